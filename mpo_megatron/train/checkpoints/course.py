"""What a run's result depends on, and its comparison with the newest checkpoint. Needs no torch.

`mpo train` calls `check_early` before any slow import, so that a run that cannot resume is refused at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, ExpertsConfig, LossConfig, TrainConfig, is_hugging_face, require
from mpo_megatron.config.checks import find_change
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.loader import steps_per_epoch
from mpo_megatron.data.store import load_groups
from mpo_megatron.files import digests
from mpo_megatron.files.functions import source_digest
from mpo_megatron.hf.identity import base_digest as digest_of_base
from mpo_megatron.hf.identity import is_adapter_folder, weights_digest
from mpo_megatron.train.checkpoints.step_folders import RunState, complete_steps, damaged_steps, read_state

FREE = {
    "optimizer": ("overlap", "cpu_offload"),
    "online": ("engine", "vllm", "endpoint", "weights_address"),
    "experts": ("measure_drift",),
}
"""Options of these sections that affect only rounding; a run depends on all their other options."""


def fixed_options(
    config: TrainConfig,
    *,
    total_steps: int,
    data_digest: str,
    reference_digest: str,
    loss: dict[str, Any],
    lora: dict[str, Any] | None = None,
    base_digest: str | None = None,
) -> dict[str, Any]:
    """Options and digests that must not change when a run resumes, as JSON values, named as in the configuration.

    Excludes options that affect only rounding (layout, rows, fused or two-phase steps), monitoring, retention or logging.

    Args:
        loss: from `loss_options`, with all hyper-parameters
        lora: shape of the trained adapter; None if all weights are trained
        base_digest: identity of its base weights
    """
    model = config.model
    fixed: dict[str, Any] = {
        "seed": config.seed,
        "number of steps": total_steps,
        "groups of data.train": data_digest,
        "data": {"groups_per_step": config.data.groups_per_step, "shuffle": config.data.shuffle},
        "reference model": reference_digest,
        "model": {"precision": model.precision, "fp8": model.fp8, "fp8_bf16_layers": model.fp8_bf16_layers},
        "loss": loss,
        "optimizer": asdict(config.optimizer),
        "experts": asdict(config.experts),
        "online": asdict(config.online) if config.online.kl_weight else {"kl_weight": 0.0},
        **({} if lora is None else {"lora": _without_default(lora), "base model": base_digest}),
    }
    for section, names in FREE.items():
        for name in names:
            fixed[section].pop(name, None)
    as_read: dict[str, Any] = json.loads(json.dumps(fixed))
    return as_read


def loss_options(config: LossConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of the loss that a run's result depends on: name, hyper-parameters, and the file of a user's own loss.

    Raises:
        ConfigError: the file does not exist.
    """
    options: dict[str, Any] = {"name": config.title, "params": params}
    if config.function is not None:
        options[f"digest of {config.title.rpartition(':')[0]}"] = source_digest("loss.function", config.function)
    return options


def count_steps(config: TrainConfig, num_groups: int) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps or max(1, round(config.epochs * steps_per_epoch(num_groups, config.data.groups_per_step)))


def check_early(config: TrainConfig, *, resumes: bool) -> None:
    """Refuse a damaged model, or resuming with other options, data or models, by reading small files only.

    Default hyper-parameters of the loss are compared later, because only the losses know them; Hugging Face folders too, because
    they are converted first.

    Args:
        resumes: False for a command that computes only what precedes a run
    Raises:
        ConfigError: names the damaged file, or the first value that changed.
    """
    checkpoint = Path(config.model.checkpoint)
    off = config.model.reference == ADAPTER_OFF
    reference = checkpoint if off else Path(config.model.reference or checkpoint)
    for folder in {checkpoint, reference}:
        if not is_hugging_face(folder):
            digests.require_list(folder)
            digests.check_folder(folder, weights=False)
    newest = newest_state(config) if resumes else None
    if newest is None:
        return
    saved, folder = newest
    data = load_groups(config.data.train)
    loss = loss_options(config.loss, config.loss.params)
    before = saved.fixed.get("loss", {})
    if before.get("name") == config.loss.title:  # the losses themselves refuse unknown names and non-numbers
        given = {name: value for name, value in config.loss.params.items() if type(value) in (int, float)}
        loss["params"] = {name: given.get(name, value) for name, value in before["params"].items()}
    fixed = fixed_options(
        config,
        total_steps=count_steps(config, len(data)),
        data_digest=data.info.data_digest,
        reference_digest=saved.fixed.get("reference model", "")
        if is_hugging_face(reference)
        else (digest_of_base if off else weights_digest)(reference),
        loss=loss,
        lora=expected_adapter(config, saved),
        base_digest=saved.fixed.get("base model"),  # compared when the base model is read
    )
    check_start(fixed, config.data.first_step, saved, folder)


