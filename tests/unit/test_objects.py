"""JSON files of a checkpoint that parse, but hold something else than was written."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError
from mpo_megatron.config.values import field_types
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.files.objects import build_record, read_object
from mpo_megatron.hf.adapter import AdapterRecord, read_adapter
from mpo_megatron.hf.conversion import Conversion, load_conversion
from mpo_megatron.train.checkpoints.step_folders import RunState
from tests.damages import ODD

ADAPTER = {"rank": 2, "alpha": 4.0, "rslora": False, "target_modules": ["o_proj"], "quantize": "none"}
RECORD = {"adapter": ADAPTER, "base": "model", "base_digest": "d"}
CONVERSION = {"architecture": "A", "vocab_size": 5, "padded_vocab_size": 128, "dtype": "float32", "digest": "d"}


def write(folder: Path, adapter: Any = RECORD, conversion: Any = CONVERSION) -> None:
    (folder / "adapter.json").write_text(json.dumps(adapter))
    (folder / "conversion.json").write_text(json.dumps(conversion))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    assert json.loads(read_adapter(tmp_path).to_bytes()) == RECORD
    assert dataclasses.asdict(load_conversion(tmp_path)).items() >= CONVERSION.items()


def fits(kind: type[Any], field: str, value: Any) -> bool:
    """Whether an odd value is one that the field may hold."""
    expected = field_types(kind)[field]
    if expected in (bool, float):
        return value is True if expected is bool else value in (1.5, 1e-320)
    text = isinstance(value, str) and "\0" not in value and "\ud800" not in value
    return (
        (expected in (str, str | None) and text)
        or (expected == str | None and value is None)
        or (field == "versions" and value == {})
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Conversion)])
def test_odd_fields_of_a_conversion(field: str, tmp_path: Path) -> None:
    for value in ODD:
        write(tmp_path, conversion=CONVERSION | {field: value})
        fine = fits(Conversion, field, value)
        with nullcontext() if fine else pytest.raises(ConfigError, match=rf"conversion.json: .*{field}"):
            load_conversion(tmp_path)


@pytest.mark.parametrize("field", [*ADAPTER, *(field.name for field in dataclasses.fields(AdapterRecord))])
def test_odd_fields_of_an_adapter(field: str, tmp_path: Path) -> None:
    for value in ODD:
        changed = {**RECORD, "adapter": ADAPTER | {field: value}} if field in ADAPTER else RECORD | {field: value}
        write(tmp_path, adapter=changed)
        fine = fits(Adapter if field in ADAPTER else AdapterRecord, field, value)
        with nullcontext() if fine else pytest.raises(ConfigError, match=r"adapter.json: "):
            read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "does not parse"),
        ("[]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ('{"rank": 2, "rank": 4}', "does not parse .rank is given twice"),
        ('{"rank": \xff}', "does not parse"),
    ],
)
def test_other_json(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=f"adapter.json: {message}.*; copy it again"):
        read_object(path, "copy it again")
    with pytest.raises(ConfigError, match=r"adapter.json: "):
        read_adapter(tmp_path)


def test_measured_numbers_may_be_anything(tmp_path: Path) -> None:
    measured = ("held_out", "recent_losses")
    content = {"step": 1, "fixed": {}, "held_out": {"accuracy": math.nan}, "recent_losses": [math.inf, 1e300]}
    state = build_record(RunState, content, tmp_path, "copy it again", measured=measured)
    assert state.recent_losses == [math.inf, 1e300]
    for name, value in (("held_out", [1.0]), ("held_out", {"accuracy": "high"}), ("recent_losses", 1), ("recent_losses", [True])):
        with pytest.raises(ConfigError, match=f"{name} holds something else than numbers; copy it again"):
            build_record(RunState, content | {name: value}, tmp_path, "copy it again", measured=measured)
