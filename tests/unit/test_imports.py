"""Allowed imports: dependencies point one way, heavy ones are confined, and every example's configuration parses."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from mpo_megatron.config import (
    AlignConfig,
    ConvertConfig,
    GenerateConfig,
    IterateConfig,
    PrepareConfig,
    ScoreConfig,
    TrainConfig,
    load_yaml,
)
from mpo_megatron.families.published import MODELS
from mpo_megatron.files.digests import write_list
from mpo_megatron.hf.conversion import Conversion
from tests.waiting import TIMEOUT

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mpo_megatron"
FILES = sorted(PACKAGE.rglob("*.py"))
OTHER_YAML = {
    *(ROOT / "examples" / name / "methods.yaml" for name in ("compare", "on_policy", "papers")),
    ROOT / "examples" / "recipes" / "plans.yaml",
    *(ROOT / "examples" / "launch" / name for name in ("pytorchjob.yaml", "jobset.yaml", "skypilot.yaml")),
}
"""An example's own files, which are not a command's configuration; the example's tests read them."""
EXAMPLE_CONFIGS = sorted(set((ROOT / "examples").rglob("*.yaml")) - OTHER_YAML)

MAY_IMPORT = {
    "starting": set(),
    "terminal": set(),
    "config": {"terminal"},
    "files": {"terminal", "config"},
    "losses": set(),
    "data": {"terminal", "config", "files"},
    "stack": {"config", "device"},
    "device": set(),
    "families": {"config", "files"},
    "hf": {"config", "files", "device", "families"},
    "mcore": {"config", "device", "stack"},
    "model": {"mcore", "terminal", "config", "files", "device", "stack", "data", "losses", "families", "hf"},
    "train": {"starting", "mcore", "terminal", "config", "files", "device", "stack", "data", "losses", "families", "hf", "model"},
    "rollout": {"terminal", "config", "files", "device", "stack", "data", "losses", "families", "hf", "model", "train"},
    "evaluate": {"terminal", "config", "files", "device", "data", "losses", "families", "hf", "model", "train", "rollout"},
    "align": {
        *("terminal", "config", "files", "device", "data", "families", "hf", "model", "train", "rollout", "plan", "report"),
    },
    "launch": {"config"},
    "report": {"terminal", "config", "files", "data"},
    "viewer": {"terminal", "config", "files", "data", "losses", "families", "hf", "train"},
    "plan": {"terminal", "config", "files", "device", "data", "losses", "families", "hf", "train"},
    "doctor": {"terminal", "config", "files", "device", "stack", "data", "hf", "model", "train"},
    "cli": {
        *("terminal", "config", "files", "plan", "doctor", "launch", "report", "viewer", "device", "data", "losses", "families"),
        *("starting", "hf", "model", "train", "rollout", "evaluate", "align"),
    },
}
"""Allowed imports of each part of the package from other parts."""


def part_of(path: Path) -> str:
    """The part of the package to which a file belongs: its folder, or its own name. A program is above all, like `cli`."""
    if path == PACKAGE / "train" / "__main__.py":
        return "cli"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imported_names(path: Path) -> set[str]:
    """Full names of all imports of a file, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["mpo_megatron", *path.relative_to(PACKAGE).parts][: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *modules: str) -> bool:
    """Whether a full name is one of these modules or inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


@functools.cache
def attributes(path: Path) -> set[str]:
    """Dotted names written in a file, such as `torch.distributed.init_process_group`."""
    return {
        ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }


by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@by_file
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not any(within(name, "mpo_megatron") for name in imported_names(path))
        return
    own = {name.split(".")[1] for name in imported_names(path) if name.startswith("mpo_megatron.")} - {"__version__"}
    assert own <= MAY_IMPORT[part] | {part}


@by_file
def test_megatron_is_confined(path: Path) -> None:
    names = imported_names(path)
    assert not any(within(name, "megatron.training", "megatron.legacy") for name in names)
    if part_of(path) not in ("mcore", "model", "train", "device", "rollout", "evaluate"):
        assert not any(within(name, "megatron", "transformer_engine") for name in names)


@by_file
def test_only_families_know_the_names_of_models(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("self.model_type = ModelType.", "")  # Megatron-Core's schedules ask for it
    assert part_of(path) == "families" or "model_type" not in text


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "config"], ids=lambda path: path.name)
def test_options_name_no_module(path: Path) -> None:
    """Any program may run with them."""
    texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and text.startswith("mpo_megatron.")]


