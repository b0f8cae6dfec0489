"""Checkpoint folders: damage is found to the byte and named, the right ones are kept, a killed removal or save hides nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import CheckpointConfig, ConfigError
from mpo_megatron.files.digests import DamagedError, digest_file, seal_sorted
from mpo_megatron.hf.identity import weights_digest
from mpo_megatron.train.checkpoints import step_folders
from mpo_megatron.train.checkpoints.step_folders import (
    RunState,
    appear,
    best_steps,
    check_files,
    complete_steps,
    damaged_steps,
    mark_damaged,
    read_state,
    remove_leftovers,
    remove_old,
    require_space,
    set_run_aside,
    step_folder,
    write_state,
)

SIZES = {"megatron/__0_0.distcp": 5000, "megatron/__1_0.distcp": 1, "megatron/.metadata": 300, "hf/config.json": 40, "empty": 0}


def state(step: int, **held_out: float) -> RunState:
    return RunState(
        step=step,
        fixed={"seed": 1, "optimizer": {"lr": 5e-7}},
        held_out={f"eval/{name}": value for name, value in held_out.items()},
        recent_losses=[0.1, 1 / 3, 2e-17],
    )


def write_step(run: Path, step: int, **held_out: float) -> Path:
    """A step's folder with files of random bytes, as a save leaves it."""
    folder = step_folder(run, step)
    rng = random.Random(step)
    for name, size in SIZES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    write_state(folder, state(step, **held_out), {name: digest_file(folder / name) for name in SIZES})
    return folder


def test_a_whole_checkpoint_passes_and_gives_back_its_state(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 3, accuracy=0.7)
    check_files(folder)
    saved, files = read_state(folder)
    assert saved == state(3, accuracy=0.7)
    assert files["megatron/__0_0.distcp"][0] == 5000
    assert complete_steps(tmp_path) == [folder]


@pytest.mark.parametrize("seed", range(4))
def test_any_truncation_and_any_changed_byte_is_found_and_named(tmp_path: Path, seed: int) -> None:
    """A property over all files (state.json included), random offsets, and for the small files every offset."""
    whole = write_step(tmp_path / "whole", 3, accuracy=0.7)
    rng = random.Random(seed)
    names = [*SIZES, "state.json"]
    for _ in range(150):
        name = rng.choice([name for name in names if name != "empty"])
        path = whole / name
        original = path.read_bytes()
        offset = rng.randrange(len(original))
        kind = rng.choice(["truncate", "flip", "extend", "remove"])
        if kind == "truncate":
            path.write_bytes(original[:offset])
        elif kind == "flip":
            changed = original[offset] ^ rng.randrange(1, 256)
            path.write_bytes(original[:offset] + bytes([changed]) + original[offset + 1 :])
        elif kind == "extend":
            path.write_bytes(original + rng.randbytes(1))
        else:
            path.unlink()
        with pytest.raises(DamagedError) as error:
            check_files(whole)
        assert str(path) in str(error.value), kind
        path.write_bytes(original)
    check_files(whole)


def test_every_byte_of_the_state_counts(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 3, accuracy=0.7)
    path = folder / "state.json"
    original = path.read_bytes()
    for offset in range(len(original)):
        for bits in (1, 7, 0x20):  # 7 turns a line feed into a carriage return
            path.write_bytes(original[:offset] + bytes([original[offset] ^ bits]) + original[offset + 1 :])
            with pytest.raises(DamagedError, match=r"state\.json"):
                read_state(folder)
        path.write_bytes(original[:offset])
        with pytest.raises(DamagedError, match=r"state\.json"):
            read_state(folder)


def test_ranks_share_the_work_and_miss_no_file(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 3)
    for name in SIZES:
        (folder / name).unlink()
        found = []
        for part in range(3):
            try:
                check_files(folder, part=part, parts=3)
            except DamagedError as error:
                found.append(str(error))
        assert len(found) == 1
        assert name in found[0]
        write_step(tmp_path, 3)


def test_a_state_that_was_deleted_is_damage_and_not_the_end_of_a_run(tmp_path: Path) -> None:
    """The folder had its name, so it was complete once: passing it over would start the run anew, silently."""
    folder = write_step(tmp_path, 3)
    (folder / "state.json").unlink()
    assert complete_steps(tmp_path) == [folder]
    with pytest.raises(DamagedError, match=r"state\.json: no such file, but it was written with this checkpoint"):
        check_files(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"format": None}, {"format": 2, "ranks": 8}])
def test_a_checkpoint_of_another_version_is_refused_and_not_taken_for_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_step(tmp_path, 3)
    content = {**json.loads((folder / "state.json").read_text()), **change}
    del content["digest"]
    (folder / "state.json").write_bytes(seal_sorted(content))
    with pytest.raises(
        ConfigError, match=rf"state\.json: has format {change['format']}, .* reads format 1; use the version that wrote it"
    ) as error:
        check_files(folder)
    assert not isinstance(error.value, DamagedError)


