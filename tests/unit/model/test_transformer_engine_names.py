"""The names of Transformer Engine that the package uses are listed, and the supported versions have them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mpo_megatron.hf.fp8 import RECIPES
from mpo_megatron.mcore import preparation
from mpo_megatron.model.precision import UNROUNDED
from tools.package_names import download
from tools.transformer_engine_names import NAMES, PYTORCH, TEXTS, VERSIONS, missing_names

PACKAGE = Path(__file__).parents[3] / "mpo_megatron"


def imported() -> set[tuple[str, str]]:
    """(module, name) of the package's imports from Transformer Engine."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformer_engine"):
                found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def test_what_is_imported_is_listed() -> None:
    listed = {(each.module, each.name.partition(".")[0]) for each in NAMES}
    assert imported() <= listed
    assert {(PYTORCH, recipe.availability) for recipe in RECIPES.values()} <= listed
    assert {UNROUNDED, preparation.POWER_OF_TWO_SCALES} <= set(TEXTS)


def write_engine(root: Path, **changes: str) -> Path:
    """A Transformer Engine with every name, in the same modules as the real one."""
    files = {
        "__init__": "",
        "pytorch/__init__": "from transformer_engine.pytorch.quantization import is_fp8_available, is_mxfp8_available\n"
        "from .quantization import is_fp8_block_scaling_available\nfrom .attention import DotProductAttention\n",
        "pytorch/quantization": "".join(f"def {each.name}(return_reason=False): ...\n" for each in NAMES[:3]),
        "pytorch/attention/__init__": "from .core import DotProductAttention",
        "pytorch/attention/core": "class DotProductAttention:\n"
        f"    def __init__(self, {', '.join(NAMES[3].parameters)}): ...\n"
        f"    def forward(self, {', '.join(NAMES[4].parameters)}): ...\n",
        "pytorch/utils": f"def get_cudnn_version(): ...\n# {' '.join(TEXTS)}",
        "common/__init__": "",
        "common/recipe": "class Float8CurrentScaling:\n    use_power_2_scales: bool = True\n",
    }
    for name, text in (files | changes).items():
        path = root / "transformer_engine" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_names_are_found_where_they_are_imported_from(tmp_path: Path) -> None:
    assert missing_names(write_engine(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pytorch/quantization": "def is_fp8_available(): ..."}, [f"{PYTORCH}.is_fp8_available: no parameter return_reason"]),
        ({"pytorch/attention/core": ""}, [f"{PYTORCH}.DotProductAttention: no such name"]),
        ({"common/recipe": "class Float8CurrentScaling: ..."}, ["Float8CurrentScaling.use_power_2_scales: no such name"]),
        ({"pytorch/utils": "def get_cudnn_version(): ..."}, [f"{text}: nowhere in the sources" for text in TEXTS]),
    ],
)
def test_what_is_gone_is_reported(tmp_path: Path, changes: dict[str, str], expected: list[str]) -> None:
    found = missing_names(write_engine(tmp_path, **changes))
    assert all(any(line.endswith(each) for line in found) for each in expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_supported_versions_have_all_names(tmp_path: Path, version: str) -> None:
    try:
        root = download("transformer-engine", version, tmp_path)
    except OSError as error:  # without a network
        pytest.skip(str(error))
    assert missing_names(root) == []
