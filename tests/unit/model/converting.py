"""Random checkpoints in Hugging Face format for tests of conversion; reading, comparing, copying and changing them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from mpo_megatron.model.safetensors_io import INDEX

SIZES = {
    "vocab_size": 1003,  # not divisible by any parallel size
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
DELTA_NET = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 4},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2.5-tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2-one-group": Qwen2Config(**{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=False),
    "qwen2-no-groups": Qwen2Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),  # head_dim ≠ hidden / heads
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": Gemma2Config(**SIZES, head_dim=32),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=32),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**SIZES),
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **DELTA_NET, head_dim=32, tie_word_embeddings=True),
    "qwen3-next": Qwen3NextConfig(**SIZES, **DELTA_NET, **EXPERTS, head_dim=32, shared_expert_intermediate_size=80),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=80, mlp_only_layers=[0]),
}
UP = "model.layers.1.mlp.up_proj.weight"
SIDE_FILES = {
    "tokenizer.json": b'{"model": {"type": "BPE"}}\n',
    "tokenizer_config.json": '{"pad": "…"}'.encode(),
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "LICENSE": b"\xff\x00 any bytes",
}


def write_hf(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB") -> Path:
    """A random checkpoint in Hugging Face format, with side files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too: ones and zeros would hide a swap
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors, through the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def convert_folder(source: Path, output: Path, **options: float) -> Path:
    convert(ConvertConfig(input=str(source), output=str(output), **options))  # type: ignore[arg-type]
    return output


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", source, target], check=True)
    return target


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint, and write it as one file."""
    tensors = read_hf(folder)
    change(tensors)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
