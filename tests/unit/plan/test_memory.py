"""Properties of the memory model that hold for any constants; tests/distributed/test_plan_memory.py has the measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mpo_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.families.published import build_config
from mpo_megatron.hf.live_engine import EngineMemory
from mpo_megatron.plan.kept import layer_kept
from mpo_megatron.plan.memory import chunks_in_flight, stage_memory
from mpo_megatron.plan.memory_layout import Kernels, MemoryLayout
from mpo_megatron.plan.parameters import Weight, buffer_size
from mpo_megatron.plan.rows import RowCounts

ROW = RowCounts(tokens=8192, pairs=8_000_000, scored=6000, responses=6000, context=6000)
GPU = Kernels(layers="transformer_engine", attention="varlen", gpu=True)


def build_layout(
    name: str = "Qwen3-14B", *, world: int = 64, fp8: Any = "none", recompute: Any = "none", **parallel: Any
) -> MemoryLayout:
    return MemoryLayout(
        shape=read_family(build_config(name)),
        padded_vocab=152064,
        model=ModelConfig(checkpoint="", fp8=fp8, recompute=recompute),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerConfig(),
        world_size=world,
        kernels=GPU,
        resident=False,
    )


def test_a_replica_adds_18_bytes_a_parameter_of_which_12_are_shared() -> None:
    alone = stage_memory(build_layout(world=8, tensor=8), 0, ROW, 4)
    shared = stage_memory(build_layout(world=64, tensor=8), 0, ROW, 4)
    assert alone.static == alone.parameters * 18
    assert shared.static == pytest.approx(shared.parameters * (6 + 12 / 8))


def test_offloaded_states_take_no_memory() -> None:
    layout = build_layout(world=8, tensor=8)
    offloaded = dataclasses.replace(layout, optimizer=OptimizerConfig(cpu_offload=0.75))
    assert stage_memory(offloaded, 0, ROW, 4).optimizer == stage_memory(layout, 0, ROW, 4).optimizer / 4


def test_an_engine_samples_where_activations_were() -> None:
    layout = build_layout(world=8, tensor=4, pipeline=2)
    without = [stage_memory(layout, stage, ROW, 4) for stage in range(2)]
    for factor in (0.5, 3.0):
        awake = round(factor * without[0].dynamic)
        engine = EngineMemory(weights=awake, cache=0, sequence_cache=0, working=0, asleep=1000)
        first, last = (stage_memory(dataclasses.replace(layout, sampler=engine), stage, ROW, 4) for stage in range(2))
        assert first.total == without[0].total + 1000 + max(0, awake - without[0].dynamic)
        assert last == without[1]  # engines run on the GPUs of the first stage


def test_buffers_pad_parameters_and_their_end() -> None:
    weights = [Weight("a", 65, True, False), Weight("b", 3, False, False)]
    assert buffer_size(weights, 1) == 256  # 128 + 64, rounded up to 128s
    assert buffer_size(weights, 3) == 384
    assert buffer_size(weights[:1], 1) == 128


@pytest.mark.parametrize(
    ("parallel", "rows", "chunks"),
    [
        ({"pipeline": 4}, 16, [4, 3, 2, 1]),
        ({"pipeline": 4}, 2, [2, 2, 2, 1]),
        # Megatron-Core's own comment on the interleaved schedule: 2 · (stages behind) + (virtual stages − 1) · stages, plus one.
        ({"pipeline": 4, "virtual_pipeline": 2}, 16, [11, 9, 7, 5]),
        ({"pipeline": 4, "virtual_pipeline": 2}, 4, [8, 8, 7, 5]),
        ({}, 16, [1]),
    ],
)
def test_rows_in_flight(parallel: dict[str, int], rows: int, chunks: list[int]) -> None:
    config = ParallelConfig(**parallel)
    assert [chunks_in_flight(config, stage, rows) for stage in range(config.pipeline)] == chunks


def test_dense_layer_kept_by_hand() -> None:
    """One Qwen3-14B layer on one GPU, in bytes per token: counted from the layer's modules."""
    hidden, queries, keys, ffn = 5120, 5120, 1024, 17408
    norms = 2 * 2 * hidden * 2 + 2 * 4
    heads = (queries + keys) * 2 + 4 * (40 + 8)  # inputs of the norms of queries and keys
    core = queries * 2 + queries * 2 + 4 * 40  # rotated queries, result, log-sum-exp
    inputs = (queries + 2 * keys) * 2 + keys * 2  # the projection's output for its values, rotated keys
    swiglu = 3 * ffn * 2
    row = dataclasses.replace(ROW, context=0, responses=0)
    layout = build_layout(world=1)
    # Without shared prompts keys and values are read in place; with them, gathered copies are kept.
    assert layer_kept(layout, row) == row.tokens * (norms + heads + core + inputs + swiglu)
    gathered = (ROW.tokens + ROW.context) * 2 * keys * 2
    assert layer_kept(layout, ROW) == row.tokens * (norms + heads + core + swiglu) + gathered


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-14B", "Qwen3-30B-A3B"])
def test_what_saves_memory_saves_memory(name: str, recompute: str) -> None:
    def dynamic(**parallel: Any) -> int:
        return stage_memory(build_layout(name, recompute=recompute, world=64, **parallel), 0, ROW, 16).dynamic

    assert dynamic(tensor=2) < dynamic()
    assert dynamic(tensor=2, context=2) < dynamic(tensor=2)
    assert dynamic(tensor=2) < dynamic(tensor=2, sequence=False)
    assert dynamic(pipeline=4) <= dynamic(pipeline=4, virtual_pipeline=2) if name != "Qwen2.5-7B" else True


