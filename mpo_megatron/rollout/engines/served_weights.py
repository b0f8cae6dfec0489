"""Generation by a vLLM server that first reads a policy's weights from its folder: `load_weights`.

The server must see the folder under the same path. Its weights have a version made of the policy's digest: shards of one command
load them once, and answers that other weights may have given are refused.
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
    """A server with a policy's weights (an `Engine`)."""

    def __init__(self, engine: EndpointEngine, *, folder: Path, digest: str, max_tokens: int, output: Path) -> None:
        """Let the server read the weights, unless it has them.

        Args:
            engine: asks the server
            folder: the policy's Hugging Face folder
            digest: of its weights
            max_tokens: of the longest prompt and its response
            output: where shards of the same command wait for the one that loads
        Raises:
            ConfigError: the server cannot load weights, or not these.
            DataError: it cannot be reached, or fails.
        """
        require(
            engine.kind == "vllm",
            f"load_weights = true, but {engine.config.base_url} is of the kind {engine.kind}, and only vllm reads other weights; "
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
            ConfigError, DataError: as `EndpointEngine.generate`; or the server has other weights by now.
        """
        for generation in self.engine.generate(prompts, sampling):
            self.server.check_weights(self.version)
            yield generation

    def close(self) -> None:
        """Leave the weights where they are: the next command may want the same."""
        self.engine.close()
