"""Tiny on-policy rounds: two rounds without interruption, and again with a kill in every stage; results are bitwise equal."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.on_policy.plot import plot_rounds
from examples.on_policy.reward import reward
from examples.on_policy.run import build_prompts, load_methods, summarize
from mpo_megatron.config import ConvertConfig, IterateConfig
from mpo_megatron.data import prepare as preparing
from mpo_megatron.data.store import load_groups
from mpo_megatron.model import convert_export
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout import iterate as rounds
from mpo_megatron.rollout import records, stages
from mpo_megatron.rollout import select as selecting
from tests.adapter_server import BASE, AdapterServer
from tests.distributed.launch import launch_ranks
from tests.kills import Killed, raise_at
from tests.tiny import save_model
from tests.waiting import TIMEOUT

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "hf", num_hidden_layers=1, hidden_size=32)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "model")))
    rows = [{"prompt": f"Say {index}."} for index in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "vowels.py").write_text("def vowels(response, group):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    return folder


def settings(inputs: Path, output: Path, *, measure_kl: bool) -> IterateConfig:
    return IterateConfig(
        output=str(output),
        model=str(inputs / "model"),
        prompts=str(inputs / "prompts.jsonl"),
        rounds=2,
        held_out=4,
        measure_kl=measure_kl,
        generate={"num_responses": 4, "max_tokens": 8, "empty": "keep"},
        score={"scorers": {"vowels": {"kind": "function", "function": f"{inputs / 'vowels.py'}:vowels"}}, "chunk_groups": 2},
        select={"truncated": "keep", "duplicates": "keep"},
        train={
            "model": {"precision": "fp32"},
            "data": {"groups_per_step": 2, "row_tokens": 256},
            "optimizer": {"lr": 1e-3},
            "loss": {"name": "mpo", "params": {"beta": 0.1}},
            "checkpoint": {"every": 1, "keep": 10},
            "eval_every": 0,
        },
        per_round={"train.loss.params.beta": [0.1, 0.2]},
    )


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "launch", launch_ranks)
        rounds.iterate(settings(inputs, output, measure_kl=True), QUIET)
    return output


# --------------------------------------------------------------------------------------------------- kills


def kill_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL the parent of torchrun after the first checkpoint: torchrun and its ranks must also end."""

    def killed(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
        run = Path(arguments[-1]).with_name("run")
        call = f"launch({module!r}, {list(arguments)!r}, num_ranks={num_ranks}, max_restarts={max_restarts})"
        program = f"from mpo_megatron.train.launcher import launch; {call}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = psutil.Popen([sys.executable, "-c", program], env=environment)
        while process.poll() is None and not (run / "checkpoints" / "step_00000001").is_dir():
            time.sleep(0.02)
        assert process.poll() is None, "training ended before it could be killed"
        started = process.children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs([process, *started], timeout=TIMEOUT)
        assert started
        assert not alive
        raise Killed("train")

    monkeypatch.setattr(stages, "launch", killed)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "export": lambda patch: raise_at(convert_export, "write_shards", 0, patch),
    "generate held-out": lambda patch: raise_at(records.LineWriter, "write", 1, patch),
    "generate": lambda patch: raise_at(records.LineWriter, "write", 12, patch),
    "select": lambda patch: raise_at(selecting, "plot_spacing", 0, patch),
    "prepare": lambda patch: raise_at(preparing, "_write", 0, patch),
    "train": kill_training,
    "report": lambda patch: raise_at(rounds, "report_round", 0, patch),
    "score of the second round": lambda patch: raise_at(rounds, "score", 0, patch),
    "last report": lambda patch: raise_at(rounds, "write_report", 0, patch),
}
"""In sequence: after each kill, the same command resumes and reaches the next."""


def finished_stages(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*.json") if "checkpoints" not in path.parts}


@pytest.fixture(scope="module")
def interrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("killed") / "out"
    config = settings(inputs, output, measure_kl=False)
    before: set[str] = set()
    for name, arm in KILLS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "launch", launch_ranks)
            arm(patch)
            with pytest.raises(Killed):
                rounds.iterate(config, QUIET)
        assert before <= finished_stages(output), name  # no completed work is lost
        before = finished_stages(output)
    rounds.iterate(config, QUIET)  # training is complete by now
    return output


