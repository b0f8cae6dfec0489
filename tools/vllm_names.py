"""Check that vLLM still has every name of its that this package reads, with the parameters that it passes by name.

    python -m tools.vllm_names FOLDER…       folders that have `vllm`: an installed environment's, or an unpacked wheel
    python -m tools.vllm_names               the oldest and newest version for a live engine, downloaded (0.3 GB each)

The sources are parsed, not imported, so it needs neither a GPU nor what vLLM depends on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.package_names import Name, check, missing

VERSIONS = ("0.33.0",)
"""Oldest and newest version that a live engine supports (mpo_megatron/stack/packages.py)."""

TRANSFER = "vllm.distributed.weight_transfer"
ENGINE = "vllm.v1.engine.llm_engine"
WORKER = "vllm.v1.worker.gpu_worker"
NAMES = (
    # rollout/engines/vllm_engine.py
    Name(ENGINE, "LLMEngine.from_engine_args", ("engine_args",)),
    Name(ENGINE, "LLMEngine.add_request", ("request_id", "prompt", "params", "lora_request")),
    Name(ENGINE, "LLMEngine.step"),
    *(
        Name("vllm.engine.arg_utils", f"EngineArgs.{name}")
        for name in (
            *("model", "tensor_parallel_size", "pipeline_parallel_size", "dtype", "gpu_memory_utilization", "max_model_len"),
            *("enable_prefix_caching", "load_format", "enable_sleep_mode", "weight_transfer_config"),
            "distributed_executor_backend",
        )
    ),
    *(
        Name("vllm.sampling_params", f"SamplingParams.{name}")
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
            *("max_tokens", "stop_token_ids", "stop", "seed", "detokenize", "output_kind", "logprobs"),
        )
    ),
    Name("vllm.sampling_params", "RequestOutputKind"),
    *(Name("vllm.engine.arg_utils", f"EngineArgs.{name}") for name in ("enable_lora", "max_loras", "max_lora_rank")),
    *(Name("vllm.lora.request", f"LoRARequest.{name}") for name in ("lora_name", "lora_int_id", "lora_path")),
    Name("vllm.outputs", "CompletionOutput.cumulative_logprob"),
    # rollout/live/vllm.py and transfer.py
    Name(ENGINE, "LLMEngine.collective_rpc", ("method", "timeout", "kwargs")),
    Name(ENGINE, "LLMEngine.sleep", ("level",)),
    Name(ENGINE, "LLMEngine.wake_up", ("tags",)),
    Name(ENGINE, "LLMEngine.reset_prefix_cache"),
    Name(WORKER, "Worker.init_weight_transfer_engine", ("init_info",)),
    Name(WORKER, "Worker.start_weight_update"),
    Name(WORKER, "Worker.update_weights", ("update_info",)),
    Name(WORKER, "Worker.finish_weight_update"),
    Name(f"{TRANSFER}.base", "ParamMeta.name"),
    Name(f"{TRANSFER}.base", "ParamMeta.dtype"),
    Name(f"{TRANSFER}.base", "ParamMeta.shape"),
    Name(f"{TRANSFER}.base", "WeightSource.metadata"),
    Name(f"{TRANSFER}.base", "WeightSource.iter_full"),
    Name(f"{TRANSFER}.base", "TrainerInitInfo.rank"),
    Name(f"{TRANSFER}.ipc_engine", "IPCTrainerInitInfo.packed"),
    Name(f"{TRANSFER}.ipc_engine", "IPCTrainerInitInfo.packed_buffer_size_bytes"),
    Name(f"{TRANSFER}.ipc_engine", "IPCWeightTransferUpdateInfo.ipc_handles_pickled"),
    Name(f"{TRANSFER}.ipc_engine", "IPCTrainerWeightTransferEngine.trainer_init", ("init_info", "client", "source")),
    Name(f"{TRANSFER}.ipc_engine", "IPCTrainerWeightTransferEngine.send_weights"),
    *(
        Name(f"{TRANSFER}.nccl_engine", f"NCCLTrainerInitInfo.{name}")
        for name in ("master_address", "master_port", "world_size", "packed", "packed_buffer_size_bytes")
    ),
    Name(f"{TRANSFER}.nccl_engine", "NCCLTrainerWeightTransferEngine.trainer_init", ("init_info", "client", "source")),
    Name(f"{TRANSFER}.nccl_engine", "NCCLTrainerWeightTransferEngine.send_weights"),
    Name(f"{TRANSFER}.nccl_engine", "NCCLTrainerWeightTransferEngine.shutdown"),
    # rollout/engines/vllm_server.py
    Name(WORKER, "Worker.reload_weights"),
    Name("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", ("weights_path",)),
    *(Name("vllm.config.vllm", f"VllmConfig.{name}") for name in ("model_config", "cache_config", "weight_transfer_config")),
    *(Name("vllm.config.model", f"ModelConfig.{name}") for name in ("max_model_len", "quantization", "quantization_config")),
    Name("vllm.config.cache", "CacheConfig.cache_dtype"),
)
"""What is imported, called, or a parameter of what is."""

TEXTS = {
    f"{TRANSFER}.ipc_engine": (
        "self.client.init_weight_transfer_engine(",  # the four calls of rollout/live/vllm.py's client
        "self.client.start_weight_update(",
        "self.client.update_weights(",
        "self.client.finish_weight_update(",
        '"ipc_handles"',
        "source.iter_full()",
    ),
    f"{TRANSFER}.nccl_engine": (
        "self.client.init_weight_transfer_engine(",
        "self.client.start_weight_update(",
        "self.client.update_weights",
        "self.client.finish_weight_update(",
        "source.iter_full()",
        "source.metadata",
    ),
    "vllm.entrypoints.rl.online.api_router": (
        '"/pause"',
        '"/resume"',
        '"/init_weight_transfer_engine"',
        '"/shutdown_weight_transfer_engine"',
        '"/start_weight_update"',
        '"/update_weights"',
        '"/finish_weight_update"',
        '"/update_weight_version"',
        '"/weight_info"',
        '"/get_world_size"',
        "init_info: Annotated",
        "update_info: Annotated",
        "new_version: Annotated",
    ),
    "vllm.entrypoints.serve.dev.cache.api_router": ('"/reset_prefix_cache"', '"success"'),
    "vllm.entrypoints.serve.dev.rpc.api_router": ('"/collective_rpc"', '"method"', '"kwargs"'),
    "vllm.entrypoints.serve.dev.server_info.api_router": ('"/server_info"', "config_format", '"vllm_config"'),
    "vllm.entrypoints.serve.instrumentator.basic": ('"/version"', '"version"'),
    "vllm.config.quantization": ('"fp8_per_tensor"', '"fp8_per_block"', '"fp8_per_channel"', '"mxfp8"', '"mxfp4"'),
    # What hybrid models' weights are called there, or become part of; tests hold the names that we hand over against these.
    "vllm.model_executor.models.qwen3_vl": ('"model.language_model.": "language_model.model."',),
    "vllm.model_executor.models.qwen3_5": (
        '"model.language_model.": "model."',
        '".in_proj_qkv": (".in_proj_qkvz", (0, 1, 2))',
        '".in_proj_z": (".in_proj_qkvz", 3)',
        '".in_proj_b": (".in_proj_ba", 0)',
        '".in_proj_a": (".in_proj_ba", 1)',
    ),
    "vllm.model_executor.models.qwen3_next": (
        *('".q_proj": (".qkv_proj", "q")', '".k_proj": (".qkv_proj", "k")', '".v_proj": (".qkv_proj", "v")'),
        *('".mlp.gate_proj": (".mlp.gate_up_proj", 0)', '".mlp.up_proj": (".mlp.gate_up_proj", 1)'),
        '".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0)',
        '".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1)',
        *("self.linear_attn = ", "self.self_attn = ", "self.o_proj = ", "self.q_norm = ", "self.k_norm = "),
        *("self.gate = ", "self.experts = ", "self.shared_expert = ", "self.shared_expert_gate = "),
        *("self.input_layernorm = ", "self.post_attention_layernorm = ", "self.embed_tokens = ", "self.norm = "),
        "self.lm_head = ",
    ),
    "vllm.model_executor.models.qwen2_moe": ("self.down_proj = ",),
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": (
        *("self.conv1d = ", "self.in_proj_qkvz = ", "self.in_proj_ba = ", "self.A_log = ", "self.dt_bias = "),
        *("self.norm = ", "self.out_proj = "),
    ),
    "vllm.envs": ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SERVER_DEV_MODE"),
}
"""What must be written somewhere in a module; `engine.client` counts as `self.client`."""


def missing_names(root: Path) -> list[str]:
    """What of NAMES and TEXTS the `vllm` in a folder lacks, a line each."""
    wanting = missing(root, NAMES)
    for module, texts in TEXTS.items():
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        source = file.read_text(encoding="utf-8").replace("engine.client.", "self.client.") if file.is_file() else ""
        wanting += [f"{module}: {text} is nowhere in it" for text in texts if text not in source]
    return wanting


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each folder or version; the exit code is 1 if a name is missing."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or list(VERSIONS)
    if {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0
    return check("vllm", chosen, missing_names, f"has all of {len(NAMES) + sum(map(len, TEXTS.values()))} names")


if __name__ == "__main__":
    raise SystemExit(main())
