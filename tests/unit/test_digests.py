"""Everything written with a digest is verified on reading: every changed byte is found, or has no effect on the content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, GenerateConfig, load_yaml, to_dict
from mpo_megatron.config.sealed import seal_yaml
from mpo_megatron.files import digests
from mpo_megatron.files.digests import DamagedError

CONTENT: dict[str, Any] = {"b": [1, 2.5, None, "ü\u2028"], "a": {"9": 1, "10": True}, "long": "x" * 50}


def damage(whole: bytes) -> list[bytes]:
    """Every byte changed in three ways, truncated there, and zeroed from there on."""
    flips = [
        whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :] for place in range(len(whole)) for bits in (1, 7, 0x20)
    ]
    blocks = [whole[:place] + bytes(len(whole[place : place + 16])) + whole[place + 16 :] for place in range(len(whole))]
    return [*flips, *blocks, *(whole[:place] for place in range(len(whole)))]


@pytest.mark.parametrize("seal", [digests.seal, digests.seal_sorted])
def test_every_byte_of_sealed_json_counts(tmp_path: Path, seal: Callable[[Any], bytes]) -> None:
    path, whole = tmp_path / "sealed.json", seal(CONTENT)
    path.write_bytes(whole)
    assert digests.unseal(path) == CONTENT
    for changed in damage(whole):
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"sealed\.json: damaged.*; remove it\.$"):
            digests.unseal(path, "remove it")


def test_a_line_is_what_was_written_or_refused() -> None:
    line = digests.seal_line(CONTENT)
    assert digests.unseal_line(line) == CONTENT
    for changed in damage(line[:-1]):
        with pytest.raises(ValueError, match=r"."):
            digests.unseal_line(changed)
    rewritten = json.dumps(dict(reversed(json.loads(line).items())), separators=(",", ":")).encode()
    assert digests.unseal_line(rewritten) == CONTENT
    with pytest.raises(ValueError, match="it has no digest"):
        digests.unseal_line(b"{}", sealed=True)


def test_lines_written_at_once_are_all_there_or_refused(tmp_path: Path) -> None:
    path, records = tmp_path / "lines.jsonl", [{"a": 1}, {"a": float("inf")}]
    whole = b"".join(digests.seal_lines(records))
    path.write_bytes(whole)
    assert digests.unseal_lines(path, "remove it") == records
    for changed in damage(whole):
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match=r"lines\.jsonl.* damaged.*; remove it\.$"):
            digests.unseal_lines(path, "remove it")


def test_a_saved_configuration_is_what_was_saved_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = GenerateConfig(prompts="p.jsonl", model="model", output="out", seed=3)
    whole = seal_yaml(to_dict(config))
    path.write_bytes(whole)
    assert load_yaml(GenerateConfig, path) == config
    first = whole.index(b"\n") + 1
    for place in [*range(1, first), *range(first, len(whole), 97)]:
        for changed in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(changed)
            assert_same_or_refused(path, config)
    path.write_bytes(whole.replace(b"seed: 3", b"seed: 4"))
    with pytest.raises(ConfigError, match=r"config\.yaml: damaged or changed: .* if you changed it yourself, remove that line"):
        load_yaml(GenerateConfig, path)
    path.write_bytes(path.read_bytes()[first:])
    assert load_yaml(GenerateConfig, path).seed == 4


def assert_same_or_refused(path: Path, config: GenerateConfig) -> None:
    try:
        found = load_yaml(GenerateConfig, path)
    except ConfigError:
        return
    assert found == config


def test_pieces_are_shared_and_all_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "PIECE", 100)
    (tmp_path / "hf").mkdir()
    (tmp_path / "weights.distcp").write_bytes(bytes(range(250)))
    (tmp_path / "hf" / "config.json").write_bytes(b"{}")
    (tmp_path / "empty").touch()
    digests.write_list(tmp_path)
    files = digests.require_list(tmp_path)
    assert {name: len(pieces) for name, (_, pieces) in files.items()} == {"weights.distcp": 3, "hf/config.json": 1, "empty": 1}
    for place, part_of_it in ((0, 0), (100, 1), (249, 2)):
        changed = bytearray(range(250))
        changed[place] ^= 4
        (tmp_path / "weights.distcp").write_bytes(changed)
        found = []
        for part in range(5):
            try:
                digests.check_pieces(tmp_path, files, part=part, parts=5)
            except DamagedError as error:
                found.append((part, str(error)))
        [(part, message)] = found
        assert part == part_of_it
        assert f"(the digest of {100 * part} to" in message
    digests.check_folder(tmp_path, weights=False)
    digests.check_file(tmp_path / "hf" / "config.json")
    (tmp_path / "hf" / "config.json").write_bytes(b"[]")
    for check in (digests.check_file, lambda path: digests.check_folder(path.parent, weights=False)):
        with pytest.raises(DamagedError, match=r"config\.json: its content differs from what was written"):
            check(tmp_path / "hf" / "config.json")


def test_what_is_not_listed_passes(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("somebody else's")
    (tmp_path / "config.json").write_text("{}")
    digests.check_file(tmp_path / "config.json")
    digests.check_folder(tmp_path, weights=True)
    with pytest.raises(DamagedError, match="has no digests"):
        digests.require_list(tmp_path)


def test_a_digest_in_a_name(tmp_path: Path) -> None:
    path = tmp_path / digests.name_digest("part-1", b"numbers", ".parquet")
    path.write_bytes(b"numbers")
    assert digests.read_named(path) == b"numbers"
    path.write_bytes(b"numberz")
    with pytest.raises(DamagedError, match=r"part-1\..*\.parquet: damaged: its digest is not the one in its name; remove it"):
        digests.read_named(path)


def test_half_a_line_is_told_from_a_damaged_one() -> None:
    line = digests.seal_line(CONTENT)
    assert all(digests.is_unfinished(line[:place]) for place in range(len(line)))
    assert not digests.is_unfinished(line[:-1] + b"\x0b")
    assert not digests.is_unfinished(line[:40] + bytes(len(line) - 40))


def test_a_list_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mpo_digests.json").write_bytes(digests.seal({"files": {"a": "no size"}}))
    with pytest.raises(digests.DamagedError, match=r"mpo_digests\.json: another version wrote it"):
        digests.read_list(tmp_path)


def test_half_of_a_surrogate_pair_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(digests.seal({"name": "a"}).replace(b'"a"', b'"\\ud800"'))
    with pytest.raises(DamagedError, match=r"state.json: damaged or changed"):
        digests.unseal(path)
