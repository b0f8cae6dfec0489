"""Whether a package still has the names that we read of it: its sources are parsed, not imported, from a folder or a wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOWNLOAD_SECONDS = 600
"""Most that pip takes."""


@dataclass(frozen=True)
class Name:
    """A function, class, method or field, with the parameters that are passed by name."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


def missing(root: Path, names: Iterable[Name]) -> list[str]:
    """What of the names the package in a folder lacks, a line each."""
    wanting = []
    for each in names:
        found = find_definition(root, each.module, each.name)
        if found is None:
            wanting.append(f"{each.module}.{each.name}: no such name")
        elif absent := [name for name in each.parameters if name not in parameter_names(found)]:
            wanting.append(f"{each.module}.{each.name}: no parameter {', '.join(absent)}")
    return wanting


def find_definition(root: Path, module: str, name: str) -> ast.stmt | None:
    """The statement that defines `name`, or `Class.member`, in a module or in one that it imports it from."""
    path = root.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    outer, _, member = name.partition(".")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == outer:
            return node if not member else find_member(node, member)
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == outer for alias in node.names):
            source = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level + path.is_dir() or None]
                source = ".".join([*parents, source] if source else parents)
            found = find_definition(root, source, name)
            if found is not None:
                return found
    return None


def find_member(node: ast.stmt, name: str) -> ast.stmt | None:
    """A method or annotated field of a class."""
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.FunctionDef) and child.name == name:
            return child
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name) and child.target.id == name:
            return child
    return None


def parameter_names(node: ast.stmt) -> set[str]:
    """Parameters of a function, or of a class's constructor."""
    if isinstance(node, ast.ClassDef):
        constructor = find_member(node, "__init__")
        return set() if constructor is None else parameter_names(constructor)
    if not isinstance(node, ast.FunctionDef):
        return set()
    return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def download(project: str, version: str, folder: Path) -> Path:
    """Unpack the Python of a wheel into a folder.

    Raises:
        OSError: pip cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary"]
    command += [":all:", "--dest", str(folder), f"{project}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS)
    if done.returncode:
        raise OSError(f"{project}=={version}: pip cannot download it: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob(f"{project.replace('-', '_')}-*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    return folder


def check(project: str, chosen: Sequence[str], missing_names: Callable[[Path], list[str]], whole: str) -> int:
    """Check each folder or version, and print a line for it; 1 if anything is missing.

    Args:
        chosen: folders that have the package, and versions to download
        missing_names: what the package in a folder lacks
        whole: what is said of one that lacks nothing
    """
    code = 0
    for each in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                is_folder = Path(each, project.replace("-", "_")).is_dir()
                root = Path(each) if is_folder else download(project, each, Path(scratch))
            except OSError as error:
                print(error, file=sys.stderr)
                return 1
            wanting = missing_names(root)
        print(f"{project} {each}: " + ("; ".join(wanting) or whole))
        code |= bool(wanting)
    return code
