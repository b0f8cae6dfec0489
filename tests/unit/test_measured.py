"""The tables of measured rewards and methods in the guides match the files that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from examples.compare.report import format_row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results" / "cpu-2cores"


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def section(page: str, start: str, end: str) -> str:
    """A page's text between two headings."""
    return (ROOT / page).read_text(encoding="utf-8").partition(f"\n{start}\n")[2].partition(f"\n{end}")[0]


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the table lines whose first cell begins so, without bold type."""
    return [
        [cell.strip() for cell in line.replace("**", "").strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {first}")
    ]


def with_errors(means: list[float], errors: list[float], mean: str = ".3f") -> list[str]:
    return [f"{value:{mean}} ± {error:.3f}" for value, error in zip(means, errors, strict=True)]


def test_comparison_of_methods() -> None:
    text, comparison = section("docs/experiments/methods.md", "## The main methods side by side", "## "), load("compare")
    written = [[name.strip("`"), *cells] for name, *cells in rows(text, "`")]
    formatted = [format_row(method, several_seeds=False) for method in comparison["methods"]]
    assert written == [[*cells[:7], *cells[8:]] for cells in formatted]  # without the time
    assert f"Numbers of {comparison['machine']['date']}" in text
    assert f"same {comparison['steps']} steps" in text


def check_rounds(text: str, name: str) -> None:
    """The table of rewards by round, and the text's numbers on single seeds and on the lead."""
    methods, prose = list(load(name)["methods"].values()), " ".join(text.split())
    table = [cells[1:] for cells in rows(text, "MPO, all") + rows(text, "DPO, best")]
    assert table == [with_errors(method["reward"], method["error"]) for method in methods]
    mpo, dpo = (", ".join(f"{rewards[-1]:.3f}" for rewards in method["reward_by_seed"].values()) for method in methods[:2])
    assert f"{mpo} against {dpo}" in prose
    assert ", ".join(with_errors(methods[1]["lead"][1:], methods[1]["lead_error"][1:], "+.3f")) in prose


def check_tuning(text: str, name: str) -> None:
    methods = load(name)["methods"]
    for method in ("mpo", "dpo"):
        ((_, *cells),) = [cells for cells in rows(text, method.upper()) if "," not in cells[0]]
        assert cells == [f"{setting['reward'][-1]:.3f}" for setting in methods[method]]
    (header,) = rows(text, "lr, β")
    assert header[1:] == [f"{setting['lr']:.0e}, {setting['beta']:g}".replace("e-0", "e-") for setting in methods["mpo"]]


def test_rounds_with_many_prompts() -> None:
    text = section("docs/experiments/on_policy.md", "## An example on a CPU: MPO against DPO", "### ")
    check_rounds(text, "on_policy")
    check_tuning(text, "on_policy_tuning")


def test_rounds_with_few_prompts() -> None:
    text = section("docs/experiments/on_policy.md", "### Fewer prompts, more responses", "## ")
    check_rounds(text, "on_policy_few_prompts")
    check_tuning(text, "on_policy_few_prompts_tuning")


def test_rounds_in_the_readme() -> None:
    mpo, dpo, *_ = load("on_policy_few_prompts")["methods"].values()
    (row,) = re.findall(r"^\| three on-policy rounds.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    ends = [with_errors(method["reward"], method["error"])[-1] for method in (mpo, dpo)]
    assert f"{mpo['reward'][0]:.3f} → MPO {ends[0]}, DPO best-vs-worst {ends[1]}" in row


def test_instructions_followed() -> None:
    record = load("instructions")
    table = {cells[0]: cells[1:] for cells in rows(section("examples/instructions/README.md", "## Measured", "## "), "")}
    for seed, result in record["seeds"].items():
        before, after, wins = result["before"], result["after"], result["win_rate"]
        assert table[seed] == [
            f"{before['reward']:.1%} → {after['reward']:.1%} ± {after['error']:.1%}".replace("%", " %"),
            f"{wins['value']:.1%} ± {wins['error']:.1%}".replace("%", " %"),
            f"{before['tokens']:.1f} → {after['tokens']:.1f}",
        ]
    before, after, gain, error = (
        100 * value for value in (record["before"]["mean"], record["after"]["mean"], *record["gain"].values())
    )
    (row,) = re.findall(r"^\| one on-policy round of SmolLM2.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"{before:.1f} % → {after:.1f} %, gain {gain:.1f} ± {error:.1f} points over {len(record['seeds'])} seeds" in row
