"""Groups to tokenized groups, in worker processes: chunks of rows in, record batches and counts out."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from mpo_megatron.config import PrepareConfig
from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.batches import to_batch
from mpo_megatron.data.chat import Chat, Tokens
from mpo_megatron.data.drawn import Drawn, differs, take_drawn
from mpo_megatron.data.fidelity import check_group
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Group, Message, TokenizedGroup
from mpo_megatron.data.sources import Rejection
from mpo_megatron.data.thoughts import find_seam, leaves_open
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError

_CHUNK_GROUPS, _CHUNK_CHARACTERS = 32, 1 << 20
"""Maximum size of one task: groups, and characters of their responses (at least one group)."""
_AHEAD = 4
"""Unfinished chunks per worker: keeps workers busy and bounds memory."""
REWARDS, LABELS = 1, 2
"""Bits of `Chunk.holds`."""


@functools.lru_cache(maxsize=1)
def _load_chat(tokenizer: str, template: str | None, system_prompt: str | None, variables: str, templated: bool) -> Chat:
    options: dict[str, Any] = {"system_prompt": system_prompt, "variables": json.loads(variables), "templated": templated}
    return Chat(load_tokenizer(tokenizer, template), **options)


def load_chat(config: PrepareConfig) -> Chat:
    """The tokenizer with its template; each process loads it once."""
    variables = json.dumps(config.chat_template_kwargs, sort_keys=True)
    templated = config.prompt_format == "templated"
    return _load_chat(config.tokenizer, config.chat_template, config.system_prompt, variables, templated)


@dataclass(kw_only=True)
class Chunk:
    """A worker's result, in the order of its items."""

    batch: pa.RecordBatch | None = None
    prompt_keys: bytearray = field(default_factory=bytearray)
    """For each accepted group, 16 bytes: a hash of its prompt's messages."""
    holds: bytearray = field(default_factory=bytearray)
    """For each accepted group, whether it has REWARDS, LABELS."""
    inputs: list[int] = field(default_factory=list)
    """For each accepted group, the index of its input."""
    rejections: list[Rejection] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Counts by the names of `Tally`'s fields."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Unusable responses, by field."""
    examples: dict[str, str] = field(default_factory=dict)
    """By the names in `counts` and `dropped`, the first case as text."""
    not_written: Counter[str] = field(default_factory=Counter)
    """Parts of prompts that the chat template omits, with their number of groups."""

    def count(self, name: str, where: str, number: int = 1) -> None:
        """Count something, and keep its first occurrence."""
        if number:
            self.counts[name] += number
            self.examples.setdefault(name, where)


def tokenize_group(
    group: Group, prompt: tuple[str, Int32] | TemplateError, chat: Chat, config: PrepareConfig, chunk: Chunk
) -> TokenizedGroup:
    """Token ids of a group; outcomes of its responses are counted in `chunk`.

    Args:
        prompt: its prompt from `Chat.prompts`

    Raises:
        RowError: the template refuses the prompt, it is too long, or fewer than two responses remain.
    """
    if isinstance(prompt, TemplateError):
        raise RowError("prompt", f"is refused by the chat template: {prompt}") from prompt
    prompt_text, prompt_tokens = prompt
    if len(prompt_tokens) > config.max_prompt_tokens:
        limit = f"max_prompt_tokens = {config.max_prompt_tokens}"
        raise RowError("prompt", f"has {len(prompt_tokens)} tokens, but {limit}")
    kept: list[int] = []
    answers: list[Tokens] = []
    num_overlong, faults = 0, list[RowError]()
    found = chat.answers(prompt_text, group.prompt, group.responses, group.tools, limit=config.max_response_tokens)
    for index, tokens in enumerate(found):
        if isinstance(tokens, RowError):
            faults.append(RowError(f"responses[{index}]{tokens.field}", tokens.reason))
            continue
        if group.drawn and (drawn := group.drawn[index]) is not None:
            tokens = _prefer_drawn(tokens, str(group.responses[index]), drawn, chat, chunk, group.where)
        if len(tokens.ids) > config.max_response_tokens:
            num_overlong += 1
            if config.overlong == "drop":
                continue
            tokens = _truncate(tokens, config.max_response_tokens)
        kept.append(index)
        answers.append(tokens)
    if len(kept) < 2:
        limit = f"max_response_tokens = {config.max_response_tokens}"
        if not num_overlong and faults:
            raise faults[0]
        raise RowError("responses", f"leave K = {len(kept)} of {len(group.responses)} within {limit}; a group needs at least two")
    chunk.count("overlong_truncated" if config.overlong == "truncate" else "overlong_dropped", group.where, num_overlong)
    for fault in faults:
        _drop(chunk, group.where, str(fault))
    _count_thoughts(chunk, chat, group, prompt_text, [group.responses[index] for index in kept], answers)
    chunk.count("labels_against_rewards", group.where, contradict(group))
    masked = any(tokens.scored is not None for tokens in answers)
    return TokenizedGroup(
        group_id=group.group_id,
        prompt_tokens=prompt_tokens,
        response_tokens=tuple(tokens.ids for tokens in answers),
        scored=tuple(_mask(tokens) for tokens in answers) if masked else None,
        rewards=None if group.rewards is None else np.array(group.rewards, np.float64)[kept],
        labels=None if group.labels is None else np.array(group.labels, np.int8)[kept],
        prompt_text=prompt_text,
        response_texts=tuple(
            response if isinstance(response, str) else tokens.text
            for response, tokens in zip((group.responses[index] for index in kept), answers, strict=True)
        ),
        where=group.where,
    )


