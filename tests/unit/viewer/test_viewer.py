"""`mpo inspect` against the packed groups, and against attention computed as in training."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from mpo_megatron.config import (
    ConfigError,
    DataConfig,
    InspectConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    to_dict,
)
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.packing import Row, build_row, plan_rows
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files.digests import seal
from mpo_megatron.viewer.blocks import Block, attention_mask, blocks_of
from mpo_megatron.viewer.inspect import inspect
from mpo_megatron.viewer.source import look
from mpo_megatron.viewer.terminal import mark_ends
from tests.tiny import save_groups, save_model

PROMPTS = ["<|im_start|>user\nname two <i>fruits</i>\n<|im_end|>\n", "<|im_start|>to 東"]
RESPONSES = [["pear\tfig<|im_end|>", "x", "</script><b>plum</b><|im_end|>"], ["a<|im_end|>", "bb<|im_end|>"]]
REWARDS = [[1.0, 0.25, 0.0], [0.0, 2.0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "hf").parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> PreparedGroups:
    tokenizer = load_tokenizer(model)
    groups = [
        TokenizedGroup(
            group_id=f"g{index}",
            prompt_tokens=np.array(tokenizer.encode(prompt), dtype=np.int32),
            response_tokens=tuple(np.array(tokenizer.encode(text), dtype=np.int32) for text in texts),
            rewards=np.array(rewards),
        )
        for index, (prompt, texts, rewards) in enumerate(zip(PROMPTS, RESPONSES, REWARDS, strict=True))
    ]
    return save_groups(tmp_path_factory.mktemp("data") / "groups", groups, model)


def pack(data: PreparedGroups, layout: str, multiple: int = 16) -> tuple[Row, list[TokenizedGroup]]:
    groups = list(data)
    lengths = [[len(tokens) for tokens in group.response_tokens] for group in groups]
    scored = np.array([[True, True, True], [True, True, False]])
    prompts = [len(group.prompt_tokens) for group in groups]
    plan = plan_rows(prompts, lengths, scored, row_tokens=10_000, num_replicas=1, layout=layout)  # type: ignore[arg-type]
    return build_row(plan.rows[0][0], groups, layout=layout, multiple=multiple), groups  # type: ignore[arg-type]


def ids(block: Block) -> list[int]:
    return [token.id for token in block.tokens]


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_every_token_is_in_the_block_it_belongs_to(data: PreparedGroups, model: Path, layout: str) -> None:
    row, groups = pack(data, layout, multiple=512)
    blocks = blocks_of(row, groups, load_tokenizer(model), [])
    responses = {(block.slot, block.response): block for block in blocks if block.role == "response"}
    assert set(responses) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    for (slot, k), block in responses.items():
        group = groups[slot or 0]
        assert ids(block) == group.response_tokens[k or 0].tolist()
        assert all(token.scored for token in block.tokens)
        # The last token is only predicted; the others lie in the row, behind their prompt.
        positions = [token.position for token in block.tokens]
        assert positions == [len(group.prompt_tokens) + place for place in range(len(positions) - 1)] + [None]
        if block.start is not None:
            assert row.tokens[block.start : block.start + block.num_inputs].tolist() == ids(block)[:-1]
    assert responses[0, 1].start is None  # of one token: it is only predicted
    prompts = [block for block in blocks if block.role == "prompt"]
    copies = [0, 1] if layout == "shared" else [0, 0, 0, 1, 1]
    assert [block.slot for block in prompts] == copies
    assert all(ids(block) == groups[block.slot or 0].prompt_tokens.tolist() for block in prompts)
    assert not any(token.scored for block in prompts for token in block.tokens)
    inputs = [block.num_inputs for block in blocks]
    assert sum(inputs) == len(row.tokens)
    assert blocks[-1].role == "padding"
    assert blocks[-1].num_inputs == len(row.tokens) - row.num_tokens > 0


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_tokens_that_the_model_did_not_generate_show_as_not_scored(data: PreparedGroups, model: Path, layout: str) -> None:
    groups = [
        dataclasses.replace(group, scored=tuple(np.arange(len(part)) % 3 != 1 for part in group.response_tokens))
        for group in data
    ]
    lengths = [[len(part) for part in group.response_tokens] for group in groups]
    prompts, wanted = [len(group.prompt_tokens) for group in groups], np.array([[True] * 3, [True, True, False]])
    plan = plan_rows(prompts, lengths, wanted, row_tokens=10_000, num_replicas=1, layout=layout)  # type: ignore[arg-type]
    row = build_row(plan.rows[0][0], groups, layout=layout, multiple=16)  # type: ignore[arg-type]
    for block in blocks_of(row, groups, load_tokenizer(model), []):
        if block.role == "response":
            group = groups[block.slot or 0]
            assert group.scored is not None
            assert ids(block) == group.response_tokens[block.response or 0].tolist()
            assert [token.scored for token in block.tokens] == group.scored[block.response or 0].tolist()


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_the_mask_is_what_attention_computes(data: PreparedGroups, layout: str) -> None:
    from mpo_megatron.model.attention import row_layout, sdpa_row_attention

    row, _ = pack(data, layout)
    length = len(row.tokens)
    mask = attention_mask(row)
    # Equal scores everywhere: attention averages one-hot values over the keys that a query sees.
    query = torch.zeros(length, 1, 1, length)
    values = torch.eye(length).reshape(length, 1, 1, length)
    seen = sdpa_row_attention(query[:, 0], query[:, 0], values[:, 0], row_layout(row.segments.tolist()))
    expected = mask / mask.sum(axis=1, keepdims=True)
    assert np.allclose(seen.reshape(length, length).numpy(), expected, atol=1e-6)


def test_tokens_show_as_they_are(data: PreparedGroups, model: Path) -> None:
    row, groups = pack(data, "shared")
    blocks = blocks_of(row, groups, load_tokenizer(model), [(0, 1)])
    first = blocks[0]
    assert (first.tokens[0].text, first.tokens[0].special) == ("<|im_start|>", True)
    assert "".join(token.text for token in first.tokens) == PROMPTS[0]
    foreign = "".join(token.text for block in blocks if block.role == "prompt" and block.slot == 1 for token in block.tokens)
    assert foreign.startswith("<|im_start|>to ⟨")  # the bytes of 東, each a token of its own, are no texts by themselves
    assert "\ufffd" not in foreign
    assert blocks[-1].role == "left out"
    assert not any(token.scored for token in blocks[-1].tokens)
    assert mark_ends("a\n\tb") == "a⏎\n→\tb"


def shown(config: InspectConfig, width: int = 120) -> str:
    out = io.StringIO()
    inspect(config, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_a_group_on_a_terminal_and_as_a_page(data: PreparedGroups, model: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "g.html", tmp_path / "pictures" / "g.png"
    named = InspectConfig(data=str(data.path), group="g0", tokenizer=str(model), html=str(page), png=str(picture))
    text = shown(named)
    assert "group g0 · prompt" in text
    assert "group g0 · response 2 ·" in text
    assert "reward 0.25" in text
    assert "</script><b>plum</b><|im_end|>" in text
    assert "pear→" in text
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;" in html
    assert "data:image/png;base64," in html
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "max_tokens = 5" in shown(InspectConfig(data=str(data.path), tokenizer=str(model), max_tokens=5))
    assert "g1" in shown(InspectConfig(data=str(data.path), group="1", tokenizer=str(model)))


def test_a_row_of_a_run_is_the_row_it_trained_on(data: PreparedGroups, model: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        output=str(tmp_path),
        model=ModelConfig(checkpoint=str(model)),
        data=DataConfig(train=str(data.path), groups_per_step=1, row_tokens=512),
        loss=LossConfig(name="dpo"),
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (tmp_path / "run.json").write_bytes(seal({"starts": [{"layout": {"data": 1}}]}))
    from mpo_megatron.data.loader import step_indices

    for step in (1, 2):
        [index] = step_indices(step - 1, len(data), 1, seed=config.seed, shuffle=True).tolist()
        sight = look(InspectConfig(run=str(tmp_path), step=step))
        assert sight.groups[0].group_id == f"g{index}"
        best, worst = int(np.argmax(REWARDS[index])), int(np.argmin(REWARDS[index]))
        assert sorted(sight.row.responses[:, 1].tolist()) == sorted([best, worst])
        assert sight.left_out == tuple((0, k) for k in range(len(REWARDS[index])) if k not in (best, worst))
    text = shown(InspectConfig(run=str(tmp_path), step=1)) + shown(InspectConfig(run=str(tmp_path), step=2))
    assert "reward 0.25 · other (Y−) · in no row: the loss does not use it" in text.replace("\n", " ")
    assert "reward 2 · preferred (Y+)" in text
    later = dataclasses.replace(config, data=dataclasses.replace(config.data, first_step=5))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(later)))
    [index] = step_indices(1, len(data), 1, seed=config.seed, shuffle=True).tolist()
    assert look(InspectConfig(run=str(tmp_path), step=7)).groups[0].group_id == f"g{index}"
    with pytest.raises(ConfigError, match="starts after step 5"):
        look(InspectConfig(run=str(tmp_path), step=5))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(ConfigError, match="row = 7: replica 0 has 1 rows at step 1"):
        look(InspectConfig(run=str(tmp_path), row=7))
    with pytest.raises(ConfigError, match="replica = 3: the run has 1 model replicas"):
        look(InspectConfig(run=str(tmp_path), replica=3))


def test_what_is_not_there_is_said(data: PreparedGroups, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="but none with this id; the first id is g0"):
        look(InspectConfig(data=str(data.path), group="nobody", tokenizer=str(model)))
    with pytest.raises(ConfigError, match="does not record its tokenizer; set --tokenizer"):
        look(InspectConfig(data=str(data.path)))
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        look(InspectConfig(run=str(tmp_path)))
    with pytest.raises(ConfigError, match="name one thing to show"):
        InspectConfig()
    with pytest.raises(ConfigError, match="step applies to a run's rows only"):
        InspectConfig(data="d", step=2)
    with pytest.raises(ConfigError, match="group has no effect on a run's rows"):
        InspectConfig(run="r", group="1")
