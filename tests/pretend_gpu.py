"""A pretend GPU: tensors report the device `cuda:0`, are stored in CPU memory, and are refused where CUDA would refuse them.

    python -m tests.pretend_gpu MODULE [ARGUMENTS…]      # run a module as on a machine with one GPU

It finds mixed devices (a CPU tensor beside a GPU tensor, `.numpy()` of a GPU tensor, a collective of NCCL over a CPU
tensor, a CPU generator for numbers on the GPU, a GPU tensor in a forked process) and wrong use of `torch.cuda`, with real numbers
coming out. It checks *placement, not kernels*: every operation runs as its CPU kernel, at once, one after the other; nothing is
compiled; memory and time mean nothing, so tests and benchmarks that measure them fail or mislead (torch's profiler cannot record
its GPU at all). Child processes have no GPU: run `mpo_megatron.train` on it, not `mpo train`, which starts ranks.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.attention.bias
import torch.nn.attention.flex_attention
import torch.nn.attention.varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests import pretend_gpu_cuda as cuda
from tests.pretend_gpu_cuda import GPU

CPU = torch.device("cpu")

MIXED = {
    "aten::_copy_from", "aten::_foreach_copy_", "aten::_to_copy", "aten::copy_", "aten::fill_", "aten::index", "aten::index_put_",
    "aten::_index_put_impl_", "aten::index_put", "aten::masked_fill", "aten::masked_fill_",
}  # fmt: skip
"""Operations that accept CPU tensors together with GPU tensors: copies, indices (of GPU tensors only) and fill values."""

_owner = os.getpid()


class MixedDevicesError(RuntimeError):
    """CUDA would refuse this."""


class GPUTensor(torch.Tensor):
    """A tensor with a CPU tensor's memory that reports the GPU as its device. Views and parameters share memory as usual."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"{self.detach().cpu()!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.detach().cpu(), spec)

    def record_stream(self, stream: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            copied.__dict__.update({name: value for name, value in self.__dict__.items() if name != "main_grad"})
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return to_gpu, (self.detach().cpu(), self.requires_grad)


def on_gpu(value: Any) -> bool:
    """Whether this is a tensor on the GPU; `tensor.data = other` can change its device, which its dispatch keys show."""
    return isinstance(value, GPUTensor) and torch._C._dispatch_keys(value).has(torch._C.DispatchKey.CUDA)


def to_gpu(tensor: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    """The same memory as a tensor on the GPU."""
    made: Any = torch.Tensor._make_subclass(GPUTensor, tensor, dispatch_device=True, device_for_backend_keys=GPU)
    return made.requires_grad_() if requires_grad else made


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    plain = torch.empty(0, dtype=tensor.dtype)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check the devices of an operation's tensors, run it on their memory, and return tensors on CUDA's output devices."""
    if func is torch.ops.prim.device.default:
        return GPU if on_gpu(args[0]) else CPU
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    wanted = kwargs.get("device")
    if wanted is not None and wanted.type == "meta":
        return func(*args, **kwargs)
    gpu = any(map(on_gpu, tensors)) if wanted is None else wanted.type == "cuda"
    if kwargs.get("pin_memory"):
        if gpu:
            raise MixedDevicesError(f"{func}: only dense CPU tensors can be pinned")
        kwargs = {**kwargs, "pin_memory": False}
    generator = kwargs.get("generator")
    if generator is not None and gpu != (generator._cdata in cuda.gpu_generators):
        raise MixedDevicesError(f"{func}: expected a {'cuda' if gpu else 'cpu'!r} generator")
    if not gpu and not any(isinstance(tensor, GPUTensor) for tensor in tensors):
        return func(*args, **kwargs)
    if os.getpid() != _owner:
        raise RuntimeError(f"{func}: Cannot re-initialize CUDA in forked subprocess")
    check(func, args, kwargs, tensors, gpu)
    if wanted is not None:
        kwargs = {**kwargs, "device": CPU}
    if func.name() == "aten::_fused_sdp_choice":
        return 0  # scaled_dot_product_attention's back end without a separate kernel
    plain_args, plain_kwargs = tree_map_only(GPUTensor, memory_of, (args, kwargs))
    if func.name() == "aten::addmm.dtype_out":  # the CPU has no such kernel
        return kwargs["out"].add_(args[1].to(args[3]) @ args[2].to(args[3]))
    if func.name() == "aten::_fused_rms_norm_backward":  # nor this one
        return tree_map_only(torch.Tensor, to_gpu, rms_norm_backward(*plain_args))
    with OwnRandomness() if gpu and torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext():
        out = func(*plain_args, **plain_kwargs)
    written = [value for argument, value in arguments_of(func, args, kwargs) if writes(argument)]
    if len(func._schema.returns) == 1 and writes(func._schema.returns[0]) and isinstance(written[0], torch.Tensor):
        if out.shape != written[0].shape or out.stride() != written[0].stride():  # resize_ and the like
            written[0].data = to_gpu(out) if gpu else out
        return written[0]
    return tree_map_only(torch.Tensor, to_gpu, out) if gpu else out


def rms_norm_backward(
    gradient: torch.Tensor,
    values: torch.Tensor,
    shape: list[int],
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of values · scale · weight, scale = 1 / √(mean(values²) + ε), over the last dimension."""
    assert len(shape) == 1
    normalized, outer = values.float() * scale, gradient.float()
    inner = outer if weight is None else outer * weight.float()
    of_values = scale * (inner - normalized * (inner * normalized).mean(dim=-1, keepdim=True))
    of_weight = None if weight is None else (outer * normalized).flatten(0, -2).sum(dim=0).to(weight.dtype)
    return of_values.to(values.dtype) if wanted[0] else None, of_weight if wanted[1] else None


def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor], gpu: bool) -> None:
    """Refuse what CUDA refuses.

    Raises:
        MixedDevicesError: names the operation and the devices of its tensors.
    """
    name = func.name().split(".")[0]
    gpus = list(map(on_gpu, tensors))
    if name.startswith("c10d::"):
        check_collective(func, args, kwargs)
        return
    if not any(gpus) or all(gpus) or (name in MIXED and (gpus[0] or "index" not in name)):
        return
    described = ", ".join(
        f"{'cuda' if there else 'cpu'}{list(tensor.shape)}" for there, tensor in zip(gpus, tensors, strict=True)
    )
    scalars = torch.Tag.pointwise in func.tags or name.startswith("aten::_foreach_")
    for argument, value in arguments_of(func, args, kwargs):
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and not on_gpu(tensor) and (tensor.dim() or writes(argument) or not scalars):
                raise MixedDevicesError(f"{func}: expected all tensors to be on one device, found {described}")


