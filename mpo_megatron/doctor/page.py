"""The doctor's findings as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def render(found: dict[str, Any]) -> str:
    """Sections with headings; problems come last, where a terminal shows them."""
    parts = [_software(found["software"]), _machine(found["machine"]), _abilities(found["abilities"])]
    if found["run"]:
        parts.append(_run(found["run"]))
    if found.get("peers"):
        parts.append(_peers(found["peers"]))
    parts.append(_problems(found["problems"]))
    return "\n\n".join(parts)


def _software(rows: Sequence[dict[str, Any]]) -> str:
    table = [("package", "version", "CUDA", "", "serves")]
    for row in rows:
        table.append((row["package"], row["version"] or "–", row["cuda"] or "–", row["state"], row["serves"]))
    return "Software\n" + _table(table)


def _machine(facts: dict[str, Any]) -> str:
    gpus = [f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB" for gpu in facts["gpus"]]
    return "Machine\n" + _table(
        [
            ("host", f"{facts['host']}: {facts['system']}, Python {facts['python']}"),
            ("CPU", f"{facts['cpu_cores']} cores, {facts['memory_gib']} GiB, {'' if facts['cpu_bf16'] else 'no '}bfloat16"),
            *((f"GPU {index}", gpu) for index, gpu in enumerate(gpus)),
            *([] if gpus else [("GPU", "none that torch can use")]),
            ("driver", f"{facts['driver']}, CUDA {facts['driver_cuda']}" if facts["driver"] else "none"),
            ("NCCL, cuDNN", f"{facts['nccl'] or 'none'}, {facts['cudnn'] or 'none'}"),
            ("nvcc, C compiler", f"{facts['nvcc'] or 'none'}, {facts['compiler'] or 'none'}"),
            ("free", ", ".join(f"{free} GiB in {path}" for path, free in _places(facts))),
        ]
    )


def _places(facts: dict[str, Any]) -> list[tuple[str, float]]:
    return [*facts["disks_gib"].items(), ("/dev/shm", facts["shared_memory_gib"])]


def _abilities(able: dict[str, Any]) -> str:
    if "error" in able:
        return "Works here\n  unknown, because Megatron-Core's model does not load"
    rows = [(f"{kind} {name}", state) for kind in ("layers", "attention", "fp8") for name, state in able[kind].items()]
    return "Works here\n" + _table(rows)


def _run(run: dict[str, Any]) -> str:
    rows = [(row["what"], row["choice"], f"because: {row['why']}") for row in run["uses"]]
    return f"What a run of {run['config']} uses here\n" + (_table(rows) if rows else "  unknown, because `mpo train` refuses it")


def _peers(peers: Sequence[dict[str, Any]]) -> str:
    rows = [
        (peer["host"], f"{len(peer['gpus'])} GPUs", f"driver {peer['driver']}", f"clock {peer['clock_seconds']:+.4f} s")
        for peer in peers
    ]
    return "Machines\n" + _table(rows)


def _problems(problems: Sequence[dict[str, str]]) -> str:
    if not problems:
        return "No problems found."
    lines = [f"  {problem['severity']}: {problem['what']}.\n    cure: {problem['cure']}" for problem in problems]
    return "Problems\n" + "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows with aligned columns; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(max(map(len, rows)) - 1)]
    return "\n".join(
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), *row[len(widths) :]]).rstrip()
        for row in rows
    )
