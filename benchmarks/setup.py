"""Models with random weights in the shapes of real ones, groups of random tokens, and training steps on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PretrainedConfig, Qwen2Config, Qwen3_5TextConfig

from mpo_megatron import device
from mpo_megatron.config import LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.data.packing import PromptLayout, Row
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families import read_family
from mpo_megatron.hf.flops import FlopModel, build_flop_model
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import Logps, Objective, build_objective
from mpo_megatron.train.step import fused_step, prepare_schedules

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": (4, 2), "vocab_size": 512},
    # For two cores; the output layer's share of the work is similar to Qwen2.5-1.5B's.
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "heads": (8, 2), "vocab_size": 2048},
    # Matrix products as wide as those of Qwen2.5-3B: between ranks, a token's data grows less than its work.
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "heads": (16, 4), "vocab_size": 8192},
    # Three Gated DeltaNets, then attention; proportions of Qwen3.5-0.8B.
    "hybrid": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4, "heads": (4, 1), "vocab_size": 2048},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "heads": (12, 2), "vocab_size": 151936},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "heads": (16, 2), "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "heads": (28, 4), "vocab_size": 152064},
}
"""Four CPU sizes, and Qwen2.5's published shapes."""


def hf_config(size: str) -> PretrainedConfig:
    """The Hugging Face configuration of a size."""
    shape = dict(SHAPES[size])
    heads, key_value_heads = shape.pop("heads")
    kind: type[PretrainedConfig] = Qwen2Config
    own: dict[str, Any] = {}
    if size == "hybrid":
        kind, own = Qwen3_5TextConfig, {"head_dim": 128, "linear_num_key_heads": 8, "linear_num_value_heads": 8}
    return kind(
        **own,
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=size in ("1.5b", "3b"),
        bos_token_id=None,
        eos_token_id=shape["vocab_size"] - 1,
        pad_token_id=shape["vocab_size"] - 2,
    )


def save_checkpoint(folder: Path, size: str) -> PretrainedConfig:
    """Write a random Hugging Face model and return its configuration.

    Beside it, `tokenizer` has the word `tn` as token number n, so that any token ids can be written as text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config = hf_config(size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.has_gpu() else torch.float32)
    model.save_pretrained(folder)
    words = {f"t{index}": index for index in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "t0", "eos_token": f"t{config.eos_token_id}", "pad_token": f"t{config.pad_token_id}"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder.with_name("tokenizer"))
    return config


def model_config() -> ModelConfig:
    """The usual precision: bf16 on a GPU, float32 on a CPU."""
    return ModelConfig(checkpoint="random", precision="bf16" if device.has_gpu() else "fp32")


@contextlib.contextmanager
def bench(size: str, *, tensor: int = 1) -> Iterator[Bench]:
    """Ranks, and a way to build models of this size; without torchrun, the world size is 1."""
    parallel = ParallelConfig(tensor=tensor)
    with model_parallel(parallel, seed=1) as ranks:
        yield Bench(config=hf_config(size), parallel=parallel, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One size on one layout."""

    config: PretrainedConfig
    parallel: ParallelConfig
    ranks: Ranks

    @property
    def flops(self) -> FlopModel:
        """The model's operations."""
        return build_flop_model(read_family(self.config))

    def build_model(self) -> list[Any]:
        """A policy with random weights and gradient buffers."""
        return self.wrap(self.build_policy(model_config()))

    def build_policy(self, model: ModelConfig) -> list[Any]:
        """A policy with random weights: the same numbers in every precision, up to rounding."""
        parts = build_policy(read_family(self.config), model, self.parallel, self.ranks, self.config.vocab_size)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in parts[0].named_parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * 0.02)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return parts

    def wrap(self, parts: list[Any]) -> list[Any]:
        """The policy with gradient buffers."""
        model = optimizer.wrap_data_parallel(parts, OptimizerConfig(), self.ranks)
        prepare_schedules(model)
        return model

    def shape(self, row_tokens: int, layout: PromptLayout = "shared") -> RowShape:
        """The shape of rows."""
        return RowShape(
            row_tokens=row_tokens,
            layout=layout,
            multiple=16 * self.parallel.row_parts,
            num_replicas=self.ranks.data_size,
            replica=self.ranks.data_rank,
            pair_weight=self.flops.pair_weight,
        )

    def count(self, rows: Sequence[Row]) -> int:
        """Operations of a forward and backward pass over rows, including padding, which is computed too."""
        pairs = 0
        for row in rows:
            start, end, context_start, context_end = row.segments.T
            length = end - start
            pairs += int((length * (length + 1) // 2 + length * (context_end - context_start)).sum())
        return self.flops.train_step(
            tokens=sum(len(row.tokens) for row in rows), pairs=pairs, scored=sum(len(row.targets) for row in rows)
        )


class TrainStep:
    """The trainer's step on given data: loss, gradients, AdamW."""

    def __init__(self, bench: Bench, model: list[Any] | None = None) -> None:
        self.bench = bench
        self.model = model or bench.build_model()
        self.objective: Objective = build_objective(LossConfig(name="mpo"))
        self.adam = optimizer.build_optimizer(OptimizerConfig(lr=1e-6), self.model, bench.ranks)

    def __call__(self, batch: StepBatch, reference: Logps) -> Logps:
        """One step; the policy's log-probs before the update."""
        optimizer.zero_gradients(self.model, self.adam)
        logps = fused_step(self.model, batch, reference, self.objective, self.bench.ranks).policy
        self.update()
        return logps

    def update(self) -> None:
        """The optimizer's part of a step."""
        optimizer.update(self.model, self.adam)


def make_groups(
    num_groups: int, *, prompt: int, response: int, responses: int, vocab_size: int, spread: float = 0.0, seed: int = 0
) -> list[TokenizedGroup]:
    """Groups of random tokens that end with the vocabulary's last token, as in the configurations above.

    Args:
        spread: response lengths are uniform in response × (1 ± spread)
    """
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return rng.integers(0, vocab_size - 8, length).astype(np.int32)

    groups = []
    for index in range(num_groups):
        lengths = np.rint(response * rng.uniform(1 - spread, 1 + spread, responses)).astype(int).clip(min=2)
        groups.append(
            TokenizedGroup(
                group_id=f"group-{index}",
                prompt_tokens=tokens(prompt),
                response_tokens=tuple(np.append(tokens(length - 1), np.int32(vocab_size - 1)) for length in lengths),
                rewards=rng.normal(size=responses),
            )
        )
    return groups


def as_data(groups: list[TokenizedGroup]) -> PreparedGroups:
    """Groups in memory in place of a folder: the loader needs only the length and single groups."""
    return cast(PreparedGroups, groups)


def make_batch(groups: list[TokenizedGroup], objective: Objective, shape: RowShape) -> StepBatch:
    """All the groups as one step."""
    return build_step(0, as_data(groups), np.arange(len(groups)), objective.select, shape)


def zero_reference(batch: StepBatch) -> Logps:
    """Zero reference log-probs, which cost nothing."""
    return Logps(response=torch.zeros(batch.table.valid.shape, dtype=torch.float64))
