"""The abilities of a GPU machine, and the results of its checks.

python -m tests.gpu.machine FILE.json         # GPU, versions, recipes, attention kernels
python -m tests.gpu.machine --summary FOLDER  # of what tools/gpu_check.sh left there; exit code 1 if a part failed or no test ran
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    if arguments[0] == "--summary":
        return summarize(Path(arguments[1]))
    found = describe()
    Path(arguments[0]).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def describe() -> dict[str, Any]:
    """Versions and abilities; where one is missing, the reason."""
    from benchmarks.timing import describe_machine
    from mpo_megatron import device
    from mpo_megatron.mcore.preparation import prepare

    prepare()
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
    """Write summary.json; the exit code: 1 if a part failed or nothing was tested."""
    parts = [
        json.loads(path.read_text())
        for path in sorted((folder / "parts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    ]
    tests = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    counts: dict[str, int] = {}
    for test in tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    smoke = json.loads((folder / "smoke.json").read_text()) if (folder / "smoke.json").is_file() else []
    summary = {
        "parts": parts,
        "tests": counts,
        "failed": [test["test"] for test in tests if test["outcome"] == "failed"],
        "smoke": {piece["piece"]: piece["outcome"] for piece in smoke},
        "figures": figures(folder),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    # Where no test ran, as without a GPU, nothing was checked.
    return int(any(part["exit_code"] for part in parts) or not counts.get("passed"))


def figures(folder: Path) -> dict[str, Any]:
    """The benchmarks' tables, by name."""
    found = {}
    for name in ("breakdown", "layouts", "fp8", "plan"):
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            found[name] = content.get("table", content["rows"])
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
