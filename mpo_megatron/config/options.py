"""Options with unparsed values: `pattern: "[a-z]"` is a text, although it would parse as a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse.typing import register_type

if TYPE_CHECKING:
    Options = dict[str, Any]
else:

    class Options:
        """The parser's type for such a field; for `dict[str, Any]` it would parse the texts as YAML again. Values are plain
        dictionaries."""


def _load(value: Any) -> dict[str, Any]:
    loaded = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(loaded, Mapping):
        raise ValueError("give options, for example {kind: match}")
    return dict(loaded)


register_type(Options, serializer=dict, deserializer=_load, type_check=lambda value, _: isinstance(value, dict))
