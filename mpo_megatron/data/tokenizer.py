"""Tokenizers behind one small interface: Hugging Face's through `AutoTokenizer`, SentencePiece's through `sentencepiece`.

A bare SentencePiece model is read by `sentencepiece` itself, without conversion: `transformers` disagrees with it on texts with
leading or double spaces, and such models were trained with `sentencepiece`. Code that comes with a checkpoint never runs.
"""

from __future__ import annotations

import array
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError

from mpo_megatron.config import ConfigError, is_hub_name, require
from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.group import Message
from mpo_megatron.data.hub import TOKENIZER, download
from mpo_megatron.data.templates import Renderer
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
_PROBE = "Naïve café, 東京  (2 spaces)\n\n\tx = 10_000;  don't <b>UPPER</b> 🙂\r\n end "
"""Probe text whose ids are part of the digest: white space, digits, contractions, several scripts, an emoji."""
_CHARACTERS = 1 << 16
"""Characters tokenized at a time; tokenizers use 250 bytes for each. More at a time take new pages from the system each time."""
_CACHED_WORDS, _USUAL_WORDS = 1 << 16, 10_000
"""Words whose tokens a BPE or Unigram model remembers, 0.5 KiB each, and its default; a large data set has far more."""
_OFF = ("", "off", "false", "f", "no", "n", "0")
"""Values of TOKENIZERS_PARALLELISM that mean one thread."""
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


def _digest(vocabulary: Mapping[str, int], probe: Sequence[int]) -> str:
    text = json.dumps([sorted(vocabulary.items(), key=lambda item: (item[1], item[0])), list(probe)])
    return hashlib.sha256(text.encode()).hexdigest()


def _cut(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in runs of `_CHARACTERS`, or one text that has more."""
    run, characters = list[str](), 0
    for text in texts:
        if run and characters + len(text) > _CHARACTERS:
            yield run
            run, characters = [], 0
        run.append(text)
        characters += len(text)
    if run:
        yield run


def _num_threads() -> int:
    """Threads that encode a batch; each has a cache of words of its own."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() in _OFF:
        return 1
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    return (int(wanted) if wanted.isdecimal() else 0) or os.cpu_count() or 1


def _as_arrays(lists: Iterable[list[int]], end: int | None) -> list[Int32]:
    """Each list as an array, with `end` behind it; parts of one buffer, which is made faster than many arrays."""
    buffer, ends = array.array("i"), [0]
    for ids in lists:
        buffer.fromlist(ids)
        if end is not None:
            buffer.append(end)
        ends.append(len(buffer))
    flat = np.frombuffer(buffer, np.int32) if buffer else np.zeros(0, np.int32)
    return [flat[start:stop] for start, stop in itertools.pairwise(ends)]


class _Templated:
    """Renders conversations with a chat template in a process with limits."""

    template: Any
    _renderer: Renderer

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        options = {"tools": list(tools) or None, **variables}
        return self._renderer(self.template, list(messages), add_generation_prompt, options)

    def render_many(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]], *, variables: Mapping[str, Any]
    ) -> list[str | TemplateError]:
        return self._renderer.many(
            [
                (self.template, list(messages), True, {"tools": list(tools) or None, **variables})
                for messages, tools in conversations
            ]
        )


