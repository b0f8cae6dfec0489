"""A run's inputs, opened and checked before any weights are loaded: the second half of `build_setup` (setup.py)."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpo_megatron import device
from mpo_megatron.config import ConfigError, TrainConfig, require, validate_experts
from mpo_megatron.config.experts import require_no_router_losses
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import Adapter, adapter_rules
from mpo_megatron.hf.adapter import AdapterRecord
from mpo_megatron.hf.identity import weights_digest
from mpo_megatron.hf.live_engine import validate_engine_layout
from mpo_megatron.hf.quantization import validate_quantization
from mpo_megatron.hf.recompute import validate_recompute
from mpo_megatron.model.architecture import resolve_model
from mpo_megatron.model.precision import validate_fp8
from mpo_megatron.model.recompute import check_offload_kernel
from mpo_megatron.stack.checks import require_working_gpus
from mpo_megatron.stack.packages import missing_for_live_vllm
from mpo_megatron.train.adapting import check_output_layer, choose_shape, find_record
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.checkpoints.course import count_steps
from mpo_megatron.train.checkpoints.step_folders import complete_steps, require_space
from mpo_megatron.train.metrics import REFERENCE_METRICS
from mpo_megatron.train.objective import Objective, build_objective, check_data, needs_reference
from mpo_megatron.train.optimizer import check_offload, choose_overlap
from mpo_megatron.train.setup import Setup
from mpo_megatron.train.tracking import check_installed


def open_inputs(config: TrainConfig, num_ranks: int, family: Family, padded_vocab_size: int, objective: Objective) -> Setup:
    """The rest of `build_setup`, which needs torch and Megatron-Core.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    require_working_gpus(config.model.backend)
    folder = Path(config.model.checkpoint)
    checkpoint.verify(folder)
    adapter = choose_shape(config, family)
    resolved = check_options(config, num_ranks, family, objective, adapter)
    record = None if adapter is None else find_record(config, adapter)
    if record is not None:
        checkpoint.verify(Path(record.base))
    base = None if record is None else Path(record.base)
    reference = base if base and config.model.reference == ADAPTER_OFF else Path(config.model.reference or folder)
    if reference not in (folder, base):
        check_reference(reference, family)
    train, held_out = open_groups(config, family, objective)
    total_steps = count_steps(config, len(train))
    check_space(config, total_steps, checkpoint_bytes(config, family, record))
    return Setup(
        given=config,
        config=resolved,
        num_ranks=num_ranks,
        family=family,
        padded_vocab_size=padded_vocab_size,
        model_digest=weights_digest(folder),
        reference_digest=weights_digest(reference),
        train=train,
        held_out=held_out,
        objective=objective,
        total_steps=total_steps,
        record=record,
    )


def check_training(config: TrainConfig, num_ranks: int, family: Family) -> Objective:
    """Check what `build_setup` refuses whatever the groups are, before the stages that make them; return the loss.

    Args:
        config: its model may be a Hugging Face folder
    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    require_working_gpus(config.model.backend)
    check_ranks(config.parallel, num_ranks)
    validate_experts(config.experts, num_experts=family.num_experts, loss_step=config.loss.step)
    objective = build_objective(config.loss)
    check_options(config, num_ranks, family, objective, choose_shape(config, family))
    return objective


def check_options(
    config: TrainConfig, num_ranks: int, family: Family, objective: Objective, adapter: Adapter | None
) -> TrainConfig:
    """Check everything that needs neither weights nor groups; return the configuration with its choices resolved.

    Args:
        adapter: the trained adapter; None if all weights are trained
    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    resolved = resolve(config, num_ranks, family)
    validate_recompute(config.model, config.parallel, family, from_engine=resolved.model.from_engine)
    check_offload_kernel(config.model)
    validate_fp8(config.model, config.parallel, family)
    check_offload(config.optimizer, config.model.precision, family)
    check_installed(config.logging)
    check_reference_uses(config, family, objective)
    check_engine(config, family)
    require(
        config.model.reference != ADAPTER_OFF or adapter is not None,
        "model.reference = adapter_off, but all weights are trained, so there is no adapter to switch off; set lora.rank, or "
        "name a checkpoint.",
    )
    if adapter is not None:
        check_output_layer(config, family, adapter)
        if adapter.quantize != "none":
            validate_quantization(family, resolved.model, config.parallel, samples=config.online.kl_weight > 0)
        require_no_router_losses(config.experts)
    return resolved


