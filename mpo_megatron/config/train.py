"""Options of `mpo train` and `mpo reference`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from mpo_megatron.config.checks import (
    check_checkpoint,
    check_function,
    check_seed,
    check_writable,
    require,
)
from mpo_megatron.config.experts import ExpertsConfig
from mpo_megatron.config.lora import LoraConfig
from mpo_megatron.config.model import ADAPTER_OFF, ModelConfig
from mpo_megatron.config.online import OnlineConfig
from mpo_megatron.config.parallel import ParallelConfig
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section, prefix="data."):
    """The groups of a step, and their layout in rows."""

    train: str
    """Folder with prepared groups (`mpo prepare`)."""
    eval: str | None = None
    """Folder with held-out prepared groups."""
    groups_per_step: int = 128
    """Global batch: groups (prompts) per optimizer step, over all data-parallel ranks."""
    row_tokens: int = 8192
    """Token budget of one packed row, which is one micro-batch."""
    layout: Literal["shared", "unshared"] = "shared"
    """`shared`: a group's prompt is computed once; `unshared`: once per response (the baseline)."""
    shuffle: bool = True
    """Draw a new order every epoch, from `seed`."""
    first_step: int = 0
    """Step, counted from 0, at which these groups replace earlier ones: a run that has completed exactly that many steps
    continues with them (segments of OnMC-PO)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.groups_per_step >= 1, f"data.groups_per_step = {self.groups_per_step}; it must be at least 1.")
        require(self.row_tokens >= 2, f"data.row_tokens = {self.row_tokens}; a row holds at least two tokens.")
        require(self.first_step >= 0, f"data.first_step = {self.first_step}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, prefix="loss."):
    """The loss over a group and its hyper-parameters; `mpo losses` lists them."""

    name: str = "mpo"
    """Name of the loss."""
    function: str | None = None
    """Your own loss instead: `path/to/file.py:function` or `package.module:function`; see docs/extending.md."""
    params: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters that differ from the paper's defaults, for example `beta: 0.1`."""
    step: Literal["auto", "fused", "two_phase"] = "auto"
    """`fused`: loss and backward in one pass; `two_phase`: all log-probs first, then backward with the loss's coefficients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.function is not None:
            check_function("loss.function", self.function)
            require(
                self.name == LossConfig.name,
                f"loss.name = {self.name} with loss.function = {self.function}, which replaces it; remove one of them.",
            )

    @property
    def title(self) -> str:
        """The loss's display name: its name, or the file and name of a function."""
        return self.name if self.function is None else Path(self.function).name


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section, prefix="optimizer."):
    """AdamW through Megatron's distributed optimizer, and the learning-rate schedule."""

    lr: float = 5e-7
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_fraction: float = 0.1
    """Share of the run's steps in which the learning rate rises from 0 to `lr`."""
    weight_decay: float = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    beta1: float = 0.9
    """AdamW's β₁: decay of the first moment."""
    beta2: float = 0.95
    """AdamW's β₂: decay of the second moment."""
    eps: float = 1e-8
    """AdamW's ε."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    overlap: Literal["auto", "none", "gradients", "all"] = "auto"
    """What data-parallel ranks communicate during computation: `gradients`, during the last row's backward pass; `all`, also the
    updated weights during the next forward pass. `auto`: `all` on several GPUs, otherwise `none`."""
    cpu_offload: float = 0.0
    """Share of the optimizer's states to keep and update in host memory; needs a GPU, Transformer Engine and bf16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.lr < math.inf, f"optimizer.lr = {self.lr}; it must be positive, and finite.")
        require(0 <= self.min_lr <= self.lr, f"optimizer.min_lr = {self.min_lr}; it must be between 0 and optimizer.lr.")
        require(
            0 <= self.warmup_fraction < 1,
            f"optimizer.warmup_fraction = {self.warmup_fraction}; it must be at least 0 and below 1.",
        )
        require(
            0 <= self.cpu_offload <= 1, f"optimizer.cpu_offload = {self.cpu_offload}; it is a share, between 0 (off) and 1 (all)."
        )
        require(self.weight_decay >= 0, f"optimizer.weight_decay = {self.weight_decay}; it must be 0 or more.")
        require(self.clip_grad >= 0, f"optimizer.clip_grad = {self.clip_grad}; it must be 0 (off) or positive.")
        require(self.eps > 0, f"optimizer.eps = {self.eps}; it must be positive.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} = {getattr(self, name)}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section, prefix="checkpoint."):
    """When to save the run, and what to keep."""

    every: int = 100
    """Save after this many steps, and always at the end; 0 saves only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 0
    """Number of additional checkpoints to keep: those with the best `best_metric`; only evaluated steps compete."""
    best_metric: str = "eval/accuracy"
    """Held-out metric that ranks checkpoints."""
    best_is: Literal["largest", "smallest"] = "largest"
    """Whether the largest or smallest value of `best_metric` is best."""
    asynchronous: bool = True
    """Write in the background while training continues; needs host memory for a copy of this rank's part."""
    resume: bool = True
    """Resume from the newest complete checkpoint in `output`, if any. false: move existing ones aside, except when torchrun or
    Slurm restarts the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.every >= 0, f"checkpoint.every = {self.every}; it must be 0 or more.")
        require(self.keep >= 1, f"checkpoint.keep = {self.keep}; at least the newest checkpoint is kept.")
        require(self.keep_best >= 0, f"checkpoint.keep_best = {self.keep_best}; it must be 0 (off) or more.")
        require(
            self.best_metric.startswith("eval/"),
            f"checkpoint.best_metric = {self.best_metric}; it must be a held-out metric, such as eval/accuracy or eval/loss.",
        )


@dataclass(frozen=True, kw_only=True)
class FaultConfig(Section, prefix="faults."):
    """Reactions to faults, and when the run stops by itself (docs/faults.md)."""

    on_nan: Literal["stop", "skip"] = "stop"
    """Reaction to a loss or gradient norm that is not finite: end the run, or skip the update."""
    on_spike: Literal["log", "skip", "stop"] = "log"
    """Reaction to a loss or gradient norm far above those of the last steps: log it, skip the update, or end the run."""
    spike_threshold: float = 10.0
    """A spike is this many (robust) standard deviations above the median of the last `spike_window` steps."""
    spike_window: int = 32
    """Number of steps that a spike is compared with; detection starts after half of them."""
    max_skips: int = 5
    """Consecutive skipped steps that end the run."""
    walltime_minutes: float | None = None
    """Save and stop before the run reaches this age; by default before SLURM_JOB_END_TIME, if Slurm sets it."""
    hang_minutes: float = 20.0
    """End a rank without progress for this long, after it writes its stacks to `<output>/incidents`; 0: never."""
    requeue_code: int = 75
    """Exit code of a run that saved and stopped on request; the same command resumes it. (75: EX_TEMPFAIL.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.spike_threshold > 0, f"faults.spike_threshold = {self.spike_threshold}; it must be positive.")
        require(self.spike_window >= 8, f"faults.spike_window = {self.spike_window}; it must be at least 8.")
        require(self.max_skips >= 1, f"faults.max_skips = {self.max_skips}; it must be at least 1.")
        require(
            self.walltime_minutes is None or self.walltime_minutes > 0,
            f"faults.walltime_minutes = {self.walltime_minutes}; it must be positive.",
        )
        require(self.hang_minutes >= 0, f"faults.hang_minutes = {self.hang_minutes}; it must be 0 (off) or positive.")
        require(3 <= self.requeue_code <= 255, f"faults.requeue_code = {self.requeue_code}; it must be in 3 … 255.")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section, prefix="logging."):
    """Destinations of metrics and samples, besides the terminal and the run's folder (docs/watching.md)."""

    tensorboard: bool = False
    """Also write TensorBoard event files to `<output>/tensorboard`."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; WANDB_MODE=offline keeps everything in the run's folder until `wandb sync`."""
    wandb_run: str | None = None
    """Name of the Weights & Biases run."""
    mlflow_experiment: str | None = None
    """Also log to this MLflow experiment."""
    mlflow_uri: str | None = None
    """MLflow's tracking URI: a server's address, or `sqlite:///file.db`; by default MLFLOW_TRACKING_URI. User name and password
    belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    num_samples: int = 4
    """Number of held-out groups logged as a table at every evaluation: responses, rewards and changes of log-probs; 0: none."""
    reference_metrics: bool = False
    """Measure `margin`, `accuracy`, log-ratios and `kl` also for a loss that reads no reference log-probs; this takes one more
    forward pass over the groups. Other losses always have these metrics."""
    seconds_between_lines: float = 5.0
    """Minimum seconds between two steps' lines where output is not a terminal; 0: a line for every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_samples >= 0, f"logging.num_samples = {self.num_samples}; it must be 0 (none) or more.")
        require(
            self.seconds_between_lines >= 0,
            f"logging.seconds_between_lines = {self.seconds_between_lines}; it must be 0 (every step) or positive.",
        )
        require(
            self.mlflow_uri is None or self.mlflow_experiment is not None,
            "logging.mlflow_uri without logging.mlflow_experiment, which names the experiment; set both, or neither.",
        )
        require(
            urlsplit(self.mlflow_uri or "").password is None,
            "logging.mlflow_uri holds a password, which would be saved with the run; remove it, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """`mpo train`: train a policy on groups."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "output",
        "model.checkpoint",
        "data.train",
        "data.eval",
        "loss.name",
        "loss.params",
        "optimizer.lr",
        "epochs",
        "parallel.tensor",
        "data.groups_per_step",
    )

    output: str
    """The run's folder: checkpoints, metrics, final configuration."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    epochs: float = 1.0
    """Passes over the training groups."""
    max_steps: int | None = None
    """Number of optimizer steps; replaces `epochs`."""
    stop_after: int | None = None
    """Save and end after this many steps; the schedule still runs to the last step, so that a later start can continue."""
    eval_every: int = 50
    """Steps between evaluations on the held-out groups; evaluations also run before the first and after the last step; 0: only
    then."""
    seed: int = 1234
    """Seed of data order, sampling and initialisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.epochs < math.inf, f"epochs = {self.epochs}; it must be positive, and finite.")
        require(self.max_steps is None or self.max_steps >= 1, f"max_steps = {self.max_steps}; it must be at least 1.")
        require(
            self.stop_after is None or self.stop_after > self.data.first_step,
            f"stop_after = {self.stop_after}; it must be larger than data.first_step = {self.data.first_step}.",
        )
        require(self.eval_every >= 0, f"eval_every = {self.eval_every}; it must be 0 or more.")
        check_seed(self.seed)


def validate_folders(config: TrainConfig) -> None:
    """Check that the run's inputs exist, and that its folder can be written to.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    for name, folder in (("model.checkpoint", config.model.checkpoint), ("model.reference", config.model.reference)):
        if folder is not None and folder != ADAPTER_OFF:
            check_checkpoint(Path(folder), name)
    _check_groups("data.train", config.data.train)
    validate_held_out(config)
    check_writable(Path(config.output), "output")


def validate_held_out(config: TrainConfig) -> None:
    """Check that held-out groups exist, if they are set or needed.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    if config.data.eval is not None:
        _check_groups("data.eval", config.data.eval)
    require(
        config.checkpoint.keep_best == 0 or config.data.eval is not None,
        f"checkpoint.keep_best = {config.checkpoint.keep_best} needs held-out groups to tell the best; set data.eval.",
    )


def _check_groups(name: str, folder: str) -> None:
    require(
        (Path(folder) / "prepare.json").is_file(),
        f"{name} = {folder}; no prepared groups there; write them with `mpo prepare`.",
    )
