"""A served vLLM that samples from the policy while it trains: weights travel by NCCL, samples over HTTP.

The run's first rank pauses the server and sends the weights. The first rank of every model replica requests the samples of its
own prompts. Each update has a version; samples drawn across another client's update or a restart are refused.
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
    """A server that receives the policy's weights (a `LiveEngine`)."""

    def __init__(self, weights: Weights, engine: EndpointEngine | None, server: VllmServer | None, config: OnlineConfig) -> None:
        """Agree with the server on the weight transfer; all ranks call it.

        Args:
            weights: the policy's weights
            engine: on ranks that request samples
            server: on the rank that sends weights
            config: gives the address at which the server finds that rank
        Raises:
            ConfigError, DataError: the server cannot receive weights, or does not connect.
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
        """Send the policy's current weights to the server; all ranks call it."""
        self.updates += 1
        if self.server is not None:
            self.server.pause()
        self.transfer.send_weights()
        version = [f"mpo-{self.run}-{self.updates}"]
        if self.server is not None:
            self.server.resume(version[0])
        if get_world_size() > 1:
            broadcast_object_list(version, src=0)  # no rank may sample before the new weights are in use
        self.version = version[0]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt.

        Raises:
            DataError: the server now has other weights.
        """
        assert self.engine is not None
        yield from self.engine.generate(prompts, sampling)
        VllmServer(self.endpoint, "online.endpoint", seconds=self.endpoint.timeout).check_weights(self.version)


def sender_address(config: OnlineConfig) -> tuple[str, int]:
    """Host and port at which the server's workers connect to this rank."""
    host, _, port = (config.weights_address or "").partition(":")
    return host or own_address(config.endpoint), int(port) if port else choose_port()


def own_address(endpoint: EndpointConfig) -> str:
    """This machine's address on the route to a server.

    Raises:
        DataError: the server's host name does not resolve.
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
            f"online.endpoint.base_url = {endpoint.base_url}: cannot be reached: {error}; check the address and the server."
        ) from None
