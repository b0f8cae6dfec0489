from __future__ import annotations

import dataclasses
import json
import pickle
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.store import BATCH_GROUPS, PreparedInfo, load_groups, read_info
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import seal
from tests.unit.data.conftest import digest_of


def make_groups(count: int, *, labels: bool = False, rewards: bool = True, masks: bool = False) -> list[TokenizedGroup]:
    draw = np.random.default_rng(count)
    groups = []
    for index in range(count):
        size = int(draw.integers(2, 6))
        lengths = draw.integers(1, 7, size)
        scored = tuple(np.arange(length) % 2 == 0 for length in lengths) if masks and index % 3 else None
        groups.append(
            TokenizedGroup(
                group_id=f"group-{index}",
                prompt_tokens=draw.integers(0, 99, draw.integers(1, 9)).astype(np.int32),
                response_tokens=tuple(draw.integers(0, 99, length).astype(np.int32) for length in lengths),
                scored=scored,
                rewards=draw.normal(size=size) if rewards else None,
                labels=draw.integers(0, 2, size).astype(np.int8) if labels else None,
                prompt_text=f"prompt {index}",
                response_texts=tuple(f"answer {index} {k}" for k in range(size)),
                where=f"rows.jsonl:{index + 1}",
            )
        )
    return groups


def write(folder: Path, groups: list[TokenizedGroup], **changes: Any) -> PreparedInfo:
    fields = {"tokenizer_digest": "abc", "vocab_size": 100, "end_token_ids": [7], "reward_kind": "scores"} | changes
    return write_groups(folder, groups, **fields)


@pytest.mark.parametrize(("labels", "masks"), [(False, False), (True, False), (False, True)])
def test_what_is_read_is_what_was_written(tmp_path: Path, labels: bool, masks: bool) -> None:
    groups = make_groups(BATCH_GROUPS + 3, labels=labels, masks=masks)  # two record batches
    info = write(tmp_path / "out", groups)
    stored = load_groups(tmp_path / "out")
    assert stored.info == info
    assert len(stored) == len(groups) == info.num_groups
    for got, wanted in zip(stored, groups, strict=True):
        assert got.prompt_tokens.dtype == np.int32
        for field in dataclasses.fields(TokenizedGroup):
            left, right = getattr(got, field.name), getattr(wanted, field.name)
            if field.name in ("response_tokens", "scored") and right is not None:
                assert [item.tolist() for item in left] == [item.tolist() for item in right]
            else:
                np.testing.assert_array_equal(left, right)


def test_masks_enter_the_digest_and_leave_a_token_to_score(tmp_path: Path) -> None:
    plain, masked = make_groups(5), make_groups(5, masks=True)
    assert write(tmp_path / "plain", plain).data_digest != write(tmp_path / "masked", masked).data_digest
    assert digest_of(load_groups(tmp_path / "masked")) == load_groups(tmp_path / "masked").info.data_digest
    nothing = dataclasses.replace(plain[0], scored=tuple(np.zeros(len(ids), bool) for ids in plain[0].response_tokens))
    with pytest.raises(DataError, match="group group-0: one of its responses has no scored token"):
        write(tmp_path / "nothing", [nothing])


def test_lengths_come_without_tokens(tmp_path: Path) -> None:
    groups = make_groups(300)
    info = write(tmp_path / "out", groups)
    stored = load_groups(tmp_path / "out")
    offsets = stored.response_offsets()
    for index in (0, 7, 255, 256, 299):
        wanted = [len(tokens) for tokens in groups[index].response_tokens]
        assert stored.response_lengths(index).tolist() == wanted
        assert stored.all_response_lengths()[offsets[index] : offsets[index + 1]].tolist() == wanted
        assert stored.all_rewards()[offsets[index] : offsets[index + 1]].tolist() == groups[index].rewards.tolist()
        assert stored.text(index) == (groups[index].prompt_text, groups[index].response_texts)
    assert stored.prompt_lengths().tolist() == [len(group.prompt_tokens) for group in groups]
    assert stored.num_responses().tolist() == [group.num_responses for group in groups]
    totals = [len(group.prompt_tokens) + sum(map(len, group.response_tokens)) for group in groups]
    assert info.max_group_tokens == max(totals)
    assert info.num_prompt_tokens + info.num_response_tokens == sum(totals)
    with pytest.raises(IndexError, match="group 300 of 300"):
        stored[300]


def test_another_process_opens_its_own_map(tmp_path: Path) -> None:
    groups = make_groups(4)
    write(tmp_path / "out", groups)
    copy = pickle.loads(pickle.dumps(load_groups(tmp_path / "out")))
    assert copy[3].group_id == "group-3"
    assert copy.info.num_groups == 4


def test_digest_covers_ids_tokens_rewards_and_labels(tmp_path: Path) -> None:
    group = make_groups(1, labels=True)[0]
    changes: list[dict[str, Any]] = [
        {},
        {"group_id": "other"},
        {"prompt_tokens": group.prompt_tokens + 1},
        {"response_tokens": tuple(tokens + 1 for tokens in group.response_tokens)},
        {"rewards": group.rewards + 1e-12},
        {"labels": 1 - group.labels},
    ]
    digests = set()
    for number, change in enumerate(changes):
        info = write(tmp_path / str(number), [dataclasses.replace(group, **change)])
        assert digest_of(load_groups(tmp_path / str(number))) == info.data_digest
        digests.add(info.data_digest)
    assert len(digests) == len(changes)
    text_only = dataclasses.replace(group, prompt_text="", where="elsewhere:1")
    assert write(tmp_path / "text", [text_only]).data_digest in digests


