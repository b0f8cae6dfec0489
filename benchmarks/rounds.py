"""The cost of a round's stages outside the models: CPU seconds and memory by the number of prompts.

    python -m benchmarks.rounds                     # 5,000 and 20,000 prompts × 8 responses
    python -m benchmarks.rounds --prompts 100000    # another number

`score` (a number extracted, a regular expression) and `select` read and write whole files of group lines. `resume` is `mpo
generate` in a folder that has all lines, but no summary: it tokenizes the prompts, finds nothing to draw, sorts the lines
and counts them. Each stage runs in a separate process, whose peak memory is compared with that after its imports, to show that it
hardly grows with the prompts.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks import timing
from mpo_megatron.config import EndpointConfig, GenerateConfig, ScoreConfig, SelectConfig
from mpo_megatron.rollout.records import LineWriter, encode_line
from mpo_megatron.terminal.console import Console

RESPONSES = 8
WORDS = 40
"""Words per response; it has as many token ids."""
SIZES = {"tiny": (20, 40), "small": (5_000, 20_000), "large": (20_000, 200_000)}
STAGES = ("score", "select", "resume")
MIB = 2**20


class Case(NamedTuple):
    """One stage over this many prompts."""

    stage: str
    prompts: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage at every size."""
    parser = timing.build_parser(__doc__, tuple(SIZES), repeat=1)
    parser.add_argument("--prompts", type=int, nargs="+", help="numbers of prompts, instead of those of --size")
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="stages to measure")
    options = timing.parse(parser, arguments)
    numbers = options.prompts or SIZES[options.size]
    cases = [Case(stage, number) for number in numbers for stage in STAGES if stage in options.stages]
    with tempfile.TemporaryDirectory() as scratch:
        rows = timing.measure_each("rounds", options, cases, lambda case: measure(case, Path(scratch)))
    table = [
        {
            "stage": row["stage"],
            "prompts": f"{row['prompts']:,}",
            "input, MB": f"{row['input_bytes'] / 1e6:,.0f}",
            "CPU s": f"{row['cpu_seconds']:.1f}",
            "prompts / CPU s": f"{row['prompts'] / row['cpu_seconds']:,.0f}",
            "peak, MiB": f"{row['peak_bytes'] / MIB:,.0f}",
            "of that, imports, MiB": f"{row['imported_bytes'] / MIB:,.0f}",
        }
        for row in rows
    ]
    note = (
        f"{RESPONSES} responses of {WORDS} words per prompt; CPU seconds of the stage and the processes it starts, "
        "without imports."
    )
    timing.report("rounds", options, {"responses": RESPONSES, "words": WORDS}, rows, table, note)


def measure(case: Case, scratch: Path) -> timing.Row:
    """Run one stage in a separate process, on generated input."""
    folder = scratch / str(case.prompts)
    samples, prompts = folder / "samples.jsonl", folder / "prompts.jsonl"
    if not samples.is_file():
        write_input(folder, case.prompts)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        found: dict[str, float] = pool.submit(run_stage, case.stage, folder).result()
    size = {"score": samples, "select": folder / "scored" / "scored.jsonl", "resume": samples}[case.stage].stat().st_size
    return {"stage": case.stage, "prompts": case.prompts, "input_bytes": size, **found, "prompts_bytes": prompts.stat().st_size}


def write_input(folder: Path, number: int) -> None:
    """Write prompts, and samples in the format of `mpo generate`."""
    random = np.random.default_rng(0)
    words = [f"word{index}" for index in range(500)]
    folder.mkdir(parents=True)
    with LineWriter(folder / "samples.jsonl") as samples, (folder / "prompts.jsonl").open("wb") as prompts:
        for index in range(number):
            chosen = random.integers(len(words), size=(RESPONSES, WORDS))
            responses = [
                {
                    "text": " ".join(words[word] for word in row) + f" The answer is {row[0] % 7}.",
                    "finish_reason": "stop",
                    "num_tokens": WORDS,
                    "seed": int(row[1]),
                    "token_ids": row.tolist(),
                }
                for row in chosen
            ]
            question = [{"role": "user", "content": f"Question {index}: " + " ".join(words[word] for word in chosen[0])}]
            record = {"group_id": str(index), "prompt": question, "reference_answer": str(index % 7)}
            prompts.write(encode_line(record))
            samples.write(record | {"responses": responses})


def run_stage(stage: str, folder: Path) -> dict[str, float]:
    """CPU seconds of a stage, and this process's memory after imports and at its peak."""
    stages: dict[str, Callable[[Path], Callable[[], object]]] = {"score": _score, "select": _select, "resume": _resume}
    run = stages[stage](folder)
    imported, started, before = _peak(), time.monotonic(), _cpu_seconds()
    run()
    return {
        "cpu_seconds": _cpu_seconds() - before,
        "wall_seconds": time.monotonic() - started,
        "imported_bytes": imported,
        "peak_bytes": _peak(),
    }


def _score(folder: Path) -> Callable[[], object]:
    from mpo_megatron.rollout.score import score
    from mpo_megatron.rollout.scorers import verifiable  # noqa: F401 - imported by the stage, and not to be counted

    scorers: dict[str, Any] = {
        "right": {"kind": "match", "mode": "numeric"},
        "ends": {"kind": "regex", "pattern": r"answer is \d+\.$", "weight": 0.1},
    }
    config = ScoreConfig(input=str(folder / "samples.jsonl"), output=str(folder / "scored"), scorers=scorers)
    return lambda: score(config, Console(quiet=True))


def _select(folder: Path) -> Callable[[], object]:
    from mpo_megatron.rollout.select import select

    config = SelectConfig(input=str(folder / "scored"), output=str(folder / "selected"), sets="best_worst", min_spread=0.05)
    return lambda: select(config, Console(quiet=True))


def _resume(folder: Path) -> Callable[[], object]:
    from mpo_megatron.rollout import generate as module
    from tests.tiny import save_tokenizer

    save_tokenizer(folder / "model")
    output = folder / "generated"
    config = GenerateConfig(
        prompts=str(folder / "prompts.jsonl"),
        model=str(folder / "model"),
        output=str(output),
        engine="openai",
        num_responses=RESPONSES,
        endpoint=EndpointConfig(base_url="http://localhost/v1", model="none"),
    )
    check = vars(module)["check_started"]

    def check_then_add_lines(*arguments: Any) -> None:
        """The lines of an earlier run appear once the folder says what they depend on."""
        check(*arguments)
        os.link(folder / "samples.jsonl", output / "samples.jsonl")

    def resume() -> None:
        with mock.patch.object(module, "check_started", check_then_add_lines):
            module.generate(config, Console(quiet=True))

    return resume


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
