"""Rows to tokenized groups, in worker processes: tasks of rows in, chunks of record batches and counts out.

Workers also parse the rows: one process that did so for all would feed about ten workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mpo_megatron.config import PrepareConfig
from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.batches import to_batch
from mpo_megatron.data.chat import Asked, Chat, Tokens
from mpo_megatron.data.chunks import LABELS, REWARDS, Built, Chunk, Task, make_rejection
from mpo_megatron.data.drawn import Drawn, differs, take_drawn
from mpo_megatron.data.fidelity import check_group
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import Parsed
from mpo_megatron.data.group import Group, Message, TokenizedGroup
from mpo_megatron.data.raw_rows import RawRow, Rejection
from mpo_megatron.data.readers import PartOfRow, RowStream
from mpo_megatron.data.sampled_prompt import check_sampled_prompt
from mpo_megatron.data.thoughts import find_seam, leaves_open
from mpo_megatron.data.tokenizer import load_tokenizer

_FEWEST, _MOST = 32, 256
"""Rows of the first task, and of later ones: they grow, so that few rows are spread over the workers, and many cost less each."""
_CHUNK_CHARACTERS = 1 << 20
"""Maximum characters of one task (at least one row)."""


@functools.lru_cache(maxsize=1)
def _load_chat(tokenizer: str, template: str | None, system_prompt: str | None, variables: str, templated: bool) -> Chat:
    options: dict[str, Any] = {"system_prompt": system_prompt, "variables": json.loads(variables), "templated": templated}
    return Chat(load_tokenizer(tokenizer, template), **options)


def load_chat(config: PrepareConfig) -> Chat:
    """The tokenizer with its template; each process loads it once."""
    variables = json.dumps(config.chat_template_kwargs, sort_keys=True)
    templated = config.prompt_format == "templated"
    return _load_chat(config.tokenizer, config.chat_template, config.system_prompt, variables, templated)


def tokenize_groups(
    groups: Sequence[Group], chat: Chat, config: PrepareConfig, chunk: Chunk
) -> Iterator[TokenizedGroup | RowError]:
    """Token ids of groups; what happens to their responses is counted in `chunk` as they are taken.

    An error says of its group that the template refuses the prompt, it is too long, or fewer than two responses remain.
    """
    prompts = [
        _check_prompt(prompt, config)
        for prompt in chat.prompts([(group.prompt, group.tools) for group in groups], limit=config.max_prompt_tokens)
    ]
    asked = [
        Asked(prompt[0], group.prompt, group.responses, group.tools)
        for prompt, group in zip(prompts, groups, strict=True)
        if not isinstance(prompt, RowError)
    ]
    answers = iter(chat.answers(asked, limit=config.max_response_tokens))
    for prompt, group in zip(prompts, groups, strict=True):
        if isinstance(prompt, RowError):
            yield prompt
            continue
        try:
            yield _tokenize_group(group, prompt, next(answers), chat, config, chunk)
        except RowError as error:
            yield error


def _check_prompt(prompt: tuple[str, Int32] | TemplateError, config: PrepareConfig) -> tuple[str, Int32] | RowError:
    if isinstance(prompt, TemplateError):
        return RowError("prompt", f"is refused by the chat template: {prompt}")
    if len(prompt[1]) > config.max_prompt_tokens:
        return RowError("prompt", f"has {len(prompt[1])} tokens, but max_prompt_tokens = {config.max_prompt_tokens}")
    return prompt


def _tokenize_group(
    group: Group,
    prompt: tuple[str, Int32],
    found: Sequence[Tokens | RowError],
    chat: Chat,
    config: PrepareConfig,
    chunk: Chunk,
) -> TokenizedGroup:
    """A group of its prompt and its responses.

    Raises:
        RowError: fewer than two responses remain.
        ConfigError: the responses were sampled with another prompt.
    """
    prompt_text, prompt_tokens = prompt
    allowed = config.other_prompts == "allow"
    chunk.count("sampled_otherwise", group.where, check_sampled_prompt(group, prompt_tokens, chat, allow=allowed))
    kept: list[int] = []
    answers: list[Tokens] = []
    num_overlong, faults = 0, list[RowError]()
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
        chunk.drop(group.where, str(fault))
    responses = [group.responses[index] for index in kept]
    _count_thoughts(chunk, chat, group, prompt_text, responses, answers)
    chunk.count("labels_against_rewards", group.where, contradict(group))
    masked = any(tokens.scored is not None for tokens in answers)
    return TokenizedGroup(
        group_id=group.group_id,
        prompt_tokens=prompt_tokens,
        response_tokens=tuple([tokens.ids for tokens in answers]),
        scored=tuple(_mask(tokens) for tokens in answers) if masked else None,
        rewards=None if group.rewards is None else np.array([group.rewards[index] for index in kept], np.float64),
        labels=None if group.labels is None else np.array([group.labels[index] for index in kept], np.int8),
        prompt_text=prompt_text,
        response_texts=tuple(
            [said if isinstance(said, str) else tokens.text for said, tokens in zip(responses, answers, strict=True)]
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


def _count_thoughts(
    chunk: Chunk, chat: Chat, group: Group, prompt_text: str, responses: list[Any], answers: list[Tokens]
) -> None:
    """Count what the summary reports about thoughts."""
    seam, lead = find_seam(prompt_text), "" if chat.templated else chat.lead.strip()
    if seam is not None or lead:
        texts = [(said, tokens.text) for said, tokens in zip(responses, answers, strict=True) if isinstance(said, str)]
    if seam is not None:
        chunk.count("repeated_thoughts", group.where, sum(chat.strip_end(said) != text for said, text in texts))
        chunk.count("open_thoughts", group.where, sum(leaves_open(seam, text) for _, text in texts))
    elif lead:
        chunk.count("without_lead", group.where, sum(not said.lstrip().startswith(lead[:4]) for said, _ in texts))
    chunk.count("rewritten_turns", group.where, sum(not tokens.exact for tokens in answers))


def tokenize_chunk(config: PrepareConfig, task: Task) -> Chunk:
    """Read and tokenize a run of rows."""
    chat, chunk = load_chat(config), Chunk(num_rows=len(task.rows), number=task.reader.number)
    groups = dict[int, Group]()
    for row, given in enumerate(task.rows):
        parsed = given if isinstance(given, PartOfRow) else task.reader.parse(given)
        item = task.reader.build(parsed)
        if isinstance(parsed.part, Parsed):
            chunk.unused.update(parsed.part.unused)
        if isinstance(item, Rejection):
            chunk.rejections[row] = item
            continue
        groups[row] = item
        own_id = isinstance(parsed.part, Parsed) and parsed.part.group_id is not None
        chunk.built.append(Built(row, item.group_id, item.where, own_id))
    found = tokenize_groups(list(groups.values()), chat, config, chunk)
    kept: list[TokenizedGroup] = []
    for row, item in groups.items():
        chunk.row = row
        group = next(found)
        if isinstance(group, RowError):
            chunk.rejections[row] = make_rejection(item.where, item.group_id, group)
            continue
        if config.check_every and (task.first + row) % config.check_every == 0:
            check_group(item, group, chat)
            chunk.count("checked", "")
        kept.append(group)
        chunk.accepted.append(row)
        key = [item.prompt, item.tools] if item.tools else item.prompt
        chunk.prompt_keys.append(hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()[:16])
        chunk.holds.append((item.rewards is not None) * REWARDS + (item.labels is not None) * LABELS)
        for fault in item.dropped:
            chunk.drop(item.where, fault)
        if not chat.templated:
            chunk.count("special_tokens", item.where, chat.spells_special(item.prompt, item.responses))
            chunk.count("templated_prompts", item.where, chat.looks_templated(item.prompt))
        for name in find_not_written(chat, item, group.prompt_text):
            chunk.count(name, "", table="not_written")
    chunk.rejections = dict(sorted(chunk.rejections.items()))
    chunk.batch = to_batch(kept) if kept else None
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
    unseen = {message["role"] for message in group.prompt if str(message["content"] or "").strip() not in prompt_text}
    for role in sorted(unseen):
        rest = tuple(message for message in group.prompt if message["role"] != role)
        with contextlib.suppress(TemplateError):
            if rest and chat.render(rest, add_generation_prompt=True, tools=group.tools) == prompt_text:
                yield f"prompt[] of role {role}"


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def cut_tasks(streams: Iterable[RowStream]) -> Iterator[Task]:
    """The rows of all inputs in runs that one task tokenizes."""
    first = 0
    for stream in streams:
        rows: list[RawRow | PartOfRow] = []
        characters = 0
        for row in stream.rows:
            rows.append(row)
            characters += _num_characters(row.value if isinstance(row, RawRow) else getattr(row.part, "responses", ()))
            if len(rows) >= min(max(_FEWEST, first // 8), _MOST) or characters >= _CHUNK_CHARACTERS:
                yield Task(stream.reader, first, rows)
                first, characters, rows = first + len(rows), 0, []
        if rows:
            yield Task(stream.reader, first, rows)
            first += len(rows)


def _num_characters(value: Any) -> int:
    """About how many characters a value holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list | tuple) else 0
