"""One small run of every GPU computation, separately: successes, and the errors of failures.

    python -m tests.gpu.smoke FILE.json      # rewritten after each piece; exit code 1 if one failed

It takes seconds and runs before the tests: a kernel that kills the process is named in the file's last line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from mpo_megatron import device
from mpo_megatron.config import ParallelConfig
from mpo_megatron.hf.fp8 import RECIPES
from mpo_megatron.model import attention_varlen
from mpo_megatron.model.attention import row_layout, segment_attention
from mpo_megatron.model.attention_flex import flex_row_attention
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine
from mpo_megatron.train import optimizer
from mpo_megatron.train.step import forward_step, fused_step
from tests.gpu import small

Piece = Callable[[], str]
"""Computes, and returns a description of the result; raises if it is wrong."""

KERNELS = ("_flash_attn_3", "_transformer_engine", "_flash_attn", "_torch")
"""Finders of variable-length kernels in attention_varlen.py."""
SEGMENTS = row_layout([(0, 64, 0, 0), (64, 160, 0, 64), (160, 200, 0, 64), (200, 256, 200, 200)])
"""A prompt with two responses, and one alone."""


def main(arguments: list[str]) -> int:
    """Run every piece."""
    path, found = Path(arguments[0]), list[dict[str, object]]()
    with model_parallel(ParallelConfig(), seed=1) as ranks:
        for name, piece in pieces(ranks):
            started = time.perf_counter()
            found.append({"piece": name, "outcome": "begun"})
            write(path, found)
            try:
                outcome, said = "passed", piece()
                device.synchronize()
            except Exception as error:  # noqa: BLE001  # the point is to see all of them
                outcome, said = "failed", f"{type(error).__name__}: {error}"[:2000]
            found[-1] |= {"outcome": outcome, "said": said, "seconds": round(time.perf_counter() - started, 2)}
            write(path, found)
            print(f"{outcome}  {name}  {said}", flush=True)
    return int(any(each["outcome"] != "passed" for each in found))


def write(path: Path, found: list[dict[str, object]]) -> None:
    """Results so far."""
    path.write_text(json.dumps(found, indent=1) + "\n")


def pieces(ranks: Ranks) -> Iterator[tuple[str, Piece]]:
    """Everything that is installed, simple things first."""
    yield "matrix product in bf16", multiply
    yield "attention: flex", lambda: attend(lambda *inputs: flex_row_attention(*inputs, SEGMENTS))
    for finder in KERNELS:
        kernel = getattr(attention_varlen, finder)()
        if kernel is not None:
            yield (
                f"attention: varlen {finder.lstrip('_')}",
                lambda kernel=kernel: attend(
                    lambda *inputs: attention_varlen.varlen_row_attention(*inputs, SEGMENTS, kernel=kernel)
                ),
            )
    yield "step: local layers, bf16", lambda: step(ranks, backend="local")
    if missing_for_transformer_engine() is not None:
        return
    yield "step: Transformer Engine, bf16", lambda: step(ranks, backend="transformer_engine")
    yield (
        "step: Transformer Engine, MLPs computed again",
        lambda: step(ranks, backend="transformer_engine", recompute="selective", recompute_modules=["mlp"]),
    )
    yield "step: Transformer Engine, offloaded layers", lambda: step(ranks, backend="transformer_engine", offload_layers=2)
    for name in RECIPES:
        if missing_for_recipe(name) is None:
            yield f"step: FP8 {name}", lambda name=name: step(ranks, fp8=name)


def multiply() -> str:
    """A product against float64."""
    left, right = (torch.randn(512, 512, device=device.device()) for _ in range(2))
    found, exact = (left.bfloat16() @ right.bfloat16()).double(), left.double() @ right.double()
    return compare(found, exact, 2e-2)


def attend(attention: Callable[..., torch.Tensor]) -> str:
    """Attention over a row, and its gradients, in bf16 against float32."""
    generator = torch.Generator(device.device()).manual_seed(0)
    shapes = ((256, 8, 64), (256, 4, 64), (256, 4, 64))
    inputs = [torch.randn(shape, device=device.device(), generator=generator) for shape in shapes]
    results = []
    for dtype, function in (
        (torch.float32, lambda *each: segment_attention(*each, SEGMENTS.segments)),
        (torch.bfloat16, attention),
    ):
        leaves = [each.to(dtype).requires_grad_() for each in inputs]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    return ", ".join(compare(found, exact, 3e-2) for exact, found in zip(*results, strict=True))


def step(ranks: Ranks, **options: object) -> str:
    """A training step that starts at the exact loss and moves the weights."""
    config = small.model_config(**options)
    batch = small.batch(config)
    parts = small.build(config, ranks)
    reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
    model, adam = small.wrap(parts, ranks)
    optimizer.zero_gradients(model, adam)
    policy = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy
    off = abs(small.mean_loss(batch, policy, reference) - small.first_loss(batch))
    changed, norm = optimizer.update(model, adam)
    assert changed, "the update was not applied"
    assert 0 < norm < float("inf"), f"gradient norm {norm}"
    assert off < 1e-3, f"the first loss is off by {off:.1e}"
    return f"first loss off by {off:.1e}, gradient norm {norm:.3f}"


def compare(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> str:
    """The relative difference; raises above the tolerance."""
    difference = float((found.double() - exact.double()).norm() / exact.double().norm())
    assert difference < tolerance, f"off by {difference:.1e}, tolerance {tolerance:.0e}"
    return f"off by {difference:.1e}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
