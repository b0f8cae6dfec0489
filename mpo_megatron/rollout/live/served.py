"""A served vLLM that samples from the policy while it trains: its weights arrive by NCCL, its samples over HTTP.

The run's first rank sends weights and pauses the server while it does. The first rank of every model replica asks for the samples
of its own prompts. Each update has a version: samples that another's update, or a restart, got between are refused.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from torch.distributed import broadcast_object_list, get_world_size

from mpo_megatron.config import EndpointConfig, OnlineConfig
from mpo_megatron.files import DataError
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.engines.vllm_server import VllmServer
from mpo_megatron.rollout.live.transfer import choose_port, open_nccl
from mpo_megatron.rollout.live.weights import Weights


class ServedLiveEngine:
    """A server that takes the policy's weights (a `LiveEngine`)."""

    def __init__(self, weights: Weights, engine: EndpointEngine | None, server: VllmServer | None, config: OnlineConfig) -> None:
        """Agree with the server on how weights travel; all ranks call it.

        Args:
            weights: the policy's
            engine: on the ranks that ask for samples
            server: on the rank that sends weights
            config: where the server finds that rank
        Raises:
            ConfigError, DataError: the server cannot take weights, or does not come.
        """
        self.engine, self.draws, self.server, self.endpoint = engine, engine is not None, server, config.endpoint
        self.run, self.updates = secrets.token_hex(4), 0
        address, port, workers = "", 0, 0
        if server is not None:
            workers = server.require_nccl()
            address, port = sender_address(config)
        self.transfer = open_nccl(weights, server, address=address, port=port, workers=workers)
        self.version = ""

    def update(self) -> None:
        """Give the server the policy's weights as they are now; all ranks call it."""
        self.updates += 1
        if self.server is not None:
            self.server.pause()
        self.transfer.send_weights()
        version = [f"mpo-{self.run}-{self.updates}"]
        if self.server is not None:
            self.server.resume(version[0])
        if get_world_size() > 1:
            broadcast_object_list(version, src=0)  # none asks before the new weights are in use
        self.version = version[0]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt.

        Raises:
            DataError: the server has other weights by now.
        """
        assert self.engine is not None
        yield from self.engine.generate(prompts, sampling)
        VllmServer(self.endpoint, "online.endpoint", seconds=self.endpoint.timeout).check_weights(self.version)


def sender_address(config: OnlineConfig) -> tuple[str, int]:
    """Host and port at which the server's workers meet this rank."""
    host, _, port = (config.weights_address or "").partition(":")
    return host or own_address(config.endpoint), int(port) if port else choose_port()


def own_address(endpoint: EndpointConfig) -> str:
    """The address of this machine from which it reaches a server.

    Raises:
        DataError: the server's name has no address.
    """
    parts = urlsplit(endpoint.base_url)
    try:
        with socket.create_connection(
            (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), 30
        ) as there:
            address: str = there.getsockname()[0]
            return address
    except OSError as error:
        raise DataError(
            f"online.endpoint.base_url = {endpoint.base_url}: cannot be reached: {error}; see to the server."
        ) from None
