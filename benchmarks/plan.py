"""Measured peak memory of training steps, compared with `mpo plan` component by component.

    python -m benchmarks.plan                            # two CPU ranks, a minute or two
    python -m benchmarks.plan --size 1.5b --ranks 1      # one GPU; with more, --ranks 2

Weights, gradients and optimizer states are measured in memory after a step. The dynamic part is the next step's peak above them:
on a GPU `torch.cuda.max_memory_allocated`; on a CPU, whose allocator does not count, the bytes of all tensors' storages, from the
operation that creates one until its last tensor is freed, including autograd's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, hf_config, make_batch, make_groups, zero_reference
from benchmarks.setup import Bench as Ranked
from mpo_megatron import device
from mpo_megatron.config import LoraConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, StepBatch
from mpo_megatron.families import read_family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.model.architecture import use_transformer_engine
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.nf4 import quantize
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.quantized import quantized_layers
from mpo_megatron.plan.memory import StageMemory, stage_memory
from mpo_megatron.plan.memory_layout import Kernels, MemoryLayout
from mpo_megatron.plan.rows import count_row
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import build_objective
from mpo_megatron.train.step import prepare_schedules

SHORT = (16, 16, 2)
"""P, R, K of the step before the measured one."""
COMPONENTS = ("weights", "gradients", "optimizer", "dynamic")
"""Components measured separately."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout, and the content of its rows."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    groups: int = 2
    """Groups per replica; each fills a row."""
    lengths: tuple[int, int, int] = (256, 128, 4)
    """P, R, K."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Changes of the model's configuration, on CPUs."""
    lora: int = 0
    """Rank of adapters in all linear layers, with frozen weights; 0: all weights are trained."""
    quantize: Literal["none", "nf4"] | None = None
    """Format of the frozen weights."""


QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True}
"""Bias on queries, keys and values, no norm of them, tied embeddings."""
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
}
"""Experts instead of an MLP."""


HYBRID = {
    "model_type": "qwen3_5_text",
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
"""Three Gated DeltaNets, then one layer of gated attention."""
HYBRID_EXPERTS = HYBRID | {
    "model_type": "qwen3_5_moe_text",
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "shared_expert_intermediate_size": 192},
}
"""The same with experts in all layers."""


LARGE_VOCABULARY = Case(
    name="large vocabulary, full recomputation", model={"recompute": "full", "logprob_chunk": 64}, shape={"vocab_size": 24576}
)
"""Where the gradient of the embedding matters."""

