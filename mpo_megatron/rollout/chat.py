"""`mpo chat`: a conversation in the terminal with one model, or with two side by side that receive the same messages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError

from mpo_megatron.config import ChatConfig, ConfigError, TransformersConfig, require
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Message
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.models import base_folder, hugging_face_folder, is_peft, locate_model
from mpo_megatron.terminal.visible import message, visible

ALIGNED = "aligned"
"""Folder inside the output of `mpo align` that holds the aligned model."""
EXIT, RESET = ("/exit", "/quit", "exit", "quit"), "/reset"
HELP = f"Write a message. {RESET} starts over, {EXIT[0]} or Ctrl-D ends."


@dataclass(kw_only=True, eq=False)
class Partner:
    """A model and the conversation so far, including its own answers."""

    name: str
    chat: Chat
    model: Any
    messages: list[Message] = field(default_factory=list)

    def answer(self, message: str, config: ChatConfig, write: Callable[[str], object]) -> str:
        """Answer a message, print the answer as it is generated, and add both to the conversation.

        Raises:
            ConfigError: the chat template refuses the conversation, or the conversation is too long for the model.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": message}]
        try:
            _, ids = self.chat.prompt(asked)
        except TemplateError as error:
            raise ConfigError(f"model = {self.name}; its chat template refuses the conversation: {error}") from error
        limit = getattr(self.model.config, "max_position_embeddings", None)
        require(
            limit is None or len(ids) + 1 <= limit,
            f"the conversation has {len(ids)} tokens, and {self.name} reads {limit}; {RESET} starts over.",
        )
        room = config.max_tokens if limit is None else min(config.max_tokens, limit - len(ids))
        text = draw(self.model, self.chat, ids.tolist(), replace(config, max_tokens=room), write)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text


def draw(model: Any, chat: Chat, prompt: list[int], config: ChatConfig, write: Callable[[str], object]) -> str:
    """Generate an answer with transformers' `generate`, and write its words as they arrive."""
    from transformers.generation.streamers import BaseStreamer

    class Words(BaseStreamer):
        """Decode the tokens so far, and print the text that can no longer change."""

        def __init__(self) -> None:
            self.ids: list[int] = []
            self.text, self.is_prompt = "", True

        def put(self, value: Any) -> None:
            if self.is_prompt:
                self.is_prompt = False
                return
            self.ids += value.flatten().tolist()
            text = chat.tokenizer.decode(self.ids, skip_special=True)
            if not text.endswith("\ufffd"):  # a character split over several tokens
                self.show(text)

        def end(self) -> None:
            self.show(chat.tokenizer.decode(self.ids, skip_special=True))

        def show(self, text: str) -> None:
            write(text[len(self.text) :])
            self.text = text

    words = Words()
    ids = torch.tensor([prompt], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    ends = sorted({chat.end_token_id, *([] if chat.tokenizer.eos_id is None else [chat.tokenizer.eos_id])})
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.max_tokens,
            eos_token_id=ends,
            pad_token_id=chat.tokenizer.pad_id if chat.tokenizer.pad_id is not None else ends[0],
            repetition_penalty=1.0,
            streamer=words,
            **sampling,
        )
    return words.text


def load(path: str, name: str, config: ChatConfig) -> Partner:
    """A model with an empty conversation.

    Raises:
        ConfigError: the path holds no model.
    """
    folder = hugging_face_folder(locate_model(path, name))
    tokenizer, adapter = load_tokenizer(folder), None
    if is_peft(folder):
        folder, adapter = base_folder(folder), folder
    chat = Chat(tokenizer, system_prompt=config.system_prompt, variables=config.chat_template_kwargs)
    settings = TransformersConfig(device=config.device, dtype=config.dtype)
    model = EmbeddedEngine.load(folder, tokenizer, settings, adapter).model
    model.generation_config = type(model.generation_config)()  # the checkpoint's own sampling defaults must not apply
    return Partner(name=path, chat=chat, model=model)


def chat(config: ChatConfig) -> None:
    """Answer `config.prompt` once, or converse until the user ends it.

    Raises:
        ConfigError: a model cannot be loaded, or cannot answer.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    partners = [load(config.model, "model", config)]
    if config.beside is not None:
        partners.append(load(config.beside, "beside", config))
    torch.manual_seed(config.seed)
    if config.prompt is not None:
        answer(partners, config.prompt, config)
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines that are typed can be edited, and come back)
        print(HELP)
    while (asked := ask()) is not None:
        if asked == RESET:
            for partner in partners:
                partner.messages = []
        elif asked:
            try:
                answer(partners, asked, config)
            except ConfigError as error:
                print(message(error), file=sys.stderr)


def ask() -> str | None:
    """Read the next message; None at the end of input."""
    try:
        message = input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if message.lower() in EXIT else message


def answer(partners: list[Partner], message: str, config: ChatConfig) -> None:
    """Print each model's answer in turn."""
    for partner in partners:
        if len(partners) > 1:
            print(f"\n── {visible(partner.name)}", flush=True)
        partner.answer(message, config, lambda text: print(visible(text, lines=True), end="", flush=True))
        print(flush=True)
