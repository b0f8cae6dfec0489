"""Models by name on the Hugging Face hub: required files go to the hub's cache, and no code from it runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpo_megatron.config import ConfigError, require

TOKENIZER = (
    *("tokenizer*", "*.model", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*config.json"),
    "additional_chat_templates/*.jinja",
)
"""Patterns of a tokenizer's files."""
MODEL = (*TOKENIZER, "*.safetensors", "*.safetensors.index.json", "LICENSE*", "NOTICE*")
"""Patterns of the files that `mpo convert` needs: no code and no pickles."""
OTHER_COPIES = ("consolidated*", "*/*.safetensors", "*/*.json", "*/*.model")
"""Duplicate weights in the author's own format, and models in subfolders."""


def download(name: str, option: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder in the hub's cache with a model's files that match the patterns; without a network, the cached files.

    Args:
        option: name of the option, for messages
        revision: branch, tag or commit; by default `main`
    Raises:
        ConfigError: no such model or revision, it is gated, or the hub cannot be reached.
    """
    import huggingface_hub  # needed only for names on the hub
    from huggingface_hub import errors

    where = f"{option} = {name}; no such folder here"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(OTHER_COPIES)
            )
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{where}, and on the hub it is gated: accept its terms on its page, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(f"{where}, and no such model on the hub; log in with `hf auth login` if it is private.") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"revision = {revision}; {name} has no such branch, tag or commit on the hub.") from error
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError) as error:
        raise ConfigError(
            f"{where}, and the hub cannot be reached; on a machine with a network run `hf download {name} --local-dir FOLDER`, "
            "and name that folder."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{where}, and loading it from the hub failed: {reason}") from error


def download_model(name: str, option: str, revision: str | None) -> Path:
    """The folder of the hub's cache with a model's weights, configuration and tokenizer.

    Raises:
        ConfigError: as in `download`; or the model's weights exist only in other formats.
    """
    folder = download(name, option, MODEL, revision)
    require(
        any(folder.glob("*.safetensors")),
        f"{option} = {name} has no safetensors on the hub; save it in that format first, with transformers: "
        f"AutoModelForCausalLM.from_pretrained({name!r}, dtype='auto').save_pretrained(NEW_FOLDER).",
    )
    return folder
