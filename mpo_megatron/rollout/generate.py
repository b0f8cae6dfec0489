"""`mpo generate`: draws K responses to each prompt, streamed to disk, resumable, in shards.

    mpo generate --prompts prompts.jsonl --model runs/mpo --output rounds/1/samples --num_responses 8

Each finished group is written to samples.jsonl at once. When all are finished, the lines are sorted in the order of the prompts
and generate.json appears. Response k of a group is drawn from the seed (seed, group id, k, attempt), so a killed run, or another
number of shards, sends the same requests. An unusable response (filtered, aborted, no text) is redrawn with the next attempt's
seed, and finally left out, without affecting the others. Failures go to failures.jsonl with the responses that did arrive; the
next run retries them.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpo_megatron.config import GenerateConfig, require
from mpo_megatron.data.chat import Chat, check_templated
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.lock import hold
from mpo_megatron.hf.fingerprint import model_digest
from mpo_megatron.rollout.draws import DrawnGroup, answer, keep_arrived
from mpo_megatron.rollout.engines import Engine, Sampling
from mpo_megatron.rollout.generate_summary import REJECTED_FILE, print_prompts, print_summary, summarize
from mpo_megatron.rollout.models import (
    base_folder,
    hugging_face_folder,
    is_adapter,
    is_peft,
    locate_model,
    read_model_settings,
    side_files,
)
from mpo_megatron.rollout.prompts import PromptSet, load_prompts
from mpo_megatron.rollout.records import (
    FAILURES_FILE,
    GENERATE_FILE,
    SAMPLES_FILE,
    IndexedLines,
    LineWriter,
    Record,
    check_started,
    join_lines,
    read_ids,
    read_lines,
    read_summary,
    write_summary,
)
from mpo_megatron.rollout.shards import Shard, choose_shard, join_shards
from mpo_megatron.rollout.validation import check_generate
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.progress import show_progress

STARTED_FILE = "generate.started.json"
"""What the folder's lines were generated with; a run with other settings is refused."""
_WINDOW = 1024
"""Groups passed to the engine together: it sorts them by length, and redraws wait for the others."""


def generate(config: GenerateConfig, console: Console | None = None) -> Path:
    """Write `<output>/samples.jsonl` and `generate.json`, or this shard's files; the path of the lines.

    Raises:
        ConfigError: a setting does not fit the model, the prompts or the folder's content.
        DataError: the prompts cannot be read, too many failed, or the output cannot be written; generated groups stay.
    """
    console = console or Console()
    check_generate(config)
    shard, output = choose_shard(config.shard), Path(config.output)
    checkpoint = locate_model(config.model, tokenizer_only=not reads_weights(config))
    require(
        not config.load_adapter or is_adapter(checkpoint),
        f"load_adapter = true, but model = {config.model} is no adapter; name a run with lora.rank or a PEFT folder, or remove "
        "load_adapter.",
    )
    require(
        not config.load_weights or not is_adapter(checkpoint),
        f"load_weights = true, but model = {config.model} is an adapter; set load_adapter instead, or merge it (mpo convert "
        "--merge true).",
    )
    tokenizer = load_tokenizer(config.tokenizer or side_files(checkpoint), config.chat_template)
    chat = Chat(
        tokenizer,
        system_prompt=config.system_prompt,
        variables=config.chat_template_kwargs,
        templated=config.prompt_format == "templated",
    )
    prompts = load_prompts(config.prompts, chat, max_prompt_tokens=config.max_prompt_tokens, max_prompts=config.max_prompts)
    if config.prompt_format == "auto":
        check_templated([record["prompt"] for record in itertools.islice(prompts.records, 64)], chat)
    sampling = _build_sampling(config, chat, checkpoint)
    if config.engine != "openai" or config.load_weights:
        _check_context(prompts, config.max_tokens, checkpoint)
    identity = _identity(config, checkpoint, tokenizer, prompts, sampling)
    check_started(output, STARTED_FILE, identity, "samples*.jsonl")
    replace_file(output / REJECTED_FILE, (item.as_json().encode() + b"\n" for item in prompts.rejections))
    print_prompts(console, config, prompts, shard)
    samples = output / shard.name(SAMPLES_FILE)
    if not (output / shard.name(GENERATE_FILE)).is_file():
        with hold(output / f".{samples.name}.lock", samples):
            _generate_shard(config, checkpoint, chat, prompts, sampling, shard)
            _join([samples], shard, prompts, identity, config)
    parts = [output / name for name in shard.all_names(SAMPLES_FILE)]
    whole = replace(config, shard=None)
    if not join_shards(output, shard, GENERATE_FILE, lambda: _join(parts, Shard(0, 1), prompts, identity, whole), console):
        return samples
    print_summary(console, output / SAMPLES_FILE, read_summary(output / GENERATE_FILE))
    return output / SAMPLES_FILE


