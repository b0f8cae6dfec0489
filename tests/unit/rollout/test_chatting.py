"""`mpo chat`: requests to a model, output, and history."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ChatConfig, ConfigError, TransformersConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.chat import Partner, chat, load
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.models import locate_model
from mpo_megatron.terminal.visible import visible
from tests.tiny import save_model, save_tokenizer


def greedy(folder: Path, messages: list[dict[str, Any]], max_tokens: int) -> str:
    """The embedded engine's answer."""
    tokenizer = load_tokenizer(folder)
    engine = EmbeddedEngine.load(folder, tokenizer, TransformersConfig(device="cpu"))
    ids = tuple(Chat(tokenizer).prompt(messages)[1].tolist())
    ends = tuple({Chat(tokenizer).end_token_id, tokenizer.eos_id or 0})
    sampling = Sampling(num_responses=1, temperature=0, max_tokens=max_tokens, stop_token_ids=ends)
    (generation,) = engine.generate([Prompt(group_id="a", token_ids=ids, messages=tuple(messages))], sampling)
    return generation.responses[0].text


def test_the_answer_is_the_engines_and_is_remembered(model_folder: Path) -> None:
    config = ChatConfig(model=str(model_folder), temperature=0, max_tokens=12, device="cpu")
    partner, written = load(config.model, "model", config), list[str]()
    first = partner.answer("Hello", config, written.append)
    asked = [{"role": "user", "content": "Hello"}]
    assert first == "".join(written) == greedy(model_folder, asked, 12)
    second = partner.answer("And then?", config, written.append)
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert second == greedy(model_folder, asked, 12)
    assert partner.messages == [*asked, {"role": "assistant", "content": second}]


def test_a_generation_config_beside_the_weights_changes_nothing(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    save_model(other, vocab_size=save_tokenizer(other), num_hidden_layers=2, hidden_size=32)
    (other / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "repetition_penalty": 9.0, "min_p": 0.9}')
    texts = []
    for folder in (model_folder, other):
        config = ChatConfig(model=str(folder), temperature=0, max_tokens=12, device="cpu")
        texts.append(load(config.model, "model", config).answer("Hello", config, lambda text: None))
    assert texts[0] == texts[1]


def test_two_models_answer_and_a_conversation_begins_anew(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[tuple[int, list[str]]] = []

    def answer(self: Partner, message: str, config: ChatConfig, write: Any) -> str:
        self.messages = [*self.messages, {"role": "user", "content": message}, {"role": "assistant", "content": "\x1b[31mred"}]
        said.append((len(self.messages), [str(each["content"]) for each in self.messages[::2]]))
        write("\x1b[31mred")
        return "red"

    monkeypatch.setattr(Partner, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    chat(ChatConfig(model=str(model_folder), beside=str(model_folder), device="cpu"))
    assert said == [(2, ["one"])] * 2 + [(4, ["one", "two"])] * 2 + [(2, ["three"])] * 2
    printed = capsys.readouterr().out
    assert printed.count(f"── {model_folder}") == 6
    assert "\\x1b[31mred" in printed
    assert "\x1b" not in printed


def test_a_folder_of_mpo_align_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "out" / "aligned").mkdir(parents=True)
    (tmp_path / "out" / "aligned" / "config.json").touch()
    assert locate_model(str(tmp_path / "out")) == tmp_path / "out" / "aligned"


def test_an_answer_ends_where_the_model_ends(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions beyond the model's maximum are never computed."""
    config = ChatConfig(model=str(model_folder), temperature=0, max_tokens=12, device="cpu")
    partner, asked = load(config.model, "model", config), list[int]()
    monkeypatch.setattr("mpo_megatron.rollout.chat.draw", lambda *given: asked.append(given[3].max_tokens) or "")
    length = len(partner.chat.prompt([{"role": "user", "content": "Hello"}])[1])
    for room in (5, 12, 20):
        partner.messages, partner.model.config.max_position_embeddings = [], length + room
        partner.answer("Hello", config, print)
    assert asked == [5, 12, 12]


def test_one_prompt(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat(ChatConfig(model=str(model_folder), prompt="Hello", temperature=0, max_tokens=12, device="cpu"))
    asked = [{"role": "user", "content": "Hello"}]
    assert capsys.readouterr().out == visible(greedy(model_folder, asked, 12), lines=True) + "\n"


def test_what_cannot_be_answered_is_said(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        chat(ChatConfig(model=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"beside = .*no such folder"):
        chat(ChatConfig(model=str(model_folder), beside=str(tmp_path / "none"), device="cpu"))
    with pytest.raises(ConfigError, match=r"the conversation has .* tokens, and .* reads 4096"):
        chat(ChatConfig(model=str(model_folder), prompt="long " * 4096, device="cpu"))


def test_a_message_that_cannot_be_answered_does_not_end_the_conversation(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(self: Partner, message: str, config: ChatConfig, write: Any) -> str:
        if message == "long":
            raise ConfigError("too \x1blong")
        write("fine")
        return "fine"

    monkeypatch.setattr(Partner, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("long\nshort\n"))
    chat(ChatConfig(model=str(model_folder), device="cpu"))
    printed = capsys.readouterr()
    assert "fine" in printed.out
    assert printed.err == "too \\x1blong\n"