class HuggingFaceTokenizer(_Templated):
    """A tokenizer of `transformers`."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer
        self._renderer = Renderer(self._render, "chat_template", render_all=self._render_all)

    @property
    def template(self) -> Any:
        return self.backend.chat_template

    @property
    def source(self) -> str:
        return str(self.backend.name_or_path)

    @functools.cached_property
    def vocab_size(self) -> int:
        return int(max(self.backend.get_vocab().values())) + 1

    @property
    def eos_id(self) -> int | None:
        eos: int | None = self.backend.eos_token_id
        return eos

    @property
    def pad_id(self) -> int | None:
        pad: int | None = self.backend.pad_token_id
        return pad

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        added = self.backend.added_tokens_decoder.items()
        return frozenset(self.backend.all_special_ids) | {index for index, token in added if token.special}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def encode_many(self, texts: Sequence[str], end: int | None = None) -> list[Int32]:
        if (fast := self._fast) is None:
            return _as_arrays(map(self.encode, texts), end)
        parts = (fast.encode_batch_fast(part, add_special_tokens=False) for part in _cut(texts))
        return _as_arrays((found.ids for part in parts for found in part), end)

    @functools.cached_property
    def _fast(self) -> Any:
        """The Rust tokenizer inside that of `transformers`, for ids only; None if that is in Python."""
        fast = getattr(self.backend, "backend_tokenizer", None)
        if fast is not None:  # as transformers sets them at each call; the file may set others
            fast.no_truncation()
            fast.no_padding()
            fast.encode_special_tokens = bool(getattr(self.backend, "split_special_tokens", False))
            if (resize := getattr(fast.model, "_resize_cache", None)) is not None:  # no public name; other models have no cache
                resize(max(_USUAL_WORDS, _CACHED_WORDS // _num_threads()))
        return fast

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def _render(self, template: Any, messages: Any, add_generation_prompt: bool, variables: dict[str, Any]) -> Any:
        """The text of one conversation, or the texts of several."""
        self.backend.chat_template = template  # the template may have changed since the rendering process started
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **variables}
        return self.backend.apply_chat_template(messages, **options)

    def _render_all(self, calls: Sequence[tuple[Any, ...]]) -> list[str]:
        """The texts of `_render` for calls that differ in messages and tools: `transformers` renders many faster than one."""
        texts = list[str]()
        for without_tools, run in itertools.groupby(calls, key=lambda call: call[3]["tools"] is None):
            if without_tools:
                template, messages, add_generation_prompt, variables = zip(*run, strict=True)
                texts += self._render(template[0], messages, add_generation_prompt[0], variables[0])
            else:
                texts += itertools.starmap(self._render, run)
        return texts

    def digest(self) -> str:
        return _digest(self.backend.get_vocab(), self.encode(_PROBE))

    def save(self, folder: str | Path) -> None:
        self.backend.save_pretrained(str(folder))


class SentencePieceTokenizer(_Templated):
    """A SentencePiece model. It recognises its control pieces (<s>, </s>), and added tokens, in a text."""

    def __init__(self, model: Path, template: str, added: Mapping[str, int] | None = None) -> None:
        import sentencepiece  # needed only for SentencePiece models

        self.model, self.template, self.source = model, template, str(model)
        self._renderer = Renderer(self._render, "chat_template")
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        size = self.processor.vocab_size()
        control = {self.processor.id_to_piece(index): index for index in range(size) if self.processor.is_control(index)}
        self.added = dict(added or {})
        self.markers = control | self.added
        longest_first = sorted(self.markers, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self.markers else None
        self.vocab_size = max([size - 1, *self.markers.values()]) + 1
        self.special_ids = frozenset(self.markers.values())

    @property
    def eos_id(self) -> int | None:
        index = int(self.processor.eos_id())
        return None if index < 0 else index

    @property
    def pad_id(self) -> int | None:
        index = int(self.processor.pad_id())
        return None if index < 0 else index

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        parts: list[str] = self._split.split(text) if self._split else [text]
        for part in parts:
            if part in self.markers:
                ids.append(self.markers[part])
            elif part:
                ids.extend(self.processor.encode(part))
        return ids

    def encode_many(self, texts: Sequence[str], end: int | None = None) -> list[Int32]:
        return _as_arrays(map(self.encode, texts), end)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        names = {index: name for name, index in self.markers.items()}
        parts: list[str] = []
        for is_marker, run in itertools.groupby(map(int, ids), key=names.__contains__):
            if not is_marker:
                parts.append(self.processor.decode(list(run)))
            elif not skip_special:
                parts += [names[index] for index in run]
        return "".join(parts)

    def _render(self, template: str, messages: list[Message], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template  # used by inference engines

        eos, bos = self.processor.eos_id(), self.processor.bos_id()
        special = {
            "bos_token": self.processor.id_to_piece(bos) if bos >= 0 else "",
            "eos_token": self.processor.id_to_piece(eos) if eos >= 0 else "",
        }
        rendered = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **special | variables,
        )
        return str(rendered[0][0])

    def digest(self) -> str:
        pieces = {self.processor.id_to_piece(index): index for index in range(self.processor.vocab_size())}
        return _digest(pieces | self.added, self.encode(_PROBE))

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.model, target / "tokenizer.model")
        added = {str(index): {"content": name, "special": True} for name, index in self.added.items()}
        settings = {"chat_template": self.template, "added_tokens_decoder": added}
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


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


def _load_backend(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer  # slow to import: only when a tokenizer is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer.encode(_PROBE, add_special_tokens=False, verbose=False)  # settings of a wrong type fail only here
        return tokenizer
    except Exception as error:
        # tokenizers (Rust) raises plain Exception; on damaged files, transformers fails on missing values in various ways.
        # StrictDataclassError: a field of config.json has another type.
        if type(error) is not Exception and not isinstance(error, (*DAMAGE, StrictDataclassError)):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"tokenizer = {folder}; transformers cannot load it ({reason}); copy the tokenizer again.") from error


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
    except ImportError as error:
        raise ConfigError(f"tokenizer = {model}; install sentencepiece to read it: pip install sentencepiece.") from error
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"tokenizer = {model}; sentencepiece cannot read it: {error}") from error
