"""Links from the documentation to other files of the repository (`../examples/…`) work on the site, too: the files go along."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
COPIES = "repository"
"""Folder of the site that holds files from outside `docs`."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add every file outside `docs` that a page links to."""
    docs = Path(config.docs_dir)
    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            target = outside_docs(docs, page.src_uri, match["path"])
            if target is not None and files.get_file_from_path(copy_name(docs, target)) is None:
                files.append(File.generated(config, copy_name(docs, target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Point links that leave `docs` at the copies."""
    docs = Path(config.docs_dir)

    def rewrite(match: re.Match[str]) -> str:
        target = outside_docs(docs, page.file.src_uri, match["path"])
        if target is None:
            return match[0]
        return posixpath.relpath(copy_name(docs, target), posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewrite, markdown)


def outside_docs(docs: Path, page: str, link: str) -> Path | None:
    """The file of the repository that a link means (a folder's README), or None if it stays in `docs`.

    Raises:
        PluginError: there is no such file.
    """
    target = (docs / page).parent.joinpath(link).resolve()
    if target.is_relative_to(docs):
        return None
    if target.is_dir():
        target = target / "README.md"
    if not target.is_file():
        raise PluginError(f"docs/{page} links to {link}: there is no {target.relative_to(docs.parent)}")
    return target


def copy_name(docs: Path, target: Path) -> str:
    """Path of a file's copy on the site; Markdown is shown as text."""
    name = target.relative_to(docs.parent).as_posix()
    return f"{COPIES}/{name}.txt" if name.endswith(".md") else f"{COPIES}/{name}"
