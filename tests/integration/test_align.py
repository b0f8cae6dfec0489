"""`mpo align` on a tiny model: killed in every stage and repeated, from groups and from prompts."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron import device
from mpo_megatron.align import align as aligning
from mpo_megatron.align import defaults
from mpo_megatron.align import plan as planning
from mpo_megatron.align.align import align, open_folder
from mpo_megatron.align.estimate import estimate
from mpo_megatron.align.outcome import read_numbers
from mpo_megatron.align.plan import build_rounds, build_stages
from mpo_megatron.align.precision import describe_precision
from mpo_megatron.config import (
    AlignConfig,
    ChatConfig,
    ConfigError,
    PrepareConfig,
    to_dict,
)
from mpo_megatron.config.sealed import seal_yaml
from mpo_megatron.data import prepare as preparing
from mpo_megatron.data.store import read_info
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import DamagedError
from mpo_megatron.model import convert_export
from mpo_megatron.rollout import iterate as rounds
from mpo_megatron.rollout import records, stages
from mpo_megatron.rollout.chat import chat
from mpo_megatron.rollout.rounds import build_plan
from mpo_megatron.terminal.console import Console
from tests.distributed.launch import launch_ranks
from tests.kills import Killed, raise_at
from tests.tiny import save_model, save_tokenizer

QUIET = Console(quiet=True)
KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "prepare": lambda patch: raise_at(preparing, "_write", 1, patch),
    "train": lambda patch: raise_at(stages, "launch", 0, patch),
    "train, done and not noted": lambda patch: raise_at(rounds, "write_summary", 0, patch),
    "export": lambda patch: raise_at(convert_export, "write_shards", 0, patch),
    "answers": lambda patch: raise_at(records.LineWriter, "write", 1, patch),
    "report": lambda patch: raise_at(aligning, "report", 0, patch),
    "outcome": lambda patch: raise_at(aligning, "replace_file", 0, patch),
}
"""In sequence: after each kill, the same command resumes and reaches the next."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face model, groups and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", vocab_size=save_tokenizer(folder / "model"), num_hidden_layers=1, hidden_size=32)
    draw = random.Random(0)
    rows = [
        {
            "prompt": f"Say {index}.",
            "responses": [{"text": text, "reward": draw.random()} for text in ("yes", "no", "well", "ok")],
        }
        for index in range(40)
    ]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:16]))
    (folder / "vowels.py").write_text("def vowels(response, group):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    return folder


def settings(inputs: Path, output: Path, **changes: Any) -> AlignConfig:
    options: dict[str, Any] = {
        "model": str(inputs / "model"),
        "output": str(output),
        "data": [str(inputs / "groups.jsonl")],
        "answers": 2,
        "train": {"model": {"precision": "fp32"}, "data": {"row_tokens": 256, "groups_per_step": 12}, "eval_every": 0},
        "generate": {"max_tokens": 8},
    }
    return AlignConfig(**options | changes)


@pytest.fixture(scope="module")
def aligned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a command that was killed in every stage."""
    output = tmp_path_factory.mktemp("align") / "out"
    for arm in KILLS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "launch", launch_ranks)
            arm(patch)
            with pytest.raises(Killed):
                align(settings(inputs, output), QUIET)
    align(settings(inputs, output), QUIET)  # training is complete by now
    return output


@pytest.mark.distributed
def test_groups_and_a_model_become_an_aligned_model(inputs: Path, aligned: Path) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (inputs / "model", aligned / "aligned")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert read_info(aligned / "groups").num_groups == 36
    assert read_info(aligned / "groups-eval").num_groups == 4  # a tenth of all
    steps = [json.loads(line) for line in (aligned / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in steps if "lr" in row]
    assert [row["step"] for row in trained] == [1, 2, 3]
    assert all(row["lr"] <= defaults.LEARNING_RATES[0][1] for row in trained)
    page = (aligned / "align.md").read_text()
    assert f"{steps[-1]['eval/accuracy']:.1%}" in page
    assert "| groups | 4 | 4 |" in page
    assert page.count("**Before**") == page.count("**After**") == 2
    assert (aligned / "report.html").is_file()


@pytest.mark.distributed
def test_repeating_it_runs_nothing_and_shows_the_end_again(inputs: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare", "run_training", "convert", "run_command", "report"):
        monkeypatch.setattr(aligning, name, lambda *_: pytest.fail("a stage that was done"))
    for name in ("check_training", "check_installed", "check_generate"):  # this machine may lack what the stages needed
        monkeypatch.setattr(planning, name, lambda *_: pytest.fail("a check of a stage that was done"))
    output = io.StringIO()
    align(settings(inputs, aligned), Console(file=output, width=200))
    assert output.getvalue().count("already complete") == 6
    assert f"mpo chat {aligned} --beside {inputs / 'model'}" in output.getvalue()


@pytest.mark.parametrize("held_out", [None, 2])
def test_missing_inputs_are_named_by_their_option(inputs: Path, tmp_path: Path, held_out: int | None) -> None:
    with pytest.raises(DataError, match=r"^data = nothing; no such file or folder"):
        align(settings(inputs, tmp_path / "out", data=["nothing"], held_out=held_out), QUIET)
    with pytest.raises(ConfigError, match=r"^train: model is a section"):
        settings(inputs, tmp_path / "out", train={"model": 5})


@pytest.mark.distributed
def test_an_unfinished_stage_takes_other_options(inputs: Path, aligned: Path, tmp_path: Path) -> None:
    """Nothing that a failed stage needs is known before it fails."""
    output, changed = tmp_path / "out", {"optimizer": {"lr": 1e-3}}
    shutil.copytree(aligned, output)
    with pytest.raises(ConfigError, match=r"train.model = .* the stage that uses it is complete"):
        align(settings(inputs, output, train=changed), QUIET)
    (output / "train.json").unlink()  # as if training had failed
    again = settings(inputs, output, train=changed)
    open_folder(again, build_stages(again, inputs / "model"))
    assert json.loads((output / "align.json").read_text())["config"]["train"] == changed
    fewer = settings(inputs, output, train=changed, held_out=3)
    with pytest.raises(ConfigError, match="started with held_out = None, now it is 3"):
        open_folder(fewer, build_stages(fewer, inputs / "model"))


@pytest.mark.distributed
def test_a_folder_that_was_started_otherwise_is_refused(inputs: Path, aligned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"started with generate.max_tokens = 8, now it is 9"):
        align(settings(inputs, aligned, generate={"max_tokens": 9}), QUIET)
    (tmp_path / "groups.jsonl").write_text((inputs / "groups.jsonl").read_text() + "\n")
    with pytest.raises(ConfigError, match="started with other data"):
        align(settings(inputs, aligned, data=[str(tmp_path / "groups.jsonl")]), QUIET)
    save_model(tmp_path / "model", vocab_size=save_tokenizer(tmp_path / "model"), num_hidden_layers=1, hidden_size=32, seed=1)
    with pytest.raises(ConfigError, match="started with another model"):
        align(settings(inputs, aligned, model=str(tmp_path / "model")), QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match=r"holds \['file'\], but no align.json"):
        align(settings(inputs, tmp_path / "other"), QUIET)
    shutil.copytree(inputs, tmp_path / "moved")
    align(settings(tmp_path / "moved", aligned), QUIET)  # the same model by its digests


@pytest.mark.distributed
def test_damaged_metrics_are_not_shown(aligned: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    text = (aligned / "run" / "metrics.jsonl").read_text()
    metrics.write_text(text)
    assert read_numbers(metrics)
    metrics.write_text(text.replace('"eval/accuracy": 0', '"eval/accuracy": 1'))
    assert metrics.read_text() != text
    with pytest.raises(DamagedError, match=r"metrics.jsonl:"):
        read_numbers(metrics)


@pytest.mark.distributed
def test_an_adapter_is_exported_once_and_answers(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "launch", launch_ranks)
    train = {"model": {"precision": "fp32"}, "data": {"row_tokens": 256}, "eval_every": 0, "lora": {"rank": 2}, "max_steps": 1}
    config = settings(inputs, tmp_path / "out", train=train, answers=2)
    align(config, QUIET)
    assert (tmp_path / "out" / "aligned" / "adapter_model.safetensors").is_file()
    output = io.StringIO()
    align(config, Console(file=output, width=200))
    assert output.getvalue().count("already complete") == 6
    capsys.readouterr()
    chat(ChatConfig(model=str(tmp_path / "out"), prompt="Say 3.", temperature=0, max_tokens=4, device="cpu"))
    assert capsys.readouterr().out.strip()


@pytest.mark.distributed
def test_a_run_that_moves_keeps_its_precision(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpo train` refuses to resume with another one."""
    monkeypatch.setattr(stages, "launch", launch_ranks)
    config = settings(inputs, tmp_path / "out", train={"data": {"row_tokens": 256}, "eval_every": 0, "max_steps": 1}, answers=0)
    monkeypatch.setattr(device, "computes_bf16", lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        KILLS["train, done and not noted"](patch)
        with pytest.raises(Killed):
            align(config, QUIET)
    monkeypatch.setattr(device, "computes_bf16", lambda: True)
    output = io.StringIO()
    align(config, Console(file=output, width=200))
    assert "train.model.precision = fp32: kept" in output.getvalue()
    assert (tmp_path / "out" / "aligned" / "config.json").is_file()
    align(config, Console(file=output, width=200))
    assert output.getvalue().count("kept") == 1  # nothing is left to train


@pytest.mark.parametrize(("fast", "kept"), [(True, "fp32"), (False, "bf16")])
def test_started_training_keeps_its_precision(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fast: bool, kept: str
) -> None:
    monkeypatch.setattr(device, "computes_bf16", lambda: not fast)
    found = build_stages(settings(inputs, tmp_path, train={}), inputs / "model")
    assert found.train.model.precision == kept
    assert describe_precision({}, tmp_path) is None
    replace_file(tmp_path / "run" / "config.yaml", [seal_yaml(to_dict(found.train))])
    monkeypatch.setattr(device, "computes_bf16", lambda: fast)
    assert build_stages(settings(inputs, tmp_path, train={}), inputs / "model").train.model.precision == kept
    assert f"train.model.precision = {kept}: kept" in str(describe_precision({}, tmp_path))
    other = {"model": {"precision": "bf16" if fast else "fp32"}}
    assert build_stages(settings(inputs, tmp_path, train=other), inputs / "model").train.model.precision != kept
    assert describe_precision(other, tmp_path) is None
    shutil.rmtree(tmp_path / "run")  # the stage starts again
    assert build_stages(settings(inputs, tmp_path, train={}), inputs / "model").train.model.precision != kept


@pytest.mark.parametrize(("fast", "kept"), [(True, "fp32"), (False, "bf16")])
def test_started_rounds_keep_their_precision(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fast: bool, kept: str
) -> None:
    prompts = str(inputs / "prompts.jsonl")
    config = settings(inputs, tmp_path, data=[], prompts=prompts, train={}, score={"scorers": {"x": {"kind": "match"}}})
    monkeypatch.setattr(device, "computes_bf16", lambda: not fast)
    plan = build_plan(dataclasses.replace(build_rounds(config, inputs / "model"), nproc=1))
    rounds.open_folder(plan)
    monkeypatch.setattr(device, "computes_bf16", lambda: fast)
    again = build_plan(dataclasses.replace(build_rounds(config, inputs / "model"), nproc=2))
    rounds.open_folder(again)
    assert again.rounds[0].train.model.precision == kept
    assert f"train.model.precision = {kept}: kept" in str(describe_precision({}, tmp_path))


@pytest.mark.distributed
def test_prompts_become_rounds(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "launch", launch_ranks)
    config = settings(
        inputs,
        tmp_path / "out",
        data=[],
        prompts=str(inputs / "prompts.jsonl"),
        rounds=1,
        held_out=4,
        generate={"num_responses": 4, "max_tokens": 8, "empty": "keep"},
        score={"scorers": {"vowels": {"kind": "function", "function": f"{inputs / 'vowels.py'}:vowels"}}},
        select={"truncated": "keep", "duplicates": "keep"},
        iterate={"held_out_responses": 3, "measure_kl": False},
    )
    output = io.StringIO()
    align(config, Console(file=output, width=200))
    page = (tmp_path / "out" / "align.md").read_text()
    (report,) = json.loads((tmp_path / "out" / "rounds" / "report.json").read_text())["rounds"]
    for side in ("before", "after"):
        assert f"{report[side]['reward']:.4g} ± {report[side]['error']:.2g}" in page
    assert page.count("**Before**") == page.count("**After**") == 2
    assert "tokens per answer, mean of 4" in page
    samples = (tmp_path / "out" / "rounds" / "policies" / "01" / "samples" / "samples.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["responses"]) for line in samples] == [3] * 4
    assert report["kl"] is None
    assert f"mpo chat {tmp_path / 'out'} --beside" in output.getvalue()
    last = tmp_path / "out" / "rounds" / "policies" / "01" / "hf"
    for path in last.iterdir():
        assert (tmp_path / "out" / "aligned" / path.name).read_bytes() == path.read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "aligned")


# --------------------------------------------------------------------------------------------------- the plan


def test_a_plan_writes_nothing(inputs: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    align(settings(inputs, tmp_path / "out", plan=True), Console(file=output, width=200))
    assert "hold out 4 groups" in output.getvalue()
    assert re.search(r"Training on 36 groups takes (about|less than a) .*; .* the reference's log-probs", output.getvalue())
    assert not (tmp_path / "out").exists()
    two = settings(inputs, tmp_path / "out", plan=True, train={"parallel": {"tensor": 2}, "max_steps": 2})
    align(two, Console(file=output, width=200))
    assert "Training on 256 groups takes " in output.getvalue()
    assert ", 1 epoch " in output.getvalue()
    assert ", 2 steps " in output.getvalue()


def test_a_plan_of_rounds_says_how_long_they_take(inputs: Path, tmp_path: Path) -> None:
    output = io.StringIO()
    scorers = {"x": {"kind": "match"}}
    changes: dict[str, Any] = {"data": [], "prompts": str(inputs / "prompts.jsonl"), "rounds": 2, "score": {"scorers": scorers}}
    align(settings(inputs, tmp_path / "out", plan=True, **changes), Console(file=output, width=400))
    # 16 prompts, two held out; answers are assumed to have half of generate.max_tokens.
    assert "Per round: 7 prompts × 8 answers of about 4 tokens" in output.getvalue()
    assert re.search(r"minutes? at [\d,]+ tokens/s; training takes .* minutes?.* All rounds, .* minutes? on", output.getvalue())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("lora", "factor"), [({}, 1), ({"rank": 0}, 1), ({"rank": 8}, defaults.ADAPTER_RATE)])
def test_only_an_adapter_takes_the_rate_of_adapters(inputs: Path, tmp_path: Path, lora: dict[str, Any], factor: int) -> None:
    rate = factor * defaults.LEARNING_RATES[0][1]
    train = {"lora": lora}
    assert build_stages(settings(inputs, tmp_path / "a", train=train), inputs / "model").train.optimizer.lr == rate
    score = {"scorers": {"x": {"kind": "match"}}}
    prompts = settings(inputs, tmp_path / "a", data=[], prompts=str(inputs / "prompts.jsonl"), train=train, score=score)
    assert build_rounds(prompts, inputs / "model").train["optimizer"]["lr"] == rate


@pytest.mark.parametrize(
    ("train", "fast", "precision"),
    [({}, True, "bf16"), ({}, False, "fp32"), ({"model": {"precision": "bf16"}}, False, "bf16")],
)
def test_precision_is_what_the_processor_computes_faster(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], fast: bool, precision: str
) -> None:
    monkeypatch.setattr(defaults.device, "computes_bf16", lambda: fast)
    stages = build_stages(settings(inputs, tmp_path / "a", train=train), inputs / "model")
    assert stages.train.model.precision == precision
    assert ("model.precision" in stages.chosen) == (precision == "fp32")
    score = {"scorers": {"x": {"kind": "match"}}}
    prompts = settings(inputs, tmp_path / "a", data=[], prompts=str(inputs / "prompts.jsonl"), train=train, score=score)
    rounds = build_rounds(prompts, inputs / "model")
    assert rounds.train.get("model", {}).get("precision", "bf16") == precision


@pytest.mark.parametrize(("loss", "partition"), [({}, "labels"), ({"params": {"beta": 0.1}}, "labels"), ({"name": "dpo"}, None)])
def test_labels_split_the_groups_of_the_default_loss(
    inputs: Path, tmp_path: Path, loss: dict[str, Any], partition: str | None
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "pairs.jsonl").write_text('{"prompt": "Say.", "chosen": "yes", "rejected": "no"}\n' * 2)
    options = {"input": [str(output / "pairs.jsonl")], "tokenizer": str(inputs / "model")}
    for name in ("groups", "groups-eval"):
        preparing.prepare(PrepareConfig(output=str(output / name), **options), QUIET)
    found = build_stages(settings(inputs, output, train={"loss": loss}), inputs / "model").train.loss
    assert found.params.get("partition") == partition
    assert found.params.get("beta") == loss.get("params", {}).get("beta")


@pytest.mark.parametrize(("given", "held_out"), [(None, 4), (7, 7)])
def test_a_number_of_held_out_groups_that_is_given_stays(inputs: Path, tmp_path: Path, given: int | None, held_out: int) -> None:
    """By default a tenth."""
    assert build_stages(settings(inputs, tmp_path, held_out=given), inputs / "model").prepare.held_out == held_out
    prompts = settings(
        inputs,
        tmp_path,
        data=[],
        prompts=str(inputs / "groups.jsonl"),
        held_out=given,
        score={"scorers": {"x": {"kind": "match"}}},
    )
    assert build_rounds(prompts, inputs / "model").held_out == held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "give exactly one of them"),
        ({"prompts": "p.jsonl"}, "give exactly one of them"),
        ({"data": ["-"]}, "a resumed run could not read standard input again"),
        ({"score": {"scorers": {"x": {"kind": "match"}}}}, "score is a stage of on-policy rounds"),
        ({"iterate": {"measure_kl": False}}, "iterate is a stage of on-policy rounds"),
        ({"rounds": 5}, "rounds = 5; it has an effect only with prompts"),
        ({"model": "none/at/all"}, "no such folder"),
        ({"prepare": {"held_out": 3}}, "prepare.held_out is set by mpo align itself"),
        ({"generate": {"max_prompts": 3}}, "generate.max_prompts is set by mpo align itself"),
        ({"train": {"model": {"checkpoint": "x"}}}, "train.model.checkpoint is set by mpo align itself"),
        ({"train": {"optimizer": {"lr": -1}}}, "train.optimizer.lr = -1"),
        ({"train": {"optimizers": {}}}, "optimizers: there is no such option"),
        ({"generate": {"engine": "vllm"}}, r"generate\.engine = vllm needs the package vllm, which is not installed"),
        ({"train": {"logging": {"wandb_project": "p"}}}, r"logging\.wandb_project is set, but wandb is not installed"),
        ({"train": {"model": {"fp8": "current"}}}, r"model\.fp8 = current"),
        ({"train": {"loss": {"name": "mpoo"}}}, r"loss\.name = 'mpoo'; .*did you mean mpo"),
        (
            {"data": [], "prompts": "p", "score": {"scorers": {}}, "iterate": {"seed": 1}},
            "iterate.seed is set by mpo align itself",
        ),
    ],
)
def test_what_cannot_work_is_named_before_anything_runs(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    find = importlib.util.find_spec
    absent = ("vllm", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    with pytest.raises(ConfigError, match=message):
        align(settings(inputs, tmp_path / "out", **changes), QUIET)
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        align(settings(inputs, tmp_path / "out", data=[str(tmp_path / "none.jsonl")]), QUIET)


@pytest.mark.distributed
def test_on_gpus_the_planner_chooses_the_layout(inputs: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated GPUs; the user's options are kept."""
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"total_memory": 79 * 2**30}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(planning, "check_training", lambda *_: None)  # it would ask the GPU for its kernels
    config = settings(inputs, aligned, train={"data": {"groups_per_step": 12}})
    found = build_stages(config, inputs / "model")
    assert "parallel.tensor" in found.chosen
    assert found.train.data.row_tokens == found.chosen["data.row_tokens"]
    given = dataclasses.replace(config, train={"parallel": {"tensor": 2}, "optimizer": {"lr": 1e-7}})
    found = build_stages(given, inputs / "model")
    assert found.train.parallel.tensor == 2
    assert not {"parallel.tensor", "optimizer.lr"} & found.chosen.keys()
    assert "less than a minute on 2 × h100; with the reference's log-probs." in estimate(config, found)
    assert "less than a minute on 2 × h100" in estimate(given, found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    assert "parallel.tensor" not in build_stages(config, inputs / "model").chosen
    assert "mpo plan does not know Another GPU; it knows a100-40" in estimate(config, found)