def test_recomputation_saves_activations() -> None:
    kept = [
        stage_memory(build_layout(recompute=mode, tensor=4), 0, ROW, 16).activations for mode in ("none", "selective", "full")
    ]
    assert kept[2] < kept[0] / 4
    assert kept[1] < kept[0] * 1.05


def test_fp8_keeps_inputs_in_one_byte_and_copies_of_weights() -> None:
    plain, fp8 = (stage_memory(build_layout(tensor=4, fp8=recipe), 0, ROW, 16) for recipe in ("none", "current"))
    assert fp8.activations < plain.activations
    assert fp8.weights > plain.weights
    assert fp8.optimizer == plain.optimizer


def test_experts_are_shared_out() -> None:
    one, eight = (stage_memory(build_layout("Qwen3-30B-A3B", world=64, expert=size), 0, ROW, 4) for size in (1, 8))
    assert eight.parameters < one.parameters / 4
    # Experts on eight ranks; a rank's share of their states is unchanged: the same ranks own each state once.
    assert eight.optimizer == pytest.approx(one.optimizer, rel=0.01)


def test_modules_that_are_computed_again_are_not_kept() -> None:
    """Per layer of a dense model: SwiGLU's three tensors, and the output of the norm that is fused with the first product."""
    plain = build_layout(tensor=4)
    model = ModelConfig(checkpoint="", recompute="selective", recompute_modules=["mlp"])
    again = dataclasses.replace(plain, model=model)
    swiglu, norm = 3 * 17408 // 4 * 2 * ROW.tokens, (5120 * 2 + 4) * ROW.tokens // 4
    assert layer_kept(plain, ROW) - layer_kept(again, ROW) == swiglu + norm
    both = dataclasses.replace(plain, model=dataclasses.replace(model, recompute_modules=["core_attn", "mlp"]))
    core = dataclasses.replace(plain, model=dataclasses.replace(model, recompute_modules=["core_attn"]))
    assert layer_kept(core, ROW) - layer_kept(both, ROW) == swiglu + norm
    peaks = [stage_memory(layout, 0, ROW, 16).dynamic for layout in (plain, again)]
    assert peaks[1] < 0.7 * peaks[0]  # one layer's are recomputed at the peak


def test_what_experts_compute_again_is_not_kept() -> None:
    plain = build_layout("Qwen3-30B-A3B")
    kept = {}
    for module in ("moe_act", "layernorm", "moe"):
        model = ModelConfig(checkpoint="", recompute="selective", recompute_modules=[module])  # type: ignore[list-item]
        kept[module] = layer_kept(dataclasses.replace(plain, model=model), ROW, experts=True)
    assert layer_kept(plain, ROW, experts=True) - kept["moe_act"] == ROW.tokens * 8 * 768 * 2
    assert layer_kept(plain, ROW, experts=True) - kept["layernorm"] == ROW.tokens * (2048 * 2 + 4)
    assert kept["moe"] < kept["moe_act"] / 2


def test_offloaded_layers_leave_two_on_their_way() -> None:
    plain = build_layout(world=8)
    layers = plain.shape.num_hidden_layers
    kept = [
        stage_memory(dataclasses.replace(plain, model=ModelConfig(checkpoint="", offload_layers=number)), 0, ROW, 4).activations
        for number in (0, layers - 10)
    ]
    assert kept[1] / kept[0] == pytest.approx(12 / layers, rel=0.05)


def test_chunks_of_log_probs_follow_the_gpus_memory() -> None:
    sizes = [
        stage_memory(dataclasses.replace(build_layout(), gpu_bytes=gib * 2**30), 0, ROW, 4).log_probs for gib in (24, 80, 141)
    ]
    assert sizes == sorted(set(sizes))
