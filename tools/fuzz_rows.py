"""Mutated rows through the readers and the tokenizer: no traceback, and every row is a group or a rejection.

    python tools/fuzz_rows.py --rows 20000 --seed 0

Rows of every format are mutated (values of other types, parts missing, doubled, cut, nested, odd characters), read, and
tokenized with a byte-level tokenizer and a ChatML template with tools. A row that breaks a rule is printed, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_megatron.config import PrepareConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.chunks import Chunk
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, detect, find_format
from mpo_megatron.data.group import Group
from mpo_megatron.data.known_formats import FORMATS
from mpo_megatron.data.raw_rows import RawRow, Rejection
from mpo_megatron.data.readers import InputReader, RowStream, build_groups, gather
from mpo_megatron.data.spill import Spill
from mpo_megatron.data.tokenizer_backends import HuggingFaceTokenizer
from mpo_megatron.data.tokenizing import tokenize_groups
from mpo_megatron.files import DataError

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Sky in Bonn?"}
CALL = {"type": "function", "function": {"name": "get_sky", "arguments": {"city": "Bonn"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "Blue.", "reasoning_content": "It scatters."},
]
SEEDS: list[dict[str, Any]] = [
    {
        "prompt": "Q",
        "responses": [{"text": "A", "reward": 1.0}, {"text": "B", "reward": 0.0}, {"text": "C", "reward": "2"}],
        "id": 1,
    },
    {"prompt": [USER], "responses": ["A", "B"], "rewards": [1, 0], "labels": [True, 0], "tools": [CALL["function"]]},
    {"question": "Q", "answers": ["A", "B"], "scores": ["1", "0.5"], "system": "Be brief."},
    {"prompt": [USER], "responses": [TURNS, [TURNS[2]], "text"], "rewards": [1, 0, 2]},
    {"instruction": "Q", "completions": [{"response": "A", "overall_score": 8}, {"response": "B", "overall_score": 2}]},
    {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2.0}]},
    {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": 2, "score_rejected": 1},
    {"chosen": [USER, *TURNS], "rejected": [USER, TURNS[2] | {"content": "Red."}], "prompt": "Sky in Bonn?"},
    {"instruction": "Q", "input": "X", "history": [["Hi", "Hello"]], "chosen": "A", "rejected": "B", "system": "S"},
    {"messages": [USER, TURNS[2]], "rejected_response": "Red."},
    {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1},
    {"context": [USER], "response1": "A", "response2": "B", "overall_preference": -2},
    {"prompt": "Q", "completion": "A", "label": True},
    {"prompt": "Q", "response": "A", "helpfulness": 3, "correctness": "4"},
]
"""A row of each kind."""
ODD: list[Any] = [
    *(None, "", " ", [], {}, 0, -1, 1e400, float("nan"), True, "nan", "1e999", [[]], [None], {"a": None}, [[["x"]]]),
    *("\ud83d", "a\0b", "🙂" * 3, "<|im_end|>", "\n\nHuman:", '[{"role": "user"}]', "[" * 50, '{"a": 1}', 10**400, 3.5),
    *(
        [USER],
        [USER, USER],
        [TURNS[1]],
        {"role": "assistant", "content": "x"},
        [{"role": None}],
        [{"from": "gpt"}],
        [TURNS[0]] * 2,
    ),
]


def mutate(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The row with one to three things changed, anywhere in it."""
    row = copy.deepcopy(row)
    for _ in range(draw.randint(1, 3)):
        holders: list[tuple[Any, Any]] = []
        stack: list[Any] = [row]
        while stack:
            value = stack.pop()
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys:
                holders.append((value, key))
                if isinstance(value[key], dict | list):
                    stack.append(value[key])
        if not holders:
            return row
        holder, key = draw.choice(holders)
        kind = draw.randrange(7)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind == 2 and isinstance(holder, dict):
            holder[draw.choice(["prompt", "role", "content", "reward", "tools", "extra", "label", "messages", "id"])] = (
                holder.pop(key)
            )
        elif kind == 3 and isinstance(holder[key], str):
            holder[key] = holder[key][: draw.randint(0, len(holder[key]))] + draw.choice(["\u202e", "\x1b[31m", "", "é" * 9])
        elif kind == 4:
            holder[key] = [holder[key]]
        elif kind == 5:
            holder[key] = json.dumps(holder[key])
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
    return row


def build_chat() -> Chat:
    """A byte-level tokenizer with `TEMPLATE`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return Chat(HuggingFaceTokenizer(fast))


def check_rows(rows: list[dict[str, Any]], base: dict[str, Any], chat: Chat, counts: Counter[str]) -> list[str]:
    """What went wrong with rows that are mutations of one: tracebacks, and rows that are lost."""
    config = PrepareConfig(input="-", output="-", tokenizer="-")
    layout = detect([base])
    joined = next(item.joins_rows for item in FORMATS if item.name == layout.format)
    wrong = []
    for row in rows:
        raw = [RawRow("rows.jsonl", 1, base), RawRow("rows.jsonl", 2, row)] if joined else [RawRow("rows.jsonl", 1, row)]
        try:
            items = list(read_rows(raw, layout))
            for item in items:
                if isinstance(item, Rejection):
                    json.loads(item.as_json().encode())
                    counts["rejected"] += 1
                    continue
                chunk = Chunk()
                counts["groups"] += 1
                [group] = tokenize_groups([item], chat, config, chunk)
                if isinstance(group, RowError):
                    counts["refused by the tokenizer"] += 1
                    continue
                lost = len(item.responses) - group.num_responses
                if lost != sum(event.number for event in chunk.events if event.table or event.name == "overlong_dropped"):
                    wrong.append(f"a response is lost: {row!r}")
            if not joined and len(items) != 1:
                wrong.append(f"{len(items)} items for one row: {row!r}")
            if joined and not (1 <= len(items) <= 2 and _num_responses(items) <= 2):
                wrong.append(f"{len(items)} items for two rows: {row!r}")
        except DataError:
            raise
        except Exception:  # noqa: BLE001 what the command looks for
            wrong.append(f"{row!r}\n{traceback.format_exc()}")
    return wrong


def read_rows(rows: list[RawRow], layout: InputLayout) -> Iterator[Group | Rejection]:
    """The groups of rows, as an input gives them."""
    reader = InputReader(layout=layout, columns={})
    parsed = map(reader.parse, rows)
    stream = RowStream(reader, None, gather(parsed) if find_format(layout.format).joins_rows else parsed, Counter())
    return build_groups(stream, Spill()).items


def _num_responses(items: list[Group | Rejection]) -> int:
    return sum(len(item.responses) for item in items if isinstance(item, Group))


def fuzz(num_rows: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes, and what went wrong."""
    draw, chat = random.Random(seed), build_chat()
    counts, wrong = Counter[str](), list[str]()
    for number, base in enumerate(SEEDS):
        size = num_rows // len(SEEDS) + (number < num_rows % len(SEEDS))
        wrong += check_rows([mutate(base, draw) for _ in range(size)], base, chat, counts)
        counts["rows"] += size
    return counts, wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, wrong = fuzz(options.rows, options.seed)
    print(", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items())))
    if wrong:
        with tempfile.NamedTemporaryFile(
            "w", prefix="fuzz_rows-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("\n\n".join(wrong))
        print(f"{len(wrong)} rows went wrong; the first (all are in {file.name}):\n{wrong[0]}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