def check_collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """NCCL moves only GPU tensors, gloo's groups here only CPU tensors."""
    values = {argument.name: value for argument, value in arguments_of(func, args, kwargs)}
    group = dist.ProcessGroup.unbox(values["process_group"])
    nccl = group.group_name in cuda.nccl_groups
    for tensor in tree_leaves(list(values.values())):
        if isinstance(tensor, torch.Tensor) and on_gpu(tensor) != nccl:
            raise MixedDevicesError(
                f"{func}: no backend for a tensor on {tensor.device} in a group of {'nccl' if nccl else 'gloo'}"
            )


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The schema's arguments with their values."""
    named = [(argument, value) for argument, value in zip(func._schema.arguments, args, strict=False)]
    return named + [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class Placement(TorchDispatchMode):
    """Also handles operations without GPU tensors among their arguments: factories, copies to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        # In inference mode, composite operations arrive undecomposed, such as `to` and `linear`; `run` is about their parts.
        if torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default and func._can_decompose():
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return run(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Calls that torch handles before an operation starts, and that a torch without CUDA refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = indexed(kwargs["device"])
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], (list, tuple)):
            args = (tree_map_only(GPUTensor, torch.Tensor.item, args[0]), *args[1:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **{**kwargs, "device": None}).to(GPU)
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], indexed(args[1]), *args[2:])
        elif func is torch.Tensor.cuda:
            return args[0].to(GPU)
        elif func is torch.Tensor.pin_memory:
            if on_gpu(args[0]):
                raise RuntimeError(f"cannot pin '{args[0].type()}' only dense CPU tensors can be pinned")
            return args[0].clone()
        elif func is torch.nn.functional.scaled_dot_product_attention and on_gpu(args[0]):  # it reads cuDNN's version
            return plain_attention(*args, **kwargs)
        elif func is torch.Tensor.tolist:  # refused for subclasses
            args = (args[0].cpu(),)
        elif func == torch.Tensor.data.__set__ and on_gpu(args[1]) and not isinstance(args[0], GPUTensor):  # type: ignore[attr-defined]
            made = to_gpu(memory_of(args[1]))
            moved = torch.nn.Parameter(made, args[0].requires_grad) if isinstance(args[0], torch.nn.Parameter) else made
            return torch.utils.swap_tensors(args[0], moved)
        return func(*args, **kwargs)


def indexed(device: Any) -> Any:
    """A device argument with the GPU's index written out."""
    if (isinstance(device, int) and not isinstance(device, bool)) or device == "cuda" or device == torch.device("cuda"):
        return GPU
    return device


def dense_attention(query: Any, key: Any, value: Any, *, block_mask: Any, enable_gqa: bool, **options: Any) -> torch.Tensor:
    """Flex attention, computed with a mask of all entries."""
    rows, columns = (torch.arange(part.shape[2], device=part.device) for part in (query, key))
    mask = block_mask.mask_mod(None, None, rows[:, None], columns[None])
    assert "score_mod" not in options
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=enable_gqa, scale=options.get("scale")
    )


