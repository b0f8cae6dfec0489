"""Options of `mpo train` and `mpo reference`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mpo_megatron.config.checks import check_writable, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, and how its layers compute."""

    checkpoint: str
    """Megatron checkpoint folder written by `mpo convert`."""
    reference: str | None = None
    """Checkpoint of the reference policy π_ref; by default the one training starts from."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; optimizer states and master weights are float32 in both."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation; `auto` takes Transformer Engine when it is installed and a GPU is there."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Attention kernel: `sdpa` is exact and runs anywhere; `flex` and `varlen` (flash attention) need a GPU; `auto` chooses."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: nothing, the attention core, or every layer."""
    logprob_chunk: int = 1024
    """Response tokens whose vocabulary logits exist at one time."""

    def __post_init__(self) -> None:
        require(self.logprob_chunk >= 1, f"model.logprob_chunk = {self.logprob_chunk}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which groups a step sees, and how they are laid out in rows."""

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

    def __post_init__(self) -> None:
        require(self.groups_per_step >= 1, f"data.groups_per_step = {self.groups_per_step}; it must be at least 1.")
        require(self.row_tokens >= 2, f"data.row_tokens = {self.row_tokens}; a row holds at least two tokens.")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is cut over ranks; what is left of the world size is data parallelism."""

    tensor: int = 1
    """Tensor-parallel ranks: each holds a slice of every weight matrix."""
    pipeline: int = 1
    """Pipeline stages: each holds a run of layers."""
    context: int = 1
    """Context-parallel ranks: each computes a part of every row's tokens, and a part of the heads in attention."""
    sequence: bool | None = None
    """Sequence parallelism in norms and residuals; by default on when `tensor` > 1."""
    timeout_minutes: float = 30.0
    """A collective that hangs longer than this ends the run."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            require(getattr(self, name) >= 1, f"parallel.{name} = {getattr(self, name)}; it must be at least 1.")
        require(
            not (self.sequence and self.tensor == 1),
            "parallel.sequence = true needs parallel.tensor > 1; leave it out, or raise parallel.tensor.",
        )

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def row_parts(self) -> int:
        """Equal parts that a row's tokens are cut into, at most: a row's length is a multiple of it."""
        return self.tensor * self.context


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which loss over a group, with its hyper-parameters; `mpo losses` lists them."""

    name: str = "mpo"
    """Name of the loss."""
    params: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters that differ from the paper's defaults, for example `beta: 0.1`."""
    step: Literal["auto", "fused", "two_phase"] = "auto"
    """`fused`: loss and backward in one pass; `two_phase`: all log-probs first, then backward with the loss's coefficients."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
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
    """Decoupled weight decay; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    eps: float = 1e-8
    """AdamW's ε."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr = {self.lr}; it must be positive.")
        require(0 <= self.min_lr <= self.lr, f"optimizer.min_lr = {self.min_lr}; it must lie between 0 and optimizer.lr.")
        require(
            0 <= self.warmup_fraction < 1,
            f"optimizer.warmup_fraction = {self.warmup_fraction}; it must be at least 0 and below 1.",
        )
        require(self.weight_decay >= 0, f"optimizer.weight_decay = {self.weight_decay}; it must be 0 or more.")
        require(self.clip_grad >= 0, f"optimizer.clip_grad = {self.clip_grad}; it must be 0 (off) or positive.")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} = {getattr(self, name)}; it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int = 100
    """Save after this many steps, and always at the end; 0 saves only at the end."""
    keep: int = 2
    """Number of newest checkpoints kept."""
    resume: bool = True
    """Continue from the newest checkpoint in `output`, if there is one."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every = {self.every}; it must be 0 or more.")
        require(self.keep >= 1, f"checkpoint.keep = {self.keep}; at least the newest checkpoint is kept.")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics and samples go, besides the terminal and the files in the run's folder; docs/watching.md explains."""

    tensorboard: bool = False
    """Also write TensorBoard event files to `<output>/tensorboard`."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; WANDB_MODE=offline keeps everything in the run's folder until `wandb sync`."""
    wandb_run: str | None = None
    """Name of the Weights & Biases run."""
    mlflow_experiment: str | None = None
    """Also log to this MLflow experiment."""
    mlflow_uri: str | None = None
    """Where MLflow keeps runs: a server's address, or `sqlite:///file.db`; by default MLFLOW_TRACKING_URI. User name and password
    belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    num_samples: int = 4
    """Held-out groups logged as a table at every evaluation: responses, rewards and how their log-probs moved; 0: none."""
    seconds_between_lines: float = 5.0
    """Where output is no terminal, a step's line comes at most this often; 0: every step has its line."""

    def __post_init__(self) -> None:
        require(self.num_samples >= 0, f"logging.num_samples = {self.num_samples}; it must be 0 (none) or more.")
        require(
            self.seconds_between_lines >= 0,
            f"logging.seconds_between_lines = {self.seconds_between_lines}; it must be 0 (every step) or positive.",
        )
        require(
            self.mlflow_uri is None or self.mlflow_experiment is not None,
            "logging.mlflow_uri without logging.mlflow_experiment, which names what to log to; set both, or neither.",
        )
        require(
            urlsplit(self.mlflow_uri or "").password is None,
            "logging.mlflow_uri holds a password, which would be saved with the run; take it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        )


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """SPO's regulariser: β · token-wise KL(π ‖ π_ref) on samples of the policy as it trains (SPO, Eq. 15)."""

    kl_weight: float = 0.0
    """β, added to any loss; 0 samples nothing. The paper tries 0.01 and 0.1."""
    every: int = 8
    """T: sample again after this many steps, and keep the samples until then."""
    num_samples: int = 32
    """Samples per batch, for prompts of the last T steps."""
    max_tokens: int = 512
    """Longest sample, its end token included."""
    temperature: float = 1.0
    """Sampling temperature; anything but 1 is not the policy's own distribution."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples, on one rank per model replica, from the live weights: the embedded model, or vLLM beside the training."""

    def __post_init__(self) -> None:
        require(self.kl_weight >= 0, f"online.kl_weight = {self.kl_weight}; it must be 0 (off) or positive.")
        for name in ("every", "num_samples", "max_tokens"):
            require(getattr(self, name) >= 1, f"online.{name} = {getattr(self, name)}; it must be at least 1.")
        require(self.temperature > 0, f"online.temperature = {self.temperature}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`mpo train`: train a policy on groups."""

    output: str
    """The run's folder: checkpoints, metrics, final configuration."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    epochs: float = 1.0
    """Passes over the training groups."""
    max_steps: int | None = None
    """Number of optimizer steps; replaces `epochs`."""
    eval_every: int = 50
    """Evaluate on the held-out groups after this many steps, before the first and after the last; 0: only these two."""
    seed: int = 1234
    """Seed of data order, sampling and initialisation."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"epochs = {self.epochs}; it must be positive.")
        require(self.max_steps is None or self.max_steps >= 1, f"max_steps = {self.max_steps}; it must be at least 1.")
        require(self.eval_every >= 0, f"eval_every = {self.eval_every}; it must be 0 or more.")


def check_ranks(parallel: ParallelConfig, world_size: int) -> None:
    """Raise `ConfigError` unless the model-parallel sizes divide the number of ranks."""
    sizes = (parallel.tensor, parallel.pipeline, parallel.context)
    model_ranks = math.prod(sizes)
    require(
        world_size % model_ranks == 0,
        f"parallel.tensor × parallel.pipeline × parallel.context = {' × '.join(map(str, sizes))} = {model_ranks} does not "
        f"divide the number of ranks, {world_size}; start a multiple of {model_ranks} ranks (torchrun --nproc-per-node).",
    )


def validate_train(config: TrainConfig, world_size: int) -> None:
    """Checks across fields and against the file system that need no model: run them before anything loads.

    Raises:
        ConfigError: naming the field, the rule and the fix.
    """
    check_ranks(config.parallel, world_size)
    for name, folder in (("model.checkpoint", config.model.checkpoint), ("model.reference", config.model.reference)):
        if folder is None:
            continue
        require(Path(folder).is_dir(), f"{name} = {folder}; no such folder; write it with `mpo convert`.")
        require(
            (Path(folder) / "megatron").is_dir(),
            f"{name} = {folder} holds no Megatron checkpoint; convert it first: "
            f"`mpo convert --input {folder} --output {folder.rstrip('/')}-megatron`.",
        )
    for name, folder in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if folder is not None:
            require(
                (Path(folder) / "prepare.json").is_file(),
                f"{name} = {folder}; no prepared groups there; write them with `mpo prepare`.",
            )
    check_writable(Path(config.output), "output")
