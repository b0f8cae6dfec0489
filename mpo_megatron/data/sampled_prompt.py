"""Whether training sees the prompt that a response was sampled with.

`mpo generate` writes digests of each prompt into its line, and `mpo score` and `mpo select` keep them. `mpo prepare` renders the
prompt again: with other options (system prompt, template, its variables), the model would train on responses to another prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpo_megatron.config import ConfigError
from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Group, Message, PromptDigests

FIELD = "prompt_digests"
"""The field of a group line."""
_DIGITS = 16


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def digest_prompt(
    chat: Chat, messages: Sequence[Message], tools: Sequence[dict[str, Any]], ids: Sequence[int] | Int32
) -> PromptDigests:
    """The digests of a prompt that `chat` rendered to `ids`."""
    shown = list(messages) if chat.templated else chat.with_system(messages)
    content = json.dumps([shown, list(tools)], sort_keys=True).encode()
    return PromptDigests(chat.tokenizer_digest[:_DIGITS], _digest(content), _digest(np.asarray(ids, "<i4").tobytes()))


def read_digests(row: FieldRecord) -> PromptDigests | None:
    """The digests in a group line; None if it has none, as in data of other origin.

    Raises:
        RowError: they do not have the form that `mpo generate` writes.
    """
    found = row.get(FIELD)
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != set(PromptDigests._fields):
        raise RowError(FIELD, f"must hold {', '.join(PromptDigests._fields)}, as `mpo generate` writes them")
    return PromptDigests(**found)


def check_sampled_prompt(group: Group, ids: Int32, chat: Chat, *, allow: bool) -> bool:
    """Whether a group's responses are known to be sampled with another prompt than `ids`.

    Args:
        allow: whether that is intended; if not, only another tokenizer explains it
    Raises:
        ConfigError: an option differs from that of `mpo generate`.
    """
    drawn = group.sampled_prompt
    if drawn is None:
        return False
    own = digest_prompt(chat, group.prompt, group.tools, ids)
    if own.ids == drawn.ids:
        return False
    if allow or (own.messages == drawn.messages and own.tokenizer != drawn.tokenizer):
        return True
    options = "system_prompt" if own.messages != drawn.messages else "chat_template, chat_template_kwargs or prompt_format"
    raise ConfigError(
        f"{options}: {group.where}: the responses of group {group.group_id} were sampled with another prompt than training would "
        f"use; set {options} as in `mpo generate` (its generate.json lists the values), or, if that is intended, set "
        "other_prompts = allow."
    )