def check_reference_uses(config: TrainConfig, family: Family, objective: Objective) -> None:
    """Check that options about reference log-probs, or a reference model in memory, have an effect.

    Raises:
        ConfigError: one has none.
    """
    require(
        not config.model.resident_offload or objective.needs.token_kl or config.online.kl_weight > 0,
        "model.resident_offload = true, but no reference model is in memory; it has an effect with online.kl_weight "
        "or loss.params.regularizer = token_kl; remove it.",
    )
    best = config.checkpoint
    if best.keep_best and not needs_reference(objective, config, family.experts):
        require(
            best.best_metric.removeprefix("eval/") not in REFERENCE_METRICS,
            f"checkpoint.best_metric = {best.best_metric}, but loss.name = {config.loss.title} reads no reference "
            "log-probs to measure it with; set logging.reference_metrics = true, or checkpoint.best_metric = eval/loss and "
            "best_is = smallest.",
        )


def check_engine(config: TrainConfig, family: Family) -> None:
    """Check that the machine and the layout suit the engine that samples during training, if there is one.

    Raises:
        ConfigError: they do not.
    """
    if config.online.kl_weight == 0 or config.online.engine == "transformers":
        return
    missing = missing_for_live_vllm()
    require(missing is None, f"online.engine = {config.online.engine}, but {missing}; or set online.engine = transformers.")
    require(
        device.has_gpu(),
        f"online.engine = {config.online.engine}, but this machine has no GPU, and vLLM receives weights from GPUs only; set "
        "online.engine = transformers.",
    )
    validate_engine_layout(config.online.vllm, config.parallel, family)


def open_groups(config: TrainConfig, family: Family, objective: Objective) -> tuple[PreparedGroups, PreparedGroups | None]:
    """The groups to train on, and the held-out ones if any, checked against the model and the loss.

    Raises:
        ConfigError: names the field, the rule and the fix.
        DataError: a folder is missing or damaged.
    """
    tokenizer = load_tokenizer(config.model.checkpoint)
    train = open_some("data.train", config.data.train, config, tokenizer, family, objective)
    if config.data.eval is None:
        return train, None
    return train, open_some("data.eval", config.data.eval, config, tokenizer, family, objective)


def open_some(
    name: str, path: str, config: TrainConfig, tokenizer: Tokenizer, family: Family, objective: Objective
) -> PreparedGroups:
    """The groups that the option `name` gives, checked as in `open_groups`."""
    data, folder = load_groups(path), config.model.checkpoint
    again = f"mpo prepare --tokenizer {shlex.quote(folder)} …"
    require(
        data.info.tokenizer_digest == tokenizer.digest(),
        f"{name} = {path} was prepared with another tokenizer than that of model.checkpoint = {folder}; "
        f"prepare it again: {again}",
    )
    require(
        data.info.vocab_size <= family.vocab_size,
        f"{name} = {path} has token ids up to {data.info.vocab_size - 1}, but the model has {family.vocab_size} embeddings; "
        f"prepare it again with the model's tokenizer: {again}",
    )
    check_lengths(data, config.data.row_tokens, name)
    check_positions(data, family, name)
    check_data(objective, has_rewards=data.info.reward_kind != "labels", has_labels=data.info.has_labels, where=path)
    return data


