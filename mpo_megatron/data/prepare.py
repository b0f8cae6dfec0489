"""`mpo prepare`: prompts with K responses and rewards → tokenized groups on disk.

    mpo prepare --input pairs.jsonl --tokenizer checkpoints/qwen --output data/pairs --held_out 200 --num_workers 8

Two passes. The first reads rows in order, tokenizes them in parallel (tokenizing.py), and stores accepted groups in a temporary
file. The second needs facts about all groups: it splits off held-out ones (choice.py) and applies the options of `finishing.py`.
The number of workers changes nothing: chunks return in order. Memory holds some chunks, and a few bytes per group.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.text import Text

from mpo_megatron.config import PrepareConfig, check_writable, require, to_dict
from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.batches import SCHEMA, to_batch
from mpo_megatron.data.chat import Chat, check_templated
from mpo_megatron.data.choice import choose_groups, count_prompts, read_keys
from mpo_megatron.data.chunks import LABELS, REWARDS, Chunk, Task
from mpo_megatron.data.finishing import changes_nothing, finish_group
from mpo_megatron.data.formats import InputLayout
from mpo_megatron.data.group import Group, Message, RewardKind
from mpo_megatron.data.preview import print_group
from mpo_megatron.data.raw_rows import Rejection
from mpo_megatron.data.readers import PartOfRow, RowStream, find_repeated, open_inputs
from mpo_megatron.data.rewards import measure_scale
from mpo_megatron.data.spill import Spill
from mpo_megatron.data.store import BATCH_GROUPS, GROUPS_FILE, PreparedInfo, StoredGroups
from mpo_megatron.data.store_writing import write_batches, write_info
from mpo_megatron.data.summary import Tally, compute_statistics, print_summary, print_tally
from mpo_megatron.data.tokenizing import cut_tasks, load_chat, tokenize_chunk
from mpo_megatron.data.workers import map_in_order, start_fork_server
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import AtomicFolder, is_free, writing
from mpo_megatron.files.partial import clear_leftovers
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.progress import track
from mpo_megatron.terminal.visible import visible

REJECTED_FILE = "rejected.jsonl"
_PEEKED = 64
"""Number of groups that are checked for already templated prompts."""


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """Result of `prepare`."""

    output: Path
    train: PreparedInfo
    eval: PreparedInfo | None
    """The held-out groups in `<output>-eval`, if any."""
    tally: Tally
    seconds: float


@dataclass(kw_only=True)
class Accepted:
    """Facts about each accepted group, a few bytes each."""

    prompt_keys: bytearray = field(default_factory=bytearray)
    holds: bytearray = field(default_factory=bytearray)
    inputs: bytearray = field(default_factory=bytearray)

    def add(self, chunk: Chunk) -> None:
        """Append a chunk's groups."""
        self.prompt_keys += b"".join(chunk.prompt_keys)
        self.holds += chunk.holds
        self.inputs += np.full(len(chunk.holds), chunk.number, dtype=np.uint16).tobytes()


