"""The two kinds of tokenizers: those of `transformers`, and bare SentencePiece models.

A bare SentencePiece model is read by `sentencepiece` itself, without conversion: `transformers` disagrees with it on texts with
leading or double spaces, and such models were trained with `sentencepiece`.
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
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mpo_megatron.data.arrays import Int32
from mpo_megatron.data.group import Message
from mpo_megatron.data.templates import Renderer

PROBE = "Naïve café, 東京  (2 spaces)\n\n\tx = 10_000;  don't <b>UPPER</b> 🙂\r\n end "
"""Probe text whose ids are part of the digest: white space, digits, contractions, several scripts, an emoji."""


_CHARACTERS = 1 << 16
"""Characters tokenized at a time; tokenizers use 250 bytes for each. More at a time take new pages from the system each time."""


_CACHED_WORDS, _USUAL_WORDS = 1 << 16, 10_000
"""Words whose tokens a BPE or Unigram model remembers, 0.5 KiB each, and its default; a large data set has far more."""


_OFF = ("", "off", "false", "f", "no", "n", "0")
"""Values of TOKENIZERS_PARALLELISM that mean one thread."""


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
        return _digest(self.backend.get_vocab(), self.encode(PROBE))

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
        return _digest(pieces | self.added, self.encode(PROBE))

    def save(self, folder: str | Path) -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.model, target / "tokenizer.model")
        added = {str(index): {"content": name, "special": True} for name, index in self.added.items()}
        settings = {"chat_template": self.template, "added_tokens_decoder": added}
        (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
