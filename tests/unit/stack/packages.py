"""Fake packages, with metadata and modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


def install(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    module: str | None = None,
    source: str = "",
    requires: tuple[str, ...] = (),
    library: bytes | None = None,
) -> None:
    """Write a distribution into a folder, with a module of this source and a shared library of this content."""
    record = []
    if module is not None:
        *parents, last = module.split(".")
        place = folder.joinpath(*parents)
        place.mkdir(parents=True, exist_ok=True)
        for depth in range(len(parents)):
            folder.joinpath(*parents[: depth + 1], "__init__.py").touch()
        (place / f"{last}.py").write_text(source)
    if library is not None:
        (folder / f"{name}.so").write_bytes(library)
        record.append(f"{name}.so,,")
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    (information / "RECORD").write_text("".join(f"{line}\n" for line in record))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched first; its imports are forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]
    importlib.invalidate_caches()