def test_labels_only(tmp_path: Path) -> None:
    write(tmp_path / "out", make_groups(3, labels=True, rewards=False), reward_kind="labels")
    stored = load_groups(tmp_path / "out")
    assert stored.all_rewards() is None
    assert stored.rewards(0) is None
    assert stored[0].rewards is None
    assert stored.info.has_labels
    assert stored.all_labels() is not None


def test_rewards_for_some_groups_only_are_refused(tmp_path: Path) -> None:
    groups = [*make_groups(1), *make_groups(1, rewards=False)]
    with pytest.raises(DataError, match="some groups have rewards or labels, and others do not"):
        write(tmp_path / "out", groups)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", make_groups(2))
    with pytest.raises(DataError, match="not an empty folder"):
        write(tmp_path / "out", make_groups(2))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", make_groups(2))
    assert len(load_groups(tmp_path / "empty")) == 2
    with pytest.raises(DataError, match="no groups to write"):
        write(tmp_path / "none", [])


def test_a_link_to_an_empty_folder_or_to_none_yet_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("disk", "not there yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / name)
        write(link, make_groups(3))
        assert link.is_symlink()
        assert len(load_groups(tmp_path / name)) == 3


def test_a_mounted_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(DataError, match=r"disk: it is a mount point; name a folder in it"):
        write(tmp_path / "disk", iter(lambda: pytest.fail("groups were read"), None))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a real write error: no file may grow beyond 4 KiB
    try:
        with pytest.raises(DataError, match=r"cannot write: .*; no partial output remains; free space"):
            write(tmp_path / "out", make_groups(500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(DataError, match=r"no prepared groups there \(prepare.json is missing\)"):
        load_groups(folder)
    write(folder, make_groups(3))
    arrow, info = folder / "groups.arrow", folder / "prepare.json"
    whole, fields = arrow.read_bytes(), json.loads(info.read_text())

    arrow.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=rf"{len(whole) - 100} bytes, but prepare.json lists {len(whole)}"):
        load_groups(folder)
    arrow.write_bytes(b"x" * len(whole))
    with pytest.raises(DataError, match=r"groups.arrow: damaged"):
        load_groups(folder)
    arrow.unlink()
    with pytest.raises(DataError, match=r"groups.arrow: missing"):
        load_groups(folder)
    arrow.write_bytes(whole)
    (folder / "groups.pieces").unlink()
    with pytest.raises(DataError, match=r"groups.pieces: damaged or missing"):
        load_groups(folder)
    info.write_text(json.dumps(fields | {"num_groups": 4}))
    with pytest.raises(DataError, match=r"prepare.json: damaged or changed: its digest does not match; .* prepare it again"):
        load_groups(folder)
    info.write_text(json.dumps({name: value for name, value in fields.items() if name != "digest"}))
    with pytest.raises(DataError, match=r"prepare.json: damaged, or written by an earlier version"):
        load_groups(folder)
    info.write_bytes(seal({name: value for name, value in fields.items() if name != "digest"} | {"format_version": 99}))
    with pytest.raises(DataError, match="format_version = 99"):
        read_info(folder)
    info.write_text("{")
    with pytest.raises(DataError, match=r"prepare.json: damaged"):
        read_info(folder)


def test_any_damage_is_found_before_it_is_used(tmp_path: Path) -> None:
    """Flipped bits and zeroed blocks in all three files: everything read is as written, or refused."""
    folder, draw = tmp_path / "out", random.Random(0)
    write(folder, make_groups(BATCH_GROUPS + 9, labels=True))
    for name in ("groups.arrow", "groups.pieces", "prepare.json"):
        whole = (folder / name).read_bytes()
        for trial in range(60):
            changed, place = bytearray(whole), draw.randrange(len(whole))
            if trial % 3:
                changed[place] ^= 1 << draw.randrange(8)
            else:
                changed[place : place + 64] = bytes(len(changed[place : place + 64]))
            if changed == whole:
                continue
            (folder / name).write_bytes(changed)
            with pytest.raises(DataError, match=rf"{name}: damaged"):
                list(load_groups(folder))
        (folder / name).write_bytes(whole)
    assert len(list(load_groups(folder))) == BATCH_GROUPS + 9


def test_a_plan_reads_no_tokens_and_training_no_other_batch(tmp_path: Path) -> None:
    """A damaged piece does not affect the others."""
    folder = tmp_path / "out"
    groups = make_groups(BATCH_GROUPS + 9)
    write(folder, groups)
    whole = (folder / "groups.arrow").read_bytes()
    place = whole.rindex(b"answer 3 0")  # a text of the first batch
    (folder / "groups.arrow").write_bytes(whole[:place] + b"A" + whole[place + 1 :])
    stored = load_groups(folder)
    assert stored.response_lengths(3).tolist() == [len(tokens) for tokens in groups[3].response_tokens]
    assert stored.all_rewards() is not None
    assert stored[BATCH_GROUPS].group_id == f"group-{BATCH_GROUPS}"
    with pytest.raises(DataError, match=r"groups.arrow: damaged: bytes [\d,]+ to [\d,]+ differ from"):
        stored[0]


@pytest.mark.parametrize("responses", [(), (np.array([1, 2], np.int32), np.zeros(0, np.int32))])
def test_responses_without_tokens_are_refused(tmp_path: Path, responses: tuple[np.ndarray, ...]) -> None:
    (group,) = make_groups(1)
    group = dataclasses.replace(group, response_tokens=responses, rewards=np.zeros(len(responses)))
    with pytest.raises(DataError, match=r"rows.jsonl:1: group .* it has no responses, or one without tokens"):
        write(tmp_path / "out", [group])
