"""`varlen` and `flex` attend like `sdpa`: their index tensors and masks are checked here without their GPU kernels."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from mpo_megatron import device
from mpo_megatron.config import ConfigError, ModelConfig
from mpo_megatron.model import attention_flex
from mpo_megatron.model.attention import PLAIN, ScoreSettings, row_layout, segment_attention
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.attention_flex import BLOCK, build_block_mask, flex_row_attention
from mpo_megatron.model.attention_varlen import (
    CUDNN_CHANNELS,
    VarlenIndex,
    _transformer_engine,
    build_varlen_index,
    find_kernel,
    varlen_row_attention,
)
from tests.unit.model.rows import assert_same, plain_varlen_kernel, random_groups_row, random_qkv, visible_pairs

SCORES = [PLAIN, ScoreSettings(window=5), ScoreSettings(window=1), ScoreSettings(window=3, scale=0.1, cap=0.5)]
"""Windows shorter than most prompts and responses, or of a single token."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_varlen_equals_sdpa(seed: int, heads: int, groups: int, scores: ScoreSettings) -> None:
    segments = random_groups_row(seed, max_tokens=9)
    inputs = random_qkv(segments[-1].end, heads, groups)
    varlen = varlen_row_attention(*inputs, row_layout(segments), scores, kernel=plain_varlen_kernel)
    sdpa = segment_attention(*inputs, segments, scores)
    assert_same(varlen, sdpa, inputs)


def test_varlen_gathers_nothing_without_shared_prompts() -> None:
    index = build_varlen_index(row_layout([(0, 5, 0, 0), (5, 9, 5, 5)]).segments)
    assert index.keys is None
    assert torch.equal(index.query_ends, index.key_ends)