def test_files_of_two_steps_that_were_swapped_are_found(tmp_path: Path) -> None:
    first, second = write_step(tmp_path, 1), write_step(tmp_path, 2)
    for name in ("megatron/__0_0.distcp", "state.json"):
        (first / name).rename(tmp_path / "kept")
        (second / name).rename(first / name)
        (tmp_path / "kept").rename(second / name)
        for folder in (first, second):
            with pytest.raises(DamagedError, match="its content differs from what was written"):
                check_files(folder)
        (first / name).rename(tmp_path / "kept")
        (second / name).rename(first / name)
        (tmp_path / "kept").rename(second / name)
        check_files(first)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    accuracies = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.9, 6: 0.4}
    for step in range(1, 8):
        held_out = {"accuracy": accuracies[step]} if step in accuracies else {}
        write_step(tmp_path, step, **held_out)
    config = CheckpointConfig(keep=2, keep_best=2)
    assert best_steps(complete_steps(tmp_path), config) == [step_folder(tmp_path, 4), step_folder(tmp_path, 2)]
    remove_old(tmp_path, config)
    assert complete_steps(tmp_path) == [step_folder(tmp_path, step) for step in (2, 4, 6, 7)]
    remove_old(tmp_path, CheckpointConfig(keep=1, keep_best=1, best_is="smallest"))
    assert complete_steps(tmp_path) == [step_folder(tmp_path, step) for step in (6, 7)]
    remove_old(tmp_path, CheckpointConfig(keep=1))
    assert complete_steps(tmp_path) == [step_folder(tmp_path, 7)]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000007"]


def test_a_best_metric_that_is_not_a_number_is_none(tmp_path: Path) -> None:
    write_step(tmp_path, 1, accuracy=0.1)
    write_step(tmp_path, 2, accuracy=float("nan"))
    assert best_steps(complete_steps(tmp_path), CheckpointConfig(keep_best=2)) == [step_folder(tmp_path, 1)]


def test_only_the_plain_name_counts(tmp_path: Path) -> None:
    whole = write_step(tmp_path, 5)
    for suffix in (".partial-0badcafe", ".removing", ".damaged", ".removing-2"):
        shutil.copytree(whole, step_folder(tmp_path, 9).with_name(f"step_00000009{suffix}"))
    step_folder(tmp_path, 8).with_name("step_8").mkdir()
    step_folder(tmp_path, 7).touch()
    assert complete_steps(tmp_path) == [whole]
    remove_leftovers(tmp_path)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000005", "step_00000007", "step_00000009.damaged", "step_8"]
    assert damaged_steps(tmp_path) == ["step_00000009.damaged"]


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write_step(tmp_path, step)

    def killed(path: Path) -> None:
        next(path.rglob("*.distcp")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(step_folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, CheckpointConfig(keep=1))
    assert complete_steps(tmp_path) == [step_folder(tmp_path, 2)]


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    old = write_step(tmp_path, 4, accuracy=0.1)
    partial = write_step(tmp_path / "other", 4, accuracy=0.2)
    appear(partial, old)
    assert read_state(old)[0].held_out == {"eval/accuracy": 0.2}
    check_files(old)
    assert not partial.exists()


def test_damaged_and_earlier_checkpoints_are_moved_not_deleted(tmp_path: Path) -> None:
    first = mark_damaged(write_step(tmp_path, 4))
    second = mark_damaged(write_step(tmp_path, 4))
    assert {first.name, second.name} == {"step_00000004.damaged", "step_00000004.damaged-2"}
    check_files(first)
    aside = set_run_aside(tmp_path)
    assert aside == tmp_path / "checkpoints.before"
    assert (aside / "step_00000004.damaged" / "state.json").is_file()
    assert set_run_aside(tmp_path) is None


def test_what_an_earlier_run_wrote_down_goes_with_its_checkpoints(tmp_path: Path) -> None:
    """Else a new run would write over its curves, and go on under its id in the services that have these steps already."""
    write_step(tmp_path, 4)
    records = ("metrics.jsonl", "run.json", "wandb_run_id", "groups/step_00000004.parquet")
    for name in (*records, ".lock", "groups/groups.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    aside = set_run_aside(tmp_path)
    assert aside is not None
    assert [(aside / name).read_text() for name in records] == list(records)
    assert {path.name for path in tmp_path.iterdir()} == {aside.name, ".lock", "groups"}
    assert (tmp_path / "groups" / "groups.arrow").is_file()  # the run may lie beside its data


def test_too_little_space_is_refused_with_numbers(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1, "the checkpoint step_00000001")
    with pytest.raises(ConfigError, match=r"step_00000001 needs 1,000,000,000\.000 GB, .* are free"):
        require_space(tmp_path, 10**18, "the checkpoint step_00000001")


def test_steps_of_a_run_are_models_of_their_own(tmp_path: Path) -> None:
    """Log-probs of one step are never taken for those of another, or of the model that the run began with."""
    first, second = write_step(tmp_path, 1), write_step(tmp_path, 2)
    again = write_step(tmp_path / "again", 1, accuracy=0.9)
    assert weights_digest(first) != weights_digest(second)
    assert weights_digest(first) == weights_digest(again)
