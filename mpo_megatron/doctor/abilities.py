"""Which attention, layers and FP8 recipes work here, and what a run would use; in a separate process, as imports may crash.

`python -m mpo_megatron.doctor.abilities [CONFIG]` prints JSON as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from mpo_megatron.config import ConfigError, ModelConfig, TrainConfig, is_hugging_face, load_yaml, validate_unused
from mpo_megatron.files import DataError
from mpo_megatron.hf.live_engine import quantized_sampling
from mpo_megatron.stack.checks import has_fused_gradients
from mpo_megatron.stack.imports import version_of
from mpo_megatron.stack.packages import missing_for_live_vllm

USABLE = "usable"


def ask(config: str | None, seconds: float = 600) -> dict[str, Any]:
    """The abilities, from another process; `{"error": …}` if it fails."""
    command = [sys.executable, "-m", __name__, *([config] if config else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ends with code {done.returncode}"]
        return {"error": lines[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def abilities() -> dict[str, Any]:
    """{layers, attention: {back end: usable or why not}, fp8: {recipe: usable or why not}}."""
    from mpo_megatron.hf.fp8 import RECIPES
    from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine

    missing = missing_for_transformer_engine()
    return {
        "layers": {"local": USABLE, "transformer_engine": missing or USABLE},
        "attention": {"sdpa": _attention("sdpa"), "flex": _attention("flex"), "varlen": _attention("varlen")},
        "fp8": {name: missing or missing_for_recipe(name) or USABLE for name in RECIPES},
    }


def _attention(name: Literal["sdpa", "flex", "varlen"]) -> str:
    from mpo_megatron.model.attention_backends import choose_attention

    try:
        choose_attention(ModelConfig(checkpoint="", attention=name, precision="bf16"))
    except ConfigError as error:
        return str(error).partition(", but ")[2].partition(";")[0]
    return f"{USABLE} ({_kernel()})" if name == "varlen" else USABLE


def _kernel() -> str:
    """Name of the variable-length kernel in use, from its finder."""
    from mpo_megatron.model.attention_varlen import require_kernel

    return require_kernel().__qualname__.partition(".")[0].lstrip("_")


def uses(config: TrainConfig) -> list[dict[str, str]]:
    """What a run would use here: [{what, choice, why}]."""
    from mpo_megatron import device
    from mpo_megatron.model.architecture import use_transformer_engine
    from mpo_megatron.model.attention_backends import choose_attention
    from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine
    from mpo_megatron.train.environment import compute_capability, recommended
    from mpo_megatron.train.launcher import count_ranks

    model, parallel = config.model, config.parallel
    ranks, replica = count_ranks(parallel), parallel.tensor * parallel.pipeline * parallel.context
    gpu = device.gpu_name()
    rows = [
        ("device", gpu or "CPU, gloo", "GPUs that torch can use" if gpu else "torch sees no GPU"),
        (
            "ranks",
            f"{ranks} on this machine: tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context} × "
            f"{ranks / replica:g} replicas",
            "one per GPU, at least one whole replica",
        ),
        ("precision", model.precision, "model.precision"),
    ]
    engine = use_transformer_engine(model)
    missing = missing_for_transformer_engine()
    why = "model.backend" if model.backend != "auto" else "it imports, and a GPU is available" if engine else missing
    rows.append(("layers", "Transformer Engine" if engine else "Megatron-Core's local ones", str(why)))
    attention = choose_attention(model)
    if model.attention != "auto":
        why = "model.attention"
    elif attention == "sdpa":
        why = "model.precision is fp32" if gpu else "the only one without a GPU"
    else:
        why = "the fastest installed kernel" if attention == "varlen" else "no variable-length kernel is installed"
    rows.append(("attention", f"{attention} ({_kernel()})" if attention == "varlen" else attention, why))
    rows.append(("fp8", model.fp8, "model.fp8" if model.fp8 == "none" else missing or missing_for_recipe(model.fp8) or "usable"))
    rows.append(("weight gradients", *_weight_gradients(engine)))
    rows.append(("recompute", model.recompute, "model.recompute"))
    rows.append(("optimizer overlap", *_overlap(config)))
    capability = compute_capability()
    if capability is not None:
        for name, value in recommended(config, capability).items():
            rows.append((name, os.environ.get(name, value), "the environment" if name in os.environ else "set by mpo train"))
    if config.online.kl_weight:
        rows.append(("live samples", *_live_engine(config)))
    return [{"what": what, "choice": choice, "why": why} for what, choice, why in rows]


def _weight_gradients(engine: bool) -> tuple[str, str]:
    if engine:
        return "added inside the GEMM", "layers of Transformer Engine"
    from mpo_megatron import device

    if not device.has_gpu():
        return "added inside the GEMM", "PyTorch, on a CPU"
    if has_fused_gradients():
        return "added inside the GEMM", "NVIDIA's apex"
    return "added in a separate pass", "neither Transformer Engine nor NVIDIA's apex is in use"


def _live_engine(config: TrainConfig) -> tuple[str, str]:
    """The engine that samples during training, and how weights reach it."""
    online = config.online
    if online.engine == "transformers":
        return online.engine, "online.engine; weights travel through host memory"
    if online.engine == "server":
        return f"vLLM at {online.endpoint.base_url}", missing_for_live_vllm() or "online.endpoint; weights travel by NCCL"
    engine, shared = online.vllm, online.vllm.gpus == "shared"
    where = "the ranks' GPUs, by CUDA IPC" if shared else "its own GPUs, by NCCL"
    choice = f"vllm {version_of('vllm')}, tensor {engine.tensor_parallel} × pipeline {engine.pipeline_parallel} a replica"
    if (cause := quantized_sampling(engine.options)) is not None:
        choice += f", quantised ({cause})"
    return choice, missing_for_live_vllm() or f"online.engine; weights travel to {where}"


def _overlap(config: TrainConfig) -> tuple[str, str]:
    from mpo_megatron import device

    if config.optimizer.overlap != "auto":
        return config.optimizer.overlap, "optimizer.overlap"
    return ("all, if there are replicas", "GPUs") if device.has_gpu() else ("none", "no GPU")


def refusal(config: TrainConfig) -> str | None:
    """Why `mpo train` would refuse this configuration here; None if it would start."""
    from mpo_megatron.train.setup import build_setup, read_layout

    try:
        validate_unused(config)
        if is_hugging_face(Path(config.model.checkpoint)):  # `mpo train` would convert it
            read_layout(config)
        else:
            build_setup(config)
    except (ConfigError, DataError) as error:
        return str(error)
    return None


def main(arguments: list[str]) -> int:
    """Print abilities, and with a configuration, what it would use."""
    try:
        found = abilities()
    except ConfigError as error:  # a package that breaks Megatron-Core
        print(json.dumps({"error": str(error).rstrip(".")}))
        return 0
    if arguments:
        try:
            config = load_yaml(TrainConfig, Path(arguments[0]))
            found["run"] = {"config": arguments[0], "refused": refusal(config), "uses": uses(config)}
        except ConfigError as error:
            found["run"] = {"config": arguments[0], "refused": str(error), "uses": []}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
