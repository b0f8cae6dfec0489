"""Turn the errors of `transformers` on a damaged folder into one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mpo_megatron.config import ConfigError
from mpo_megatron.data.tokenizer import DAMAGE


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Load a model or tokenizer inside.

    Args:
        what: option, value and what fails, for the message

    Raises:
        ConfigError: transformers cannot load it.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError; the folder is fine
        raise
    except (*DAMAGE, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what} cannot load it: {reason}; copy it again.") from error
