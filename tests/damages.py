"""Damage to files: bytes of any file, and values of JSON and YAML."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**400, 1e308, -1e308, float("nan"), float("inf"), 1e-320),
    *("", " ", "\ud800", "\x1b[31m", "9" * 5000, "..", "\0", [], {}, [None], {"a": {}}),
)
"""Values that a file's author did not mean."""


def damaged(path: Path, seed: int) -> bytes:
    """The file's content with one damage, chosen by the seed."""
    rng, whole = random.Random(f"{path.name} {seed}"), path.read_bytes()
    while (changed := _change(path, whole, rng)) == whole:
        pass
    return changed


def _change(path: Path, whole: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3 or path.suffix not in (".json", ".jsonl", ".yaml", ".safetensors"):
        return _change_bytes(whole, rng)
    if path.suffix == ".safetensors":  # a length, a JSON header, and the tensors
        end = 8 + int.from_bytes(whole[:8], "little")
        header = _encode(_change_value(json.loads(whole[8:end]), rng))
        return len(header).to_bytes(8, "little") + header + whole[end:]
    if path.suffix == ".yaml":
        return yaml.safe_dump(_change_value(yaml.safe_load(whole), rng), sort_keys=False).encode(errors="surrogatepass")
    if path.suffix == ".json":
        return _encode(_change_value(json.loads(whole), rng))
    lines = whole.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = _encode(_change_value(json.loads(lines[place]), rng))
    return b"\n".join([*lines, b""])


def _encode(value: Any) -> bytes:
    """JSON; the text DEEP becomes lists nested beyond every parser's limit, and a name with TWICE in front a second one."""
    return json.dumps(value).encode().replace(b'"DEEP"', b"[" * 100_000 + b"]" * 100_000).replace(b'"TWICE ', b'"')


def _change_bytes(whole: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(whole))
    kind = rng.choice(("flip", "cut", "zeros", "not UTF-8", "empty", "inserted"))
    if kind == "flip":
        return whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
    if kind == "zeros":
        return whole[:place] + bytes(len(whole[place : place + 64])) + whole[place + 64 :]
    inserted = {"not UTF-8": b"\xff\xfe", "inserted": rng.choice((b"null", b"{", b'"', b"\n", b"1e999"))}
    return inserted[kind].join((whole[:place], whole[place:])) if kind in inserted else whole[: place if kind == "cut" else 0]


def _change_value(value: Any, rng: random.Random) -> Any:
    """A copy in which one value is another, or missing, or under another name."""
    value = copy.deepcopy(value)
    holder, key = rng.choice(list(_places(value)))
    kind = rng.choice(("odd", "odd", "odd", "missing", "renamed", "deep", "twice", "another type"))
    if kind == "missing":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "twice" and isinstance(holder, dict):
        holder[f"TWICE {key}"] = rng.choice(ODD)
    elif kind == "another type":
        inner = holder[key]
        number = isinstance(inner, int | float) and not isinstance(inner, bool)
        holder[key] = rng.choice([[inner], {"a": inner}, str(inner), *([-inner, inner + 1, inner * 10**6] if number else [])])
    else:
        holder[key] = "DEEP" if kind == "deep" else rng.choice(ODD)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield value, key
        yield from _places(inner)
