"""The folder that a conversion is written to."""

from __future__ import annotations

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


def test_a_mounted_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ConfigError, match=r"disk; a disk is mounted there, .* name a folder in it"), staged(tmp_path / "disk", 1):
        pytest.fail("something was converted")
