"""Users' functions, given in a configuration as `path/to/file.py:name` or `package.module:name`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from mpo_megatron.config import ConfigError

_LOADED: dict[tuple[Path, str], ModuleType] = {}
"""Imported user files, by path and digest."""


def load_function(function: str) -> tuple[Callable[..., Any], str]:
    """The function, and the source of its file ("" if it has none). An unchanged file is imported once.

    Raises:
        AttributeError: the module lacks the name.
        Exception: whatever the import raises.
    """
    place, _, name = function.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    source = Path(getattr(module, "__file__", None) or "")
    found: Callable[..., Any] = getattr(module, name)
    return found, importlib.util.decode_source(source.read_bytes()) if source.suffix == ".py" else ""


def find_function(option: str, function: str) -> Callable[..., Any]:
    """The function given by an option.

    Raises:
        ConfigError: no such file, module or function, or the import fails; names the option and the cause.
    """
    place, _, name = function.rpartition(":")
    where = f"{option} = {function}"
    source_digest(option, function)
    try:
        found, _ = load_function(function)
    except AttributeError as error:
        if getattr(error, "name", None) != name:
            raise ConfigError(f"{where}; importing it failed: AttributeError: {error}.") from error
        raise ConfigError(f"{where}; {place} has no function {name}; check its spelling.") from error
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ConfigError(f"{where}; importing it failed: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ConfigError(f"{where}; it is of type {type(found).__name__}, not a function; name a function.")
    return found


def source_digest(option: str, function: str) -> str:
    """Digest of the file with the function; imports nothing except a module's parent packages.

    Raises:
        ConfigError: the file does not exist.
    """
    place = function.rpartition(":")[0]
    path: str | None = place
    if not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (Exception, SystemExit) as error:  # importing runs the package's code
            raise ConfigError(f"{option} = {function}; {place} cannot be found: {type(error).__name__}: {error}.") from error
        path = None if spec is None else spec.origin
    if path is None or not Path(path).is_file():
        raise ConfigError(f"{option} = {function}; there is no file {place}; paths start where the command runs.")
    return _digest(Path(path))


def check_source(option: str, function: str) -> None:
    """Refuse a file that is missing, is not Python, imports a missing package, or does not name the function; does not run it.

    Raises:
        ConfigError: names the option and the cause.
    """
    source_digest(option, function)
    place, _, name = function.rpartition(":")
    if not place.endswith(".py"):
        return
    try:
        source = importlib.util.decode_source(Path(place).read_bytes())  # as Python does: byte-order mark, encoding in a comment
        tree = ast.parse(source, place)
        compile(tree, place, "exec")
    except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: another encoding, or null bytes
        raise ConfigError(f"{option} = {function}; {place} is not valid Python: {error}; fix it.") from error
    if name not in source and "import *" not in source:
        raise ConfigError(f"{option} = {function}; {place} has no function {name}; check its spelling.")
    if "sys.path" in source:  # where its imports are found shows only when it runs
        return
    for statement in tree.body:
        for package in _packages(statement):
            if _is_neighbour(package, Path(place).parent):
                return  # which may change sys.path, too
            if not _is_importable(package):
                where = f"{place}, line {statement.lineno}"
                raise ConfigError(f"{option} = {function}; {where}, imports {package}, which is not installed; install it.")


def _packages(statement: ast.stmt) -> list[str]:
    """The packages that a statement of a file imports, unless it is part of a condition, a `try` or a function."""
    if isinstance(statement, ast.Import):
        return [name.name.partition(".")[0] for name in statement.names]
    if isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
        return [statement.module.partition(".")[0]]
    return []


def _is_neighbour(package: str, folder: Path) -> bool:
    """Whether a file in the folder imports a neighbour by this name, of Python or compiled."""
    return package not in sys.stdlib_module_names and PathFinder.find_spec(package, [str(folder)]) is not None


def _is_importable(package: str) -> bool:
    """Whether a package is installed; imports nothing."""
    if package in sys.modules:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, which something else has put there
        return True


def _load_file(path: Path) -> ModuleType:
    digest, folder = _digest(path), str(path.parent.resolve())
    if (path.resolve(), digest) in _LOADED:
        return _LOADED[path.resolve(), digest]
    name = path.stem
    if name in sys.modules or not name.isidentifier() or importlib.util.find_spec(name) is not None:
        name = f"{name.replace('.', '_')}_{digest}"  # imports of the file may need another module of this name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module
    if folder not in sys.path:
        sys.path.append(folder)  # the file can import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _LOADED[path.resolve(), digest] = module
    return module


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
