"""The gated delta rule over packed rows: against its definition, token by token, and against other implementations of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from torch import Tensor
from torch.nn.functional import conv1d, pad

from mpo_megatron.config import ConfigError, ModelConfig
from mpo_megatron.families import Family, read_family
from mpo_megatron.model import delta_backends, delta_fla
from mpo_megatron.model.attention import Segment, row_layout
from mpo_megatron.model.delta_backends import choose_delta_rule
from mpo_megatron.model.delta_net import convolve
from mpo_megatron.model.delta_rule import build_chunks, order_states, run_chunks, unit
from mpo_megatron.stack import delta_kernels
from tests.tiny import CONFIGS
from tests.tolerances import reordered
from tests.unit.model.rows import random_groups_row

KEY_HEADS, SHARE, KEYS, VALUES, CHUNK = 2, 2, 6, 5, 8
# Sums of float64 products over some hundred tokens: 2⁻⁵² times a few hundred, and gradients ten times as large as outputs.
EXACT = 1e-12
FLOAT32 = reordered(64)
"""Of float32 sums over the tokens of a chunk."""


def random_inputs(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value, decay and rate of a row."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator, dtype=torch.float64)

    heads = KEY_HEADS * SHARE
    drawn = [draw(KEY_HEADS, KEYS), draw(KEY_HEADS, KEYS), draw(heads, VALUES), -draw(heads).exp() / 4, draw(heads).sigmoid()]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def by_definition(inputs: list[Tensor], segments: list[Segment]) -> Tensor:
    """The rule, token by token."""
    query, key, value, decay, rate = inputs
    query, key = (unit(part).repeat_interleave(SHARE, dim=1) for part in (query, key))
    outputs: dict[int, Tensor] = {}
    ends: dict[tuple[int, int], Tensor] = {}
    for start, end, *context in segments:
        state = ends.get((context[0], context[1]), torch.zeros(value.shape[1], KEYS, VALUES, dtype=value.dtype))
        for token in range(start, end):
            state = state * decay[token].exp()[:, None, None]
            missing = (value[token] - (state.transpose(1, 2) @ key[token][..., None])[..., 0]) * rate[token][:, None]
            state = state + key[token][..., None] * missing[:, None]
            outputs[token] = (state.transpose(1, 2) @ query[token][..., None])[..., 0] * KEYS**-0.5
        ends[start, end] = state
    return torch.stack([outputs[token] for token in range(len(query))])


def row(*groups: tuple[int, list[int]]) -> list[Segment]:
    """Groups of (tokens of the prompt, tokens of each response)."""
    segments, end = [], 0
    for prompt, responses in groups:
        context = (end, end + prompt)
        if prompt:
            segments.append(Segment(*context, end, end))
        end += prompt
        for tokens in responses:
            segments.append(Segment(end, end + tokens, *(context if prompt else (end, end))))
            end += tokens
    return segments


LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3]
ROWS = [
    *(row((prompt, [1, CHUNK, CHUNK + 1])) for prompt in (0, *LENGTHS)),
    row((3, [])),  # a prompt that none of the row's responses belongs to
    row((5, [1] * 16), (CHUNK, [2]), (0, [4, 1]), (1, LENGTHS)),
    *(random_groups_row(seed, max_groups=3) for seed in range(3)),
]


@pytest.mark.parametrize("segments", ROWS, ids=range(len(ROWS)))
def test_chunks_compute_what_the_definition_says(segments: list[Segment]) -> None:
    inputs = random_inputs(segments[-1].end)
    truth, ours = by_definition(inputs, segments), run_chunks(*inputs, build_chunks(segments, size=CHUNK))
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=truth.dtype)
    torch.testing.assert_close(ours, truth, rtol=EXACT, atol=EXACT)
    expected, found = (torch.autograd.grad((output * weights).sum(), inputs) for output in (truth, ours))
    for theirs, gradient in zip(expected, found, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=10 * EXACT, atol=10 * EXACT)


def test_megatron_core_s_rule_agrees() -> None:
    """For whole sequences, in float32, with the chunk size that both have."""
    segments = row((100, []), (64, []))
    inputs = random_inputs(164, dtype=torch.float32)
    ours = run_chunks(*inputs, build_chunks(segments, 64))
    query, key, value, decay, rate = inputs
    for start, end, *_ in segments:
        part = slice(start, end)
        theirs, _ = torch_chunk_gated_delta_rule(
            *(unit(tensor[part]).repeat_interleave(SHARE, dim=1)[None] for tensor in (query, key)),
            *(tensor[part][None] for tensor in (value, decay, rate)),
        )
        torch.testing.assert_close(ours[part], theirs[0], rtol=FLOAT32, atol=FLOAT32)


def test_a_response_does_not_depend_on_its_siblings() -> None:
    prompt, responses = 11, [9, 1, 17]
    shared = row((prompt, responses))
    inputs = random_inputs(shared[-1].end)
    everything = run_chunks(*inputs, build_chunks(shared, size=CHUNK))
    start = prompt
    for tokens in responses:
        own = [*range(prompt), *range(start, start + tokens)]
        alone = run_chunks(*(tensor[own] for tensor in inputs), build_chunks(row((prompt + tokens, [])), size=CHUNK))
        torch.testing.assert_close(everything[own[prompt:]], alone[prompt:], rtol=EXACT, atol=EXACT)
        start += tokens


def test_a_context_must_be_a_whole_segment() -> None:
    with pytest.raises(ValueError, match="context"):
        order_states([Segment(0, 4, 0, 0), Segment(4, 6, 0, 3)])


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("prompt", [0, 1, 2, 3, 4, 9])
def test_the_convolution_goes_on_where_the_prompt_ends(prompt: int, taps: int) -> None:
    segments = row((prompt, [1, 2, 7]), (3, [5]))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(segments[-1].end, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, taps, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros_like(inputs)
    for start, end, *context in segments:
        whole = torch.cat((inputs[context[0] : context[1]], inputs[start:end]))
        mixed = conv1d(pad(whole.t()[None], (taps - 1, 0)), weight, groups=3)[0].t()
        expected = expected.index_copy(0, torch.arange(start, end), mixed[len(mixed) - (end - start) :])
    ours = convolve(inputs, weight, row_layout(segments))
    torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for theirs, found in zip(
        *(torch.autograd.grad((output * weights).sum(), (inputs, weight)) for output in (expected, ours)), strict=True
    ):
        torch.testing.assert_close(found, theirs, rtol=10 * EXACT, atol=10 * EXACT)


def sequential_kernel(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, ends: Tensor, state: Tensor | None, *, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Replaces flash-linear-attention's function by Megatron-Core's, for one sequence."""
    outputs, lasts = [], []
    for number, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
        part = slice(start, end)
        output, last = torch_chunk_gated_delta_rule(
            *(unit(tensor[part]).repeat_interleave(SHARE, dim=1)[None] for tensor in (query, key)),
            *(tensor[part][None] for tensor in (value, decay, rate)),
            initial_state=None if state is None else state[number][None],
            output_final_state=True,
        )
        outputs.append(output[0])
        lasts.append(last)
    return torch.cat(outputs), torch.cat(lasts) if final else None


