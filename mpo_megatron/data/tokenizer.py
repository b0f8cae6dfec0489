"""Tokenizers behind one small interface, and how they are loaded. Code that comes with a checkpoint never runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from mpo_megatron.config import ConfigError, is_hub_name, require
from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.group import Message
from mpo_megatron.data.hub import TOKENIZER, download
from mpo_megatron.data.tokenizer_backends import PROBE, HuggingFaceTokenizer, SentencePieceTokenizer
from mpo_megatron.files.digests import check_file, check_folder

PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Chat template of a SentencePiece model that comes without one."""
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
"""Files of which a `transformers` tokenizer folder has at least one."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def source(self) -> str:
        """Where it was loaded from, for messages."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if the tokenizer defines one."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: begin, end, turn markers."""

    @property
    def pad_id(self) -> int | None:
        """The padding token, if the tokenizer defines one."""

    @property
    def template(self) -> Any:
        """The chat template; several by name, in a dictionary, for some models."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Spelled-out special tokens are recognised; none are added."""

    def encode_many(self, texts: Sequence[str], end: int | None = None) -> list[Int32]:
        """Ids of each text, as from `encode`, followed by `end`; faster than one by one."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The chat template's text for a conversation. Raises `jinja2.TemplateError` if the template refuses it."""

    def render_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]], *, variables: Mapping[str, Any]
    ) -> list[str | TemplateError]:
        """The template's text with a generation prompt for each conversation with its tools, or why the template refuses it."""

    def digest(self) -> str:
        """sha256 of the vocabulary and of a probe text's ids: the same wherever the tokenizer is loaded from."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its chat template, so that `load_tokenizer(folder)` restores it."""


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
    """Load a tokenizer: a Hugging Face folder, a Megatron checkpoint (its `hf` folder), a SentencePiece `.model` file,
    or a model's name on the hub.

    `chat_template` is a file with a Jinja template that replaces the tokenizer's own. A SentencePiece model without template gets
    `PLAIN_TEMPLATE`; any other tokenizer without one is refused, because inference would have none either.

    Raises:
        ConfigError: there is nothing to load, a file is damaged, or the chat template is missing.
    """
    source = Path(path)
    template = None if chat_template is None else _read_template(Path(chat_template))
    if source.is_file():
        require(source.suffix == ".model", f"tokenizer = {path}; a file must be a SentencePiece .model; give its folder.")
        check_file(source)
        return _load_sentencepiece(source, template)
    if is_hub_name(str(path)):
        source = download(str(path), "tokenizer", TOKENIZER)
    require(source.is_dir(), f"tokenizer = {path}; no such folder or file; give a checkpoint's folder or a .model file.")
    folder = source / "hf" if (source / "hf").is_dir() else source
    check_folder(folder, weights=False)
    if _is_sentencepiece(folder):
        return _load_sentencepiece(folder / "tokenizer.model", template)
    return _load_hugging_face(folder, template)


def _read_template(path: Path) -> str:
    require(path.is_file(), f"chat_template = {path}; no such file; give a file with a Jinja template.")
    try:
        return path.read_text(encoding="utf-8-sig")  # an editor's byte-order mark would be part of every prompt
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template = {path}; not UTF-8 ({error}); save it as UTF-8.") from error


def count_tokens(folder: Path) -> int | None:
    """Embedding rows needed for a folder's tokenizer: its largest id plus one; None if the folder has no tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if _is_sentencepiece(folder):
        return _load_sentencepiece(folder / "tokenizer.model", None).vocab_size
    if not any((folder / name).is_file() for name in HUGGING_FACE_FILES):
        return None
    return HuggingFaceTokenizer(_load_backend(folder)).vocab_size


def _is_sentencepiece(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _load_hugging_face(folder: Path, template: str | None) -> HuggingFaceTokenizer:
    require(
        any((folder / name).is_file() for name in HUGGING_FACE_FILES),
        f"tokenizer = {folder}; it holds none of {', '.join(HUGGING_FACE_FILES)}, tokenizer.model; copy the tokenizer's files "
        "there.",
    )
    tokenizer = _load_backend(folder)
    if template is not None:
        tokenizer.chat_template = template
    require(
        tokenizer.chat_template is not None,
        f"tokenizer = {folder}; no chat template; give one with chat_template = FILE (docs/reference/data.md has a plain one).",
    )
    return HuggingFaceTokenizer(tokenizer)


DAMAGE = (ValueError, OSError, LookupError, ImportError, TypeError, AttributeError, RecursionError)
"""Errors that transformers raises on a damaged tokenizer."""


LARGEST_ID = 2**31 - 1
"""Largest token id: files and tensors hold ids in 32 bits."""


def _load_backend(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer  # slow to import: only when a tokenizer is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer.encode(PROBE, add_special_tokens=False, verbose=False)  # settings of a wrong type fail only here
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:
        # tokenizers (Rust) raises plain Exception; on damaged files, transformers fails on missing values in various ways.
        # StrictDataclassError: a field of config.json has another type.
        if type(error) is not Exception and not isinstance(error, (*DAMAGE, StrictDataclassError)):
            raise
        reason = (
            _explain(folder / "tokenizer.json") or _find_invalid(folder) or f"transformers cannot load it ({_one_line(error)})"
        )
        raise ConfigError(f"tokenizer = {folder}; {reason}; copy the tokenizer again.") from error
    require(tokenizer.vocab_size > 0, f"tokenizer = {folder}; its vocabulary is empty; copy the tokenizer again.")
    require(
        largest <= LARGEST_ID,
        f"tokenizer = {folder}; its largest token id is {largest}, beyond {LARGEST_ID}; copy the tokenizer again.",
    )
    return tokenizer


def _find_invalid(folder: Path) -> str | None:
    """The first JSON file of a folder that does not parse, and why; None if all do."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            return f"{path.name} is not valid JSON ({_one_line(error)})"
    return None


def _explain(path: Path) -> str | None:
    """Why a tokenizer.json is no tokenizer, in its reader's words, because transformers names only a missing key; None if it is
    one."""
    from tokenizers import Tokenizer as Backend

    if not path.is_file():
        return None
    try:
        Backend.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the type that Rust raises
            raise
        return f"{path.name} does not hold a tokenizer ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load_sentencepiece(model: Path, template: str | None) -> SentencePieceTokenizer:
    settings_file, template_file = model.with_name("tokenizer_config.json"), model.with_name("chat_template.jinja")
    try:
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        if template is None and template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        template = template or settings.get("chat_template") or PLAIN_TEMPLATE
        added = {token["content"]: int(index) for index, token in settings.get("added_tokens_decoder", {}).items()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"tokenizer = {model}; tokenizer_config.json or chat_template.jinja beside it is damaged ({error}); copy both again."
        ) from error
    try:
        return SentencePieceTokenizer(model, template, added)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"tokenizer = {model}; sentencepiece cannot read it: {error}") from error
