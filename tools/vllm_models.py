"""Hand the policy's weights over to vLLM's own model classes, as to a live engine, on a CPU.

    python -m tools.vllm_models              every family
    python -m tools.vllm_models qwen3 llama  some model types

It needs an environment with vLLM and the packages that its models import, but neither its kernels nor a GPU: nothing is
generated. For each tiny model, vLLM's own loader reads the Hugging Face checkpoint. Then an update of the same weights must
give the same parameters, and an update of numbers that all differ must use each of them exactly once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3_5Config, Qwen3_5MoeConfig

from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.convert import convert
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.checkpoints import checkpoint
from tests.tiny import CONFIGS, HYBRID, save_model

WHOLE = {"qwen3_5": Qwen3_5Config, "qwen3_5_moe": Qwen3_5MoeConfig}
"""Multimodal models; their vision tower is not handed over."""
SIZES: dict[str, dict[str, Any]] = {
    **{name: {"moe_intermediate_size": 64} for name in ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")},
    "mixtral": {"intermediate_size": 64},
    "gemma2": {"tied": True},
}
"""Changes of tiny models: experts of a size that vLLM's kernels for CPUs do not pad; no separate output layer, which vLLM's
Gemma 2 lacks."""
BF16 = (*HYBRID, "qwen3")
"""Model types that are also tried in bf16; the parameters of decays stay float32."""
CHUNK = 7
"""Weights per call: real updates arrive in parts that end anywhere."""
Update = Iterable[tuple[str, Tensor]]


def save(folder: Path, model_type: str) -> Path:
    """Write a tiny checkpoint."""
    if model_type not in WHOLE:
        return save_model(folder, model_type=model_type, **SIZES.get(model_type, {}))
    text = save(folder / "text", f"{model_type}_text")
    settings = json.loads((text / "config.json").read_text())
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}
    config = WHOLE[model_type](text_config=settings, vision_config={**vision, "num_position_embeddings": 16})
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder / "whole")
    return folder / "whole"


def build_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """vLLM's model for a folder, with uninitialized parameters, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    experts: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    experts.cpu_prepack_moe_weight = lambda weight, *options: weight  # a kernel's order of a loaded weight
    settings = EngineArgs(
        *(str(folder),), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, gpu_memory_utilization=0.1
    ).create_engine_config()
    with set_current_vllm_config(settings), set_default_torch_dtype(getattr(torch, dtype)):
        if not model_parallel_is_initialized():
            with tempfile.NamedTemporaryFile() as file:
                init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
            initialize_model_parallel(1, 1)
        return initialize_model(settings), settings


def load_folder(model: Any, settings: Any) -> dict[str, Tensor]:
    """Parameters after vLLM's own loader has read the folder."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    with set_current_vllm_config(settings):
        get_model_loader(settings.load_config).load_weights(model, settings.model_config)
        process_weights_after_loading(model, settings.model_config, torch.device("cpu"))
    return parameters_of(model)


def load_update(model: Any, settings: Any, update: Update) -> dict[str, Tensor]:
    """Parameters after an update in parts; NaN where it wrote nothing."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    with torch.no_grad(), set_current_vllm_config(settings):
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        initialize_layerwise_reload(model)
        weights = list(update)
        for start in range(0, len(weights), CHUNK):
            model.load_weights(iter(weights[start : start + CHUNK]))
        finalize_layerwise_reload(model, settings.model_config)
    return parameters_of(model)


def parameters_of(model: Any) -> dict[str, Tensor]:
    """Copies of the model's parameters, without the vision tower's."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if not name.startswith("visual.")}


def numbered(update: Update) -> Iterator[tuple[str, Tensor]]:
    """The same weights, filled with 1, 2, 3, …, which float32 holds exactly."""
    first = 1
    for name, weight in update:
        yield name, torch.arange(first, first + weight.numel(), dtype=torch.float32).view(weight.shape)
        first += weight.numel()


def differences(folder: Path, dtype: str, ranks: Ranks) -> list[str]:
    """What vLLM's model gets wrong from an update, a line each."""
    megatron = folder.with_name(f"{folder.name}-megatron")
    if not megatron.is_dir():
        convert(ConvertConfig(input=str(folder), output=str(megatron)))
    family, padded = load_family(folder), load_conversion(megatron).padded_vocab_size
    settings = ModelConfig(checkpoint="", precision="fp32" if dtype == "float32" else "bf16")
    policy = build_policy(family, settings, ParallelConfig(), ranks, padded)
    checkpoint.load_weights(policy, megatron, ranks)
    live = LiveWeights.of_policy(policy, family, padded, ranks)
    update = [(name, weight.clone()) for name, weight in live.stream()]
    model, engine = build_model(folder, dtype)
    expected, found = load_folder(model, engine), load_update(model, engine, update)
    vocab_size = family.vocab_size
    wrong = [
        f"{name}: not as from the folder" for name, parameter in expected.items() if not same(parameter, found[name], vocab_size)
    ]
    if dtype == "float32":
        filled = load_update(model, engine, numbered(update)).values()
        values = torch.cat([used(parameter, vocab_size).flatten() for parameter in filled])
        total = sum(weight.numel() for _, weight in update)
        if not torch.equal(values.sort().values, torch.arange(1, total + 1, dtype=torch.float32)):
            wrong.append(f"{len(values)} elements hold {len(values[values.isfinite()].unique())} of {total} numbers")
    return wrong


def used(parameter: Tensor, vocab_size: int) -> Tensor:
    """A parameter without the rows with which vLLM pads the vocabulary."""
    return parameter[:vocab_size] if len(parameter) == -(-vocab_size // 64) * 64 else parameter


def same(first: Tensor, second: Tensor, vocab_size: int) -> bool:
    """Whether two parameters agree in type and bits, padding aside."""
    return first.dtype == second.dtype and torch.equal(used(first, vocab_size), used(second, vocab_size))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each model type; the exit code is 1 if anything differs."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or [*CONFIGS, *WHOLE]
    if {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0
    failed = False
    # The first model decides which of vLLM's process groups exist: one with experts has all.
    chosen.sort(key=lambda name: "moe" not in name and name not in ("mixtral", "qwen3_next"))
    with tempfile.TemporaryDirectory() as folder, model_parallel(ParallelConfig(), seed=1) as ranks:
        for model_type in chosen:
            source = save(Path(folder) / model_type, model_type)
            for dtype in ("float32", *(("bfloat16",) if model_type in BF16 else ())):
                wrong = differences(source, dtype, ranks)
                print(f"{model_type}, {dtype}: {'; '.join(wrong[:5]) or 'as from the folder'}", flush=True)
                failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
