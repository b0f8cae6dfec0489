"""Samples of the policy during training: weights gathered from shards, SPO's regulariser, and runs that store both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.config import (
    CheckpointConfig,
    ConfigError,
    ConvertConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OnlineConfig,
    OptimizerConfig,
    TrainConfig,
    TransformersConfig,
)
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import step_indices
from mpo_megatron.data.store import load_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.live.regularizer import build_regularizer, choose_prompts
from tests.distributed.launch import run_ranks
from tests.distributed.parity_cases import MODELS
from tests.tiny import random_groups, save_groups, save_model
from tests.tolerances import reordered
from tests.training import train

pytestmark = pytest.mark.distributed

# Of the largest gradient: float32 products of some 200 tokens against float64.
TOLERANCE = reordered(200)
GATHERED: list[tuple[str, dict[str, int]]] = [
    ("qwen3-moe", {"expert": 2}),
    ("qwen2-moe-tied", {"tensor": 2}),
    ("llama", {"tensor": 2}),
    ("mixtral", {"expert": 2}),
    ("gemma2", {"tensor": 2}),
    ("olmo3", {"pipeline": 2}),
]
"""Models whose weights are gathered, and their layouts."""


def test_regulariser_and_live_weights_on_two_ranks(tmp_path: Path) -> None:
    for role, seed in (("policy", 1), ("reference", 2)):
        hf = save_model(tmp_path / f"{role}-hf", seed=seed, num_hidden_layers=2, hidden_size=32, tied=True)
        convert(ConvertConfig(input=str(hf), output=str(tmp_path / role)))
    for name in {name for name, _ in GATHERED}:
        hf = save_model(tmp_path / f"{name}-hf", **{"num_hidden_layers": 2, "hidden_size": 32, **MODELS[name]})
        convert(ConvertConfig(input=str(hf), output=str(tmp_path / name)))
    # Several rows and, with two replicas, samples of one prompt on both.
    save_groups(tmp_path / "samples", random_groups(5, seed=3, max_responses=4), tmp_path / "policy-hf")
    save_groups(tmp_path / "groups", random_groups(4, seed=4, tied_share=0), tmp_path / "policy-hf")
    spec = {
        "folder": str(tmp_path),
        "layouts": [{"tensor": 2}, {}, {"overlap": True}, {"context": 2}, {"pipeline": 2}],
        "gathered": GATHERED,
        "results": str(tmp_path / "results.json"),
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    run_ranks(2, "tests.distributed.live_worker", [str(tmp_path / "spec.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    results = found["layouts"]
    assert len(results) == 5
    # One engine, or one per replica, …, draws the same samples: same prompts, same seeds.
    assert all(result["samples"] == results[0]["samples"] for result in results)
    assert [[len(tokens) for tokens in group] for group in results[0]["samples"]] == [[6, 6]] * 5
    for result in results:
        assert result["missing"] == [], result
        assert result["weights"] == 0, result
        assert result["kl"] == pytest.approx(result["expected_kl"], rel=1e-5), result
        assert result["gradients"] <= TOLERANCE * result["largest"], result
        # A step's gradients are the sum of both: no gradient is reduced twice.
        assert result["sum"] <= TOLERANCE * max(result["largest"], result["loss_largest"]), result
        assert result["loss_largest"] > 0
    for (name, _), result in zip(GATHERED, found["gathered"], strict=True):
        assert result["missing"] == [], result
        assert result["equal"], result
        assert result["handed"] == [True] * 4, result  # by CUDA IPC, and by NCCL
        assert result["samples"] == draw(tmp_path / f"{name}-hf", load_groups(tmp_path / "samples")), result["model"]


def draw(folder: Path, groups: Iterable[TokenizedGroup]) -> list[list[list[int]]]:
    """Answers of the exported checkpoint, to the same requests as the live policy."""
    engine = EmbeddedEngine.load(folder, load_tokenizer(folder), TransformersConfig(dtype="float32"))
    prompts = [Prompt(group_id=group.group_id, token_ids=tuple(group.prompt_tokens.tolist()), messages=()) for group in groups]
    found = {answer.group_id: answer.responses for answer in engine.generate(prompts, Sampling(num_responses=2, max_tokens=6))}
    return [[list(response.token_ids) for response in found[prompt.group_id]] for prompt in prompts]


STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (model) and training groups (groups)."""
    folder = tmp_path_factory.mktemp("live")
    hf = save_model(folder / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(hf), output=str(folder / "model")))
    save_groups(folder / "groups", random_groups(12, seed=1), hf)
    save_groups(folder / "others", random_groups(9, seed=2), hf)
    return folder


def run_config(
    inputs: Path, output: Path, *, groups: str = "groups", first_step: int = 0, stop_after: int | None = None, **online: Any
) -> TrainConfig:
    settings = {"kl_weight": 0.1, "every": EVERY, "num_samples": 10, "max_tokens": 9, **online}
    return TrainConfig(
        output=str(output),
        model=ModelConfig(checkpoint=str(inputs / "model"), precision="fp32"),
        data=DataConfig(train=str(inputs / groups), groups_per_step=3, row_tokens=256, first_step=first_step),
        loss=LossConfig(name="spo", params={"alpha": 0.1, "form": "ranked"}),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant", warmup_fraction=0.0),
        checkpoint=CheckpointConfig(every=1, keep=10, asynchronous=False),
        online=OnlineConfig(**settings),
        max_steps=STEPS,
        stop_after=stop_after,
    )


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_config(inputs, output), build_regularizer)
    return output


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "sample_kl" in line]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    """The records of a step's file; its last line gives their number."""
    *records, last = map(json.loads, (run / "online" / f"samples_{step:08d}.jsonl").read_text().splitlines())
    assert "index" not in last
    return records


