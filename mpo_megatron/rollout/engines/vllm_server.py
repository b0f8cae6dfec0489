"""A served vLLM whose weights can be replaced, through its routes with VLLM_SERVER_DEV_MODE=1.

Calls are bounded in time and size; calls that change state are sent once. A server reports the version of its weights
(`/weight_info`), which every update sets: that reveals a restart or another client's update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpo_megatron.config import ConfigError, EndpointConfig
from mpo_megatron.files import DataError
from mpo_megatron.hf.live_engine import quantized_sampling, validate_quantization
from mpo_megatron.rollout.client import Client
from mpo_megatron.stack.packages import LIVE_VLLM

START = "start it with VLLM_SERVER_DEV_MODE=1"
UNDER_WAY = "mpo-under-way"
"""The version during an update. No client requests it, so a killed command's partial update is always replaced."""
NCCL_START = START + """ and --weight-transfer-config '{"backend": "nccl"}'"""


class VllmServer:
    """Replaces the weights of a served vLLM."""

    def __init__(self, config: EndpointConfig, name: str, *, seconds: float) -> None:
        """Prepare the calls; none is sent yet.

        Args:
            name: the configuration's field, used in messages
            seconds: time limit of a call, including retries
        """
        self.root = config.base_url.removesuffix("/").removesuffix("/v1")
        self.where = f"{name}.base_url = {config.base_url}"
        tries = config.retries + 1
        self.clients = {
            "get": Client(replace(config, concurrency=1, timeout=seconds / tries)),
            # Once: a repeated update would collide with the running one.
            "post": Client(replace(config, concurrency=1, timeout=seconds, retries=0)),
        }

    def check_version(self) -> None:
        """Check that the server is a vLLM with known routes.

        Raises:
            ConfigError: it is another version, or lacks these routes.
        """
        version = str(self._get("/version", "version", START))
        if not LIVE_VLLM.contains(version, prereleases=True):
            raise ConfigError(
                f"{self.where}: vLLM {version[:40]}; weight routes are known for vllm{LIVE_VLLM}; install that on the server.",
            )

    def describe(self) -> dict[str, Any]:
        """The server's own configuration (vLLM's `VllmConfig`)."""
        found = self._get("/server_info?config_format=json", "vllm_config", START)
        return found if isinstance(found, dict) else {}

    def check_model(self, *, max_tokens: int) -> str | None:
        """Check that the server can take the policy's weights; the reason if it would sample from a quantised policy, else None.

        It does not report the shapes of its model: vLLM's loader refuses wrong ones, and `engine_kl` reveals layers that it kept.

        Args:
            max_tokens: tokens of the longest prompt plus its sample
        Raises:
            ConfigError: names the obstacle.
        """
        described = self.describe()
        model = _part(described, "model_config")
        length = model.get("max_model_len")
        if not isinstance(length, int) or length < max_tokens:
            raise ConfigError(
                f"{self.where}: its max_model_len is {str(length)[:40]}; a prompt with its sample takes {max_tokens}; raise it."
            )
        validate_quantization(model.get("quantization"), f"{self.where}: its quantization")
        options = {name: model.get(name) for name in ("quantization", "quantization_config")}
        return quantized_sampling(options | {"kv_cache_dtype": _part(described, "cache_config").get("cache_dtype")})

    def require_nccl(self) -> int:
        """The number of the server's workers, over all replicas.

        Raises:
            ConfigError: it does not receive weights by NCCL.
        """
        backend = _part(self.describe(), "weight_transfer_config").get("backend")
        if backend != "nccl":
            raise ConfigError(f"{self.where}: its weight transfer is {str(backend)[:40]}, not nccl; {NCCL_START}.")
        workers = self._get("/get_world_size", "world_size", NCCL_START)
        if not isinstance(workers, int) or isinstance(workers, bool) or not 0 < workers < 2**16:
            raise ConfigError(f"{self.where}: /get_world_size answers {str(workers)[:40]!r}; this is no vLLM server.")
        return workers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Disconnect the workers from an earlier trainer and connect them to this one."""
        self._post("/shutdown_weight_transfer_engine", {}, NCCL_START)
        self._post("/init_weight_transfer_engine", {"init_info": init_info}, NCCL_START)

    def start_weight_update(self) -> None:
        """Prepare the workers for new weights."""
        self._post("/start_weight_update", {}, NCCL_START)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Send weights to the workers."""
        self._post("/update_weights", {"update_info": update_info}, NCCL_START)

    def finish_weight_update(self) -> None:
        """Switch the workers to the new weights."""
        self._post("/finish_weight_update", {}, NCCL_START)

    def load(self, folder: str) -> None:
        """Load weights on the workers from a folder, which they see under this path."""
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}, START)

    def pause(self) -> None:
        """Finish running requests and refuse new ones (503) until `resume`: otherwise they would mix two sets of weights."""
        self._post("/update_weight_version", {"new_version": UNDER_WAY}, START)
        self._post("/pause?mode=wait", {}, START)

    def resume(self, version: str) -> None:
        """Clear prefixes of old weights, accept requests, and set the version: a server with a version is not paused.

        Raises:
            DataError: cached prefixes remain, so samples would mix old and new weights.
        """
        answer = self._post("/reset_prefix_cache", {}, START)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise DataError(f"{self.where}: still caches prefixes of the old weights; restart it.")
        self._post("/resume", {}, START)
        self._post("/update_weight_version", {"new_version": version}, START)

    def version(self) -> str:
        """The version of the server's weights."""
        return str(self._get("/weight_info", "weight_version", START))

    def check_weights(self, version: str) -> None:
        """Check that the server still has these weights.

        Raises:
            DataError: it has others.
        """
        found = self.version()
        if found != version:
            raise DataError(
                f"{self.where}: has weights {found[:80]!r} instead of {version!r}; it was restarted, or another client replaced "
                "its weights. Give this run its own server, then run the same command again to resume."
            )

    def _get(self, path: str, field: str, cure: str) -> Any:
        answer = self._call("get", path, None, cure)
        if not isinstance(answer, dict) or field not in answer:
            raise ConfigError(f"{self.where}: {path.partition('?')[0]} does not report {field}; {cure}.")
        return answer[field]

    def _post(self, path: str, body: dict[str, Any], cure: str) -> Any:
        return self._call("post", path, body, cure)

    def _call(self, method: str, path: str, body: dict[str, Any] | None, cure: str) -> Any:
        async def ask(client: Any, url: str) -> Any:
            import openai

            try:
                if method == "get":
                    return [await client.get(url, cast_to=object)]
                return [await client.post(url, cast_to=object, body=body)]
            except openai.APIStatusError as error:
                if error.status_code in (404, 405):
                    raise ConfigError(f"{self.where}: has no {path.partition('?')[0]}; {cure}.") from None
                raise

        outcome = self.clients[method].ask_one(self.root + path, ask)
        if outcome.failure is not None:
            route = path.partition("?")[0]
            raise DataError(
                f"{self.where}: {route} failed: {outcome.failure.reason}; look at the server's log, restart it if it is "
                "paused, and run the same command again."
            )
        assert outcome.answer is not None
        return outcome.answer[0]


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}
