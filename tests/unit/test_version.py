"""One version: the package's, setup.py's, the citation's, and the newest release of the changelog."""

from __future__ import annotations

import re
from pathlib import Path

import mpo_megatron

ROOT = Path(__file__).parents[2]


def read(name: str, pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)


def test_versions_agree() -> None:
    releases = read("CHANGELOG.md", r"^## (\d+\.\d+\.\d+) – (\d{4}-\d\d-\d\d)$")
    assert releases == sorted(releases, reverse=True)
    (newest, date), *_ = releases
    assert read("setup.py", r'^ +version="([^"]+)",$') == [newest]
    assert read("CITATION.cff", r"^version: (.+)$") == [newest]
    assert read("CITATION.cff", r"^date-released: (.+)$") == [date]
    assert mpo_megatron.__version__ == newest
