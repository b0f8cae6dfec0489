"""Sampling from the policy while it trains: weights gathered from its shards into an engine, no checkpoint in between.

One rank of each model replica (the first of its tensor, context and pipeline ranks) has an engine and samples its share of the
prompts; all ranks take part in gathering weights, and all get all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import all_gather_object, get_world_size
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from mpo_megatron import device
from mpo_megatron.config import TrainConfig
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.families import Family
from mpo_megatron.files import DataError
from mpo_megatron.model.live_weights import send_adapter, send_weights
from mpo_megatron.model.merging import merger
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.live.vllm import VllmLiveEngine
from mpo_megatron.train.optimizer import gather_weights
from mpo_megatron.train.setup import Setup

BATCH_SIZE = 32
"""Responses that the embedded engine generates side by side."""


class LiveEngine(Protocol):
    """An engine whose weights can be replaced."""

    def receive(self, name: str, weight: Tensor) -> None:
        """Take one weight, by its Hugging Face name; the tensor belongs to the caller again afterwards."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt with the weights received since the last call."""


class LivePolicy:
    """The policy as it is, to sample from."""

    def __init__(self, setup: Setup, ranks: Ranks) -> None:
        """Start the engine on the ranks that have one.

        Raises:
            ConfigError: the engine is not installed, or cannot be used here.
        """
        self.setup, self.ranks = setup, ranks
        self.keeps_base = setup.adapter is not None and setup.config.online.engine == "transformers"
        self.base: dict[str, Tensor] = {}
        """The frozen weights on the host, so that only the adapter is sent again; where `keeps_base`, on ranks with an engine."""
        self.base_sent = False
        self.engine: LiveEngine | None = None
        if ranks.tensor.rank() == ranks.context.rank() == ranks.pipeline.rank() == 0:
            self.engine = build_live_engine(setup.config, setup.family)

    def sample(self, model: list[Any], prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """Answers of the policy as it is now, in the order of the prompts; all ranks call it and get the same.

        Raises:
            DataError: the engine has no answer to a prompt.
        """
        gather_weights(model)
        self._send(model)
        own = prompts[self.ranks.data_rank :: self.ranks.data_size]
        generations = [] if self.engine is None else list(self.engine.generate(own, sampling))
        everyone = [generations]
        if get_world_size() > 1:
            everyone = [[] for _ in range(get_world_size())]
            all_gather_object(everyone, generations)
        found = {generation.group_id: generation for part in everyone for generation in part}
        for prompt in prompts:
            if not found[prompt.group_id].responses:
                reason = found[prompt.group_id].error
                raise DataError(f"group {prompt.group_id}: the policy gave no sample ({reason}); look at the engine's log.")
        return [found[prompt.group_id] for prompt in prompts]

    def _send(self, model: list[Any]) -> None:
        """Give the engines the policy's weights: with an adapter, the sum of both; the base model's are sent once if kept."""
        receive = None if self.engine is None else self.engine.receive
        family, adapter = self.setup.family, self.setup.adapter
        if adapter is None:
            send_weights(model, family, self.setup.padded_vocab_size, self.ranks, receive)
            return
        matrices: dict[str, Tensor] = {}
        keep_matrix = _keeper(matrices, "cpu" if self.keeps_base else device.device())
        send_adapter(model, family, adapter, self.ranks, None if receive is None else keep_matrix)
        merge = merger(adapter, matrices, None)

        def receive_merged(name: str, weight: Tensor) -> None:
            if receive is not None:
                receive(name, merge(name, 0, weight))

        if self.keeps_base:
            if not self.base_sent:
                keep_base = None if receive is None else _keeper(self.base, "cpu")
                send_weights(model, family, self.setup.padded_vocab_size, self.ranks, keep_base)
                self.base_sent = True
            for name, weight in self.base.items():
                receive_merged(name, weight)
        else:
            sent = None if receive is None else receive_merged
            send_weights(model, family, self.setup.padded_vocab_size, self.ranks, sent)


def _keeper(weights: dict[str, Tensor], where: str | torch.device) -> Callable[[str, Tensor], None]:
    """What copies weights into a dictionary."""

    def keep(name: str, weight: Tensor) -> None:
        weights[name] = weight.detach().to(where, copy=True)

    return keep


class EmbeddedLiveEngine:
    """A `transformers` model made anew for every batch of samples, and gone when they are drawn: training has its memory back.

    Weights pass through host memory, where they are collected under the names they have in checkpoints; `transformers` itself
    puts them in place (experts, for example, become one tensor).
    """

    def __init__(self, family: Family, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        self.hf_config, self.tokenizer, self.dtype = family.config, tokenizer, dtype
        self.weights: dict[str, Tensor] = {}

    def receive(self, name: str, weight: Tensor) -> None:
        """Keep a copy on the host."""
        self.weights[name] = weight.detach().to("cpu", copy=True)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Build the model, answer, and drop it."""
        transformers_logging.disable_progress_bar()
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.hf_config)]
        model, report = kind.from_pretrained(
            None, config=self.hf_config, state_dict=self.weights, dtype=self.dtype, output_loading_info=True
        )
        self.weights = {}
        if report["missing_keys"]:
            raise RuntimeError(f"the policy gave no weights for {sorted(report['missing_keys'])[:4]}.")
        engine = EmbeddedEngine(model.to(device.device()).eval(), self.tokenizer, batch_size=BATCH_SIZE)
        try:
            yield from engine.generate(prompts, sampling)
        finally:
            engine.close()


def build_live_engine(config: TrainConfig, family: Family) -> LiveEngine:
    """The engine that `online.engine` names, on this rank.

    Raises:
        ConfigError: it is not installed.
    """
    folder = Path(config.model.checkpoint)
    dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
    tokenizer = load_tokenizer(folder)
    if config.online.engine == "transformers":
        return EmbeddedLiveEngine(family, tokenizer, dtype)
    return VllmLiveEngine(folder / "hf", tokenizer, dtype, config.online.vllm_memory_fraction)
