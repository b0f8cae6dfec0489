"""vLLM's interface: the package's uses are listed, the tests' stand-in has them, and an installed vLLM is checked."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_megatron.families import read_family
from mpo_megatron.model.weight_map import build_weight_map
from mpo_megatron.stack.packages import LIVE_VLLM
from tests import vllm_stand_in
from tests.tiny import CONFIGS, HYBRID
from tests.waiting import TIMEOUT
from tools.vllm_names import ENGINE, NAMES, TEXTS, TRANSFER, VERSIONS, WORKER, missing_names

PACKAGE = Path(__file__).parents[3] / "mpo_megatron"


def test_what_is_imported_is_listed() -> None:
    listed = {each.name.partition(".")[0] for each in NAMES}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                assert {alias.name for alias in node.names} <= listed, path


def test_live_versions_are_those_that_are_checked() -> None:
    assert all(LIVE_VLLM.contains(version) for version in VERSIONS)


def test_the_stand_in_has_the_interface() -> None:
    stand_ins = {ENGINE: {"LLMEngine": vllm_stand_in.Engine}, WORKER: {"Worker": vllm_stand_in.Worker}}
    checked = 0
    for each in NAMES:
        outer, _, member = each.name.partition(".")
        if each.module.startswith(TRANSFER):
            owner = getattr(vllm_stand_in, outer, None)  # of a base or a worker's class, the sources alone are checked
        else:
            owner = stand_ins.get(each.module, {}).get(outer)
        found = None if owner is None else inspect.getattr_static(owner, member, None)
        if owner is not None and each.parameters and found is not None:
            function = getattr(owner, member)
            assert set(each.parameters) <= set(inspect.signature(function).parameters), each
            checked += 1
    assert checked == 7  # collective_rpc, sleep, wake_up, two of the worker's, trainer_init of both back ends


def write_vllm(root: Path, changed: str = "", content: str = "") -> Path:
    """A vLLM with only the names."""
    modules: dict[str, dict[str, list[str]]] = {}
    for each in NAMES:
        outer, _, member = each.name.partition(".")
        body = modules.setdefault(each.module, {}).setdefault(outer, [])
        if each.parameters or member in ("step", "reset_prefix_cache"):
            body.append(f"    def {member}(self, {', '.join(each.parameters)}): ...")
        elif member:
            body.append(f"    {member}: int")
    for module in {*modules, *TEXTS}:
        lines = [line for name, body in modules.get(module, {}).items() for line in (f"class {name}:", *(body or ["    x = 1"]))]
        lines += [f"# {text}" for text in TEXTS.get(module, ())]
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if module == changed else "\n".join(lines))
    return root


def test_what_is_gone_is_reported(tmp_path: Path) -> None:
    assert missing_names(write_vllm(tmp_path / "whole")) == []
    found = missing_names(write_vllm(tmp_path / "other", WORKER, "class Worker:\n    def update_weights(self, request): ..."))
    assert f"{WORKER}.Worker.update_weights: no parameter update_info" in found
    assert f"{WORKER}.Worker.start_weight_update: no such name" in found
    found = missing_names(write_vllm(tmp_path / "texts", "vllm.envs", ""))
    assert found == [f"vllm.envs: {text} is nowhere in it" for text in TEXTS["vllm.envs"]]


def test_an_installed_vllm_has_all_names() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed; python -m tools.vllm_names downloads its sources")
    assert missing_names(Path(spec.submodule_search_locations[0]).parent) == []


@pytest.mark.slow
def test_an_installed_vllm_s_models_take_our_weights() -> None:
    """Each number of an update is in exactly one place, the one where vLLM's own loader puts it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "tools.vllm_models"], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("model_type", HYBRID)
def test_weights_of_hybrid_models_have_names_that_vllm_knows(model_type: str) -> None:
    """Each module on the way to a weight is an attribute there, or is mapped to a part of one."""
    known = "\n".join(text for module, texts in TEXTS.items() if ".model_executor." in module for text in texts)
    experts = {} if model_type == "qwen3_5_text" else {"num_experts": 2, "num_experts_per_tok": 2}
    family = read_family(CONFIGS[model_type](num_hidden_layers=4, **experts))
    names = [part.name for item in build_weight_map(family, family.vocab_size) for part in item.placements]
    words = {word for name in names for word in name.split(".")}
    assert "A_log" in words
    unknown = {
        word
        for word in words - {"model", "layers", "mlp", "weight"}
        if not word.isdigit() and f"self.{word} = " not in known and f'.{word}": (' not in known
    }
    assert not unknown
