"""Detect the kind of server behind an endpoint, and send it every sampling setting it accepts.

A server fills missing settings from the model's `generation_config.json` or from its own defaults: 50 tokens (`transformers
serve`), 40 tokens and min_p = 0.05 (llama.cpp), a repetition penalty. So each request sets all of them. Settings of an unknown
server cannot be controlled, and are reported.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from mpo_megatron.config import EndpointConfig
from mpo_megatron.files import DataError
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines import Sampling

ServerKind = Literal["vllm", "sglang", "llamacpp", "transformers", "openai"]
UNCONTROLLED: dict[ServerKind, tuple[str, ...]] = {
    "vllm": (),
    "sglang": (),
    "llamacpp": (),
    "transformers": (),
    "openai": ("top_k", "min_p", "repetition_penalty"),
}
"""Sampling parameters that a server of this kind may set itself."""
REFUSALS = (400, 404, 405, 422, 501)
"""Statuses for an unknown path or an unaccepted request."""


def find_kind(config: EndpointConfig, client: Client) -> ServerKind:
    """The kind of server: configured, else detected; `openai` if it does not identify itself.

    Raises:
        ConfigError, DataError: the server refuses the key, or cannot be reached.
    """
    if config.server != "auto":
        return config.server
    outcome = client.ask_one(config.base_url, _ask_kind)
    if outcome.failure is not None and outcome.failure.kind == "lost":
        raise DataError(f"{config.base_url}: cannot be reached: {outcome.failure.reason}; check the server, then run this again.")
    kind: ServerKind = outcome.answer or "openai"
    return kind


async def _ask_kind(client: Any, base_url: str) -> ServerKind:
    """Detect vLLM, SGLang and llama.cpp by the owner of their models, `transformers serve` by a path that only it has."""
    owners = [model.get("owned_by") for model in await _models(client)]
    for kind in get_args(ServerKind):
        if kind in owners and kind != "openai":
            found: ServerKind = kind
            return found
    parts = urlsplit(base_url)
    described = await _get(client, f"{parts.scheme}://{parts.netloc}/openapi.json")
    paths = described.get("paths") if isinstance(described, dict) else None
    return "transformers" if isinstance(paths, dict) and "/load_model" in paths else "openai"


async def list_models(client: Any) -> list[str]:
    """Names of the models that a server lists; empty if it lists none."""
    return [str(model["id"]) for model in await _models(client) if "id" in model]


async def _models(client: Any) -> list[dict[str, Any]]:
    listed = await _get(client, "/models")
    models = listed.get("data") if isinstance(listed, dict) else None
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


async def _get(client: Any, path: str) -> Any:
    """The JSON at a path of the server; None if there is none."""
    import openai

    try:
        return await client.get(path, cast_to=object)
    except openai.APIStatusError as error:
        if error.status_code in REFUSALS:
            return None
        raise


def request_fields(kind: ServerKind, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The sampling fields of a request, all that this kind of server accepts."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
    }
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if kind == "transformers":
        return fields | {"generation_config": json.dumps(_generation_config(sampling))}
    if kind == "openai":
        return fields | ({"top_k": sampling.top_k} if sampling.top_k else {})
    fields |= {"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    if kind == "llamacpp":
        return fields | {"top_k": sampling.top_k, "repeat_penalty": 1.0}
    return fields | {
        "top_k": sampling.top_k or -1,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "return_token_ids": True,
        **({"logprobs": 0} if sampling.logps else {}),  # of the sampled tokens only
    }


def _generation_config(sampling: Sampling) -> dict[str, Any]:
    """A `transformers.GenerationConfig` that overrides all of the model's own settings."""
    settings: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.max_tokens,
        "repetition_penalty": 1.0,
        "eos_token_id": list(sampling.stop_token_ids),
        "pad_token_id": sampling.stop_token_ids[0] if sampling.stop_token_ids else 0,
    }
    return settings | ({"top_k": sampling.top_k} if sampling.temperature > 0 else {})
