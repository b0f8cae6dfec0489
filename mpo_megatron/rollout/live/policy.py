"""Sample from the policy while it trains: gather weights from its shards into an engine, without a checkpoint in between.

One rank of each model replica (the first of its tensor, context and pipeline ranks) runs an engine and samples its share of the
prompts. All ranks take part in gathering the weights, and all receive all samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import all_gather_object, get_world_size
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from mpo_megatron import device
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.families import Family
from mpo_megatron.files import DataError
from mpo_megatron.hf.live_engine import choose_memory_fraction, engine_memory, quantized_sampling
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.engines.vllm_server import VllmServer
from mpo_megatron.rollout.live.served import ServedLiveEngine
from mpo_megatron.rollout.live.vllm import OWN_FRACTION, VllmLiveEngine, choose_gpus, start_vllm
from mpo_megatron.rollout.live.weights import MergedWeights, Weights
from mpo_megatron.train.optimizer import gather_weights
from mpo_megatron.train.setup import Setup

BATCH_SIZE = 32
"""Responses that the embedded engine generates in one batch."""


class LiveEngine(Protocol):
    """An engine whose weights can be replaced."""

    draws: bool
    """Whether this rank generates; the others only take part in `update`."""

    def update(self) -> None:
        """Receive the policy's current weights; all ranks call it."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt with the weights of the last update; only on a rank that `draws`."""


class LivePolicy:
    """Samples from the current policy."""

    def __init__(self, setup: Setup, ranks: Ranks, model: list[Any]) -> None:
        """Start the engines.

        Args:
            model: this rank's part of the policy
        Raises:
            ConfigError: the engine is not installed, or cannot run here.
        """
        self.ranks, self.model = ranks, model
        self.engine = build_live_engine(setup, ranks, model)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """Answers of the current policy, in the order of the prompts; all ranks call it and receive the same answers.

        Raises:
            DataError: the engine did not answer a prompt.
        """
        gather_weights(self.model)
        self.engine.update()
        own = prompts[self.ranks.data_rank :: self.ranks.data_size]
        generations = list(self.engine.generate(own, sampling)) if self.engine.draws else []
        everyone = [generations]
        if get_world_size() > 1:
            everyone = [[] for _ in range(get_world_size())]
            all_gather_object(everyone, generations)
        found = {generation.group_id: generation for part in everyone for generation in part}
        for prompt in prompts:
            if not found[prompt.group_id].responses:
                reason = found[prompt.group_id].error
                raise DataError(f"group {prompt.group_id}: the policy gave no sample ({reason}); look at the engine's log.")
            if not all(response.token_ids for response in found[prompt.group_id].responses):
                raise DataError(
                    f"group {prompt.group_id}: the engine returned a sample without token ids; its text may encode to others; "
                    "serve with vLLM 0.33, or set online.engine to transformers."
                )
        return [found[prompt.group_id] for prompt in prompts]