def resolve(config: TrainConfig, num_ranks: int, family: Family) -> TrainConfig:
    """The configuration with every choice resolved that is the same for all steps and ranks.

    Raises:
        ConfigError: the machine lacks something that the configuration requests.
    """
    parallel = config.parallel
    overlap = choose_overlap(config.optimizer, num_ranks // (parallel.tensor * parallel.pipeline))
    return replace(
        config,
        model=resolve_model(config.model, family),
        parallel=replace(parallel, sequence=parallel.sequence_parallel),
        optimizer=replace(config.optimizer, overlap=overlap),  # type: ignore[arg-type]
    )


def checkpoint_bytes(config: TrainConfig, family: Family, record: AdapterRecord | None) -> int:
    """Size of one of the run's checkpoints."""
    rules = None if record is None else adapter_rules(family, record.adapter)
    return checkpoint.estimate_bytes(Path(config.model.checkpoint), config.model.precision, rules, family.num_hidden_layers)


def check_space(config: TrainConfig, total_steps: int, size: int) -> None:
    """Check that the disk has room for all checkpoints that exist at the same time, besides existing ones.

    Args:
        size: bytes of a checkpoint
    Raises:
        ConfigError: it has not.
    """
    settings = config.checkpoint
    saves = math.ceil(total_steps / settings.every) if settings.every else 1
    most = min(saves, settings.keep + settings.keep_best + 1)  # while one is written, all kept ones still exist
    there = len(complete_steps(Path(config.output))) if settings.resume else 0
    missing = max(1, most - there)
    require_space(
        Path(config.output) / "checkpoints", missing * size, f"room for {missing} checkpoints of about {size / 1e9:,.3f} GB"
    )


def check_reference(folder: Path, policy: Family) -> None:
    """Check that a separate reference model has the policy's architecture, because it is loaded into the same modules.

    Raises:
        ConfigError: names a feature that differs.
    """
    checkpoint.verify(folder)
    reference = load_family(folder / "hf")
    name = policy.difference(reference)
    if name is None:
        return
    ours, theirs = getattr(policy, name), getattr(reference, name)
    values = f"{name} = {theirs}, but model.checkpoint has {ours}" if isinstance(ours, int | float | str) else f"other {name}"
    raise ConfigError(f"model.reference = {folder} has {values}; use a reference of the same architecture.")


def check_positions(data: PreparedGroups, family: Family, name: str) -> None:
    """Check that no sequence is so long that `transformers` would change its rotary frequencies.

    A prompt is computed once for responses of all lengths, so its keys cannot have different frequencies for each.

    Raises:
        ConfigError: names the longest group.
    """
    limits = [rope.limit for rope in family.ropes if rope.limit is not None]
    if not limits:
        return
    tokens = data.prompt_lengths() + np.maximum.reduceat(data.all_response_lengths(), data.response_offsets()[:-1])
    worst = int(tokens.argmax())
    require(
        tokens[worst] <= min(limits),
        f"{name} = {data.path}: group {data[worst].group_id} has a prompt and response of {tokens[worst]} tokens; beyond "
        f"{min(limits)} (max_position_embeddings) the model's dynamic rotary embedding depends on the sequence; prepare the data "
        "with smaller limits.",
    )


def check_lengths(data: PreparedGroups, row_tokens: int, name: str) -> None:
    """Check that every prompt fits into a row with any one of its responses.

    Raises:
        ConfigError: names the longest group.
    """
    longest = np.maximum.reduceat(data.all_response_lengths(), data.response_offsets()[:-1])
    tokens = data.prompt_lengths() + longest - 1  # a response's last token is never an input
    worst = int(tokens.argmax())
    require(
        tokens[worst] <= row_tokens,
        f"data.row_tokens = {row_tokens} is too short for {name} = {data.path}: group {data[worst].group_id} has a prompt and "
        f"response of {tokens[worst]} tokens; raise data.row_tokens, or prepare the data with smaller limits.",
    )
