"""The command: output, files and refusals; and its estimates change in the right direction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.config import (
    ConfigError,
    DataConfig,
    EndpointConfig,
    LiveVllmConfig,
    ModelConfig,
    OnlineConfig,
    ParallelConfig,
    PlanConfig,
    TrainConfig,
)
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.plan.figures import summarize
from mpo_megatron.plan.hardware import TABLE
from mpo_megatron.plan.plan import build_problem, plan
from mpo_megatron.plan.remedies import explain_nothing_fits
from mpo_megatron.plan.search import Workload, search
from mpo_megatron.plan.step_time import TIMES
from mpo_megatron.train.throughput import peak_flops
from tests.tiny import random_groups, save_groups, save_tokenizer

RUN = """
output: run
model:
  checkpoint: qwen
  recompute: {recompute}
data:
  train: groups
  row_tokens: 8192
parallel:
  tensor: {tensor}
  pipeline: {pipeline}
"""


def build(*, gpus: int = 8, parallel: ParallelConfig | None = None, **options: Any) -> Workload:
    config = PlanConfig(model="Qwen2.5-7B", gpus=gpus, groups_per_step=32, **options)
    model, data = ModelConfig(checkpoint="qwen"), DataConfig(train="groups")
    return build_problem(config, TrainConfig(output="run", model=model, data=data, parallel=parallel or ParallelConfig()))


def write_run(folder: Path, *, recompute: str = "none", tensor: int = 1, pipeline: int = 1) -> str:
    path = folder / "train.yaml"
    path.write_text(RUN.format(recompute=recompute, tensor=tensor, pipeline=pipeline))
    return str(path)


def test_a_run_that_fits_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan.json"
    run = write_run(tmp_path, tensor=4, pipeline=2)
    plan(PlanConfig(model="Qwen2.5-7B", gpus=8, train=run, groups_per_step=32, suggest=2, output=str(output)))
    printed = capsys.readouterr().out
    for words in ("7.62 G parameters", "tensor 4 × pipeline 2", "layouts that fit", "bubble", "days"):
        assert words in printed
    content = json.loads(output.read_text())
    assert content["run"]["fits"]
    assert len(content["run"]["stages"]) == 2
    assert len(content["suggestions"]) == 2
    parts = ("weights", "gradients", "optimizer", "activations", "working", "reference", "overhead")
    for stage in content["run"]["stages"]:
        assert sum(stage[part] for part in parts) == stage["total"] <= content["limit_bytes"]
    seconds = content["run"]["time"]
    assert content["run"]["run"]["seconds_per_step"] == pytest.approx(sum(seconds[part] for part in TIMES))


def test_epochs_repeat_steps_and_not_reference_log_probs() -> None:
    problem = build()
    found = problem.evaluate(ParallelConfig(tensor=4, pipeline=2), "none", 8192)
    once, thrice = (summarize(problem, found, epochs * problem.sequences.num_groups) for epochs in (1, 3))
    assert thrice["hours"] == pytest.approx(3 * once["hours"])
    assert thrice["reference_hours"] == once["reference_hours"] > 0
    assert thrice["days"] == pytest.approx((thrice["hours"] + thrice["reference_hours"]) / 24)


def test_a_run_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    config = PlanConfig(model="Qwen2.5-7B", gpus=8, train=write_run(tmp_path, tensor=1), groups_per_step=32, suggest=0)
    with pytest.raises(ConfigError) as refused:
        plan(config)
    message = str(refused.value)
    assert "stage 0 needs" in message
    assert "the largest part is activations" in message
    assert "It would fit with model.recompute = full" in message
    assert "parallel.tensor = 2" in message


def test_what_would_make_it_fit_does(tmp_path: Path) -> None:
    better = write_run(tmp_path, tensor=1, recompute="full")
    plan(PlanConfig(model="Qwen2.5-7B", gpus=8, train=better, groups_per_step=32, suggest=0))


def test_nothing_fits_on_too_few_gpus() -> None:
    problem = build(gpus=1, hardware="a100-40")
    assert not search(problem)
    message = explain_nothing_fits(problem)
    gpus = int(message.split("with ")[1].split(" GPUs")[0])
    assert gpus > 1
    assert search(build(gpus=gpus, hardware="a100-40"))
    assert not search(build(gpus=gpus // 2, hardware="a100-40"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "h1000"}, r"hardware = h1000; there is no such entry; choose one of a100-40"),
        ({"model": "Llama"}, r"model = Llama; neither a checkpoint folder nor a known model"),
        ({"responses": 1}, r"responses = 1; loss.name = mpo compares a group's responses; give at least 2"),
        ({"hardware": "a100", "fp8": "current"}, r"model.fp8 = current, but hardware = a100 has no FP8"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(PlanConfig(**{"model": "Qwen2.5-7B", "gpus": 8, **options}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"neither model nor train is given"),
        ({"model": "x", "efficiency": 1.5}, r"efficiency = 1.5; it is a share"),
        ({"model": "x", "responses": 0}, r"responses = 0; it must be at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanConfig(gpus=8, **options)


def test_lengths_come_from_prepared_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(tmp_path / "model")
    groups = random_groups(24)
    save_groups(tmp_path / "groups", groups, tmp_path / "model")
    plan(PlanConfig(model="Qwen2.5-0.5B", gpus=2, data=str(tmp_path / "groups"), groups_per_step=8, suggest=1))
    printed = capsys.readouterr().out
    assert str(tmp_path / "groups") in printed.replace("\n", "")
    assert "24 groups in" in printed
    with pytest.raises(ConfigError, match=r"prompt_tokens and spread: lengths come from data = .*groups; remove one of them"):
        plan(PlanConfig(model="Qwen2.5-0.5B", gpus=2, data=str(tmp_path / "groups"), prompt_tokens=99, spread=0.1))
    monkeypatch.chdir(tmp_path)  # nobody named the folder `groups` that is here
    plan(PlanConfig(model="Qwen2.5-0.5B", gpus=2, groups_per_step=8, groups=1000, suggest=1))
    assert "1,000 groups in" in capsys.readouterr().out
    labels = [dataclasses.replace(group, rewards=None, labels=np.zeros(group.num_responses, dtype=np.int8)) for group in groups]
    write_groups(tmp_path / "labels", labels, tokenizer_digest="", vocab_size=256, end_token_ids=[], reward_kind="labels")
    with pytest.raises(ConfigError, match=r"loss.name = mpo reads rewards, but .*labels has chosen / rejected labels only"):
        plan(PlanConfig(model="Qwen2.5-0.5B", gpus=2, data=str(tmp_path / "labels")))


def test_layouts_that_do_not_divide_are_refused_by_the_trainers_own_checks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor = 3"):
        plan(PlanConfig(model="Qwen2.5-7B", gpus=6, train=write_run(tmp_path, tensor=3), suggest=0))


def test_fp8_that_does_not_divide_a_matrix_is_refused() -> None:
    config = PlanConfig(model="Qwen2.5-0.5B", gpus=2, fp8="mxfp8")
    model = ModelConfig(checkpoint="qwen", fp8="mxfp8")
    problem = build_problem(config, TrainConfig(output="run", model=model, data=DataConfig(train="groups")))
    problem.evaluate(ParallelConfig(), "none", 8192)
    # On two ranks 448 = 14 · 32 channels of queries, 576 = 18 · 32 with keys and values, 2,432 = 76 · 32 of the MLP.
    problem.evaluate(ParallelConfig(tensor=2), "none", 8192)
    odd = dataclasses.replace(problem, family=dataclasses.replace(problem.family, intermediate_size=4864 + 32))
    with pytest.raises(
        ConfigError, match=r"model.fp8 = mxfp8 multiplies .* multiples of 32, but the model's intermediate_size is 2448"
    ):
        odd.evaluate(ParallelConfig(tensor=2), "none", 8192)


def test_search_finds_only_what_fits_the_fastest_first() -> None:
    problem = build()
    found = search(problem)
    assert found
    assert all(problem.fits(candidate) for candidate in found)
    assert [candidate.time.seconds for candidate in found] == pytest.approx(sorted(c.time.seconds for c in found), abs=1e-3)


def test_engines_on_other_gpus_take_no_memory_of_those_that_train() -> None:
    server = EndpointConfig(base_url="http://node7:8000/v1", model="m")
    for online, counted in (
        (OnlineConfig(), False),
        (OnlineConfig(kl_weight=0.1), True),
        (OnlineConfig(kl_weight=0.1, engine="vllm"), True),
        (OnlineConfig(kl_weight=0.1, engine="vllm", vllm=LiveVllmConfig(gpus="own")), False),
        (OnlineConfig(kl_weight=0.1, engine="server", endpoint=server), False),
    ):
        assert (dataclasses.replace(build(), online=online).sampler(1) is not None) == counted


def test_bubble_is_that_of_1f1b() -> None:
    problem = build(gpus=8)
    plain = problem.evaluate(ParallelConfig(pipeline=4), "full", 4096)
    interleaved = problem.evaluate(ParallelConfig(pipeline=4, virtual_pipeline=7), "full", 4096)
    rows = plain.packed.rows_per_replica
    # (p − 1) / m of the busy time if all stages took as long; the last has the output layer, and the others wait for it less.
    share = plain.time.bubble_share
    assert 0.5 * 3 / rows < share / (1 - share) < 3 / rows
    assert interleaved.time.bubble < plain.time.bubble / 4


def test_more_recomputation_costs_a_forward_pass() -> None:
    problem = build()
    none, full = (problem.evaluate(ParallelConfig(tensor=2), mode, 4096).time for mode in ("none", "full"))
    assert none.model_flops == full.model_flops
    assert 1.2 < full.compute / none.compute < 4 / 3
    assert full.tensor / none.tensor == pytest.approx(14 / 10)


def test_more_gpus_do_a_step_faster_but_not_in_proportion() -> None:
    seconds = {gpus: search(build(gpus=gpus))[0].time.seconds for gpus in (8, 32)}
    assert seconds[32] < seconds[8] < 4.5 * seconds[32]


def test_the_reference_is_a_forward_pass() -> None:
    time = build().evaluate(ParallelConfig(tensor=2), "none", 4096).time
    assert 0.2 < time.forward_seconds / time.seconds < 0.4


@pytest.mark.parametrize("name", TABLE)
def test_planned_peak_is_the_one_that_a_run_is_measured_against(name: str) -> None:
    assert 1e12 * TABLE[name].bf16_tflops == peak_flops(f"NVIDIA {name.upper()}")