def weights(run: Path, step: int, target: Path) -> dict[str, torch.Tensor]:
    convert(ConvertConfig(input=str(run / "checkpoints" / f"step_{step:08d}"), output=str(target)))
    return load_file(target / "model.safetensors")


def test_a_run_samples_every_t_steps_from_the_policy_it_has_then(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert ["sample_seconds" in line for line in lines] == [True, False] * 3
    assert ["engine_kl" in line for line in lines] == [True, False] * 3
    # The engine never samples the five embeddings without a token: about log(264 / 259) nats per token.
    assert all(0.005 < line["engine_kl"] < 0.1 for line in lines[::2])
    assert lines[0]["sample_kl"] == pytest.approx(0, abs=1e-6)  # the policy still equals its reference
    assert all(line["sample_kl"] > 1e-4 for line in lines[1:])
    assert all(1 <= line["sample_length"] <= 9 for line in lines)
    # The exported checkpoint of that step, with the same request, gives identical samples.
    weights(undisturbed, EVERY, tmp_path / "hf")
    tokenizer = load_tokenizer(tmp_path / "hf")
    engine = EmbeddedEngine.load(tmp_path / "hf", tokenizer, TransformersConfig(dtype="float32"))
    data, kept = load_groups(inputs / "groups"), samples(undisturbed, EVERY)
    indices, per_prompt = choose_prompts(data, run_config(inputs, undisturbed), EVERY)
    assert per_prompt == 2  # six prompts in two steps, ten samples
    assert sum(len(record["responses"]) for record in kept) == 10
    assert [record["index"] for record in kept] == indices.tolist()
    prompts = [
        Prompt(
            group_id=data[index].group_id,
            token_ids=tuple(data[index].prompt_tokens.tolist()),
            messages=(),
            seeds=tuple(response["seed"] for response in record["responses"]),
        )
        for index, record in zip(indices.tolist(), kept, strict=True)
    ]
    found = {item.group_id: item for item in engine.generate(prompts, Sampling(num_responses=2, max_tokens=9))}
    for record in kept:
        generated = [list(response.token_ids) for response in found[record["group_id"]].responses]
        assert generated == [response["tokens"] for response in record["responses"]]


@pytest.mark.parametrize("killed_after", [3, 4])
def test_a_killed_run_continues_bit_by_bit(inputs: Path, undisturbed: Path, tmp_path: Path, killed_after: int) -> None:
    """After step 3 the samples of step 2 are in use; after step 4 new ones are drawn."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    for step in range(killed_after + 1, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step_{step:08d}")
    stale = output / "online" / "samples_00000004.jsonl"
    stale.write_text(stale.read_text().replace('"index": ', '"index": 1')) if killed_after == 3 else stale.unlink()
    train(run_config(inputs, output), build_regularizer)
    assert samples(output, 4) == samples(undisturbed, 4)
    ours, theirs = weights(output, STEPS, tmp_path / "a"), weights(undisturbed, STEPS, tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(metrics(output), metrics(undisturbed), strict=True):
        assert (one["step"], one["loss"], one["sample_kl"]) == (other["step"], other["loss"], other["sample_kl"])


def test_refusals(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"online\.max_tokens = 400"):
        train(run_config(inputs, tmp_path / "run", max_tokens=400), build_regularizer)
    with pytest.raises(ConfigError, match=r"online\.kl_weight = 0.1; the run needs a sampling engine"):
        train(run_config(inputs, tmp_path / "run"))


def test_groups_may_change_where_a_run_stopped(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train(run_config(inputs, output, stop_after=3), build_regularizer)
    assert [line["step"] for line in metrics(output)] == [1, 2, 3]
    for first_step, message in ((2, "groups of data.train"), (5, r"data\.first_step = 5")):
        with pytest.raises(ConfigError, match=message):
            train(run_config(inputs, output, groups="others", first_step=first_step), build_regularizer)
    shutil.copytree(output, tmp_path / "own")
    train(run_config(inputs, tmp_path / "own"), build_regularizer)
    ours, theirs = weights(tmp_path / "own", STEPS, tmp_path / "a"), weights(undisturbed, STEPS, tmp_path / "b")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Others from step 3 on: their first three groups come first, new samples are drawn at once, optimizer and rate go on.
    train(run_config(inputs, output, groups="others", first_step=3), build_regularizer)
    lines = metrics(output)
    assert ["sample_seconds" in line for line in lines] == [True, False, True, True, True, False]
    data = load_groups(inputs / "others")
    first = {data[int(index)].group_id for index in step_indices(0, len(data), 3, seed=1234, shuffle=True)}
    assert {record["group_id"] for record in samples(output, 3)} == first
    assert [data[record["index"]].group_id for record in samples(output, 3)] == [r["group_id"] for r in samples(output, 3)]
