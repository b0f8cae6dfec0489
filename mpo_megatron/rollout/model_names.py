"""Names of models on servers."""

from __future__ import annotations

import re

_MONTH, _DAY = "(0[1-9]|1[0-2])", "(0[1-9]|[12][0-9]|3[01])"
_DATE = rf"(20\d\d-?)?{_MONTH}-?{_DAY}|2\d{_MONTH}({_DAY})?|20\d\d-?{_MONTH}"
"""The dates in models' names: 2024-08-06, 20241022, 0613, 2411, 250528."""
_VERSION = re.compile(rf"|@.+|[-:](latest|main|00\d|{_DATE})")
"""What may follow a model's name in that of one of its versions; 001 is Google's."""


def is_version(served: str, requested: str) -> bool:
    """Whether a served name is the requested one, or one of its versions: with a date, a number such as 001, or a revision.

    `gpt-4o-mini` is no version of `gpt-4o`, nor `model-7b-instruct` or `model-7b-123` of `model-7b`.
    """
    found, name = _last_part(served), _last_part(requested)
    name = name.removesuffix(":latest").removesuffix("-latest") or name
    return found.startswith(name) and _VERSION.fullmatch(found.removeprefix(name)) is not None


def _last_part(name: str) -> str:
    """A model's own name, in lower case, without its folder or the suffix of its file."""
    path = name.rstrip("/").lower().split("/")
    if len(path) > 2 and path[-2] == "snapshots":  # the hub's cache: …/models--org--name/snapshots/<commit>
        return path[-3].rpartition("--")[2]
    return path[-1].removesuffix(".gguf")
