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
from typing import Any, Literal

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3_5Config, Qwen3_5MoeConfig

from mpo_megatron.config import ConvertConfig, LoraConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.hf.identity import PEFT_CONFIG, PEFT_WEIGHTS
from mpo_megatron.model.adapter_weights import fill_adapters
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import peft_settings
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.rollout.live.weights import MergedWeights
from mpo_megatron.train.checkpoints import checkpoint
from tests.distributed.adapters import start_matrix
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
ADAPTED: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text"), (("all-linear",),)),
    **dict.fromkeys(("qwen3_moe", "qwen3_next", "qwen3_5_moe_text"), (("attention",),)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), (("all-linear",), ("in_proj_qkv",), ("in_proj_b",), ("in_proj_a",))),
}
"""Targets of adapters that vLLM loads beside the base weights."""
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


def build_model(folder: Path, dtype: str, **options: Any) -> tuple[Any, Any]:
    """vLLM's model for a folder, with uninitialized parameters, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    experts: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    experts.cpu_prepack_moe_weight = lambda weight, *options: weight  # a kernel's order of a loaded weight
    options |= {"enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64, "gpu_memory_utilization": 0.1}
    settings = EngineArgs(str(folder), dtype=dtype, **options).create_engine_config()
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


class Subject:
    """A tiny model in both formats, and the policy with its weights."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Convert the folder, once."""
        self.folder, self.ranks = folder, ranks
        self.megatron = folder.with_name(f"{folder.name}-megatron")
        if not self.megatron.is_dir():
            convert(ConvertConfig(input=str(folder), output=str(self.megatron)))
        self.family = load_family(folder)
        self.padded = load_conversion(self.megatron).padded_vocab_size

    def build(
        self, precision: Literal["bf16", "fp32"], adapter: Adapter | None = None
    ) -> tuple[list[torch.nn.Module], LiveWeights]:
        """A policy and its weights."""
        settings = ModelConfig(checkpoint="", precision=precision)
        policy = build_policy(self.family, settings, ParallelConfig(), self.ranks, self.padded, adapter)
        checkpoint.load_weights(policy, self.megatron, self.ranks)
        return policy, LiveWeights.of_policy(policy, self.family, self.padded, self.ranks)


def weight_differences(subject: Subject, dtype: str) -> list[str]:
    """What vLLM's model gets wrong from an update, a line each."""
    _, live = subject.build("fp32" if dtype == "float32" else "bf16")
    update = [(name, weight.clone()) for name, weight in live.stream()]
    model, engine = build_model(subject.folder, dtype)
    expected, found = load_folder(model, engine), load_update(model, engine, update)
    vocab_size = subject.family.vocab_size
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


def adapter_differences(subject: Subject, targets: Sequence[str]) -> list[str]:
    """Where vLLM's adapter layers add something else than a merge, a line each."""
    from vllm.config import set_current_vllm_config
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager

    family, ranks = subject.family, subject.ranks
    adapter = choose_adapter(family, LoraConfig(rank=3, alpha=5.0, target_modules=list(targets)))
    assert adapter is not None
    policy, base = subject.build("fp32", adapter)
    fill_adapters(policy, family, adapter, ranks, start_matrix)
    matrices = LiveWeights.of_adapter(policy, family, adapter, ranks)
    folder = subject.folder.with_name(f"{subject.folder.name}-{'-'.join(targets)}")
    folder.mkdir()
    save_file(dict(matrices.stream()), folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps(peft_settings(adapter, "base")))
    model, engine = build_model(subject.folder, "float32", enable_lora=True, max_loras=1, max_lora_rank=8)
    before = load_folder(model, engine)
    merged = load_update(model, engine, MergedWeights(base, matrices, adapter, keep_base=False).stream())
    manager = WorkerLoRAManager(engine, torch.device("cpu"), model.embedding_modules)
    with set_current_vllm_config(engine):
        manager.create_lora_manager(model, engine)
        manager.add_adapter(LoRARequest("policy", 1, str(folder)))  # also activates it
    layers = manager._adapter_manager
    added = {
        f"{name}.weight": torch.cat(
            [up[0, 0] @ down[0, 0] for down, up in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)]
        )
        for name, layer in layers.modules.items()
        if isinstance(getattr(layer, "lora_a_stacked", None), tuple)  # not of embeddings and the output layer
    }
    changes = {name: parameter - before[name] for name, parameter in merged.items()}
    wrong = []
    for name, change in changes.items():
        found = added.get(name, torch.zeros_like(change))
        if (found - change).abs().max() > 1e-6 * merged[name].abs().max():  # a few roundings of the merged weight
            wrong.append(f"{name}: the adapter is {found.norm():.3f}, merged {change.norm():.3f}")
    return wrong if any(change.any() for change in changes.values()) else ["the adapter changes nothing"]


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
            subject = Subject(save(Path(folder) / model_type, model_type), ranks)
            results = {
                dtype: weight_differences(subject, dtype) for dtype in ("float32", *(("bfloat16",) if model_type in BF16 else ()))
            }
            results |= {
                f"adapter of {' and '.join(targets)}": adapter_differences(subject, targets)
                for targets in ADAPTED.get(model_type, ())
            }
            for case, wrong in results.items():
                print(f"{model_type}, {case}: {'; '.join(wrong[:5]) or 'equal'}", flush=True)
                failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
