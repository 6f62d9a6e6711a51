"""Check plans on another model: what a calibration with the embedded model predicts for it, beside what it takes.

    OMP_NUM_THREADS=1 python benchmarks/plan_check.py FOLDER

All pieces of both models are run in turn. Seconds are those of the processor, which others on the machine change
little: so it computes on one, in one thread.
"""

from __future__ import annotations

import sys
import time

import torch

from beacon_memory.modeling.model import BeaconModel
from beacon_memory.planning.measure import best, pieces, predicted, shape_of, solved, timed


def main() -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    small, other = BeaconModel.from_pretrained(device="cpu"), BeaconModel.from_pretrained(sys.argv[1], device="cpu")
    work = {f"small {name}": piece for name, piece in pieces(small).items()}
    of_machine = ("product", "stream")
    work |= {f"other {name}": piece for name, piece in pieces(other).items() if name not in of_machine}
    in_turn = {name: work[name] for name in sorted(work, key=lambda name: name.split()[1])}
    rounds = timed(in_turn, small.device, time.process_time, limit=240)
    taken = best(rounds)
    own = {name.split()[1]: seconds for name, seconds in taken.items() if name.startswith("small ")}
    speed = solved(shape_of(small), own, small.dtype.itemsize, load=1e9)
    print(f"{speed}\n{len(rounds)} rounds\n")
    print("| piece | predicted, s | measured, s | predicted / measured |\n|---|---|---|---|")
    for name, seconds in predicted(shape_of(other), speed, other.dtype.itemsize).items():
        there = taken[f"other {name}"]
        print(f"| {name} | {seconds:.3f} | {there:.3f} | {seconds / there:.2f} |")


if __name__ == "__main__":
    main()
