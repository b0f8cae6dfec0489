"""Options of the stages of `mpo align` and `mpo iterate` with invalid values: refused by name before anything starts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.align.align import align
from mpo_megatron.align.plan import build_rounds, build_stages
from mpo_megatron.config import AlignConfig, ConfigError, IterateConfig, from_dict
from mpo_megatron.config.names import options_of
from mpo_megatron.files import DataError
from mpo_megatron.rollout.rounds import check_rounds
from tests.tiny import save_model
from tests.unit.test_values import ANYTHING, wrong_values

ROUND_STAGES = tuple(IterateConfig.STAGE_TYPES)
STAGES = {"groups": ("prepare", "train", "generate"), "prompts": ("iterate", *ROUND_STAGES), "rounds": ROUND_STAGES}
"""What a command starts from → its sections; `rounds` is `mpo iterate`."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, groups and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "hf", num_hidden_layers=1, hidden_size=32)
    responses = [{"text": "yes", "reward": 1}, {"text": "no", "reward": 0}]
    rows = [{"prompt": f"Say {index}.", "responses": responses} for index in range(20)]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return folder


def required(command: str, inputs: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"output": str(inputs / "out"), "model": str(inputs / "hf")}
    if command == "groups":
        return {**options, "data": [str(inputs / "groups.jsonl")]}
    scorers = {"scorers": {"x": {"kind": "match"}}}
    return {**options, "prompts": str(inputs / "prompts.jsonl"), "score": scorers, "rounds": 1, "held_out": 2}


def check(command: str, options: dict[str, Any]) -> None:
    """All checks before the first stage."""
    if command == "rounds":
        check_rounds(from_dict(IterateConfig, options, "where"))
        return
    config = from_dict(AlignConfig, options, "where")
    if command == "groups":
        build_stages(config, Path(config.model))
    else:
        check_rounds(build_rounds(config, Path(config.model)))


def trials(command: str, inputs: Path, values_of: Callable[[Any], list[Any]]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The name of every option of every stage, a value, and the command's options with it."""
    for stage in STAGES[command]:
        for name, expected in options_of(AlignConfig.STAGE_TYPES[stage]).items():
            for value in values_of(expected):
                options = copy.deepcopy(required(command, inputs))
                section, parts = options, f"{stage}.{name}".split(".")
                for part in parts[:-1]:
                    section = section.setdefault(part, {})
                section[parts[-1]] = value
                yield f"{stage}.{name}", value, options


def assert_names(error: ConfigError | DataError, name: str) -> None:
    section = ".".join(name.split(".")[:2])  # some rules are about a whole section: generate.vllm.* is set, but …
    assert name.split(".")[-1] in str(error) or section in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("command", STAGES)
def test_a_wrong_value_is_refused_by_name(command: str, inputs: Path) -> None:
    """A few values of each option; test_values.py has all, and the same code checks both."""
    for name, value, options in trials(command, inputs, lambda expected: wrong_values(expected)[::4]):
        try:
            check(command, options)
        except ConfigError as error:
            assert_names(error, name)
        else:
            raise AssertionError(f"{command}: {name} took {value!r:.50}")
    assert not (inputs / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["groups", "prompts"])
def test_no_value_ends_in_another_error(command: str, inputs: Path) -> None:
    check(command, required(command, inputs))
    for name, _, options in trials(command, inputs, lambda _: ANYTHING[::2]):
        try:
            check(command, options)
        except (ConfigError, DataError) as error:
            assert_names(error, name)
    assert not (inputs / "out").exists()


def test_numbers_as_texts_count_as_numbers(inputs: Path) -> None:
    groups = required("groups", inputs)
    texts, numbers = (
        build_stages(
            from_dict(AlignConfig, {**groups, "train": {"lora": {"rank": rank}}}, "where"), inputs / "hf"
        ).train.optimizer
        for rank in ("0", 0)
    )
    assert texts.lr == numbers.lr


def test_what_answers_would_refuse_after_training_is_refused_at_once(inputs: Path) -> None:
    groups = required("groups", inputs) | {"generate": {"vllm": {"max_in_flight": 8}}}
    with pytest.raises(ConfigError, match=r"^generate\.vllm\.\* is set, but engine = transformers does not read it"):
        align(from_dict(AlignConfig, groups, "where"))
    check("groups", groups | {"answers": 0})  # nothing answers
