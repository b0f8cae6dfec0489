"""Token ids that come with responses: used in training if they decode to the text; counted where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo_megatron.config import ConfigError, PrepareConfig
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import PreparedGroups, load_groups
from tests.tiny import CHATML


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, and one merge: the tokenizer encodes "ab" as token 256."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ab"])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def run(
    tmp_path: Path, tokenizer: Path, responses: list[dict[str, Any]], **options: Any
) -> tuple[PreparedGroups, dict[str, Any]]:
    noted = {"finish_reason": "stop", "num_tokens": 3, "seed": 1, "scores": {"x": 1.0}}
    lines = [{"group_id": "g", "prompt": "Why?", "meta": {"k": 1}, "responses": [noted | response for response in responses]}]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = PrepareConfig(
        input=str(tmp_path / "groups.jsonl"), output=str(tmp_path / "out"), tokenizer=str(tokenizer), **options
    )
    info = prepare(config, Console(quiet=True)).train
    return load_groups(tmp_path / "out"), info.statistics["preparation"]


def ids_of(text: str) -> list[int]:
    """Byte by byte, which differs from the tokenizer's encoding."""
    return [sorted(pre_tokenizers.ByteLevel.alphabet()).index(character) for character in text]


def test_what_was_drawn_is_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    end = 257
    responses = [
        {"text": "ab", "reward": 1.0, "token_ids": [*ids_of("ab"), end]},  # drawn as two tokens, encoded as one
        {"text": "cd", "reward": 0.5, "token_ids": [*ids_of("cd"), end]},  # as the tokenizer encodes it
        {"text": "cab", "reward": 0.4, "token_ids": ids_of("cab"), "finish_reason": "length"},  # truncated: no end token
        {"text": "ef", "reward": 0.3, "token_ids": [*ids_of("xy"), end]},  # another text
        {"text": "gh", "reward": 0.2, "token_ids": [10**6]},  # another tokenizer
        {"text": "ij", "reward": 0.1},
    ]
    groups, counts = run(tmp_path, tokenizer, responses)
    [group] = groups
    assert [tokens.tolist() for tokens in group.response_tokens] == [
        [*ids_of("ab"), end],
        [*ids_of("cd"), end],
        ids_of("cab"),
        *([*ids_of(text), end] for text in ("ef", "gh", "ij")),
    ]
    assert {name: counts[name] for name in ("drawn_responses", "drawn_otherwise", "drawn_of_another_text")} == {
        "drawn_responses": 3,
        "drawn_otherwise": 2,
        "drawn_of_another_text": 2,
    }
    assert counts["unused_columns"] == {}


def test_what_are_no_ids_costs_one_response(tmp_path: Path, tokenizer: Path) -> None:
    responses = [{"text": text, "reward": reward} for text, reward in (("ab", 1.0), ("cd", 0.5), ("ef", 0.1))]
    groups, counts = run(tmp_path, tokenizer, [*responses, {"text": "x", "reward": 0.0, "token_ids": ["1"]}])
    assert [group.num_responses for group in groups] == [3]
    assert counts["unusable_responses_by_field"] == {"responses": 1}


def test_the_best_stays_and_swapped_copies_join_it(tmp_path: Path, tokenizer: Path) -> None:
    responses = [{"text": text, "reward": reward} for text, reward in (("cde", 0.1), ("fgh", 0.2), ("xyz", 0.9), ("uvw", 0.3))]
    groups, _ = run(tmp_path, tokenizer, responses, responses_per_prompt=2, keep_best=True, swapped_negatives=2)
    [group] = groups
    assert group.rewards is not None
    assert group.response_texts[int(group.rewards.argmax())] == "xyz"
    assert group.num_responses == 4
    for text, tokens, reward in list(zip(group.response_texts, group.response_tokens, group.rewards, strict=True))[2:]:
        assert sorted(text) == [*"xyz"]
        assert text != "xyz"
        assert tokens[-1] == 257
        assert reward == group.rewards[:2].min()


def test_options_without_an_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep_best = true; it has an effect only with responses_per_prompt"):
        PrepareConfig(input="x", output="y", tokenizer="z", keep_best=True)