class EmbeddedLiveEngine:
    """A `transformers` model that is rebuilt for every batch of samples and then freed, so that training gets the memory back.

    Weights pass through host memory under their checkpoint names. `transformers` loads them into the model: for example, it
    stacks experts.
    """

    def __init__(self, live: Weights, family: Family, tokenizer: Tokenizer, dtype: torch.dtype, *, draws: bool) -> None:
        self.live, self.hf_config, self.tokenizer, self.dtype, self.draws = live, family.config, tokenizer, dtype, draws
        self.weights: dict[str, Tensor] = {}

    def update(self) -> None:
        """Copy the weights to the host, on a rank that `draws`."""
        self.weights = {name: weight.to("cpu") for name, weight in self.live.stream(wanted=self.draws)}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Build the model, answer all prompts, and free the model."""
        transformers_logging.disable_progress_bar()
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.hf_config)]
        model, report = kind.from_pretrained(
            None, config=self.hf_config, state_dict=self.weights, dtype=self.dtype, output_loading_info=True
        )
        self.weights = {}
        if report["missing_keys"]:
            raise RuntimeError(f"the policy has no weights for {sorted(report['missing_keys'])[:4]}.")
        engine = EmbeddedEngine(model.to(device.device()).eval(), self.tokenizer, batch_size=BATCH_SIZE)
        try:
            yield from engine.generate(prompts, sampling)
        finally:
            engine.close()


def build_live_engine(setup: Setup, ranks: Ranks, model: list[Any]) -> LiveEngine:
    """The engine that `online.engine` names, on every rank.

    Raises:
        ConfigError: the engine is not installed, or its GPU memory does not suffice beside training.
    """
    config, folder, family = setup.config, setup.model_folder, setup.family
    dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
    live = build_weights(setup, ranks, model)
    draws = ranks.tensor.rank() == ranks.context.rank() == ranks.pipeline.rank() == 0
    tokenizer = load_tokenizer(folder)
    if config.online.engine == "transformers":
        return EmbeddedLiveEngine(live, family, tokenizer, dtype, draws=draws)
    if config.online.engine == "server":
        return build_served_engine(setup, live, tokenizer, draws=draws, sends=ranks.is_main)
    engine, seconds = config.online.vllm, 60 * config.parallel.timeout_minutes
    own_gpus = engine.tensor_parallel * engine.pipeline_parallel if engine.gpus == "own" else 0
    parameters = sum(torch.Size(info.shape).numel() for info in live.metadata)  # a collective: all ranks
    gpus = choose_gpus(engine, draws=draws)
    if not draws:
        return VllmLiveEngine(live, None, seconds=seconds, own_gpus=own_gpus)
    if ranks.is_main and (cause := quantized_sampling(engine.options)) is not None:
        say_quantized(f"online.vllm.options.{cause}")
    fraction = engine.memory_fraction or (OWN_FRACTION if own_gpus else None)
    if fraction is None:
        free, total = torch.cuda.mem_get_info()
        need = engine_memory(
            family,
            engine,
            parameters=parameters,
            dtype_bytes=dtype.itemsize,
            sequences=-(-config.online.num_samples // ranks.data_size),
            tokens=setup.train.info.max_prompt_tokens + config.online.max_tokens,
        )
        fraction = choose_memory_fraction(need, free=free, total=total)
    started = start_vllm(folder / "hf", tokenizer, dtype, engine, memory_fraction=fraction, gpus=gpus)
    return VllmLiveEngine(live, started, seconds=seconds, own_gpus=own_gpus)


def build_served_engine(setup: Setup, live: Weights, tokenizer: Tokenizer, *, draws: bool, sends: bool) -> ServedLiveEngine:
    """The server of `online.endpoint`, checked on the rank that sends it weights.

    Raises:
        ConfigError, DataError: the server cannot be reached, serves another model, or accepts no weights.
    """
    online, seconds = setup.config.online, 60 * setup.config.parallel.timeout_minutes
    server = VllmServer(online.endpoint, "online.endpoint", seconds=seconds) if sends else None
    if server is not None:
        server.check_version()
        longest = setup.train.info.max_prompt_tokens + online.max_tokens
        if (cause := server.check_model(max_tokens=longest)) is not None:
            say_quantized(f"{server.where}: {cause}")
    engine = EndpointEngine(replace(online.endpoint, server="vllm"), tokenizer) if draws else None
    return ServedLiveEngine(live, engine, server, online)


def say_quantized(where: str) -> None:
    """Warn that samples come from a quantised policy."""
    print(
        f"{where}: samples are drawn from a quantised policy, not from the trained one; engine_kl in metrics.jsonl measures "
        "the difference, and engine_logp in the samples' files gives each sample's importance weight.",
        flush=True,
    )


def build_weights(setup: Setup, ranks: Ranks, model: list[Any]) -> Weights:
    """The policy's weights as engines receive them, with the adapter merged if there is one."""
    base = LiveWeights.of_policy(model, setup.family, setup.padded_vocab_size, ranks)
    if setup.adapter is None:
        return base
    matrices = LiveWeights.of_adapter(model, setup.family, setup.adapter, ranks)
    return MergedWeights(base, matrices, setup.adapter, keep_base=setup.config.online.engine == "transformers")
