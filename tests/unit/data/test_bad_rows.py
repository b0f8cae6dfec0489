"""What is wrong with a row: each fault's field and reason."""

from __future__ import annotations

from typing import Any

import pytest

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import build_group, detect, parse
from tests.unit.data.messages import assistant, user

NAME_REWARDS = "map its column (--columns rewards=…), or set rating to a key of the responses"
GOOD: dict[str, Any] = {"prompt": "Q", "responses": [{"text": "A", "reward": 1.0}, {"text": "B", "reward": 0.0}]}


def with_first(**changes: Any) -> dict[str, Any]:
    return GOOD | {"responses": [GOOD["responses"][0] | changes, GOOD["responses"][1]]}


BAD = [
    (["a", "list"], "row", "is of type list, not an object with fields"),
    ({"responses": GOOD["responses"]}, "prompt", "is missing, and responses hold only an answer"),
    (GOOD | {"prompt": None}, "prompt", "is missing, and responses hold only an answer"),
    (GOOD | {"prompt": " \n"}, "prompt", "is empty"),
    (GOOD | {"prompt": 3}, "prompt", "is of type int, not a string or messages"),
    (GOOD | {"prompt": []}, "prompt", "is empty"),
    (GOOD | {"prompt": ["Q"]}, "prompt[0]", "is of type str, not a message"),
    (GOOD | {"prompt": [{"role": "robot", "content": "Q"}]}, "prompt[0].role", "is 'robot'; use system, user, assistant or tool"),
    (GOOD | {"prompt": [{"content": "Q"}]}, "prompt[0].role", "is None; use system, user, assistant or tool"),
    (GOOD | {"prompt": [user("")]}, "prompt[0].content", "is empty"),
    (GOOD | {"prompt": [{"role": "user"}]}, "prompt[0].content", "is missing"),
    (GOOD | {"prompt": [user("Q"), assistant("A")]}, "prompt", "ends with an assistant message, not a question"),
    (GOOD | {"prompt": [{"role": "system", "content": "S"}]}, "prompt", "has a system message but no question"),
    (
        GOOD | {"prompt": [user("Q"), {"role": "system", "content": "S"}, user("Q")]},
        "prompt[1].role",
        "is system; only the first message can be",
    ),
    (GOOD | {"responses": None}, "responses", "is missing"),
    (GOOD | {"responses": []}, "responses", "is empty"),
    (GOOD | {"responses": "A"}, "responses", "is of type str, not a list"),
    (GOOD | {"responses": GOOD["responses"][:1]}, "responses", "has K = 1 response; a group needs at least two"),
    (with_first(text=""), "responses[0].text", "is empty"),
    (with_first(text=None), "responses[0].text", "is missing"),
    (with_first(text=5), "responses[0].text", "is of type int, not a string or messages"),
    (with_first(text="half \ud83d pair"), "responses[0].text", "has half a surrogate pair at character 5"),
    (with_first(reward=None), "responses[0].reward", "is missing"),
    (with_first(reward="high"), "responses[0].reward", "is 'high', not a number"),
    (with_first(reward=[1]), "responses[0].reward", "is of type list, not a number"),
    (with_first(reward=float("nan")), "responses[0].reward", "is nan; a reward must be finite"),
    (with_first(reward=float("-inf")), "responses[0].reward", "is -inf; a reward must be finite"),
    (with_first(reward=10**400), "responses[0].reward", "is inf; a reward must be finite"),
    (with_first(reward=-1e31), "responses[0].reward", "is -1e+31; a reward must be within ±1e+30"),
    (GOOD | {"responses": ["A", "B"]}, "rewards", f"is missing; {NAME_REWARDS}"),
    (GOOD | {"responses": [{"text": "A"}, {"text": "B"}]}, "responses[0].reward", f"is missing; {NAME_REWARDS}"),
    (GOOD | {"responses": "['A', 'B']"}, "responses", "is a list as text, but not JSON; write it with json.dumps"),
    (GOOD | {"responses": ["A", "B"], "rewards": [1]}, "rewards", "has 1 values for 2 responses"),
    (GOOD | {"responses": ["A", "B"], "rewards": 1}, "rewards", "is of type int, not a list"),
    (GOOD | {"id": True}, "id", "is True; use a non-empty string or an integer"),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD, ids=[f"{field}: {reason[:40]}" for _, field, reason in BAD])
def test_each_fault_has_its_message(row: Any, field: str, reason: str) -> None:
    layout = detect([GOOD])
    with pytest.raises(RowError) as caught:
        build_group(parse(row, layout), "rows.jsonl:1")
    assert (caught.value.field, caught.value.reason) == (field, reason)


PAIR: dict[str, Any] = {"prompt": "Q", "chosen": "A", "rejected": "B"}
BAD_PAIRS = [
    (PAIR | {"rejected": ""}, "rejected", "is empty"),
    (PAIR | {"rejected": None}, "rejected", "is missing"),
    ({"chosen": "A", "rejected": "B"}, "prompt", "is missing, and chosen and rejected hold only an answer"),
    (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("P"), assistant("B")]},
        "rejected",
        "belongs to another conversation than chosen: their messages differ before the last one",
    ),
    (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q")]},
        "rejected",
        "must end with the assistant's message",
    ),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD_PAIRS)
def test_each_fault_of_a_pair_has_its_message(row: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        build_group(parse(row, detect([PAIR])), "rows.jsonl:1")
    assert (caught.value.field, caught.value.reason) == (field, reason)


def test_a_missing_score_of_a_pair_is_named() -> None:
    layout = detect([PAIR | {"chosen_score": 2, "rejected_score": 1}])
    remedy = "to use labels instead, rename that column: --columns unused=chosen_score"
    with pytest.raises(RowError, match=f"rejected_score is missing, but chosen_score is there; {remedy}"):
        parse(PAIR | {"chosen_score": 2}, layout)
    renamed = PAIR | {"unused": 2}
    assert parse(renamed, detect([renamed])).unused == ("unused",)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"answer": "A", "rank": 1}, {"answer": "B"}], r"answers\[1\].rank is missing"),
        ([{"answer": "A", "rank": 1}, {"rank": 2}], r"answers\[1\].answer is missing"),
        ([{"answer": "A", "rank": 1}, "B"], r"answers\[1\] is of type str, not a record"),
    ],
)
def test_each_fault_of_a_ranking_has_its_message(answers: list[Any], message: str) -> None:
    row = {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": answers}
    layout = detect([row])
    with pytest.raises(RowError, match=message):
        parse(row, layout)
