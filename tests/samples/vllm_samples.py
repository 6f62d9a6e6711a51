"""A tiny model with a LoRA of answers as a folder for vLLM, and documents of all kinds that it has read."""

from __future__ import annotations

from pathlib import Path

from training_samples import files_with_answers
from vllm_beacon_memory import write_model_folder

from beacon_memory.memory import BeaconMemory

LEASE = "\n\n".join(
    (
        "The lease of the mill ends on 3 May 2031, and the landlord may renew it for ten years if both agree. " * 2,
        "The rent is paid by the miller, Ada Flint, on the first day of each month, in silver or in gold. " * 2,
        "The mill has two wheels and a pond. Ducks live on the pond, and nobody may shoot them in any season. " * 2,
    )
)
OWLS = "Two barn owls nest above the hayloft. They hunt at dusk.\n\n" * 3


def tiny_setting(folder: Path) -> tuple[BeaconMemory, Path]:
    """A memory with documents, and the folder of its model for vLLM.

    Every head has all tokens of `lease` and `owls`, the slots of `beacons`, and of `appended` in two files; in
    `ragged` each head has its own.
    """
    base, adapter = files_with_answers(folder)
    write_model_folder(folder / "model", base, adapter, dtype="float32")
    memory = BeaconMemory(folder / "store", base, adapter, device="cpu", dtype="float32", reserve=16)
    memory.add("lease", LEASE, ratio=1, compression="select")
    memory.add("owls", OWLS, ratio=0, compression="select")
    memory.add("beacons", OWLS, ratio=2, compression="beacon")
    memory.add("ragged", LEASE, ratio=2, compression="select")
    memory.add("appended", OWLS, ratio=1, compression="select")
    memory.append("appended", "An owl sleeps.")
    return memory, folder / "model"