def _build_sampling(config: GenerateConfig, chat: Chat, checkpoint: Path) -> Sampling:
    name = "generation_config.json"
    settings = read_model_settings(checkpoint, name) if (side_files(checkpoint) / name).is_file() else {}
    eos = settings.get("eos_token_id")
    ends = {chat.end_token_id, chat.tokenizer.eos_id, *(eos if isinstance(eos, list) else [eos])}
    return Sampling(
        num_responses=config.num_responses,
        temperature=config.temperature,
        temperatures=tuple(config.temperatures),
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        stop=tuple(config.stop),
        stop_token_ids=tuple(sorted(end for end in ends if end is not None)),
        seed=config.seed,
    )


def _check_context(prompts: PromptSet, max_tokens: int, checkpoint: Path) -> None:
    """Refuse a longest prompt plus response beyond the model's positions."""
    settings = read_model_settings(checkpoint)
    settings = settings.get("text_config", settings)
    limit = settings.get("max_position_embeddings")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    factor = rope.get("factor", 1.0)
    longest = prompts.longest
    if isinstance(limit, int):
        limit = int(limit * max(1.0, factor if isinstance(factor, int | float) else 1.0))
        require(
            longest + max_tokens <= limit,
            f"max_tokens = {max_tokens}; with the longest prompt's {longest} tokens that is more than the model's {limit} "
            f"positions; choose at most {limit - longest}, or lower max_prompt_tokens.",
        )


# --------------------------------------------------------------------------------------------------- the request


def reads_weights(config: GenerateConfig) -> bool:
    """Whether the engine loads the weights of `model`."""
    return config.engine != "openai" or config.load_adapter or config.load_weights


def _identity(
    config: GenerateConfig, checkpoint: Path, tokenizer: Tokenizer, prompts: PromptSet, sampling: Sampling
) -> dict[str, Any]:
    """All settings that determine the responses; runs with equal identities continue each other."""
    served = f"{config.endpoint.model} (api {config.endpoint.api})"
    own = model_digest(checkpoint) if reads_weights(config) else ""
    loaded = f"{served} with {'adapter' if config.load_adapter else 'weights'} {own}" if own else served
    model = loaded if config.engine == "openai" else own
    return {
        "engine": config.engine,
        "model": model,
        "tokenizer": tokenizer.digest(),
        "prompts": prompts.digest(),
        "sampling": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(sampling).items()
            if name != "logps"
        },
        "empty": config.empty,
        "duplicates": config.duplicates,
        "max_attempts": config.max_attempts,
    }


# --------------------------------------------------------------------------------------------------- groups


