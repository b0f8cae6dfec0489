"""Check that Transformer Engine still has every name of its that this package reads.

    python -m tools.transformer_engine_names                  # oldest and newest supported version, downloaded
    python -m tools.transformer_engine_names 2.15.0 FOLDER    # a version to download, or a folder that has `transformer_engine`

The sources are parsed, not imported, so it needs neither a GPU nor Transformer Engine's libraries: a wheel of 1 MB is enough.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VERSIONS = ("2.11.0", "2.20.2")
"""Oldest and newest version that the package supports."""


@dataclass(frozen=True)
class Name:
    """A function, class, method or field, with the parameters that are passed by name."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


PYTORCH = "transformer_engine.pytorch"
NAMES = (
    Name(PYTORCH, "is_fp8_available", ("return_reason",)),
    Name(PYTORCH, "is_fp8_block_scaling_available", ("return_reason",)),
    Name(PYTORCH, "is_mxfp8_available", ("return_reason",)),
    Name(PYTORCH, "DotProductAttention", ("num_gqa_groups", "attention_dropout", "qkv_format", "attn_mask_type")),
    Name(PYTORCH, "DotProductAttention.forward", ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")),
    Name(f"{PYTORCH}.utils", "get_cudnn_version"),
    Name("transformer_engine.common.recipe", "Float8CurrentScaling.use_power_2_scales"),
)
"""What is imported or called: model/precision.py, model/attention_varlen.py."""

TEXTS = (
    "_high_precision_init_val",  # model/precision.py: keep_exact_weights
    "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES",  # device.py
    "NVTE_UNFUSED_ATTN",  # model/attention_varlen.py
    'group["step"]',  # mcore/optimizer_states.py: Adam's count of steps
)
"""What is written somewhere in its Python sources: attributes, keys and environment variables."""


def missing_names(root: Path) -> list[str]:
    """What of NAMES and TEXTS the `transformer_engine` in a folder lacks, a line each."""
    wanting = []
    for each in NAMES:
        found = find_definition(root, each.module, each.name)
        if found is None:
            wanting.append(f"{each.module}.{each.name}: no such name")
        elif absent := [name for name in each.parameters if name not in parameter_names(found)]:
            wanting.append(f"{each.module}.{each.name}: no parameter {', '.join(absent)}")
    sources = [path.read_text(encoding="utf-8") for path in sorted((root / "transformer_engine").rglob("*.py"))]
    return [*wanting, *(f"{text}: nowhere in the sources" for text in TEXTS if not any(text in source for source in sources))]


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


def download(version: str, folder: Path) -> Path:
    """Unpack the Python of a version into a folder.

    Raises:
        OSError: pip cannot download it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary"]
    command += [":all:", "--dest", str(folder), f"transformer-engine=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise OSError(f"transformer-engine=={version}: pip cannot download it: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(folder.glob("transformer_engine-*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each version or folder; the exit code is 1 if a name is missing."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or list(VERSIONS)
    if {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0
    code = 0
    for each in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                root = Path(each) if Path(each, "transformer_engine").is_dir() else download(each, Path(scratch))
            except OSError as error:
                print(error, file=sys.stderr)
                return 1
            wanting = missing_names(root)
        print(f"Transformer Engine {each}: " + ("; ".join(wanting) or f"has all of {len(NAMES) + len(TEXTS)} names"))
        code |= bool(wanting)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
