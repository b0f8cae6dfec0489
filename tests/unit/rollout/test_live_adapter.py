"""Samples of a live policy with an adapter: engines get the sum of base weights and adapter, and the base model once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import PEFT_PREFIX, Adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.adapter_weights import fill_adapters
from mpo_megatron.model.convert import convert
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.rollout.live import policy as live
from mpo_megatron.train.checkpoints import checkpoint
from tests.distributed.adapters import start_matrix
from tests.tiny import save_model


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engines_get_the_sum_of_base_and_adapter(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "hf", num_hidden_layers=1)
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "model")))
    family, adapter = load_family(tmp_path / "hf"), Adapter(rank=2, alpha=3.0, rslora=False, target_modules=("v_proj", "up_proj"))
    sent: list[str] = []
    original = LiveWeights.stream

    def stream(self: LiveWeights, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        for name, weight in original(self, wanted=wanted):
            sent.extend([name] if name in base else [])
            yield name, weight

    monkeypatch.setattr(LiveWeights, "stream", stream)
    padded = load_conversion(tmp_path / "model").padded_vocab_size
    setup = SimpleNamespace(
        adapter=adapter, family=family, padded_vocab_size=padded, config=SimpleNamespace(online=SimpleNamespace(engine=engine))
    )
    base = load_file(tmp_path / "hf" / "model.safetensors")
    with model_parallel(ParallelConfig(), seed=1) as ranks:
        settings = ModelConfig(checkpoint="", precision="fp32")
        parts = build_policy(family, settings, ParallelConfig(), ranks, padded, adapter)
        checkpoint.load_weights(parts, tmp_path / "model", ranks)
        weights = live.build_weights(cast(Any, setup), ranks, parts)
        for factor in (1.0, 2.0):  # the adapter learns between two batches of samples
            fill_adapters(parts, family, adapter, ranks, lambda name, shape, factor=factor: factor * start_matrix(name, shape))  # type: ignore[misc]
            received = {name: weight.clone() for name, weight in weights.stream()}
            assert received.keys() == base.keys()
            for name, weight in base.items():
                prefix = PEFT_PREFIX + name.removesuffix(".weight")
                expected = weight.double()
                if name.split(".")[-2] in adapter.target_modules:
                    shapes = {"A": (2, weight.shape[1]), "B": (weight.shape[0], 2)}
                    down, up = (factor * start_matrix(f"{prefix}.lora_{kind}.weight", shapes[kind]).double() for kind in "AB")
                    expected = expected + adapter.scale * up @ down
                assert torch.equal(received[name], expected.float()), name
    assert len(sent) == len(base) * (1 if engine == "transformers" else 2)
