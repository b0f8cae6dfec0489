"""Options whose values are not parsed again: `pattern: "[a-z]"` is a text, though it would parse as a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import register_type

if TYPE_CHECKING:
    Options = dict[str, Any]
else:

    class Options:
        """The type of such a field for the parser, which reads the texts in a `dict[str, Any]` as YAML again. Values are plain
        dictionaries."""


def _load(value: Any) -> dict[str, Any]:
    loaded = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(loaded, Mapping):
        raise ValueError("give options, for example {kind: match}")
    return dict(loaded)


register_type(Options, serializer=dict, deserializer=_load, type_check=lambda value, _: isinstance(value, dict))