def _generate_shard(
    config: GenerateConfig, checkpoint: Path, chat: Chat, prompts: PromptSet, sampling: Sampling, shard: Shard
) -> None:
    """Answer the shard's prompts that have no line yet."""
    output = Path(config.output)
    samples, failures = (output / shard.name(name) for name in (SAMPLES_FILE, FAILURES_FILE))
    total = len(range(shard.part, len(prompts.records), shard.total))
    failed: dict[str, int] = {}
    """By id: the number of the prompt."""
    reasons = Counter[str]()
    uncontrolled: Record = {}
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(LineWriter(samples))
        pending = _find_pending(samples, prompts, shard)
        numbers = {prompts.group_ids[number]: number for number in pending}
        before = stack.enter_context(contextlib.closing(IndexedLines(failures))) if failures.is_file() else None
        groups = (
            DrawnGroup.begin(
                prompts.records[number],
                tuple(prompts.token_ids[number]),
                before.get(prompts.group_ids[number]) if before is not None else None,
            )
            for number in pending
        )
        start = 0
        if pending:
            title = "generating" if shard.total == 1 else f"generating {shard.part}/{shard.total}"
            with (
                contextlib.closing(_load_engine(config, checkpoint, chat, prompts, shard)) as engine,
                LineWriter(failures) as failure_lines,
                show_progress(title, len(pending), "prompts", "tokens") as advance,
            ):
                start = failures.stat().st_size
                uncontrolled = {"uncontrolled": list(names)} if (names := getattr(engine, "uncontrolled", ())) else {}
                while window := list(itertools.islice(groups, _WINDOW)):
                    for line in answer(engine, window, sampling, config):
                        if "error" in line:
                            failure_lines.write(line)
                            failed[line["group_id"]] = numbers[line["group_id"]]
                            reasons[line["error"]] += 1
                        else:
                            lines.write(line | uncontrolled)
                            advance(1, sum(response["num_tokens"] for response in line["responses"]))
        _settle_failures(failures, start, reasons, total, config.max_failed)
        for line in read_lines(failures) if failed else ():
            if line["responses"]:
                record = prompts.records[failed[line["group_id"]]]
                lines.write(keep_arrived(record, line, config.num_responses) | uncontrolled)


def _find_pending(samples: Path, prompts: PromptSet, shard: Shard) -> array[int]:
    """Numbers of the shard's prompts that have no line yet."""
    done = read_ids(samples)
    mine = range(shard.part, len(prompts.group_ids), shard.total)
    return array("q", [number for number in mine if prompts.group_ids[number] not in done])


def _settle_failures(path: Path, start: int, reasons: Counter[str], total: int, max_failed: float) -> None:
    """Keep exactly this run's failures, the lines from byte `start`; raise `DataError` if they exceed `max_failed`."""
    if not reasons:
        path.unlink(missing_ok=True)
        return
    with path.open("rb") as file:
        file.seek(start)
        replace_file(path, file)
    if reasons.total() > max_failed * total:
        worst = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        raise DataError(
            f"{reasons.total()} of {total} prompts failed: {worst}. They are in {path}, the others are kept: run the same "
            "command again to retry, or allow a share with max_failed."
        )


def _load_engine(config: GenerateConfig, checkpoint: Path, chat: Chat, prompts: PromptSet, shard: Shard) -> Engine:
    """The engine, with its model loaded."""
    if config.engine == "openai":
        from mpo_megatron.rollout.engines.endpoint import EndpointEngine

        adapter = hugging_face_folder(checkpoint) if config.load_adapter else None
        engine = EndpointEngine(config.endpoint, chat, adapter, keep_adapter=shard.total > 1)
        if not config.load_weights:
            return engine
        from mpo_megatron.rollout.engines.served_weights import ServedWeights

        return ServedWeights(
            engine,
            folder=hugging_face_folder(checkpoint),
            digest=model_digest(checkpoint),
            max_tokens=prompts.longest + config.max_tokens,
            output=Path(config.output),
        )
    folder, adapter = hugging_face_folder(checkpoint), None
    if is_peft(folder):
        folder, adapter = base_folder(folder), folder
    if config.engine == "vllm":
        from mpo_megatron.rollout.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, chat.tokenizer, config.vllm, adapter)
    from mpo_megatron.rollout.engines.embedded import EmbeddedEngine

    return EmbeddedEngine.load(folder, chat.tokenizer, config.transformers, adapter)


# --------------------------------------------------------------------------------------------------- completion


def _join(
    sources: Sequence[Path],
    shard: Shard,
    prompts: PromptSet,
    identity: Mapping[str, Any],
    config: GenerateConfig,
) -> None:
    """Sort the lines of a shard's file in the order of its prompts, then mark them complete."""
    output = Path(config.output)
    samples = output / shard.name(SAMPLES_FILE)
    join_lines(sources, samples, prompts.group_ids[shard.part :: shard.total])
    summary = summarize(samples, prompts, identity, config)
    write_summary(output / shard.name(GENERATE_FILE), summary)