def segment_attention(
    query: Any, key: Any, value: Any, query_ends: Any, key_ends: Any, *longest: int, **options: Any
) -> torch.Tensor:
    """Torch's variable-length attention, segment by segment: causal, aligned at the bottom right."""
    assert options["window_size"] == (-1, 0)
    assert on_gpu(query_ends)
    assert on_gpu(key_ends)
    segments = []
    for (first, last), (start, end) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        parts = (part.transpose(0, 1) for part in (query[first:last], key[start:end], value[start:end]))
        mask = causal_mask(last - first, end - start)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=mask, enable_gqa=True, scale=options["scale"]
        )
        segments.append(attended.transpose(0, 1))
    return torch.cat(segments)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """`scaled_dot_product_attention` in plain operations, regardless of available kernels."""
    dropout, causal = options.pop("dropout_p", 0.0), options.pop("is_causal", False)
    if attn_mask is not None:  # to be added to the scores
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return torch._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout, causal, None, **options)[0]


def causal_mask(rows: int, columns: int) -> torch.Tensor:
    """Every row attends to the columns up to its own, the last row to all."""
    return torch.ones(rows, columns, dtype=torch.bool, device=GPU).tril(columns - rows)


class OwnRandomness:
    """Within this context, the CPU's generator is in the GPU's state: each has its own sequence."""

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.set_rng_state(cuda.generator.get_state())

    def __exit__(self, *exception: object) -> None:
        cuda.generator.set_state(torch.get_rng_state())
        torch.set_rng_state(self.state)


def install() -> None:
    """Give this process a GPU, in all its threads, permanently. Call it before Megatron is imported."""
    cuda.replace_names()
    torch.nn.attention.flex_attention.flex_attention = dense_attention  # type: ignore[assignment]
    torch.nn.attention.varlen.varlen_attn = segment_attention  # type: ignore[assignment]
    # This mask is torch's own tensor subclass, which is incompatible with the modes below; a plain mask is not.
    torch.nn.attention.bias.causal_lower_right = causal_mask  # type: ignore[assignment]
    torch.compile = lambda function=None, **options: function or (lambda function: function)  # type: ignore[assignment]
    run_backward = torch.autograd._engine_run_backward

    def backward_with_names(*args: Any, **kwargs: Any) -> Any:
        with Names():  # a mode is off while it answers a call, here `backward`, which may compute a layer's forward once more
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = backward_with_names  # type: ignore[attr-defined]
    bootstrap: Callable[[threading.Thread], None] = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def with_gpu(thread: threading.Thread) -> None:
        with Names(), Placement():
            bootstrap(thread)

    threading.Thread._bootstrap_inner = with_gpu  # type: ignore[attr-defined]
    for mode in (Names(), Placement()):
        mode.__enter__()


if __name__ == "__main__":
    from tests import pretend_gpu  # not this copy, named __main__, but the imported module

    pretend_gpu.install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
