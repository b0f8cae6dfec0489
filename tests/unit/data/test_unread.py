"""Parts of a row that change what the model sees, but that no format reads: the row is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import detect, parse
from tests.unit.data.messages import TOOL, assistant, user

ANSWERS = {"chosen": "A", "rejected": "B"}
PAIR: dict[str, Any] = {"prompt": "Q"} | ANSWERS
MEDIA = "is not text, and only text is read; remove it to use the row's text alone"


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (PAIR | {"images": ["a.png"]}, "images", MEDIA),
        (PAIR | {"image": "a.png"}, "image", MEDIA),
        (PAIR | {"rejected_images": ["a.png"]}, "rejected_images", MEDIA),
        (PAIR | {"videos": ["a.mp4"]}, "videos", MEDIA),
        (PAIR | {"audio": {"array": [0.0], "sampling_rate": 1}}, "audio", MEDIA),
        (PAIR | {"photo": {"bytes": "…", "path": None}}, "photo", MEDIA),
        (PAIR | {"photos": [{"bytes": None, "path": "a.png"}]}, "photos", MEDIA),
        (PAIR | {"prompt": [user("Q") | {"images": ["a.png"]}]}, "prompt[0].images", MEDIA),
        (
            PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs",
            "sets the chat template's variables",
        ),
        (
            PAIR | {"prompt": [user("Q")], "history": [["Q0", "A0"]]},
            "history",
            "is not read; it comes before a question given as text: write its turns as messages before the others",
        ),
        (
            {"instruction": [user("Q")], "input": "Sky"} | ANSWERS,
            "input",
            "is not read: it continues an instruction given as text",
        ),
        ({"instruction": "\n\nHuman: Q\n\nAssistant:", "input": "Sky"} | ANSWERS, "input", "is not read: it continues"),
        (PAIR | {"functions": [{"name": "f"}]}, "functions", "is not read; write it as the row's column tools"),
        (PAIR | {"prompt": [user("Q") | {"tools": [TOOL]}]}, "prompt[0].tools", "is not read; write it as the row's column"),
        (
            PAIR | {"chosen": [assistant("A", function_calls="f(1)")]},
            "chosen[0].function_calls",
            "is not read; write it as tool_",
        ),
        (
            PAIR | {"chosen": [assistant(None, function_call={"name": "f"})]},
            "chosen[0].function_call",
            "is not read; write it as",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_the_model_would_miss_is_refused(row: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row, detect([row]))
    assert caught.value.field == field
    assert caught.value.reason.startswith(reason)


def test_empty_parts_and_descriptions_are_not() -> None:
    """Arrow fills up records, and a number is no image."""
    empty: dict[str, Any] = {
        "images": [],
        "image": None,
        "chat_template_kwargs": {"enable_thinking": None, "tools": []},
        "functions": "[]",
        "history": "[]",
    }
    described = {"images": 3, "audio": False, "image_caption": "a cat", "meta": {"images": 1}}
    row = PAIR | {"prompt": [user("Q") | {"functions": "", "function_calls": None}]} | empty
    assert parse(row, detect([row])).unused == ("chat_template_kwargs",)
    row = PAIR | described
    assert parse(row, detect([row])).unused == tuple(described)


def test_keys_of_a_messages_parts_are_listed() -> None:
    row = PAIR | {"prompt": [user("Q") | {"content": [{"type": "text", "text": "Q", "cache_control": "x", "image": None}]}]}
    assert parse(row, detect([row])).unused == ("prompt[].content[].cache_control",)