CASES = {
    1: (
        LARGE_VOCABULARY,
        Case(name="one rank"),
        Case(name="selective recomputation", model={"recompute": "selective"}),
        Case(name="full recomputation", model={"recompute": "full"}),
        Case(name="recomputed MLPs", model={"recompute": "selective", "recompute_modules": ["mlp"]}),
        Case(name="longer rows", lengths=(512, 320, 5)),
        Case(name="adapters", lora=8),
        Case(name="adapters, full recomputation", lora=8, model={"recompute": "full"}),
        Case(name="hybrid", shape=HYBRID),
        Case(name="hybrid, longer rows", shape=HYBRID, lengths=(512, 320, 5)),
        Case(name="hybrid, selective recomputation", shape=HYBRID, model={"recompute": "selective"}),
        Case(name="hybrid, full recomputation", shape=HYBRID, model={"recompute": "full"}),
        Case(name="hybrid, adapters", shape=HYBRID, lora=8),
        Case(name="hybrid, adapters, longer rows", shape=HYBRID, lora=8, lengths=(512, 320, 5)),
        Case(name="hybrid, adapters in 4 bits", shape=HYBRID, lora=8, quantize="nf4"),
        Case(
            name="hybrid, adapters in 4 bits, full recomputation",
            shape=HYBRID,
            lora=8,
            quantize="nf4",
            model={"recompute": "full"},
        ),
        Case(name="hybrid, experts, adapters", shape=HYBRID_EXPERTS, lora=8),
    ),
    2: (
        Case(name="data 2"),
        Case(name="data 2, selective recomputation", model={"recompute": "selective"}),
        Case(name="data 2, full recomputation", model={"recompute": "full"}),
        Case(name="data 2, recomputed MLPs", model={"recompute": "selective", "recompute_modules": ["mlp"]}),
        Case(name="data 2, longer rows", lengths=(512, 256, 5)),
        Case(name="data 2, small chunks of log-probs", model={"logprob_chunk": 64}),
        Case(name="tensor 2", parallel={"tensor": 2}),
        Case(name="tensor 2, no sequence parallelism", parallel={"tensor": 2, "sequence": False}),
        Case(name="tensor 2, full recomputation", parallel={"tensor": 2}, model={"recompute": "full"}),
        Case(name="pipeline 2", parallel={"pipeline": 2}, groups=4),
        Case(name="pipeline 2, full recomputation", parallel={"pipeline": 2}, model={"recompute": "full"}, groups=4),
        Case(name="pipeline 2 in 2 runs", parallel={"pipeline": 2, "virtual_pipeline": 2}, groups=4),
        Case(name="context 2", parallel={"context": 2}),
        Case(name="context 2, full recomputation", parallel={"context": 2}, model={"recompute": "full"}),
        Case(name="Qwen2, tied, tensor 2", parallel={"tensor": 2}, shape=QWEN2),
        Case(name="Qwen2, tied, pipeline 2", parallel={"pipeline": 2}, shape=QWEN2, groups=4),
        LARGE_VOCABULARY,
        Case(name="experts, data 2", shape=EXPERTS),
        Case(name="experts, expert 2", parallel={"expert": 2}, shape=EXPERTS),
        Case(name="adapters, data 2", lora=8),
        Case(name="adapters, tensor 2", lora=8, parallel={"tensor": 2}),
        Case(name="adapters, pipeline 2, full recomputation", lora=8, parallel={"pipeline": 2}, model={"recompute": "full"}),
        Case(name="hybrid, tensor 2", parallel={"tensor": 2}, shape=HYBRID),
        Case(name="hybrid, adapters, data 2", lora=8, shape=HYBRID),
    ),
}
"""Cases by number of ranks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the ranks, measure every case, compare."""
    parser = timing.build_parser(__doc__, list(SHAPES), repeat=1)
    parser.add_argument("--ranks", type=int, choices=list(CASES), default=2, help="ranks to start on this machine")
    parser.add_argument("--cases", default="", help="only cases whose names contain this")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = timing.parse(parser, arguments)
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        raise SystemExit(subprocess.run([*command, "-m", "benchmarks.plan", *arguments], env=environment, check=False).returncode)
    with connected():
        cases = [case for case in CASES[options.ranks] if options.cases in case.name]
        cases = cases[:2] if options.size == "tiny" else cases
        found = timing.measure_each(
            "plan", options, cases, lambda case: gather(measure(case, configuration(options.size, case.shape), options))
        )
        if torch.distributed.get_rank() == 0:
            show(options, [row for stages in found for row in stages])


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect the ranks once for all cases; each case creates its own groups."""
    device.select(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(device.distributed_backend())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def configuration(size: str, shape: dict[str, Any]) -> PretrainedConfig:
    """On CPUs, a Qwen3 model with more layers than in the other benchmarks, plus `shape`; otherwise as in those."""
    if size not in ("tiny", "small"):
        return hf_config(size)
    small = size == "small"
    settings = {
        "model_type": "qwen3",
        "hidden_size": 256 if small else 64,
        "intermediate_size": 768 if small else 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 8 if small else 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 6144 if small else 512,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "eos_token_id": 511,
        "pad_token_id": 510,
    }
    return AutoConfig.for_model(**(settings | shape))


def measure(case: Case, config: PretrainedConfig, options: argparse.Namespace) -> timing.Row:
    """One case on this rank: bytes measured and planned."""
    parallel = ParallelConfig(**case.parallel)
    model_config = ModelConfig(checkpoint="random", precision="bf16" if device.has_gpu() else "fp32", **case.model)
    optimizer_config = OptimizerConfig(lr=1e-6)
    torch.distributed.barrier()
    with model_parallel(parallel, seed=1) as ranks:
        own = Ranked(config=config, parallel=parallel, ranks=ranks)
        prompt, response, responses = case.lengths
        batch = build_batch(own, case)
        family = read_family(config)
        adapter = choose_adapter(family, LoraConfig(rank=case.lora, quantize=case.quantize))
        parts = build_policy(family, model_config, parallel, ranks, config.vocab_size, adapter)
        with torch.no_grad():
            for part in parts:
                for parameter in part.parameters():  # random, so that experts share the tokens
                    parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
                for layer in quantized_layers(part):
                    layer.blocks = quantize(
                        0.02 * torch.randn(layer.weight_shape, dtype=layer.weight_dtype, device=device.device())
                    )
        model = optimizer.wrap_data_parallel(parts, optimizer_config, ranks)
        prepare_schedules(model)
        step = TrainStep(own, model)
        first = build_batch(own, replace(case, lengths=SHORT))
        step(first, zero_reference(first))  # creates the optimizer's states
        measured = measure_static(model, step.adam)
        measured["weights"] += sum(layer.blocks.num_bytes for part in parts for layer in quantized_layers(part))
        measured["dynamic"] = measure_peak(lambda: step(batch, zero_reference(batch)))
        planned = plan(own, model_config, optimizer_config, batch, own.ranks.pipeline.rank(), adapter)
    return {
        "case": case.name,
        "stage": planned.stage,
        "lengths": f"P {prompt}, R {response}, K {responses}",
        "tokens": max(len(row.tokens) for row in batch.rows),
        "moment": planned.moment,
        "measured": measured,
        "planned": {name: getattr(planned, name) for name in COMPONENTS},
        "total_measured": sum(measured.values()),
        "total_planned": planned.total,
    }


def build_batch(own: Ranked, case: Case) -> StepBatch:
    """Groups of equal lengths, one per row."""
    prompt, response, responses = case.lengths
    shape = RowShape(
        row_tokens=prompt + response * responses,
        layout="shared",
        multiple=16 * own.parallel.row_parts,
        num_replicas=own.ranks.data_size,
        replica=own.ranks.data_rank,
        pair_weight=own.flops.pair_weight,
        rows_multiple=own.parallel.rows_multiple,
    )
    groups = make_groups(
        case.groups * own.ranks.data_size,
        prompt=prompt,
        response=response,
        responses=responses,
        vocab_size=own.config.vocab_size,
    )
    return make_batch(groups, build_objective(LossConfig(name="mpo")), shape)


def plan(
    own: Ranked, model: ModelConfig, config: OptimizerConfig, batch: StepBatch, stage: int, adapter: Adapter | None
) -> StageMemory:
    """The prediction of `mpo plan` for this rank and these rows."""
    layout = MemoryLayout(
        shape=read_family(own.config),
        padded_vocab=own.config.vocab_size,
        model=model,
        parallel=own.parallel,
        optimizer=config,
        world_size=torch.distributed.get_world_size(),
        kernels=Kernels(
            layers="transformer_engine" if use_transformer_engine(model) else "local",
            attention=choose_attention(model),  # type: ignore[arg-type]
            gpu=device.has_gpu(),
        ),
        resident=False,
        adapter=adapter,
        gpu_bytes=device.gpu_bytes(),
    )
    largest = max(batch.rows, key=lambda row: len(row.tokens))
    return stage_memory(layout, stage, count_row(largest), len(batch.rows))


class Storages(TorchDispatchMode):
    """Bytes of all tensors created within this context, now and at the peak; on a CPU, where PyTorch does not count them.

    Memory that a kernel allocates internally is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in self.live and storage._cdata not in given:
                self.live[storage._cdata] = storage.nbytes()
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.total)
                weakref.finalize(storage, self.release, storage._cdata)
        return result

    def release(self, key: int) -> None:
        """The last tensor of a storage is freed."""
        self.total -= self.live.pop(key)


