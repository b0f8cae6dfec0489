"""Checks that a model can be sharded by a layout."""

from __future__ import annotations

from pathlib import Path

from mpo_megatron import device
from mpo_megatron.config import ParallelConfig, is_hugging_face, require
from mpo_megatron.families import Family, load_family
from mpo_megatron.hf.conversion import load_conversion, padded_vocab_size


def read_model(folder: Path, parallel: ParallelConfig) -> tuple[Family, int]:
    """The model in a Megatron or Hugging Face checkpoint folder, checked to be shardable by `parallel`, and its padded vocabulary
    size.

    Raises:
        ConfigError: it cannot be sharded, or a file is missing or damaged.
    """
    if is_hugging_face(folder):
        family = load_family(folder)
        padded_vocab = padded_vocab_size(family.vocab_size)
    else:
        family, padded_vocab = load_family(folder / "hf"), load_conversion(folder).padded_vocab_size
    validate_layout(family, parallel, padded_vocab)
    return family, padded_vocab


def validate_layout(family: Family, parallel: ParallelConfig, padded_vocab: int) -> None:
    """Check that the layout can shard the model.

    Raises:
        ConfigError: names the field, the number it must divide, and valid values.
    """
    tensor = parallel.tensor
    for name, size in (
        ("num_attention_heads", family.num_attention_heads),
        ("num_key_value_heads", family.num_key_value_heads),
        ("intermediate_size", family.intermediate_size),
        ("padded vocabulary", padded_vocab),
    ):
        _require_divides("parallel.tensor", tensor, f"the model's {name}", size)
    parallel.stage_layers(family.num_hidden_layers)
    _validate_experts(family, parallel)
    _validate_delta_net(family, parallel)
    heads, groups = family.num_attention_heads // tensor, family.num_key_value_heads // tensor
    # Context-parallel ranks share attention by heads; a key-value head may go to several ranks, but whole.
    choices = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
    require(
        parallel.context in choices,
        f"parallel.context = {parallel.context} cannot split the {heads} attention heads and {groups} key/value heads that "
        f"each tensor-parallel rank has; choose one of {', '.join(map(str, choices))}, or another parallel.tensor.",
    )


def _validate_delta_net(family: Family, parallel: ParallelConfig) -> None:
    """Check that ranks can shard the heads of Gated DeltaNets.

    Raises:
        ConfigError: names the field, the number it must divide, and valid values.
    """
    if family.delta_net is None:
        return
    heads = family.delta_net.key_heads
    _require_divides("parallel.tensor", parallel.tensor, "the model's linear_num_key_heads", heads)
    own = heads // parallel.tensor
    what = f"the {own} key heads of linear_attention that each tensor-parallel rank has (linear_num_key_heads)"
    _require_divides("parallel.context", parallel.context, what, own)


def _require_divides(name: str, divisor: int, what: str, size: int) -> None:
    choices = ", ".join(str(n) for n in range(1, min(size, 128) + 1) if size % n == 0)
    require(size % divisor == 0, f"{name} = {divisor} does not divide {what} = {size}; choose one of {choices}.")


def _validate_experts(family: Family, parallel: ParallelConfig) -> None:
    """Check that the layout can shard the experts.

    Raises:
        ConfigError: names the field, the rule and valid values.
    """
    experts = family.experts
    if experts is None:
        for name in ("expert", "expert_tensor"):
            require(
                getattr(parallel, name) == 1,
                f"parallel.{name} = {getattr(parallel, name)}, but the model has no experts; remove it.",
            )
        return
    require(
        parallel.tensor == 1 or parallel.sequence_parallel,
        f"parallel.sequence = false with parallel.tensor = {parallel.tensor}: every rank would send every token to the experts; "
        "remove parallel.sequence.",
    )
    require(
        parallel.expert == 1 or parallel.expert_tensor == 1 or device.has_gpu(),
        f"parallel.expert = {parallel.expert} with parallel.expert_tensor = {parallel.expert_tensor} gathers parts of different "
        "lengths, which gloo (without a GPU) does not support; set one of them to 1.",
    )
    divisible = [("expert", "num_experts", experts.num), ("expert_tensor", experts.size_field, experts.channels)]
    if experts.shared_channels is not None:
        divisible.append(("tensor", "shared_expert_intermediate_size", experts.shared_channels))
    for name, what, size in divisible:
        number = getattr(parallel, name)
        choices = ", ".join(str(n) for n in range(1, min(size, 128) + 1) if size % n == 0)
        require(
            size % number == 0,
            f"parallel.{name} = {number} does not divide the model's {what} = {size}; choose one of {choices}.",
        )
