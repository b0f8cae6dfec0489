"""vLLM's offline engine: continuous batching, tensor parallelism, a prefix cache that computes each prompt once for K samples.

Each response is a separate request with its own seed. New requests enter as others finish, so the engine stays full and
groups finish one by one.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, VllmConfig
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import VLLM_RANKS, vllm_refuses
from mpo_megatron.hf.adapter import require_loads_in_vllm
from mpo_megatron.hf.identity import adapter_rank, adapter_targets
from mpo_megatron.rollout.engines import Generation, Miss, Prompt, Response, Sampling, read_finish_reason
from mpo_megatron.rollout.engines.embedded import cut_at_stop
from mpo_megatron.rollout.http_responses import UnusableAnswerError


class VllmEngine:
    """Generates with vLLM in this process and the processes it starts."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: VllmConfig, adapter: Path | None = None) -> None:
        """Load a checkpoint.

        Args:
            adapter: PEFT folder of an adapter, which vLLM applies beside the model's weights
        Raises:
            ConfigError: vLLM is missing, or refuses the checkpoint or an option.
        """
        lora = {} if adapter is None else _adapter_options(load_family(folder), adapter)
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise ConfigError(
                f"engine = vllm needs vLLM, but importing it failed ({error}): pip install 'mpo-megatron[rollout]', or set "
                "engine = transformers."
            ) from error
        options: dict[str, Any] = {
            "model": str(folder),
            "tensor_parallel_size": config.tensor_parallel,
            "pipeline_parallel_size": config.pipeline_parallel,
            "dtype": config.dtype,
            "gpu_memory_utilization": config.memory_fraction,
            "max_model_len": config.max_model_len,
            "enable_prefix_caching": True,
            **lora,
        }
        try:
            self.engine: Any = LLMEngine.from_engine_args(EngineArgs(**options | config.options))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"vllm: the engine refuses the checkpoint or an option: {error}") from error
        self.tokenizer, self.max_in_flight = tokenizer, config.max_in_flight
        self.request_options: dict[str, Any] = {}
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self.request_options["lora_request"] = LoRARequest("policy", 1, str(adapter))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt; yield a group when its last response ends."""
        requests = deque(
            (prompt, index, seed) for prompt in prompts for index, seed in enumerate(prompt.response_seeds(sampling))
        )
        under_way: dict[str, tuple[Prompt, int, int]] = {}
        done: dict[str, dict[int, Response | Miss]] = {prompt.group_id: {} for prompt in prompts}
        while requests or under_way:
            while requests and len(under_way) < self.max_in_flight:
                prompt, index, seed = requests.popleft()
                name = f"{prompt.group_id}/{index}/{seed}"
                under_way[name] = (prompt, index, seed)
                tokens, parameters = {"prompt_token_ids": list(prompt.token_ids)}, self._parameters(seed, sampling)
                self.engine.add_request(name, tokens, parameters, **self.request_options)
            for output in self.engine.step():
                if not output.finished:
                    continue
                prompt, index, seed = under_way.pop(output.request_id)
                done[prompt.group_id][index] = self._read(output.outputs[0], seed, sampling)
                if len(done[prompt.group_id]) == len(prompt.response_seeds(sampling)):
                    draws = [draw for _, draw in sorted(done.pop(prompt.group_id).items())]
                    yield Generation(
                        group_id=prompt.group_id,
                        responses=tuple(draw for draw in draws if isinstance(draw, Response)),
                        misses=tuple(draw for draw in draws if isinstance(draw, Miss)),
                    )

    def _parameters(self, seed: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            stop=list(sampling.stop),
            seed=seed,
            logprobs=0 if sampling.logps else None,  # of the sampled token only; vLLM computes them before the temperature
            detokenize=bool(sampling.stop),  # only to find stop texts: decoding is shared by all engines
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _read(self, completion: Any, seed: int, sampling: Sampling) -> Response | Miss:
        tokens = tuple(completion.token_ids)
        words = tokens[:-1] if tokens and tokens[-1] in sampling.stop_token_ids else tokens
        text = self.tokenizer.decode(words, skip_special=True)
        cut = cut_at_stop(text, sampling.stop)
        try:
            reason = read_finish_reason(completion.finish_reason)
        except UnusableAnswerError as error:
            return Miss(seed=seed, label=error.label, reason=str(error))
        return Response(
            text=cut,
            finish_reason=reason if cut == text else "stop",
            num_tokens=len(tokens),
            seed=seed,
            token_ids=tokens,
            cut=cut != text,
            logp=completion.cumulative_logprob if sampling.logps else None,
        )

    def close(self) -> None:
        """Free the GPUs."""
        del self.engine
        gc.collect()


def _adapter_options(family: Family, adapter: Path) -> dict[str, Any]:
    """The options with which vLLM reserves memory for an adapter: the smallest `max_lora_rank` that covers its rank.

    Raises:
        ConfigError: vLLM cannot load the adapter, or it is damaged.
    """
    require_loads_in_vllm(adapter)
    rank = adapter_rank(adapter)
    refusal = vllm_refuses(family, rank, adapter_targets(adapter))
    if refusal is not None:
        raise ConfigError(
            f"model: {refusal.reason}, which vLLM cannot load; set engine = transformers, or merge the adapter (mpo convert "
            "--merge true)."
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in VLLM_RANKS if size >= rank)}
