"""Generation on a vLLM server that first loads a policy's weights from a folder: `load_weights`.

The server must see the folder under the same path. The version of the weights is the policy's digest: the shards of one command
load them once, and answers possibly given by other weights are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpo_megatron.config import require
from mpo_megatron.files.lock import hold
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.endpoint import EndpointEngine
from mpo_megatron.rollout.engines.vllm_server import VllmServer


class ServedWeights:
    """A server that holds a policy's weights (an `Engine`)."""

    def __init__(self, engine: EndpointEngine, *, folder: Path, digest: str, max_tokens: int, output: Path) -> None:
        """Load the weights on the server, unless it has them.

        Args:
            engine: sends the requests
            folder: the policy's Hugging Face folder
            digest: digest of the policy's weights
            max_tokens: tokens of the longest prompt plus its response
            output: folder in which shards of the same command wait for the one that loads
        Raises:
            ConfigError: the server cannot load weights, or refuses these.
            DataError: the server cannot be reached, or fails.
        """
        require(
            engine.kind == "vllm",
            f"load_weights = true, but {engine.config.base_url} is of kind {engine.kind}; only vllm can load weights; "
            "set endpoint.server if it is one, or set engine to vllm or transformers.",
        )
        self.engine, self.uncontrolled = engine, engine.uncontrolled
        self.version = f"mpo-{digest[:32]}"
        self.server = VllmServer(engine.config, "endpoint", seconds=engine.config.timeout)
        self.server.check_version()
        if (cause := self.server.check_model(max_tokens=max_tokens)) is not None:
            print(f"{self.server.where}: {cause}: responses are drawn from a quantised policy.", file=sys.stderr)
        with hold(output / ".server.lock", output, wait_seconds=float("inf")):
            if self.server.version() != self.version:
                self.server.pause()
                self.server.load(str(folder.absolute()))
                self.server.resume(self.version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt.

        Raises:
            ConfigError, DataError: as in `EndpointEngine.generate`; or the server now has other weights.
        """
        for generation in self.engine.generate(prompts, sampling):
            self.server.check_weights(self.version)
            yield generation

    def close(self) -> None:
        """Keep the weights on the server: the next command may need them."""
        self.engine.close()
