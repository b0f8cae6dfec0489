"""`mpo prepare`: prompts with K responses and rewards → tokenized groups on disk.

    mpo prepare --input pairs.jsonl --tokenizer checkpoints/qwen --output data/pairs --held_out 200 --num_workers 8

Two passes. The first reads rows in order, tokenizes them in parallel, and keeps what passes in a temporary file. The
second, which needs to have seen all groups, splits off the held-out ones and applies the options of `rewards.py`. Nothing
depends on the number of workers: chunks come back in the order they left.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from mpo_megatron.config import PrepareConfig, check_writable, require, to_dict
from mpo_megatron.data import DataError
from mpo_megatron.data.atomic import AtomicFolder, is_free, writing
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import Layout
from mpo_megatron.data.group import Group, TokenizedGroup
from mpo_megatron.data.readers import Rejection, read_groups
from mpo_megatron.data.rewards import (
    RewardScale,
    add_noise,
    choose_responses,
    hash_unit,
    in_fraction,
    measure_scale,
    normalize,
)
from mpo_megatron.data.store import GROUPS_FILE, SCHEMA, PreparedInfo, StoredGroups, to_batch, write_arrow, write_info
from mpo_megatron.data.summary import Tally, compute_statistics, print_summary, print_tally
from mpo_megatron.data.tokenizer import load_tokenizer

REJECTED_FILE = "rejected.jsonl"
_CHUNK = 32
"""Groups that one task tokenizes."""
_AHEAD = 4
"""Chunks per worker that may be under way: keeps workers busy and memory bounded."""


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` wrote."""

    output: Path
    train: PreparedInfo
    eval: PreparedInfo | None
    """The held-out groups in `<output>-eval`, if any."""
    tally: Tally
    seconds: float


# --------------------------------------------------------------------------------------------------- tokenizing


def load_chat(config: PrepareConfig) -> Chat:
    """The tokenizer with its template; each process loads it once."""
    variables = json.dumps(config.chat_template_kwargs, sort_keys=True)
    return _load_chat(config.tokenizer, config.chat_template, config.system_prompt, variables)


@functools.lru_cache(maxsize=1)
def _load_chat(tokenizer: str, chat_template: str | None, system_prompt: str | None, variables: str) -> Chat:
    return Chat(load_tokenizer(tokenizer, chat_template), system_prompt=system_prompt, variables=json.loads(variables))


class Chunk(NamedTuple):
    """A worker's answer, in the order of its items."""

    batch: pa.RecordBatch | None
    prompt_keys: list[str]
    """Of each accepted group, a hash of its prompt's messages."""
    rejections: list[Rejection]
    num_overlong: int
    """Responses that were too long."""
    num_special: int
    """Accepted groups with a special token written out in their text."""


def tokenize_group(group: Group, chat: Chat, config: PrepareConfig) -> tuple[TokenizedGroup, int]:
    """Token ids of a group, and how many of its responses were over-long.

    Raises:
        RowError: the template refuses the prompt, it is too long, or fewer than two responses remain.
    """
    try:
        prompt_text, prompt_tokens = chat.prompt(group.prompt)
    except TemplateError as error:
        raise RowError("prompt", f"is refused by the chat template: {error}") from error
    if len(prompt_tokens) > config.max_prompt_tokens:
        limit = f"max_prompt_tokens = {config.max_prompt_tokens}"
        raise RowError("prompt", f"has {len(prompt_tokens)} tokens, {limit}")
    tokens = [chat.response(response) for response in group.responses]
    fits = [len(ids) <= config.max_response_tokens for ids in tokens]
    keep = [index for index, fit in enumerate(fits) if fit or config.overlong == "truncate"]
    if len(keep) < 2:
        limit = f"max_response_tokens = {config.max_response_tokens}"
        raise RowError("responses", f"leave K = {len(keep)} of {len(tokens)} within {limit}; a group needs at least two")
    tokenized = TokenizedGroup(
        group_id=group.group_id,
        prompt_tokens=prompt_tokens,
        response_tokens=tuple(tokens[index][: config.max_response_tokens] for index in keep),
        rewards=None if group.rewards is None else np.array(group.rewards, np.float64)[keep],
        labels=None if group.labels is None else np.array(group.labels, np.int8)[keep],
        prompt_text=prompt_text,
        response_texts=tuple(group.responses[index] for index in keep),
        where=group.where,
    )
    return tokenized, fits.count(False)


