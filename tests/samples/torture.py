"""Torture a store: kills, power cuts, failing calls, damage, and many processes at a time, again and again.

    python tests/samples/torture.py --minutes 60 --seed 1

Each round begins with a seed of its own, counted up from the one given for each kind. One that fails is printed with
the command that repeats it. Without --minutes there is one round of each kind. A new kind is one more line in KINDS.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from in_memory import folder_in_memory
from rounds.faults import faults
from rounds.kills import kills
from rounds.mutations import mutations
from rounds.power import power_cuts
from rounds.processes import processes

MOST_SECONDS = 600  # that many processes work at a time


@dataclass
class Kind:
    """A kind of rounds.

    round: does one in an empty folder, from a seed, and returns how often it struck.
    what:  it struck with.
    share: of the time that all kinds take.
    """

    round: Callable[[Path, int], int]
    what: str
    share: float
    rounds: int = 0
    struck: int = 0
    seconds: float = 0.0


KINDS = {
    "kills": Kind(kills, "kills of processes", 0.15),
    "power cuts": Kind(power_cuts, "power cuts", 0.2),
    "mutations": Kind(mutations, "mutations of files and folders", 0.3),
    "faults": Kind(faults, "failed calls of the system", 0.25),
    "processes": Kind(processes, "processes at work together", 0.1),
}


def run(name: str, seed: int) -> None:
    """Run one round in a folder of its own, in memory where there is some."""
    kind, folder, began = KINDS[name], folder_in_memory(), time.monotonic()
    try:
        kind.struck += kind.round(folder, seed)
    except BaseException as error:
        error.add_note(f"in the round of {name} with seed {seed}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        kind.rounds += 1
        kind.seconds += time.monotonic() - began


def main() -> None:
    """Run rounds until the time is over, each kind for its share of it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="how long to go on; 0: one round of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the first round of each kind")
    parser.add_argument("--only", choices=KINDS, action="append", help="a kind; without, all")
    parser.add_argument("--processes", type=int, default=50, help="how many work together, given --minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {name: KINDS[name] for name in given.only or KINDS}
    seconds = 60 * given.minutes
    if seconds:
        share = KINDS["processes"].share / sum(kind.share for kind in kinds.values())
        many = partial(processes, count=given.processes, seconds=min(MOST_SECONDS, share * seconds))
        KINDS["processes"].round = many
    sys.stdout.write(f"seed {given.seed}\n")
    end = time.monotonic() + seconds
    while True:
        name = min(kinds, key=lambda name: kinds[name].seconds / kinds[name].share)
        if kinds[name].rounds and time.monotonic() > end:
            break
        seed = given.seed + kinds[name].rounds
        try:
            run(name, seed)
        except BaseException as error:
            report(kinds)
            many = f" --minutes {given.minutes} --processes {given.processes}" if name == "processes" else ""
            error.add_note(f"a promise was broken; again: just torture --only '{name}' --seed {seed}{many}")
            raise
    report(kinds)
    sys.stdout.write(f"all promises held; again: just torture --minutes {given.minutes} --seed {given.seed}\n")


def report(kinds: dict[str, Kind]) -> None:
    """Say how often each kind struck."""
    for kind in kinds.values():
        sys.stdout.write(f"{kind.struck:>9,} {kind.what}, in {kind.rounds:,} rounds and {kind.seconds:,.0f} s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
