"""Compare a group tokenized by `mpo prepare` with plain `apply_chat_template`, with which inference engines render prompts."""

from __future__ import annotations

import unicodedata
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Group, TokenizedGroup
from mpo_megatron.data.tokenizer_backends import HuggingFaceTokenizer
from mpo_megatron.data.turns import without_end
from mpo_megatron.files import DataError


def check_group(group: Group, tokenized: TokenizedGroup, chat: Chat) -> None:
    """Compare the prompt's ids, and what follows it for one-message answers, with the tokenizer's own rendering.

    Raises:
        DataError: they differ; the message shows the first difference.
    """
    if chat.templated or not isinstance(chat.tokenizer, HuggingFaceTokenizer):
        return  # nothing is rendered, or no second way exists
    backend: Any = chat.tokenizer.backend
    options = {"tools": list(group.tools) or None, **chat.variables}
    messages = chat.with_system(group.prompt)
    try:
        prompt = backend.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options)
    except (TemplateError, TypeError):
        return  # a template that needs a call's arguments as text, which `Chat.render` handles
    ours = tokenized.prompt_tokens.tolist()
    if prompt != ours:
        _fail(group, "prompt", backend.decode(ours), backend.decode(prompt))
    for index, answer in enumerate(group.responses):
        if isinstance(answer, str) or len(answer) > 1 or len(tokenized.response_tokens) != len(group.responses):
            continue
        whole = backend.apply_chat_template([*messages, without_end(chat, answer[0], 0)], tokenize=False, **options)
        if not whole.startswith(tokenized.prompt_text):
            continue  # the template opens a thought in the prompt only
        text = whole[len(tokenized.prompt_text) :]
        tokens = tokenized.response_tokens[index].tolist()
        shown = chat.tokenizer.decode(tokens)
        # Decoders of some tokenizers move spaces; then the ids must equal those of the text.
        if not _same(text, shown) and chat.tokenizer.encode(whole)[: len(ours) + len(tokens)] != [*ours, *tokens]:
            _fail(group, f"responses[{index}]", shown, text)


def _same(whole: str, shown: str) -> bool:
    """Whether the template's text starts with ours, up to tokenizers' normalisation; it may continue after the end token."""
    wanted, ours = unicodedata.normalize("NFC", whole), unicodedata.normalize("NFC", shown)
    return wanted.startswith(ours) or wanted.rstrip().startswith(ours.rstrip()) or ours.startswith(wanted.rstrip())


def _fail(group: Group, what: str, ours: str, wanted: str) -> None:
    place = next(
        (place for place, pair in enumerate(zip(ours, wanted, strict=False)) if pair[0] != pair[1]), min(len(ours), len(wanted))
    )
    start = max(0, place - 20)
    raise DataError(
        f"{group.where}: group {group.group_id}: {what} differs from apply_chat_template: {ours[start : place + 40]!r} "
        f"instead of {wanted[start : place + 40]!r}; please report this template, or set check_every to 0 to continue."
    )