def weights(policy: Path) -> Iterator[tuple[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(policy / "hf", dtype=torch.float32, local_files_only=True)
    yield from model.state_dict().items()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_kill_in_each_stage_resumes_to_the_same_result(uninterrupted: Path, interrupted: Path) -> None:
    for number in (0, 1, 2):
        pairs = zip(
            weights(uninterrupted / f"policies/{number:02d}"), weights(interrupted / f"policies/{number:02d}"), strict=True
        )
        assert all(name == other and torch.equal(ours, theirs) for (name, ours), (other, theirs) in pairs)
    for name in ("rounds/01/selected/groups.jsonl", "rounds/02/selected/groups.jsonl", "policies/02/scored/scored.jsonl"):
        assert (uninterrupted / name).read_bytes() == (interrupted / name).read_bytes()
    ours, theirs = (json.loads((folder / "report.json").read_text())["rounds"] for folder in (uninterrupted, interrupted))
    assert [{**report, "kl": None} for report in ours] == theirs


@pytest.mark.distributed
@pytest.mark.slow
def test_rounds_follow_each_other(inputs: Path, uninterrupted: Path) -> None:
    """Each round trains on samples of the previous policy, with that policy as its reference, and changes the weights."""
    policies = [dict(weights(uninterrupted / f"policies/{number:02d}")) for number in (0, 1, 2)]
    for before, after in itertools.pairwise(policies):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    prompts = []
    for number in (1, 2):
        folder = uninterrupted / "rounds" / f"{number:02d}"
        lines = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
        prompts.append({line["prompt"][0]["content"] for line in lines})
        report = json.loads((folder / "report.json").read_text())
        training = report["training"]
        assert (training["loss"], training["params"], training["lr"]) == ("mpo", {"beta": {1: 0.1, 2: 0.2}[number]}, 1e-3)
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        learned = [row for row in steps if "loss" in row]  # a step may have only groups without contrast
        assert len(steps) == 3
        assert training["last_step"] == {name: learned[-1][name] for name in ("step", "loss", "accuracy", "margin")}
        # Policy and reference are the same at the first step.
        first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["margin"] == pytest.approx(0.0, abs=1e-4)
    assert len(prompts[0]) == len(prompts[1]) == 6
    assert not prompts[0] & prompts[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_kl_is_that_of_the_exported_policies(uninterrupted: Path) -> None:
    """KL of round 2, recomputed with plain transformers on the exported checkpoints."""
    groups = load_groups(uninterrupted / "policies/02/kl/groups")
    models = [
        AutoModelForCausalLM.from_pretrained(uninterrupted / f"policies/{number:02d}/hf", dtype=torch.float64)
        for number in (2, 1)
    ]
    means = []
    for index in range(len(groups)):
        group, ratios = groups[index], []
        for response in group.response_tokens:
            ids = torch.tensor(np.concatenate([group.prompt_tokens, response]))[None].long()
            with torch.inference_mode():
                logps = [model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0] for model in models]
            ratios.append(float((logps[0] - logps[1])[len(group.prompt_tokens) - 1 :].sum()))
        means.append(np.mean(ratios))
    report = json.loads((uninterrupted / "rounds/02/report.json").read_text())
    assert abs(np.mean(means)) > 1e-4
    assert report["kl"]["kl"] == pytest.approx(np.mean(means), abs=1e-4)  # float32 sums against float64


@pytest.mark.distributed
@pytest.mark.slow
def test_three_rounds_of_a_hybrid_model(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gated DeltaNets and attention: sampled, trained from the previous round, and exported as `transformers` reads them."""
    monkeypatch.setattr(stages, "launch", launch_ranks)
    save_model(tmp_path / "hf", model_type="qwen3_5_text", hidden_size=32)
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "model")))
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {index}."}) + "\n" for index in range(40)))  # some without contrast
    config = settings(inputs, output, measure_kl=True)
    config = dataclasses.replace(config, model=str(tmp_path / "model"), prompts=str(prompts), rounds=3, per_round={})
    rounds.iterate(config, QUIET)
    policies = [dict(weights(output / f"policies/{number:02d}")) for number in range(4)]
    for old, new in itertools.pairwise(policies):
        name = "model.layers.0.linear_attn.in_proj_qkv.weight"
        assert not torch.equal(old[name], new[name])
    for number in (1, 2, 3):
        folder = output / "rounds" / f"{number:02d}"
        first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        assert first["margin"] == pytest.approx(0.0, abs=1e-4)  # policy and reference are the same at the first step
        assert 0 < abs(json.loads((folder / "report.json").read_text())["kl"]["kl"]) < 5
    assert AutoModelForCausalLM.from_pretrained(output / "policies/03/hf").config.model_type == "qwen3_5_text"


def test_reward_of_the_example() -> None:
    group = {"meta": {"kind": "fruits", "count": 4}}
    cases = {
        "apple, plum, fig, pear": 1.0,
        "apple": 0.25,
        "apple, apple, apple, plum": 0.5,
        "apple, hammer, fig, pear, plum": 0.8,
    }
    assert {text: reward(text, group) for text in cases} == cases


def test_prompts_of_the_example_are_new_and_different() -> None:
    first = build_prompts(50, taken=set())
    taken = {row["prompt"] for row in first}
    assert len(taken) == 50
    assert not taken & {row["prompt"] for row in build_prompts(50, taken=taken)}
    assert set(load_methods()) >= {"mpo", "dpo"}


def test_summary_and_picture_of_the_example(tmp_path: Path) -> None:
    def runs(*rewards: float) -> list[dict[str, Any]]:
        return [
            {"before": {"reward": old}, "after": {"reward": new, "tokens": 9.0}, "win_rate": {"value": 0.5 + new - old}}
            for old, new in itertools.pairwise(rewards)
        ]

    methods = {"mpo": {"label": "MPO"}, "dpo": {"label": "DPO"}}
    results = {"mpo": {0: runs(0.2, 0.3, 0.5), 1: runs(0.2, 0.4, 0.6)}, "dpo": {0: runs(0.2, 0.3, 0.4), 1: runs(0.2, 0.2, 0.3)}}
    summary = summarize(methods, results)
    method, other = summary["methods"].values()
    assert summary["seeds"] == [0, 1]
    assert method["reward"] == pytest.approx([0.2, 0.35, 0.55])
    assert method["error"] == pytest.approx([0.0, 0.05, 0.05])  # standard deviation of two values 0.1 apart, over √2
    assert method["win_rate"] == pytest.approx([0.65, 0.7])
    assert (method["lead"], method["lead_error"]) == ([0, 0, 0], [0, 0, 0])
    assert other["lead"] == pytest.approx([0, 0.1, 0.2])  # of two seeds: 0 and 0.2, then 0.1 and 0.3
    assert other["lead_error"] == pytest.approx([0, 0.1, 0.1])
    plot_rounds(summary, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_hand_over_the_adapter_alone(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies after the first are separate PEFT folders; the second round continues the adapter of the first.

    A server of the first policy answers: it loads each later policy's adapter, and unloads it.
    """
    monkeypatch.setattr(stages, "launch", launch_ranks)
    server = AdapterServer(inputs / "hf", "vllm")
    config = settings(inputs, tmp_path / "out", measure_kl=True)
    config = dataclasses.replace(config, train={**config.train, "lora": {"rank": 2}, "optimizer": {"lr": 0.05}})
    endpoint = {"base_url": server.url, "model": BASE, "retries": 0}
    asked = {**config.generate, "engine": "openai", "load_adapter": True, "endpoint": endpoint}
    rounds.iterate(dataclasses.replace(config, generate=asked), QUIET)
    server.close()
    # The first policy and the first round: nothing to load. The second policy's held-out answers, its round, the third policy's.
    assert server.actions == ["load_lora_adapter", "unload_lora_adapter"] * 3
    names = list(dict.fromkeys(body["model"] for path, body in server.asked if path.endswith("completions")))
    assert names[0] == BASE
    assert len(names) == 3
    policies = [tmp_path / "out" / "policies" / f"{number:02d}" / "hf" for number in range(3)]
    assert (policies[0] / "model.safetensors").is_file()
    matrices = []
    for policy in policies[1:]:
        assert not (policy / "model.safetensors").exists()
        assert json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"] == str(policies[0])
        matrices.append(load_file(policy / "adapter_model.safetensors"))
    assert matrices[0].keys() == matrices[1].keys()
    assert all(tensor.abs().max() > 0 for tensor in matrices[0].values())
    products = [2 * matrices[0][name.replace("lora_A", "lora_B")] @ matrices[0][name] for name in matrices[0] if "lora_A" in name]
    metrics = (tmp_path / "out" / "rounds" / "02" / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(values for values in map(json.loads, metrics) if "adapter_norm" in values)
    assert first["adapter_norm"] == pytest.approx(float(sum(product.square().sum() for product in products)) ** 0.5, rel=1e-5)
    for number in (1, 2):
        report = json.loads((tmp_path / "out" / "rounds" / f"{number:02d}" / "report.json").read_text())
        assert report["kl"]["kl"] != 0