def storages(values: Any) -> list[Any]:
    """The memory behind every tensor in nested containers."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def count_bytes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes behind tensors, each storage once, by its address."""
    return {storage.data_ptr(): storage.nbytes() for storage in storages(list(tensors))}


def measure_static(model: list[Any], adam: Any) -> dict[str, int]:
    """Bytes of weights, gradient buffers and optimizer states in memory between two steps."""
    parameters = [parameter for part in model for parameter in part.parameters()]
    weights = count_bytes(parameters)
    gradients = count_bytes(parameter.main_grad for parameter in parameters if parameter.requires_grad)
    states: dict[int, int] = {}
    for one in getattr(adam, "chained_optimizers", [adam]):
        own = [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        states |= count_bytes([*own, *tree_leaves([dict(state) for state in one.optimizer.state.values()])])
    extra = {address: size for address, size in states.items() if address not in weights and address not in gradients}
    return {name: sum(sizes.values()) for name, sizes in zip(COMPONENTS, (weights, gradients, extra), strict=False)}


def measure_peak(action: Callable[[], object]) -> int:
    """Bytes allocated above the start at an action's peak."""
    gc.collect()
    if device.has_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Storages() as counted:
        action()
    return counted.peak


def gather(row: timing.Row) -> list[timing.Row]:
    """The distinct rows of all ranks: one per pipeline stage."""
    rows: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(rows, row)
    return list({row["stage"]: row for row in reversed(rows)}.values())[::-1]


def show(options: argparse.Namespace, rows: list[timing.Row]) -> None:
    """Print the table: measured MiB, and the plan's error."""
    table = []
    for row in rows:
        line: dict[str, Any] = {"case": row["case"], "stage": row["stage"], "row": row["tokens"]}
        for name in COMPONENTS:
            measured, planned = row["measured"][name], row["planned"][name]
            line[f"{name}, MiB"] = f"{measured / 2**20:.1f} ({planned / measured - 1:+.1%})"
        line["peak, MiB"] = f"{row['total_measured'] / 2**20:.1f} ({row['total_planned'] / row['total_measured'] - 1:+.1%})"
        table.append({**line, "at": row["moment"]})
    note = "Measured, with the plan's error in brackets. `dynamic`: activations and working memory at the step's peak."
    timing.report("plan", options, {"ranks": options.ranks}, rows, table, note)


if __name__ == "__main__":
    main()