def tokenize_chunk(config: PrepareConfig, items: list[Group | Rejection]) -> Chunk:
    """Tokenize a run of groups; rejections among them pass through in their place."""
    chat = load_chat(config)
    groups: list[TokenizedGroup] = []
    keys: list[str] = []
    rejections: list[Rejection] = []
    num_overlong = num_special = 0
    for item in items:
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        try:
            group, overlong = tokenize_group(item, chat, config)
        except RowError as error:
            file, _, line = item.where.rpartition(":")
            rejections.append(
                Rejection(file=file, line=int(line), group_id=item.group_id, field=error.field, reason=error.reason)
            )
            continue
        groups.append(group)
        keys.append(hashlib.sha256(json.dumps(item.prompt, sort_keys=True).encode()).hexdigest()[:32])
        num_overlong += overlong
        num_special += chat.spells_special(item.prompt, group.response_texts)
    return Chunk(
        batch=to_batch(groups) if groups else None,
        prompt_keys=keys,
        rejections=rejections,
        num_overlong=num_overlong,
        num_special=num_special,
    )


def map_in_order[Item, Result](function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map` over processes, results in the order of the items, a bounded number of them under way."""
    if num_workers == 1:
        yield from map(function, items)
        return
    # Not fork: the parent has threads (Arrow, the progress bar). The fork server imports once, its children start clean.
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
                f"num_workers = {num_workers}; a tokenizing process died, perhaps for lack of memory; use fewer."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks[Item](items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


# --------------------------------------------------------------------------------------------------- both passes


def prepare(config: PrepareConfig, console: Console | None = None) -> PrepareSummary:
    """Write prepared groups to `config.output` (and held-out ones to `<output>-eval`), and print a summary.

    Raises:
        ConfigError: a setting does not fit the tokenizer or the data.
        DataError: the input cannot be read, holds no usable group, or the output cannot be written.
    """
    started, console = time.monotonic(), console or Console()
    output = Path(config.output.rstrip("/"))
    held_out = output.with_name(output.name + "-eval")
    check_writable(output, "output")
    for folder in (output, held_out) if config.held_out else (output,):
        require(is_free(folder), f"output = {folder}; exists and is not an empty folder; remove it, or choose another output.")
    chat = load_chat(config)
    if chat.lead.strip():
        console.print(
            f"[yellow]The chat template puts {chat.lead!r} before an assistant's answer, and the prompt does not end with it; "
            "responses are taken as they stand. If the model should not think, set chat_template_kwargs (Qwen3: "
            "enable_thinking: false).[/yellow]"
        )
    stream = read_groups(
        config.input,
        format_name=config.format,
        split=config.split,
        subset=config.subset,
        rating=config.rating,
        max_rows=config.max_rows,
    )
    _check_reward_options(config, stream.layout)
    tally = Tally()
    with AtomicFolder(output) as partial:
        spool = partial.path / "tokenized.arrow"
        prompt_keys = _tokenize(config, stream.items, stream.total, spool, tally)
        if not prompt_keys:
            raise DataError(_nothing_left(config.input, tally))
        groups = StoredGroups(spool)
        train, evaluation = _split(groups, prompt_keys, config, tally)
        rewards = groups.all_rewards()
        scale = None if rewards is None else measure_scale(rewards)
        untouched = replace(config, reward_noise=0.0, responses_per_prompt=None)
        write = functools.partial(_write, config, chat, stream.layout, tally)
        eval_info = None
        with writing(output):
            info = write(partial.path, (_finish(groups[index], config, scale) for index in train))
            if evaluation:
                with AtomicFolder(held_out) as eval_partial:
                    eval_info = write(eval_partial.path, (_finish(groups[index], untouched, scale) for index in evaluation))
                    eval_partial.commit()
            spool.unlink()
            partial.commit()  # last: whoever sees it sees everything
    summary = PrepareSummary(output=output, train=info, eval=eval_info, tally=tally, seconds=time.monotonic() - started)
    _print(console, summary, held_out)
    return summary


def _check_reward_options(config: PrepareConfig, layout: Layout) -> None:
    if layout.reward_kind != "labels":
        return
    for name, off in (("reward_noise", 0.0), ("reward_normalization", "none")):
        value = getattr(config, name)
        require(value == off, f"{name} = {value}; the data has labels and no rewards; leave it out.")


def _nothing_left(source: str, tally: Tally) -> str:
    reasons = "; ".join(f"{count} × {name}: {tally.examples[name]}" for name, count in tally.rejected.most_common(5))
    return f"input = {source}; not one of {tally.rows} groups is usable: {reasons}."


def _tokenize(config: PrepareConfig, items: Iterable[Group | Rejection], total: int, spool: Path, tally: Tally) -> list[str]:
    """First pass: accepted groups to `spool`, rejections to the file beside it; the accepted groups' prompt keys."""
    output = Path(config.output)
    prompt_keys: list[str] = []
    with (
        writing(output),  # around the others: closing a file writes too; readers turn their own failures into DataError
        pa.OSFile(str(spool), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        spool.with_name(REJECTED_FILE).open("w", encoding="utf-8") as rejected,
        _progress() as progress,
    ):
        task = progress.add_task("tokenizing", total=total)
        tokenize = functools.partial(tokenize_chunk, config)
        for chunk in map_in_order(tokenize, _chunks(items, _CHUNK), config.num_workers):
            if chunk.batch is not None:
                writer.write_batch(chunk.batch)
            rejected.writelines(rejection.as_json() + "\n" for rejection in chunk.rejections)
            prompt_keys += chunk.prompt_keys
            _count(tally, chunk, config.overlong)
            progress.update(task, completed=tally.rows, total=max(total, tally.rows))
    tally.duplicate_prompts = len(prompt_keys) - len(set(prompt_keys))
    return prompt_keys


def _count(tally: Tally, chunk: Chunk, overlong: str) -> None:
    for rejection in chunk.rejections:
        name = rejection.field.split("[")[0].split(".")[0]
        tally.rejected[name] += 1
        where = f"{rejection.file}:{rejection.line}"
        tally.examples.setdefault(name, f"{where}: {rejection.field} {rejection.reason}")
    tally.rows += len(chunk.prompt_keys) + len(chunk.rejections)
    if overlong == "truncate":
        tally.overlong_truncated += chunk.num_overlong
    else:
        tally.overlong_dropped += chunk.num_overlong
    tally.special_tokens += chunk.num_special


def _split(groups: StoredGroups, prompt_keys: list[str], config: PrepareConfig, tally: Tally) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out groups, each in the input's order."""
    held: set[str] = set()
    num_held = 0
    of_prompt = Counter(prompt_keys)
    for key in sorted(of_prompt, key=lambda key: hash_unit(config.seed, "held_out", key)):
        if num_held >= config.held_out:
            break
        held.add(key)
        num_held += of_prompt[key]
    evaluation = [index for index, key in enumerate(prompt_keys) if key in held]
    rest = [index for index, key in enumerate(prompt_keys) if key not in held]
    require(
        bool(rest),
        f"held_out = {config.held_out}; only {len(prompt_keys)} groups are usable, none would be left to train on; lower it.",
    )
    ids = groups.group_ids()
    train = [index for index in rest if in_fraction(ids[index], config.fraction, seed=config.seed)]
    require(bool(train), f"fraction = {config.fraction}; none of {len(rest)} groups would be left; raise it.")
    tally.outside_fraction = len(rest) - len(train)
    return train, evaluation


def _finish(group: TokenizedGroup, config: PrepareConfig, scale: RewardScale | None) -> TokenizedGroup:
    """Apply the options that act on one group: noise on all its rewards, then the choice of responses, then the scale.

    Args:
        scale: statistics of all accepted groups' rewards, before noise and choice; None if there are only labels
    """
    rewards, labels = group.rewards, group.labels
    if rewards is not None and config.reward_noise > 0:
        rewards = add_noise(rewards, config.reward_noise, group.group_id, seed=config.seed)
    keep = choose_responses(group.num_responses, config.responses_per_prompt, group.group_id, seed=config.seed)
    if rewards is not None:
        rewards = normalize(rewards[keep], config.reward_normalization, scale)
    return replace(
        group,
        response_tokens=tuple(group.response_tokens[index] for index in keep),
        response_texts=tuple(group.response_texts[index] for index in keep),
        rewards=rewards,
        labels=None if labels is None else labels[keep],
    )


def _write(
    config: PrepareConfig, chat: Chat, layout: Layout, tally: Tally, folder: Path, groups: Iterable[TokenizedGroup]
) -> PreparedInfo:
    """Write `groups.arrow` and `prepare.json`."""
    arrow = folder / GROUPS_FILE
    counts = write_arrow(arrow, groups)
    info = PreparedInfo(
        tokenizer_digest=chat.tokenizer.digest(),
        vocab_size=chat.tokenizer.vocab_size,
        end_token_ids=(chat.end_token_id,),
        reward_kind=layout.reward_kind,
        statistics=compute_statistics(StoredGroups(arrow)) | {"preparation": tally.as_dict()},
        config=to_dict(config) | {"format": layout.format},
        **counts,
    )
    write_info(folder, info)
    return info


# --------------------------------------------------------------------------------------------------- printing


class _Rate(ProgressColumn):
    """Groups per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} groups/s" if speed else "", style="progress.data.speed")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _print(console: Console, summary: PrepareSummary, held_out: Path) -> None:
    print_summary(console, f"{summary.output}", summary.train)
    if summary.eval is not None:
        print_summary(console, f"{held_out} (held out)", summary.eval)
    print_tally(console, summary.tally)
    rate = summary.tally.rows / max(summary.seconds, 1e-9)
    console.print(f"{summary.tally.rows:,} groups in {summary.seconds:.1f} s ({rate:,.0f} groups/s).")