@by_file
def test_one_module_sets_up_ranks(path: Path) -> None:
    if path == PACKAGE / "model" / "parallel.py":
        return
    assert not any(within(name, "megatron.core.parallel_state", "megatron.core.mpu") for name in imported_names(path))
    assert not any(name.endswith("init_process_group") for name in imported_names(path) | attributes(path))


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "losses"], ids=lambda path: path.name)
def test_losses_need_only_torch(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_names(path)}
    assert roots <= sys.stdlib_module_names | {"torch", "mpo_megatron"}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "data"], ids=lambda path: path.name)
def test_data_needs_no_gpu_stack(path: Path) -> None:
    assert not any(within(name, "torch.distributed", "torch.nn", "torch.cuda") for name in imported_names(path))


PRIVATE_ELSEWHERE = {
    "os._exit",  # Python's
    "parallel_state._global_process_group_list",  # model/parallel.py, the one module that touches the parallel state
    "super()._apply",  # model/delta_net.py: torch's, which changes the dtype of a module's weights
    "super()._forward_mlp",  # model/routing.py: a layer of ours, in the place of Megatron's
}
"""Private names that modules outside `mcore` may use."""


@by_file
def test_private_parts_of_megatron_are_reached_in_one_room(path: Path) -> None:
    if part_of(path) == "mcore" or not any(within(name, "megatron") for name in imported_names(path)):
        return
    private = re.compile(r"(?<!self)(?<!cls)\._[a-z]")  # of another object or module
    assert {name for name in attributes(path) if private.search(name)} <= PRIVATE_ELSEWHERE


def type_names(path: Path) -> set[str]:
    """Public names of the types that a file defines: classes, and aliases such as `Rows = list[Row]`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.TypeAlias):
            found.add(node.name.id)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp | ast.Attribute):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name) and not target.id.isupper()}
    return {name for name in found if name[0].isupper()}


SHARED_NAMES: set[str] = set()
"""Names that two types may share, each with the reason."""


def test_a_types_name_is_unique() -> None:
    places = defaultdict(list)
    for path in FILES:
        for name in type_names(path):
            places[name].append(str(path.relative_to(PACKAGE)))
    assert len(places) > 200
    assert {name: files for name, files in places.items() if len(files) > 1 and name not in SHARED_NAMES} == {}


def test_megatron_may_be_absent() -> None:
    program = (
        "import sys; sys.modules['megatron'] = sys.modules['transformer_engine'] = None\n"
        "import mpo_megatron.cli, mpo_megatron.config, mpo_megatron.data.prepare, mpo_megatron.losses"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=TIMEOUT)


def write_model(folder: Path) -> None:
    """Reads of a run's inputs by `mpo train` before it imports Megatron: a model of 40 heads, and groups."""
    for name in ("model/megatron", "model/hf", "groups"):
        (folder / name).mkdir(parents=True)
    (folder / "model/hf/config.json").write_text(json.dumps(MODELS["Qwen3-14B"]))
    record = Conversion(architecture="", vocab_size=151936, padded_vocab_size=151936, dtype="bfloat16", digest="")
    (folder / "model/conversion.json").write_text(json.dumps(dataclasses.asdict(record)))
    write_list(folder / "model")
    (folder / "groups/prepare.json").write_text("{}")


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("plan --model qwen3-14b --gpus 8 --hardware h100 --suggest 1", 0, "layouts that fit"),
        ("train --parallel.tensor 3 --nproc 3", 2, "parallel.tensor = 3 does not divide the model's num_attention_heads = 40"),
        ("train --parallel.tensor 8 --nproc 4", 2, "parallel.tensor"),
    ],
)
def test_plan_and_impossible_layouts_need_no_megatron(command: str, code: int, message: str, tmp_path: Path) -> None:
    options = ""
    if command.startswith("train"):
        write_model(tmp_path)
        options = "--output run --model.checkpoint model --data.train groups"
    program = (
        "import sys; sys.modules['megatron'] = sys.modules['transformer_engine'] = None\n"
        "from mpo_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *command.split(), *options.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert run.returncode == code, run.stderr
    assert message in run.stdout + run.stderr


def test_there_are_example_configs() -> None:
    assert EXAMPLE_CONFIGS


@pytest.mark.parametrize("path", EXAMPLE_CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_configs_parse(path: Path) -> None:
    kinds = {
        "align": AlignConfig,
        "convert": ConvertConfig,
        "prepare": PrepareConfig,
        "generate": GenerateConfig,
        "score": ScoreConfig,
        "iterate": IterateConfig,
    }
    load_yaml(next((kind for prefix, kind in kinds.items() if path.name.startswith(prefix)), TrainConfig), path)
