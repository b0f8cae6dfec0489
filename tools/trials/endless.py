"""Expressions and templates of users that never end, or ask for all memory: what each command does with them."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpo_megatron.cli import main
from mpo_megatron.data.templates import Renderer
from mpo_megatron.rollout.scorers.patterns import TOO_SLOW, Pattern
from tools.trials.processes import Child, Outcome

CPU_SECONDS = 0.5
"""Limit of a text in these trials; it is longer for users, and nothing else differs."""
MOST_CPU_SECONDS = 60.0
"""What a command may take in all, with its imports."""

PATTERNS = {
    "nested repetition": r"(a+)+$",
    "alternatives that overlap": r"(a|aa)+$",
    "many ways to share out": r"(.*a){25}c",
    "nested lookahead": r"(?=(a+)+c)b",
    "back reference": r"(a*)*\1c",
}
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
TEMPLATES = {
    "loops": f"{LOOP}{LOOP}{LOOP}a{END}{END}{END}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "length": "{{ 'a' * 10 ** 10 }}",
    "recursion": "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "padding": "{{ '%0999999999d' % 1 }}",
}
MISSING = ("--missing", "drop_response")
SLOW, FAST = "a" * 60 + "b", "aaa"


@dataclass(frozen=True)
class Endless:
    """A command that is given something endless."""

    name: str
    run: Callable[[Path], int]
    accepts: Callable[[Outcome, Path], bool]
    """Whether it ended as it should."""


def endless_trials(folder: Path, inputs: Path) -> Iterator[str | None]:
    """What is wrong with each trial, or None."""
    folder.mkdir(exist_ok=True)
    for number, case in enumerate(cases(inputs)):
        place = folder / f"endless-{number:02d}"
        place.mkdir()
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        outcome = Child(lambda: _bounded(case, place), place).outcome()  # noqa: B023
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        where = f"endless {case.name} ({place}), {seconds:.0f} CPU s, {time.monotonic() - started:.0f} s"
        left = [path.name for path in place.rglob("*") if ".partial-" in path.name]
        if seconds > MOST_CPU_SECONDS or left or "Traceback" in outcome.output or not case.accepts(outcome, place):
            yield f"{where}: ended with {outcome.code}, left {left}:\n{outcome.output[-3000:]}"
        else:
            print(f"{where}: {outcome.output.strip().splitlines()[-1]}")
            shutil.rmtree(place)
            yield None


def _bounded(case: Endless, place: Path) -> int:
    """In a forked process: run the command, with short limits."""
    for limited in (Renderer, Pattern):
        limited.__init__.__defaults__ = (CPU_SECONDS,)
    return case.run(place)


def cases(inputs: Path) -> list[Endless]:
    """Every pattern in every scorer that takes one, every template wherever one is taken."""
    found = []
    for name, pattern in PATTERNS.items():
        for scorer in (
            {"kind": "regex", "pattern": pattern},
            {"kind": "regex", "pattern": pattern.removesuffix("$"), "full": True},
            {"kind": "match", "extract": pattern},
        ):
            title = f"{name} in {scorer['kind']}{', full' if 'full' in scorer else ''}"
            found.append(Endless(title, lambda place, scorer=scorer: _score(place, {"it": scorer}), _one_is_missing))  # type: ignore[misc]
    for name, template in TEMPLATES.items():
        for command, run in (
            ("the template of a judge", _judge),
            ("the chat template of prepare", lambda place: main(_prepare(inputs, place))),
            ("the chat template of generate", lambda place: main(_generate(inputs, place))),
        ):
            found.append(Endless(f"{name} in {command}", _with_template(template, run), _refused))
    return found


def _with_template(template: str, run: Callable[[Path], int]) -> Callable[[Path], int]:
    def write_and_run(place: Path) -> int:
        (place / "template.jinja").write_text(template)
        return run(place)

    return write_and_run


def _score(place: Path, scorers: dict[str, object]) -> int:
    samples = place / "answers.jsonl"
    groups = [
        {
            "group_id": f"g{index}",
            "prompt": [{"role": "user", "content": "Say a."}],
            "reference_answer": "aaa",
            "responses": [{"text": text, "finish_reason": "stop"} for text in (FAST, SLOW if index == 1 else FAST)],
        }
        for index in range(3)
    ]
    samples.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return main(["score", "--input", str(samples), "--output", str(place / "out"), "--scorers", json.dumps(scorers), *MISSING])


def _judge(place: Path) -> int:
    endpoint = {"base_url": "http://127.0.0.1:9/v1", "model": "m"}
    return _score(place, {"it": {"kind": "judge", "template": str(place / "template.jinja"), "endpoint": endpoint}})


def _prepare(inputs: Path, place: Path) -> list[str]:
    given = ("--input", inputs / "groups.jsonl", "--tokenizer", inputs / "hf", "--output", place / "out")
    return ["prepare", *map(str, given), "--chat_template", str(place / "template.jinja")]


def _generate(inputs: Path, place: Path) -> list[str]:
    given = ("--prompts", inputs / "prompts.jsonl", "--model", inputs / "hf", "--output", place / "out", "--max_tokens", 4)
    return ["generate", *map(str, given), "--chat_template", str(place / "template.jinja")]


def _one_is_missing(outcome: Outcome, place: Path) -> bool:
    """The command goes on: the text that the pattern does not end on is left out, for that reason; others are scored."""
    if outcome.code:
        return False
    lines = [json.loads(line) for line in (place / "out" / "scored.jsonl").read_text().splitlines()]
    kept = {line["group_id"]: len(line["responses"]) for line in lines}
    return kept == {"g0": 2, "g1": 1, "g2": 2} and TOO_SLOW in (place / "out" / "score.json").read_text()


def _refused(outcome: Outcome, place: Path) -> bool:
    """One sentence, that names the template."""
    last = outcome.output.strip().splitlines()[-1]
    return outcome.code == 2 and "template" in last and not (place / "out" / "groups.arrow").exists()
