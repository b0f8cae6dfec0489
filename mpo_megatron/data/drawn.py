"""Token ids as sampled: encoding a response's text again may give other ids.

A sampler may draw "un" + "able" where the tokenizer encodes "unable": another sequence, with another probability. So ids that
come with a response are trained on if this tokenizer decodes them to the text; otherwise the text is encoded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError

Drawn = tuple[int, ...]
_NOTED = ("finish_reason", "num_tokens", "seed", "attempt", "temperature", "model", "scores", "reward_before_noise")
"""Fields of a response written by earlier stages that training does not need."""
_NOTED_OF_GROUP = ("reference_answer", "meta", "dropped", "unusable", "uncontrolled", "missing", "notes")
"""Such fields of a group."""


def read_drawn(row: FieldRecord, response: FieldRecord) -> Drawn | None:
    """The token ids beside a response's text, including the end token; None if absent.

    Raises:
        RowError: they are not token ids.
    """
    if response.has("num_tokens") and response.has("seed"):  # a line of `mpo generate`
        for record, names in ((response, _NOTED), (row, _NOTED_OF_GROUP)):
            for name in names:
                record.get(name)
    ids: Any = response.get("token_ids")
    if ids is None or ids == []:
        return None
    if not isinstance(ids, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in ids
    ):
        raise RowError(f"{response.place}token_ids", "is not a list of token ids")
    return tuple(ids)


def take_drawn(chat: Chat, text: str, drawn: Drawn) -> Int32 | None:
    """The ids as an array [R], if the tokenizer decodes them to the response's text; otherwise None."""
    if max(drawn) >= chat.tokenizer.vocab_size:
        return None
    words = drawn[:-1] if drawn[-1] in chat.tokenizer.special_ids else drawn  # the text lacks the end token
    for ids in (words, drawn[:-1]):  # a token that is not special may also end a response
        if ids and chat.tokenizer.decode(ids, skip_special=True) == text:
            return np.array(drawn, np.int32)
    return None


def differs(chat: Chat, drawn: Int32, encoded: Int32) -> bool:
    """Whether encoding the text gives other tokens than were sampled, ignoring the end token."""
    ends = {chat.end_token_id, *chat.tokenizer.special_ids}
    first, second = (ids[:-1] if len(ids) and int(ids[-1]) in ends else ids for ids in (drawn, encoded))
    return not np.array_equal(first, second)
