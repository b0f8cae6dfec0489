"""Parse the verdict in a judge's answer: a grade, or the better of two responses.

If the whole answer is a JSON object, its keys count. Otherwise the last statement in one of these forms counts:

    Score: 8    **Rating:** 8/10    [[8]]    <score>8</score>    {"score": 8}
    Verdict: A  Winner: Response B  [[A]]    <verdict>tie</verdict>    [[A>>B]]    {"winner": "A"}
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_THOUGHT = re.compile(r"(?s)\A.*</think\s*>")
_FENCE = re.compile(r"(?s)\A```\w*\s*(.*?)\s*```\Z")
_MARKS = r"[\s*_`\"']{0,12}"
"""White space, emphasis and quotes between a label and its value; bounded, to keep the patterns' time linear."""
_NUMBER = r"[-+−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_GRADE = re.compile(
    rf"(?:(?i:\b(?:score|rating|grade|verdict)\b)(?:\s?\([^()\n]{{1,40}}\))?{_MARKS}[:=]{_MARKS}\[{{0,2}}{_MARKS}"
    rf"|\[\[{_MARKS}(?=[^\[\]]*\]\])"
    rf"|(?i:<(?:score|rating|grade|verdict)>){_MARKS})"
    rf"({_NUMBER})(?![\w%]|[.,]\d|\s*[-–]\s*\d|\s+(?:or|to)\s+\d)"
)
"""A label, double brackets or a tag, and a number that is not a range (8-9, 8 to 9)."""
_SIDE = r"(?:(?i:response|assistant|answer|option|candidate|model)\s+)?"
_CHOICE = rf"{_SIDE}(A|B|C|(?:a\s+)?(?i:tie|draw|equal|neither)|A\s*(?:>{{1,2}}|<{{1,2}}|=)\s*B|B\s*(?:>{{1,2}}|<{{1,2}}|=)\s*A)"
_COMPARISON = re.compile(
    rf"\[\[{_MARKS}{_CHOICE}{_MARKS}\]\]"
    rf"|(?i:<(verdict|winner|better)>){_MARKS}{_CHOICE}{_MARKS}</"
    rf"|(?i:\b(?:verdict|winner|better|choice|preference)(?:\s+(?:response|answer|one))?\b){_MARKS}(?:(?i:is)\b{_MARKS})?[:=]"
    rf"{_MARKS}\[{{0,2}}{_MARKS}{_CHOICE}{_MARKS}\]{{0,2}}{_MARKS}(?:[.;!)\n]|,(?!\s*(?:and\s+)?{_SIDE}[AB]\b)|\Z)"
)
"""Double brackets, a tag or a label, and an unqualified choice; "A and B are equally good" does not count."""
_WINNERS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5, "draw": 0.5, "equal": 0.5, "neither": 0.5}
"""Verdict → P(a > b); some templates call a tie C."""
_GRADE_KEYS = ("score", "rating", "grade", "verdict")
_CHOICE_KEYS = ("verdict", "winner", "better", "choice", "preference")


def read_grade(text: str) -> float | None:
    """The last grade in an answer; None without one."""
    said = _strip(text)
    if said is None:
        return None
    found, value = _read_object(said, _GRADE_KEYS)
    if not found:
        matches = _GRADE.findall(said)
        return to_number(matches[-1]) if matches else None
    return float(value) if isinstance(value, int | float) else to_number((value or "").partition("/")[0])


def read_comparison(text: str) -> float | None:
    """The last P(a > b) in an answer: 0, 0.5 or 1; None without one."""
    said = _strip(text)
    if said is None:
        return None
    found, value = _read_object(said, _CHOICE_KEYS)
    if found:
        match = re.fullmatch(_CHOICE, str(value).strip())
        return to_winner(match[1]) if match else None
    matches = list(_COMPARISON.finditer(said))
    if not matches:
        return None
    last = matches[-1]
    return to_winner(next(group for group in (last[1], last[3], last[4]) if group is not None))


def _strip(text: str) -> str | None:
    """The answer after its thought; None if the thought does not end."""
    text = _THOUGHT.sub("", text)
    return None if re.search(r"<think\s*>", text) else text.strip()


def _read_object(text: str, keys: tuple[str, ...]) -> tuple[bool, int | float | str | None]:
    """Whether an answer is a JSON object with one of these keys, and the value of the first of them if it can be a verdict."""
    fenced = _FENCE.match(text)
    try:
        value: Any = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False, None
    if not isinstance(value, dict):
        return False, None
    items = {str(key).casefold(): item for key, item in value.items()}
    key = next((key for key in keys if key in items), None)
    if key is None:
        return False, None
    item = items[key]
    if isinstance(item, str) or (isinstance(item, int | float) and not isinstance(item, bool) and abs(item) <= 1e30):
        return True, item
    return True, None


def to_number(text: str) -> float | None:
    """The finite number in a verdict, or None."""
    try:
        value = float(text.strip().replace("−", "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def to_winner(text: str) -> float | None:
    """P(a > b) of a verdict such as A, tie or A>>B, or None."""
    word = re.sub(r"\s+", "", text).casefold()
    for sign, first in ((">", 1.0), ("<", 0.0), ("=", 0.5)):
        if sign in word:
            return first if word.startswith("a") else 1.0 - first
    return _WINNERS.get(word.removeprefix("a") if len(word) > 1 else word)
