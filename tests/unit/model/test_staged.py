"""The output folder of a conversion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpo_megatron.config import ConfigError
from mpo_megatron.model.convert_folder import staged


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    with staged(link, 1) as folder:
        (folder / "weights").write_text("1")
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["weights"]
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a machine that crashes may leave an incomplete folder that looks complete."""
    forced: list[int] = []
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in [source, *source.rglob("*")]} <= set(forced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", watched)
    with staged(tmp_path / "output", 1) as folder:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")
    assert (tmp_path / "output" / "hf" / "config.json").is_file()
    assert tmp_path.stat().st_ino in forced


def test_a_mounted_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"disk; it is a mount point; name a folder in it"), staged(tmp_path / "disk", 1):
        pytest.fail("something was converted")
