"""Measure vLLM with and without memories: the first token, and many requests at a time.

    benchmarks/vllm/run.sh VENV figures        # or, where vLLM is installed: python benchmarks/vllm/figures.py

For texts of some lengths, the seconds until vLLM has the first token of an answer: the text pasted and read, the text
pasted and found in vLLM's prefix cache, the memory loaded from its file (which the system has in memory), the memory
found in the prefix cache. Then as many requests at a time as memories, each behind its own; these hold the same K/V
under different ids, which is all the same to vLLM. Pasted texts begin with a number, so none has a prefix of another.

Seconds are those of the processor, which others on the machine change little: so it computes in one process, in one
thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

STORY = Path(__file__).parents[2] / "examples" / "treasure_island_chapter_1.txt"
QUESTION = "What is the name of the inn?"


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000], help="tokens of the texts")
    parser.add_argument("--requests", type=int, default=16, help="at a time, each behind a memory of its own")
    parser.add_argument("--tokens", type=int, default=1000, help="of each of these memories")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each of their answers")
    parser.add_argument("--repeats", type=int, default=3, help="the median of which is told")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    """Write model and documents into a folder, start vLLM, and measure."""
    import vllm
    from vllm_beacon_memory import Fronts, write_model_folder

    from beacon_memory.memory import BeaconMemory

    write_model_folder(folder / "model", dtype=given.dtype)
    with BeaconMemory(folder / "store", device="cpu", dtype=given.dtype) as memory:
        texts = {f"{length} tokens": text_of(memory, length) for length in given.lengths}
        text = text_of(memory, given.tokens)
        for id, own in (texts | {"copy": text}).items():
            memory.add(id, own, ratio=0)
        copy = memory.store.get("copy")
        many = {f"copy {number}": f"{number}. {text}" for number in range(given.requests)}
        for id in many:
            memory.store.put(replace(copy.header, id=id), copy.kv, text)
    llm = vllm.LLM(
        str(folder / "model"),
        dtype=given.dtype,
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "BeaconMemoryConnector",
            "kv_connector_module_path": "vllm_beacon_memory.connector",
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"store": str(folder / "store")},
        },
    )
    fronts = Fronts(folder / "store", folder / "model")

    def asked(text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        ids: list[int] = llm.get_tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return ids

    def pasted(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"prompt_token_ids": asked(f"{text}\n\n{QUESTION}")}, {}

    def behind(id: str) -> tuple[dict[str, Any], dict[str, Any]]:
        front = fronts.of([id])
        return front.prompt(asked(QUESTION)), {"extra_args": {"kv_transfer_params": front.kv_transfer_params}}

    def seconds(requests: Sequence[tuple[dict[str, Any], dict[str, Any]]], tokens: int, *, found: bool) -> float:
        """Return the median time that vLLM takes for requests; found: whether their prefixes are in its cache."""
        parameters = [
            vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options) for _, options in requests
        ]
        prompts: Any = [prompt for prompt, _ in requests]
        return median(
            given.repeats,
            lambda: None if found else llm.reset_prefix_cache(),
            lambda: llm.generate(prompts, parameters, use_tqdm=False),
        )

    llm.generate([pasted(QUESTION)[0]], use_tqdm=False)  # the first of all takes longer
    print(f"{platform.machine()}, one thread, {given.dtype}")
    print(f"vLLM {vllm.__version__}, blocks of {llm.llm_engine.vllm_config.cache_config.block_size} tokens\n")
    print("first token, s of the processor\n")
    print("| text | pasted | pasted, in the prefix cache | memory | memory, in the prefix cache |")
    print("|---|---|---|---|---|")
    for id, own in texts.items():
        ways = (pasted(own), behind(id))
        taken = [seconds([way], 1, found=found) for way in ways for found in (False, True)]
        print(f"| {id} | " + " | ".join(f"{one:.2f}" for one in taken) + " |")
    print(f"\n{given.requests} requests at a time, each behind {given.tokens} tokens, {given.answer} tokens answered\n")
    print("| | s of the processor | answers / s | tokens answered / s |\n|---|---|---|---|")
    for name, requests in {"pasted": [*map(pasted, many.values())], "memories": [*map(behind, many)]}.items():
        taken_by_all = seconds(requests, given.answer, found=False)
        rate = given.requests / taken_by_all
        print(f"| {name} | {taken_by_all:.1f} | {rate:.2f} | {rate * given.answer:.1f} |")


def text_of(memory: Any, tokens: int) -> str:
    """Return the beginning of a story with so many tokens, told again if it is too short."""
    ids = memory.compressor.tokenize(STORY.read_text(encoding="utf-8")).ids
    return str(memory.model.tokenizer.decode([*islice(cycle(ids), tokens)]))


def median(repeats: int, before: Callable[[], object], run: Callable[[], object]) -> float:
    """Return the median time of some runs, in seconds of the processor."""
    taken = []
    for _ in range(repeats):
        before()
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