def test_gathered_keys_sum_their_gradients_in_float32() -> None:
    """2049 equal gradients on a prompt's only key: bf16 would stop counting at 256."""
    layout = row_layout([(0, 1, 0, 0), *((token, token + 1, 0, 1) for token in range(1, 2049))])
    query, key, value = random_qkv(2049, 1, 1, dtype=torch.bfloat16)

    def sum_of_values(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        return value

    varlen_row_attention(query, key, value, layout, kernel=sum_of_values).sum().backward()
    assert value.grad is not None
    assert value.grad[0].eq(2048).all()  # 2049 rounded to bf16


def test_gathered_keys_sum_their_gradients_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation whose order varies on a GPU; groups of several sizes, a prompt alone, and a response without a prompt."""
    layout = row_layout(
        [(0, 3, 0, 0), (3, 5, 0, 3), (5, 9, 0, 3), (9, 11, 0, 0), (11, 12, 9, 11), (12, 14, 0, 0), (14, 16, 14, 14)]
    )
    query, key, value = random_qkv(16, 2, 1, dtype=torch.float32)

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("adds in any order")

    for name in ("index_add_", "index_add", "scatter_add_", "scatter_add"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    weights: list[Tensor] = []

    def weighted(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        weights.append(torch.randn_like(value))
        return value * weights[0]

    varlen_row_attention(query, key, value, layout, kernel=weighted).sum().backward()
    index = layout.index(build_varlen_index)
    assert index.keys is not None
    assert sorted(places.shape[1] for _, places in index.keys.copies) == [1, 2, 3]
    expected = torch.stack([weights[0][index.keys.index == token].sum(0) for token in range(16)])
    torch.testing.assert_close(value.grad, expected)


def test_index_is_made_once_per_row() -> None:
    layout = row_layout([(0, 3, 0, 0), (3, 5, 0, 3)])
    assert layout.index(build_varlen_index) is layout.index(build_varlen_index)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 20, 200])
def test_flex_mask_is_exact(seed: int, window: int | None) -> None:
    segments = random_groups_row(seed, max_tokens=90, max_responses=6)
    num_tokens = segments[-1].end
    visible = visible_pairs(segments, window)
    ours = build_block_mask(segments, window)
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, num_tokens, num_tokens, device="cpu")[0, 0], visible)
    theirs = create_block_mask(lambda b, h, q, k: visible[q, k], 1, 1, num_tokens, num_tokens, device="cpu", BLOCK_SIZE=BLOCK)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.seq_lengths == theirs.seq_lengths


def test_flex_mask_has_full_blocks_and_skips() -> None:
    prompt = (0, 4 * BLOCK)
    segments = [(*prompt, 0, 0), *((start, start + BLOCK, *prompt) for start in range(prompt[1], 8 * BLOCK, BLOCK))]
    mask = build_block_mask(row_layout(segments).segments)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]  # a response sees the whole prompt
    assert mask.kv_num_blocks[0, 0].tolist() == [1] * 8  # and needs the mask on its own diagonal only


def test_flex_is_compiled_once_for_rows_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    monkeypatch.setattr(attention_flex, "_compiled", functools.cache(attention_flex._compiled.__wrapped__))
    for seed in range(6):
        segments = random_groups_row(seed, max_tokens=90)
        assert segments[-1].end > 2 * BLOCK
        query, key, value = (tensor.detach() for tensor in random_qkv(segments[-1].end, 4, 2, channels=16, dtype=torch.float32))
        flex = flex_row_attention(query, key, value, row_layout(segments))
        torch.testing.assert_close(flex, segment_attention(query, key, value, segments), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), {"flash_attn_interface", "flash_attn", "transformer_engine"}, "_flash_attn_3"),
        ((9, 0), {"flash_attn", "transformer_engine"}, "_transformer_engine"),
        ((9, 0), {"flash_attn"}, "_flash_attn"),
        ((9, 0), set(), "_torch"),
        ((10, 0), {"flash_attn_interface", "flash_attn", "transformer_engine"}, "_transformer_engine"),
        ((8, 0), {"flash_attn_interface", "flash_attn", "transformer_engine"}, "_flash_attn"),
        ((12, 0), {"transformer_engine"}, "_torch"),
    ],
)
def test_the_fastest_kernel_of_the_architecture_is_taken(
    capability: tuple[int, int], installed: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, installed, capability)
    kernel = find_kernel.__wrapped__()
    assert kernel is not None
    assert kernel.__qualname__.split(".")[0] == expected


def test_first_versions_of_flash_attention_3_return_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_varlen_index(row_layout([(0, 2, 0, 0)]).segments)
    install(monkeypatch, {"flash_attn_interface"}, (9, 0))
    tensor = torch.ones(2, 1, 4)
    for output in (tensor, (tensor, torch.zeros(1, 2))):
        monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", lambda *_, output=output, **__: output)
        kernel = find_kernel.__wrapped__()
        assert kernel is not None
        assert kernel(tensor, tensor, tensor, index, PLAIN) is tensor


def test_wide_heads_do_not_go_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_varlen_index(row_layout([(0, 2, 0, 0)]).segments)
    install(monkeypatch, {"flash_attn", "transformer_engine"}, (9, 0))
    kernel = find_kernel.__wrapped__()
    assert kernel is not None
    for channels, expected in ((CUDNN_CHANNELS, "cudnn"), (CUDNN_CHANNELS + 8, "flash_attn")):
        tensor = torch.zeros(2, 1, channels)
        assert kernel(tensor, tensor, tensor, index, PLAIN)[0, 0, 0] == {"cudnn": 1, "flash_attn": 2}[expected]


def install(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], capability: tuple[int, int], cudnn: tuple[int, int, int] = (9, 19, 0)
) -> None:
    """Replaces packages for GPUs: their kernels return ones (cuDNN) or twos (flash-attn)."""

    class Core(torch.nn.Module):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__()

        def forward(self, query: Tensor, *arguments: object, **options: object) -> Tensor:
            return torch.ones_like(query).flatten(1)

    twos = types.SimpleNamespace(flash_attn_varlen_func=lambda query, *_, **__: 2 * torch.ones_like(query))
    modules = {
        "flash_attn_interface": twos,
        "flash_attn": twos,
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": types.SimpleNamespace(DotProductAttention=Core),
        "transformer_engine.pytorch.utils": types.SimpleNamespace(get_cudnn_version=lambda: cudnn),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module if name.split(".")[0] in installed else None)  # type: ignore[arg-type]
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")


@pytest.mark.parametrize(
    ("capability", "cudnn", "taken"),
    [((8, 0), (9, 19, 0), False), ((9, 0), (9, 18, 0), True), ((9, 0), (9, 17, 1), False), ((12, 0), (9, 19, 0), False)],
)
def test_transformer_engines_kernel_is_taken_where_it_has_one(
    capability: tuple[int, int], cudnn: tuple[int, int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {"transformer_engine"}, capability, cudnn)
    monkeypatch.delenv("NVTE_UNFUSED_ATTN", raising=False)
    assert (_transformer_engine() is not None) == taken
    assert os.environ.pop("NVTE_UNFUSED_ATTN", None) == ("0" if taken else None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT" and not torch.cuda.is_available(),
    reason="torch.compile's C++ needs vector units (torch 2.14: no at::vec::transpose_block without)",
)
def test_flex_forward_equals_sdpa() -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    segments = random_groups_row(2)
    assert segments[-1].end > 2 * BLOCK
    drawn = random_qkv(segments[-1].end, 4, 2, channels=16, dtype=torch.float32, device=where)
    query, key, value = (tensor.detach() for tensor in drawn)  # flex has no backward pass on a CPU
    flex = flex_row_attention(query, key, value, row_layout(segments))
    torch.testing.assert_close(flex, segment_attention(query, key, value, segments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gpu", [True, False])
def test_choice_by_machine(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    monkeypatch.setattr("mpo_megatron.model.attention_varlen.find_kernel", lambda: None)
    assert choose_attention(ModelConfig(checkpoint="", precision="bf16")) == ("flex" if gpu else "sdpa")
    assert choose_attention(ModelConfig(checkpoint="", precision="fp32")) == "sdpa"
    with pytest.raises(ConfigError, match=r"model.attention = varlen, but"):
        choose_attention(ModelConfig(checkpoint="", attention="varlen"))
    if not gpu:
        with pytest.raises(ConfigError, match=r"model.attention = flex, but this machine has no GPU"):
            choose_attention(ModelConfig(checkpoint="", attention="flex"))
    monkeypatch.setattr("mpo_megatron.model.attention_varlen.find_kernel", lambda: plain_varlen_kernel)
    assert choose_attention(ModelConfig(checkpoint="", precision="bf16")) == ("varlen" if gpu else "sdpa")
    with pytest.raises(ConfigError, match="float32" if gpu else "GPU"):
        choose_attention(ModelConfig(checkpoint="", attention="varlen", precision="fp32"))
