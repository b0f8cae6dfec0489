"""An adapter on a server that holds its base model: loaded at run time, requested by name, unloaded at the end.

    vLLM      POST <base_url>/load_lora_adapter   name, path     requests name the adapter as their model
    SGLang    POST <host>/load_lora_adapter       name, path     requests name it in `lora_path`

The server reads the adapter's folder itself, so it must see the folder under the same path. The name is derived from the
adapter's content: no two adapters share a name or cached prefixes, and the shards of one command load an adapter once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mpo_megatron.config import ConfigError, EndpointConfig, require
from mpo_megatron.files import DataError
from mpo_megatron.hf.adapter import require_loads_in_vllm
from mpo_megatron.hf.identity import PEFT_CONFIG, PEFT_WEIGHTS, adapter_rank
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines.servers import REFUSALS, ServerKind, list_models

LOADERS: dict[ServerKind, str] = {
    "vllm": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve … --enable-lora --max-lora-rank {rank}",
    "sglang": "python -m sglang.launch_server … --enable-lora --max-lora-rank {rank} --lora-target-modules all",
}
"""Servers that load adapters, and the command that starts each of them for one."""
_PATIENCE = 30.0
"""Seconds allowed for unloading an adapter at the end."""


class ServedAdapter:
    """One adapter on one server."""

    def __init__(self, config: EndpointConfig, kind: ServerKind, folder: Path) -> None:
        """Prepare the requests; none is sent yet.

        Args:
            folder: PEFT folder of the adapter
        Raises:
            ConfigError: a server of this kind loads no adapters, or the folder is damaged.
        """
        require(
            kind in LOADERS,
            f"load_adapter = true, but {config.base_url} is of kind {kind}; only {' and '.join(LOADERS)} load adapters; "
            "set endpoint.server if it is one of them, or merge the adapter (mpo convert --merge true) and serve the result.",
        )
        if kind == "vllm":
            require_loads_in_vllm(folder)
        self.config, self.kind, self.folder = config, kind, folder.absolute()
        self.start_command = LOADERS[kind].format(rank=adapter_rank(folder))
        self.name = adapter_name(folder)
        self.loaded_here = False
        """Whether this object loaded it: it was absent before."""

    @property
    def fields(self) -> dict[str, Any]:
        """The request fields that select the adapter."""
        return {"model": self.name} if self.kind == "vllm" else {"model": self.config.model, "lora_path": self.name}

    def load(self) -> None:
        """Load the adapter on the server beside its base model, unless it is already there.

        Raises:
            ConfigError: the server does not serve the base model, cannot load adapters, or refuses this one.
            DataError: the server cannot be reached, or fails.
        """
        served = Client(self.config).ask_one(None, lambda client, _: list_models(client)).answer or []
        require(
            not served or self.config.model in served,
            f"endpoint.model = {self.config.model}; {self.config.base_url} serves {', '.join(name[:80] for name in served[:4])}; "
            "with load_adapter = true, name the adapter's base model.",
        )
        refusal = self._post(self.config, "load_lora_adapter", {"lora_name": self.name, "lora_path": str(self.folder)})
        if refusal is None:
            self.loaded_here = True
        elif "already" not in refusal:
            raise ConfigError(
                f"{self.config.base_url} does not load the adapter {self.folder} ({refusal}); the server "
                f"must see that folder, hold the adapter's base model, and be started for it: {self.start_command}."
            )

    def unload(self) -> str | None:
        """Unload the adapter; the server's answer if it refuses, else None."""
        patient = dataclasses.replace(self.config, retries=0, timeout=min(self.config.timeout, _PATIENCE))
        try:
            return self._post(patient, "unload_lora_adapter", {"lora_name": self.name})
        except (ConfigError, DataError) as error:
            return str(error)

    def _post(self, config: EndpointConfig, action: str, body: Mapping[str, str]) -> str | None:
        """Send one request; the server's answer if it refuses, else None.

        Raises:
            ConfigError, DataError: the server refuses the key, cannot be reached, or fails.
        """
        parts, client = urlsplit(config.base_url), Client(config)
        path = f"/{action}" if self.kind == "vllm" else f"{parts.scheme}://{parts.netloc}/{action}"

        async def ask(connection: Any, _: None) -> str | None:
            import openai

            try:
                await connection.post(path, cast_to=str, body=dict(body))
            except openai.APIStatusError as error:
                if error.status_code in REFUSALS:
                    return client.describe_refusal(error)
                raise
            return None

        outcome = client.ask_one(None, ask)
        if outcome.failure is not None:
            raise DataError(f"{config.base_url}: {action}: {outcome.failure.reason}; see the server's log, then retry.")
        return outcome.answer


def adapter_name(folder: Path) -> str:
    """A name unique to this adapter: a digest of its matrices and its configuration."""
    digest = hashlib.sha256()
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"mpo-{digest.hexdigest()[:16]}"