UNFINISHED = ".unfinished"
"""A file in the held-out groups' folder until the folder of the other groups is complete too."""


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
    clear_leftovers(output.resolve())  # even if the output is refused because it is complete
    if is_free(output) and (held_out / UNFINISHED).is_file():  # a run was killed between renaming its two folders
        shutil.rmtree(held_out)
    for folder in (output, held_out) if config.held_out else (output,):
        require(is_free(folder), f"output = {folder}; exists and is not an empty folder; remove it, or choose another output.")
    if config.num_workers > 1:
        start_fork_server()
    chat = load_chat(config)
    streams = open_streams(config)
    tally = Tally()
    _print_start(console, config, chat, streams)
    with AtomicFolder(output) as partial:
        spool = partial.path / "tokenized.arrow"
        rejected = partial.path / REJECTED_FILE
        accepted = _tokenize(config, chat, streams, spool, rejected, tally)
        if not accepted.holds:
            raise DataError(_nothing_left(config, streams, tally))
        groups = StoredGroups(spool)
        kind = _reward_kind(config, streams, accepted)
        if kind == "labels":
            empty = dict.fromkeys(name for stream in streams for name in stream.layout.empty_scores)
            tally.notes += [f"{' and '.join(empty)}: empty; labels are used instead of rewards"] if empty else []
        usable = _reject_without_rewards(groups, accepted, kind, rejected, output, tally)
        keys, inputs = read_keys(accepted.prompt_keys), np.frombuffer(bytes(accepted.inputs), np.uint16)
        _check_inputs(config, inputs, inputs[usable], kind, tally)
        tally.duplicate_prompts = len(usable) - count_prompts(keys[usable])
        ids = groups.group_ids() if config.weights or config.fraction < 1 else []
        train, evaluation, tally.outside_weights, tally.outside_fraction = choose_groups(usable, keys, inputs, ids, config)
        rewards = groups.all_rewards()
        scale = None if rewards is None else measure_scale(rewards)
        labels = _all_labelled(accepted, usable)
        finish = functools.partial(finish_group, chat=chat, scale=scale, labels=labels)
        untouched = replace(config, reward_noise=0.0, responses_per_prompt=None, keep_best=False, swapped_negatives=0)
        write = functools.partial(_write, config, chat, _stored_format(config, streams), kind, tally)
        eval_info = None
        with writing(output):

            def batches(places: Int64, options: PrepareConfig) -> Iterator[pa.RecordBatch]:
                if changes_nothing(options) and (labels or groups.all_labels() is None):
                    return groups.batches(places)
                return map(to_batch, itertools.batched((finish(groups[index], options) for index in places), BATCH_GROUPS))

            chosen = track("writing", batches(train, config), len(train), "groups", lambda batch: batch.num_rows)
            info = write(partial.path, chosen)
            if len(evaluation):
                with AtomicFolder(held_out) as eval_partial:
                    eval_info = write(eval_partial.path, batches(evaluation, untouched))
                    (eval_partial.path / UNFINISHED).touch()
                    eval_partial.commit()
            sample = finish(groups[train[0]], config)
            print_group(console, sample, chat.tokenizer)
            spool.unlink()
            partial.commit()  # last: if it exists, everything is complete
            if eval_info is not None:
                (held_out / UNFINISHED).unlink()
    summary = PrepareSummary(output=output, train=info, eval=eval_info, tally=tally, seconds=time.monotonic() - started)
    _print_end(console, summary, held_out)
    return summary


def open_streams(config: PrepareConfig) -> list[RowStream]:
    """The rows of each input."""
    return open_inputs(
        config.inputs,
        format_name=config.format,
        split=config.split,
        subset=config.subset,
        rating=config.rating,
        columns=config.columns,
        drop_ranks=config.drop_ranks,
        max_rows=config.max_rows,
    )


def _stored_format(config: PrepareConfig, streams: list[RowStream]) -> str:
    return streams[0].layout.format if len(streams) == 1 else config.format


def _print_start(console: Console, config: PrepareConfig, chat: Chat, streams: list[RowStream]) -> None:
    for source, stream in zip(config.inputs, streams, strict=True):
        console.print(Text(visible(f"{source}: format {stream.layout.format}, because {stream.layout.why}.")), soft_wrap=True)
    if chat.lead.strip() and not chat.templated:
        console.print(
            f"The chat template puts {chat.lead!r} before an assistant's answer, but the prompt does not end with it. "
            "Answers given as messages get it; answers given as text stay unchanged. If the model should not think, set "
            "chat_template_kwargs (Qwen3: enable_thinking: false).",
            style="yellow",
        )


# --------------------------------------------------------------------------------------------------- first pass