def _without_default(lora: dict[str, Any]) -> dict[str, Any]:
    """An adapter's shape as saved by versions without `lora.quantize`."""
    return {name: value for name, value in lora.items() if (name, value) != ("quantize", "none")}


def expected_adapter(config: TrainConfig, saved: RunState) -> dict[str, Any] | None:
    """The adapter's shape from the options, completed from the saved state; None if all weights are trained."""
    lora = config.lora
    if not lora.rank:
        return saved.fixed.get("lora") if is_adapter_folder(Path(config.model.checkpoint)) else None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    shape = {"rank": lora.rank, "alpha": alpha, "rslora": lora.rslora}
    return {**saved.fixed.get("lora", {}), **shape, **({} if lora.quantize is None else {"quantize": lora.quantize})}


def newest_state(config: TrainConfig) -> tuple[RunState, Path] | None:
    """State and folder of the checkpoint to resume from; None if the run would start, or look for an older one.

    Raises:
        ConfigError: no checkpoint is intact, or another version wrote it.
    """
    run = Path(config.output)
    steps = complete_steps(run) if config.checkpoint.resume else []
    if not steps:
        require_whole([], damaged_steps(run) if config.checkpoint.resume else [], run)
        return None
    try:
        return read_state(steps[-1])[0], steps[-1]
    except digests.DamagedError:  # the ranks look for an older one, and report it
        return None


def require_whole(steps: list[Path], damaged: list[str], run: Path) -> None:
    """Refuse to start over if every checkpoint is damaged.

    Raises:
        DamagedError: checkpoints exist, but none is intact.
    """
    if not steps and damaged:
        raise digests.DamagedError(
            f"{run / 'checkpoints'}: no checkpoint is complete; damaged: {', '.join(damaged)}. Copy a complete one there, "
            "or start over with checkpoint.resume = false or another output."
        )


def check_start(fixed: dict[str, Any], first_step: int, saved: RunState, folder: Path) -> None:
    """Refuse to resume from a step's folder if the result would differ.

    Raises:
        ConfigError: names the first value that changed.
    """
    check_first_step(first_step, saved.step, folder)
    before = saved.fixed
    if saved.step == first_step:  # earlier steps may have used other groups
        before = {**before, "groups of data.train": fixed["groups of data.train"]}
    check_same_run(before, fixed, folder)


def check_same_run(before: dict[str, Any], fixed: dict[str, Any], folder: Path) -> None:
    """Refuse to continue a run if the result would differ.

    Raises:
        ConfigError: names the first value that changed.
    """
    if "experts" in fixed:  # earlier versions had no such options
        defaults = {name: value for name, value in asdict(ExpertsConfig()).items() if name in fixed["experts"]}
        before = {"experts": defaults, **before}
    changed = find_change(before, fixed)
    if changed is not None:
        name, then, now = changed[0], _shorten(changed[1]), _shorten(changed[2])
        raise ConfigError(
            f"cannot resume from {folder}: it was trained with {name} = {then}, now it is {now}; use the old value, or start "
            f"a new run: another output (from these weights: model.checkpoint = {folder}), or checkpoint.resume = false."
        )


def _shorten(value: Any) -> Any:
    """A value as a message shows it: of a digest the beginning, which is enough to tell two apart."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) is not None
    return f"digest {value[:8]}…" if is_digest else value


def check_first_step(first_step: int, done: int, folder: Path) -> None:
    """Refuse data that starts at a step that the run has not reached.

    Raises:
        ConfigError: names both steps.
    """
    require(
        first_step <= done,
        f"data.first_step = {first_step}, but {folder} is at step {done}; train the steps before with their own data first "
        "(mpo iterate does, if train.json of the round before is removed).",
    )
