"""What a GPU machine has, and what a check of it found.

python -m tests.gpu.machine FILE.json         # GPU, versions, recipes, attention kernels
python -m tests.gpu.machine --summary FOLDER  # of what tools/gpu_check.sh left there; exit code 1 if a part failed or no test ran
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def main(arguments: list[str]) -> int:
    if arguments[0] == "--summary":
        return summarize(Path(arguments[1]))
    found = describe()
    Path(arguments[0]).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def describe() -> dict[str, Any]:
    """Versions and abilities, each with the reason where it is missing."""
    from benchmarks.timing import describe_machine
    from mpo_megatron import device

    device.prepare()
    import torch

    from mpo_megatron.config import ModelConfig
    from mpo_megatron.hf.fp8 import RECIPES
    from mpo_megatron.model.attention_backends import choose_attention
    from mpo_megatron.model.attention_varlen import find_kernel
    from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine

    missing = missing_for_transformer_engine()
    kernel = find_kernel()
    return {
        **describe_machine(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": list(torch.cuda.get_device_capability()) if device.has_gpu() else None,
        "transformer_engine": missing or "there",
        "fp8": {name: missing or missing_for_recipe(name) or "there" for name in RECIPES},
        "varlen_kernel": None if kernel is None else kernel.__qualname__.split(".")[0].lstrip("_"),
        "attention": choose_attention(ModelConfig(checkpoint="")),
    }


def summarize(folder: Path) -> int:
    """Write summary.json and tests.json; the exit code: 1 if a part failed or no test ran."""
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    tests = []
    if (folder / "tests.xml").is_file():
        for case in ElementTree.parse(folder / "tests.xml").getroot().iter("testcase"):
            outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            tests.append(
                {
                    "test": f"{case.get('classname')}::{case.get('name')}",
                    "outcome": "passed" if outcome is None else outcome.tag,
                    "seconds": float(case.get("time", 0)),
                    "message": None if outcome is None else (outcome.get("message") or "")[:1000],
                }
            )
        (folder / "tests.json").write_text(json.dumps(tests, indent=1) + "\n")
        (folder / "tests.xml").unlink()
    counts: dict[str, int] = {}
    for test in tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    summary = {
        "parts": parts,
        "tests": counts,
        "failed": [test["test"] for test in tests if test["outcome"] in ("failure", "error")],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "parts.jsonl").unlink()
    print(json.dumps(summary, indent=1))
    # Where no test ran, as without a GPU, nothing was checked.
    return int(any(part["exit_code"] for part in parts) or not counts.get("passed"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
