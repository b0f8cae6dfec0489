"""flash-linear-attention's kernels against plain operations, on a GPU or through Triton's interpreter.

`python -m tests.unit.model.fla_rows` prints the largest errors as JSON; with TRITON_INTERPRET=1 it needs no GPU.
"""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.model.attention import Segment, row_layout
from mpo_megatron.model.delta_fla import _kernel, fla_delta_rule
from mpo_megatron.model.delta_rule import build_chunks, run_chunks, unit

KEY_HEADS, SHARE = 2, 2


def random_inputs(tokens: int, dtype: torch.dtype, place: str, *, channels: int = 16) -> list[Tensor]:
    """Query, key, value, decay and rate of a row; decays and rates in float32, as the layer computes them."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator)

    heads = KEY_HEADS * SHARE
    drawn = [draw(KEY_HEADS, channels), draw(KEY_HEADS, channels), draw(heads, 2 * channels)]
    drawn = [part.to(dtype) for part in drawn] + [-draw(heads).exp() / 4, draw(heads).sigmoid()]
    return [part.to(place).requires_grad_() for part in drawn]


def row_errors(segments: list[Segment], dtype: torch.dtype, place: str = "cpu", *, channels: int = 16) -> dict[str, float]:
    """Errors of outputs and gradients of a row, relative to the largest value of each; plain operations compute in float32."""
    inputs = random_inputs(segments[-1].end, dtype, place, channels=channels)
    exact = [part.detach().float().requires_grad_() for part in inputs]
    outputs = fla_delta_rule(*inputs, row_layout(segments)), run_chunks(*exact, build_chunks(segments, 64))
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(place)
    gradients = [
        torch.autograd.grad((output.float() * weights).sum(), own) for output, own in zip(outputs, (inputs, exact), strict=True)
    ]
    names = ("output", "query", "key", "value", "decay", "rate")
    pairs = zip(names, (outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True)
    return {name: _error(ours, truth) for name, ours, truth in pairs}


def transformers_errors(place: str = "cpu") -> dict[str, float]:
    """Errors of outputs and last states of two sequences with initial states, against the function in `transformers`."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    lengths = [70, 3]
    inputs = [part.detach() for part in random_inputs(sum(lengths), torch.float32, place)]
    states = torch.randn(len(lengths), KEY_HEADS * SHARE, 16, 32, generator=torch.Generator().manual_seed(2)).to(place)
    ends = torch.tensor([0, *lengths], device=place).cumsum(0)
    output, last = _kernel(*inputs, ends, states, final=True)
    assert last is not None
    found = {"output": 0.0, "state": 0.0}
    for number, part in enumerate(zip(*(tensor.split(lengths) for tensor in inputs), strict=True)):
        query, key = (unit(tensor).repeat_interleave(SHARE, dim=1)[None] for tensor in part[:2])
        rest = (tensor[None] for tensor in part[2:])
        truth, end = torch_chunk_gated_delta_rule(
            *(query, key, *rest), initial_state=states[number : number + 1], output_final_state=True
        )
        own = output.split(lengths)[number]
        found["output"] = max(found["output"], _error(own, truth[0]))
        found["state"] = max(found["state"], _error(last[number], end[0]))
    return found


def _error(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).abs().max() / truth.abs().max())


class _Index(int):
    """A loop's index in the interpreter, which passes kernels a number where the compiler passes a tensor."""

    def to(self, dtype: Any) -> _Index:
        return self


def _indices(*bounds: int) -> Iterator[_Index]:
    return map(_Index, builtins.range(*bounds))


def prepare_interpreter() -> None:
    """Let Triton's interpreter run the kernels: without autotuning, which needs a GPU, and with indices as tensors."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, options: prune(self, options)[:1]
    import fla.ops.gated_delta_rule  # type: ignore[import-not-found,unused-ignore]  # noqa: F401 - its modules are changed

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops.") and isinstance(module, types.ModuleType):
            vars(module)["range"] = _indices


def main() -> None:
    """A group around the kernels' chunk of 64 tokens, and one without a prompt; the interpreter has float16, and no bfloat16."""
    prepare_interpreter()
    group = [Segment(0, 65, 0, 0), Segment(65, 66, 0, 65), Segment(66, 132, 0, 65), Segment(132, 135, 132, 132)]
    found = {
        "float32": row_errors(group, torch.float32),
        "float16": row_errors([Segment(0, 5, 0, 0), Segment(5, 9, 0, 5)], torch.float16),
        "transformers": transformers_errors(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