def contradict(group: Group) -> bool:
    """Whether a chosen response has a lower reward than a rejected one."""
    if group.rewards is None or group.labels is None:
        return False
    of = {label: [reward for reward, own in zip(group.rewards, group.labels, strict=True) if own == label] for label in (0, 1)}
    return bool(of[0]) and bool(of[1]) and min(of[1]) < max(of[0])


def _prefer_drawn(tokens: Tokens, text: str, drawn: Drawn, chat: Chat, chunk: Chunk, where: str) -> Tokens:
    """The response by its sampled ids, if they decode to its text."""
    ids = take_drawn(chat, text, drawn)
    if ids is None:
        chunk.count("drawn_of_another_text", where)
        return tokens
    chunk.count("drawn_responses", where)
    chunk.count("drawn_otherwise", where, differs(chat, ids, tokens.ids))
    return tokens._replace(ids=ids)


def _truncate(tokens: Tokens, limit: int) -> Tokens:
    scored = None if tokens.scored is None or tokens.scored[:limit].all() else tokens.scored[:limit]
    return tokens._replace(ids=tokens.ids[:limit], scored=scored)


def _mask(tokens: Tokens) -> Any:
    return np.ones(len(tokens.ids), np.bool_) if tokens.scored is None else tokens.scored


def _drop(chunk: Chunk, where: str, fault: str) -> None:
    name = fault.split(" ")[0].split("[")[0].split(".")[0]
    chunk.dropped[name] += 1
    chunk.examples.setdefault(f"dropped {name}", f"{where}: {fault}")


def _count_thoughts(
    chunk: Chunk, chat: Chat, group: Group, prompt_text: str, responses: list[Any], answers: list[Tokens]
) -> None:
    """Count what the summary reports about thoughts."""
    seam = find_seam(prompt_text)
    for response, tokens in zip(responses, answers, strict=True):
        is_text = isinstance(response, str)
        if is_text and seam is not None:
            chunk.count("repeated_thoughts", group.where, chat.strip_end(response) != tokens.text)
            chunk.count("open_thoughts", group.where, leaves_open(seam, tokens.text))
        elif is_text and chat.lead.strip() and not chat.templated:
            chunk.count("without_lead", group.where, not response.lstrip().startswith(chat.lead.strip()[:4]))
        chunk.count("rewritten_turns", group.where, not tokens.exact)


def tokenize_chunk(config: PrepareConfig, numbered: tuple[int, list[Group | Rejection]]) -> Chunk:
    """Tokenize a chunk of groups; rejections among them keep their position.

    Args:
        numbered: index of the first item among all, and the items
    """
    chat, chunk = load_chat(config), Chunk()
    groups: list[TokenizedGroup] = []
    first, items = numbered
    conversations = [(item.prompt, item.tools) for item in items if isinstance(item, Group)]
    prompts = iter(chat.prompts(conversations, limit=config.max_prompt_tokens))
    for place, item in enumerate(items, start=first):
        if isinstance(item, Rejection):
            chunk.rejections.append(item)
            continue
        try:
            group = tokenize_group(item, next(prompts), chat, config, chunk)
        except RowError as error:
            file, _, line = item.where.rpartition(":")
            chunk.rejections.append(
                Rejection(file=file, line=int(line), group_id=item.group_id, field=error.field, reason=error.reason)
            )
            continue
        if config.check_every and place % config.check_every == 0:
            check_group(item, group, chat)
            chunk.counts["checked"] += 1
        groups.append(group)
        key = [item.prompt, item.tools] if item.tools else item.prompt
        chunk.prompt_keys += hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()[:16]
        chunk.holds.append((item.rewards is not None) * REWARDS + (item.labels is not None) * LABELS)
        chunk.inputs.append(item.source)
        for fault in item.dropped:
            _drop(chunk, item.where, fault)
        chunk.count("special_tokens", item.where, not chat.templated and chat.spells_special(item.prompt, group.response_texts))
        chunk.count("templated_prompts", item.where, not chat.templated and chat.looks_templated(item.prompt))
        chunk.not_written.update(find_not_written(chat, item, group.prompt_text))
    chunk.batch = to_batch(groups) if groups else None
    return chunk


def find_not_written(chat: Chat, group: Group, prompt_text: str) -> Iterator[str]:
    """Parts of a prompt without effect on the template's text."""
    if chat.templated:
        return
    names = {name for message in group.prompt for name in message} - {"role", "content"}
    variants: dict[str, tuple[tuple[Message, ...], Any]] = {
        f"prompt[].{name}": (tuple(_without(message, name) for message in group.prompt), group.tools) for name in sorted(names)
    }
    if group.tools:
        variants["tools"] = (group.prompt, ())
    for name, (messages, tools) in variants.items():
        try:
            if chat.render(messages, add_generation_prompt=True, tools=tools) == prompt_text:
                yield name
        except TemplateError:
            continue  # the template requires this part


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def map_in_order[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map` over processes: results in the order of the items, with a bounded number in progress."""
    if num_workers == 1:
        yield from map(function, items)
        return
    # Not fork: the parent has threads (Arrow, the progress bar). The fork server imports once, and its children start clean.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    under_way: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) >= _AHEAD * num_workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"num_workers = {num_workers}; a tokenizing process died, perhaps out of memory; use fewer workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cut_chunks(items: Iterable[Group | Rejection]) -> Iterator[tuple[int, list[Group | Rejection]]]:
    """Split items into chunks for one task each, with the index of their first item."""
    chunk: list[Group | Rejection] = []
    first, characters = 0, 0
    for item in items:
        chunk.append(item)
        if isinstance(item, Group):
            characters += sum(len(part) for part in item.responses if isinstance(part, str))
        if len(chunk) >= _CHUNK_GROUPS or characters >= _CHUNK_CHARACTERS:
            yield first, chunk
            first, characters, chunk = first + len(chunk), 0, []
    if chunk:
        yield first, chunk