def _tokenize(
    config: PrepareConfig, chat: Chat, streams: list[RowStream], spool: Path, rejected_file: Path, tally: Tally
) -> Accepted:
    """Write accepted groups to `spool`, and rejections to the file beside it."""
    accepted = Accepted()
    totals = [stream.total for stream in streams]
    total = None if None in totals else sum(count for count in totals if count is not None)
    seen = Spill()
    with (
        writing(Path(config.output)),  # outermost: closing a file also writes; readers raise DataError themselves
        pa.OSFile(str(spool), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        rejected_file.open("w", encoding="utf-8") as rejected,
    ):
        chunks = map_in_order(
            functools.partial(tokenize_chunk, config), _peek(config, chat, cut_tasks(streams)), config.num_workers
        )
        for chunk in track("tokenizing", chunks, total, "groups", lambda chunk: chunk.num_rows):
            repeated = {
                built.row: error
                for built in chunk.built
                if (error := find_repeated(seen, built.group_id, built.where, own=built.own_id)) is not None
            }
            if repeated:
                chunk.reject(repeated)
            if chunk.batch is not None:
                writer.write_batch(chunk.batch)
            rejected.writelines(rejection.as_json() + "\n" for rejection in chunk.rejections.values())
            accepted.add(chunk)
            _count(tally, chunk)
    for stream in streams:
        tally.unused += stream.unused
    return accepted


def _peek(config: PrepareConfig, chat: Chat, tasks: Iterator[Task]) -> Iterator[Task]:
    """The tasks, after checking the first rows.

    Raises:
        ConfigError: most prompts look already templated.
    """
    head, prompts = list[Task](), list[Sequence[Message]]()
    num_rows = 0
    for task in tasks:
        head.append(task)
        for row in task.rows[: _PEEKED - num_rows]:
            item = task.reader.build(row if isinstance(row, PartOfRow) else task.reader.parse(row))
            prompts += [item.prompt] if isinstance(item, Group) else []
        num_rows += len(task.rows)
        if num_rows >= _PEEKED:
            break
    if config.prompt_format == "auto":
        check_templated(prompts, chat)
    return itertools.chain(head, tasks)


def _count(tally: Tally, chunk: Chunk) -> None:
    for rejection in chunk.rejections.values():
        name = rejection.field.split("[")[0].split(".")[0]
        tally.rejected[name] += 1
        where = f"{rejection.file}:{rejection.line}"
        tally.examples.setdefault(name, f"{where}: {rejection.field} {rejection.reason}")
    tally.rows += chunk.num_rows
    tally.unused += chunk.unused
    for event in chunk.events:
        if event.table:
            getattr(tally, event.table)[event.name] += event.number
        else:
            setattr(tally, event.name, getattr(tally, event.name) + event.number)
        if event.example:
            tally.examples.setdefault(f"{event.table} {event.name}".strip(), event.example)


def _reasons(tally: Tally) -> str:
    return "; ".join(f"{count} × {name}: {tally.examples[name]}" for name, count in tally.rejected.most_common(5))


def _nothing_left(config: PrepareConfig, streams: list[RowStream], tally: Tally) -> str:
    read = ", ".join(f"{stream.layout.format} because {stream.layout.why}" for stream in streams)
    unused = f"; columns not used: {', '.join(sorted(tally.unused))}" if tally.unused else ""
    names = " and ".join(config.inputs)
    return f"input = {names}; none of {tally.rows} groups is usable (format {read}{unused}): {_reasons(tally)}."


# --------------------------------------------------------------------------------------------------- between the passes


def _reward_kind(config: PrepareConfig, streams: list[RowStream], accepted: Accepted) -> RewardKind:
    """Meaning of the accepted groups' rewards: that of the inputs that have any.

    Raises:
        ConfigError: inputs mix scores and ranks, or an option for rewards meets labels.
    """
    holds, inputs = np.frombuffer(bytes(accepted.holds), np.uint8), np.frombuffer(bytes(accepted.inputs), np.uint16)
    kinds = {_kind_of(streams[number].layout) for number in np.unique(inputs[(holds & REWARDS) > 0])}
    require(
        len(kinds) <= 1,
        f"input = {config.input}; some have scores and some ranks, which are not comparable; prepare them separately.",
    )
    if kinds:
        return kinds.pop()
    for name, off in (("reward_noise", 0.0), ("reward_normalization", "none")):
        value = getattr(config, name)
        require(value == off, f"{name} = {value}; the data has labels but no rewards; remove it.")
    return "labels"


def _kind_of(layout: InputLayout) -> RewardKind:
    return "scores" if layout.reward_kind == "labels" else layout.reward_kind  # scores appear only after the first rows


def _reject_without_rewards(
    groups: StoredGroups, accepted: Accepted, kind: RewardKind, rejected: Path, output: Path, tally: Tally
) -> Int64:
    """Indices of the groups that have what most groups have; rejects the rest."""
    holds = np.frombuffer(bytes(accepted.holds), np.uint8)
    needed = LABELS if kind == "labels" else REWARDS
    lacking = np.flatnonzero((holds & needed) == 0)
    if len(lacking):
        name = "labels" if kind == "labels" else "rewards"
        reason = f"are missing, but {len(holds) - len(lacking)} other groups have them"
        with writing(output), rejected.open("a", encoding="utf-8") as file:
            for index in lacking.tolist():
                group = groups[index]
                path, _, line = group.where.rpartition(":")
                rejection = Rejection(file=path, line=int(line), group_id=group.group_id, field=name, reason=reason)
                file.write(rejection.as_json() + "\n")
                tally.rejected[name] += 1
                tally.examples.setdefault(name, f"{group.where}: {name} {reason}")
    usable = np.flatnonzero((holds & needed) > 0)
    labelled = int(((holds[usable] & LABELS) > 0).sum())
    if 0 < labelled < len(usable):
        tally.notes.append(f"labels: only {labelled:,} of {len(usable):,} groups have them, so all labels were dropped")
    return usable


def _check_inputs(
    config: PrepareConfig,
    accepted: npt.NDArray[np.uint16],
    usable: npt.NDArray[np.uint16],
    kind: RewardKind,
    tally: Tally,
) -> None:
    """Refuse an input without any usable group, rather than train on the other inputs only.

    Args:
        accepted: for each group with tokens, the index of its input
        usable: the same for those that have what most groups have

    Raises:
        DataError: names the input and its rejections.
    """
    for number in sorted({*range(len(config.inputs))} - {*usable.tolist()}):
        mixed = (
            "" if kind == "labels" or number not in accepted else "; inputs with rewards and inputs with labels alone do not mix"
        )
        raise DataError(
            f"input = {config.inputs[number]}; none of its groups is usable{mixed}; rejected in all inputs: "
            f"{_reasons(tally)}. Fix that input, or remove it."
        )


def _all_labelled(accepted: Accepted, usable: Int64) -> bool:
    return bool((np.frombuffer(bytes(accepted.holds), np.uint8)[usable] & LABELS).all())


# --------------------------------------------------------------------------------------------------- second pass


def _write(
    config: PrepareConfig,
    chat: Chat,
    format_name: str,
    kind: RewardKind,
    tally: Tally,
    folder: Path,
    batches: Iterable[pa.RecordBatch],
) -> PreparedInfo:
    """Write `groups.arrow` and `prepare.json`."""
    arrow = folder / GROUPS_FILE
    counts: dict[str, Any] = write_batches(arrow, batches)
    info = PreparedInfo(
        tokenizer_digest=chat.tokenizer.digest(),
        vocab_size=chat.tokenizer.vocab_size,
        end_token_ids=(chat.end_token_id,),
        reward_kind=kind,
        statistics=compute_statistics(StoredGroups(arrow)) | {"preparation": tally.as_dict()},
        config=to_dict(config) | {"format": format_name},
        **counts,
    )
    write_info(folder, info)
    return info


def _print_end(console: Console, summary: PrepareSummary, held_out: Path) -> None:
    print_summary(console, f"{summary.output}", summary.train)
    if summary.eval is not None:
        print_summary(console, f"{held_out} (held out)", summary.eval)
    print_tally(console, summary.tally)
    console.print(f"took {summary.seconds:.1f} s")