@pytest.mark.parametrize("segments", [ROWS[0], ROWS[4], ROWS[9]], ids=["no prompt", "a chunk", "groups"])
def test_the_calls_of_flash_linear_attention(segments: list[Segment], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in one call, responses from their states in another; the kernel itself needs a GPU."""
    monkeypatch.setattr(delta_fla, "_kernel", sequential_kernel)
    inputs = random_inputs(segments[-1].end, dtype=torch.float32)
    truth = run_chunks(*inputs, build_chunks(segments, 64))
    ours = delta_fla.fla_delta_rule(*inputs, row_layout(segments))
    torch.testing.assert_close(ours, truth, rtol=FLOAT32, atol=FLOAT32)
    weights = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    for expected, found in zip(*(torch.autograd.grad((output * weights).sum(), inputs) for output in (truth, ours)), strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * FLOAT32, atol=10 * FLOAT32)


KERNELS = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not KERNELS, reason="flash-linear-attention or triton is not installed")
def test_the_kernels_of_flash_linear_attention() -> None:
    """Through Triton's interpreter, in a separate process: it must be enabled before triton is imported."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.model.fla_rows"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    float16 = errors.pop("float16")
    # Sums over a chunk; between them, the kernels round to the inputs' dtype.
    assert max(float16.values()) <= reordered(1, torch.float16), float16
    for case, found in errors.items():
        assert max(found.values()) <= FLOAT32, (case, found)


def hybrid() -> Family:
    return read_family(CONFIGS["qwen3_5_text"]())


def test_without_a_gpu_plain_operations_compute_it() -> None:
    assert choose_delta_rule(ModelConfig(checkpoint="x"), hybrid()) == "torch"
    with pytest.raises(ConfigError, match=r"model\.delta_rule = fla, but this machine has no GPU"):
        choose_delta_rule(ModelConfig(checkpoint="x", delta_rule="fla"), hybrid())


def test_a_gpu_needs_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_backends.device, "has_gpu", lambda: True)
    monkeypatch.setattr(delta_kernels, "is_installed", lambda: False)
    model = ModelConfig(checkpoint="x")
    with pytest.raises(ConfigError, match=r"not installed: pip install 'flash-linear-attention.*set model.delta_rule to torch"):
        choose_delta_rule(model, hybrid())
    assert choose_delta_rule(dataclasses.replace(model, delta_rule="torch"), hybrid()) == "torch"
    assert choose_delta_rule(dataclasses.replace(model, precision="fp32"), hybrid()) == "torch"
    monkeypatch.setattr(delta_kernels, "is_installed", lambda: True)
    versions = {"fla-core": "0.6.0", "triton": "3.6.0"}
    monkeypatch.setattr(delta_kernels, "version_of", versions.get)
    assert choose_delta_rule(model, hybrid()) == "fla"
    versions["fla-core"] = "0.4.1"
    with pytest.raises(ConfigError, match=r"0\.4\.1 is installed, but <0\.7,>=0\.5\.2 is needed"):
        choose_delta_rule(model, hybrid())
    with pytest.raises(ConfigError, match="64 tokens at once"):
        choose_delta_rule(dataclasses.replace(model, delta_chunk=32), hybrid())
    with pytest.raises(ConfigError, match="float32"):
        choose_delta_rule(dataclasses.replace(model, precision="fp32", delta_rule="fla"), hybrid())


