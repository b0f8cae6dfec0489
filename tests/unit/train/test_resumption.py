"""What is refused before ranks are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mpo_megatron.config import ConfigError, DataConfig, ExpertsConfig, ModelConfig, TrainConfig
from mpo_megatron.train.checkpoints import course, resumption
from mpo_megatron.train.checkpoints.step_folders import DamagedError, RunState, step_folder, write_state


def setup(run: Path) -> Any:
    return Mock(folder=run, config=TrainConfig(output=str(run), model=ModelConfig(checkpoint="m"), data=DataConfig(train="t")))


def test_a_run_that_would_take_another_course_is_refused_by_its_newest_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "run_options", lambda *_: {"seed": 2})
    resumption.check_resumption(setup(tmp_path))  # nothing is there yet
    for step, seed in ((3, 1), (4, 2)):
        step_folder(tmp_path, step).mkdir(parents=True)
        write_state(step_folder(tmp_path, step), RunState(step=step, fixed={"seed": seed}), {})
    resumption.check_resumption(setup(tmp_path))
    write_state(step_folder(tmp_path, 4), RunState(step=4, fixed={"seed": 1}), {})
    with pytest.raises(ConfigError, match=r"step_00000004: it was trained with seed = 1, now it is 2; use the old value"):
        resumption.check_resumption(setup(tmp_path))
    (step_folder(tmp_path, 4) / "state.json").write_text("damaged")
    resumption.check_resumption(setup(tmp_path))  # the ranks take an older one, and say so


def test_of_digests_only_the_beginning_is_shown(tmp_path: Path) -> None:
    before, now = ({"reference model": digit * 64} for digit in "ab")
    with pytest.raises(ConfigError, match="with reference model = digest aaaaaaaa…, now it is digest bbbbbbbb…; use the old"):
        course.check_same_run(before, now, tmp_path)


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003.damaged").mkdir(parents=True)
    with pytest.raises(DamagedError, match=r"no checkpoint is complete; damaged: step_00000003\.damaged"):
        resumption.check_resumption(setup(tmp_path))


def test_routing_of_experts_belongs_to_a_runs_course_and_measuring_does_not(tmp_path: Path) -> None:
    def options(**experts: Any) -> dict[str, Any]:
        config = TrainConfig(
            output="run", model=ModelConfig(checkpoint="m"), data=DataConfig(train="t"), experts=ExpertsConfig(**experts)
        )
        return course.fixed_options(config, total_steps=1, data_digest="d", reference_digest="r", loss={"name": "mpo"})

    earlier = {name: value for name, value in options().items() if name != "experts"}
    for before, now in ((options(), options(measure_drift=True)), (earlier, options()), (options(z_coeff=0.1),) * 2):
        course.check_same_run(before, now, tmp_path)
    for before in (options(), earlier):
        with pytest.raises(ConfigError, match=r"trained with experts.routing = free, now it is replay"):
            course.check_same_run(before, options(routing="replay"), tmp_path)
    with pytest.raises(ConfigError, match=r"trained with experts.balance_coeff = 0.1, now it is 0.0"):
        course.check_same_run(options(balance_coeff=0.1), options(), tmp_path)


def test_frozen_weights_keep_their_format(tmp_path: Path) -> None:
    """Runs that knew no `lora.quantize` resume; another format is another model."""
    config = TrainConfig(output="run", model=ModelConfig(checkpoint="m"), data=DataConfig(train="t"))

    def options(**lora: Any) -> dict[str, Any]:
        shape = {"rank": 4, **lora}
        return course.fixed_options(config, total_steps=1, data_digest="d", reference_digest="r", loss={}, lora=shape)

    course.check_same_run(options(), options(quantize="none"), tmp_path)
    course.check_same_run(options(quantize="nf4"), options(quantize="nf4"), tmp_path)
    for before, now in ((options(quantize="nf4"), options(quantize="none")), (options(), options(quantize="nf4"))):
        with pytest.raises(ConfigError, match=r"lora\.quantize"):
            course.check_same_run(before, now, tmp_path)