@pytest.mark.parametrize(
    ("triton", "tilelang", "works"), [("3.6.0", False, False), ("3.6.0", True, True), ("3.7.1", False, True)]
)
def test_wrong_gradients_on_hopper_are_refused(triton: str, tilelang: bool, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_kernels, "version_of", {"fla-core": "0.6.0", "triton": triton}.get)
    monkeypatch.setattr(delta_kernels, "_has", lambda module: module == "fla" or tilelang)
    monkeypatch.setattr(delta_kernels, "is_hopper", lambda: True)
    missing = delta_kernels.missing_for_delta_kernels()
    assert (missing is None) == works
    assert works or "Triton 3.6.0 compiles wrong gradients" in str(missing)


def test_a_model_without_such_layers_has_no_kernel_to_choose() -> None:
    family = read_family(CONFIGS["qwen3"]())
    with pytest.raises(ConfigError, match=r"model\.delta_rule = torch, but no layer"):
        choose_delta_rule(ModelConfig(checkpoint="x", delta_rule="torch"), family)
    with pytest.raises(ConfigError, match=r"model\.delta_chunk = 32, but no layer"):
        choose_delta_rule(ModelConfig(checkpoint="x", delta_chunk=32), family)
    chosen = choose_delta_rule(ModelConfig(checkpoint="x"), family)  # a run decides once for all ranks, and each builds with that
    assert choose_delta_rule(ModelConfig(checkpoint="x", delta_rule=chosen), family) == chosen  # type: ignore[arg-type]
