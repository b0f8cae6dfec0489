"""Small inputs of every command, and the commands run in this process on a damaged one of their files."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mpo_megatron import cli
from mpo_megatron.config import ConvertConfig, TrainConfig, from_dict, parsing
from mpo_megatron.doctor import abilities
from mpo_megatron.files import digests
from mpo_megatron.model.convert import convert
from tests.damages import damaged
from tests.run_folder import write_data, write_run
from tests.tiny import random_groups, save_groups, save_model
from tests.training import train

RESEALED = "!"
"""Ends a file's name: after the damage, its folder's digests are written again, as by someone who edits the file on purpose."""

COMMANDS = {
    "report": ("report {run} --output {out}/page.html", "run/metrics.jsonl run/config.yaml run/run.json groups/prepare.json"),
    "inspect": (
        "inspect --data {random} --tokenizer {hf}",
        "random/prepare.json random/groups.arrow hf/tokenizer_config.json",
    ),
    "evaluate": (
        "evaluate --candidate {lines.jsonl} --baseline {other.jsonl} --num_resamples 2 --output {out}/e",
        "lines.jsonl",
    ),
    "select": (
        "select --input {lines.jsonl} --output {out}/s --sets mean --length_unit tokens --max_length 9",
        "lines.jsonl",
    ),
    "score": ("score --config {score.yaml} --output {out}/s", "lines.jsonl score.yaml"),
    "plan": ("plan --config {plan.yaml}", "plan.yaml train.yaml hf/config.json"),
    "plan, adapter": ("plan --train {tune.yaml} --gpus 8 --suggest 2", "tune.yaml hf/config.json"),
    "launch torchrun": ("launch torchrun --config {launch.yaml} --dry_run", "launch.yaml train.yaml"),
    "launch slurm": ("launch slurm --config {slurm.yaml} --dry_run", "slurm.yaml train.yaml hf/config.json"),
    "launch slurm-array": ("launch slurm-array --config {array.yaml} --dry_run", "array.yaml generate.yaml"),
    "launch kubernetes": ("launch kubernetes --config {kubernetes.yaml} --dry_run", "kubernetes.yaml train.yaml"),
    "doctor": ("doctor --config {tune.yaml} --json", "tune.yaml hf/config.json model/conversion.json"),
    "align": ("align --config {align.yaml} --plan --output {out}/a", "align.yaml lines.jsonl hf/config.json"),
    "align, rounds": ("align --config {rounds.yaml} --plan --output {out}/a", "rounds.yaml prompts.jsonl"),
    "prepare": ("prepare --config {prepare.yaml} --output {out}/p", "prepare.yaml lines.jsonl hf/tokenizer.json"),
    "prepare, json": ("prepare --input {lines.json} --tokenizer {hf} --output {out}/p", "lines.json hf/tokenizer_config.json"),
    "prepare, csv": (
        "prepare --input {pairs.csv} --tokenizer {hf} --output {out}/p",
        "pairs.csv hf/chat_template.jinja hf/generation_config.json",
    ),
    "prepare, parquet": ("prepare --input {pairs.parquet} --tokenizer {hf} --output {out}/p", "pairs.parquet"),
    "train": (
        "train --config {train.yaml} --nproc 1 --output {out}/t",
        "train.yaml random/prepare.json hf/config.json hf/tokenizer.json hf/model.safetensors",
    ),
    "train, resumed": (
        "train --config {run.yaml} --nproc 1 --output {trained}",
        "run.yaml {step}/state.json! {step}/megatron/.metadata! {step}/conversion.json! "
        "model/conversion.json! model/hf/config.json! model/mpo_digests.json random/groups.arrow trained/run.json",
    ),
    "train, adapter": (
        "train --config {tune.yaml} --nproc 1 --output {out}/t",
        "tune.yaml model/conversion.json! model/hf/config.json! adapter/adapter.json!",
    ),
    "convert": (
        "convert --input {hf} --output {out}/m",
        "hf/config.json hf/generation_config.json hf/tokenizer.json hf/tokenizer_config.json hf/model.safetensors",
    ),
    "convert, sharded": (
        "convert --input {sharded} --output {out}/m",
        "sharded/model.safetensors.index.json sharded/one.safetensors",
    ),
    "convert, back": (
        "convert --input {model} --output {out}/h",
        "model/conversion.json! model/mpo_digests.json! model/hf/config.json! model/hf/tokenizer_config.json! "
        "model/megatron/.metadata! model/megatron/common.pt! model/megatron/metadata.json! model/conversion.json",
    ),
    "convert, step": (
        "convert --input {trained} --output {out}/h",
        "{step}/state.json! {step}/megatron/.metadata! {step}/conversion.json {step}/hf/config.json!",
    ),
    "convert, adapter": (
        "convert --input {peft} --base {model} --output {out}/m",
        "peft/adapter_config.json peft/adapter_model.safetensors model/hf/config.json! model/conversion.json!",
    ),
    "convert, adapter merged": (
        "convert --input {peft} --base {model} --merge --output {out}/m",
        "peft/adapter_config.json peft/adapter_model.safetensors",
    ),
    "convert, adapter back": (
        "convert --input {adapter} --output {out}/h",
        "adapter/adapter.json! adapter/megatron/.metadata! adapter/peft/adapter_config.json! adapter/hf/config.json!",
    ),
    "convert, adapter back and merged": (
        "convert --input {adapter} --merge --output {out}/h",
        "adapter/adapter.json! adapter/conversion.json! model/conversion.json!",
    ),
}
"""Command → its arguments, with paths in place of names in braces, and the files to damage."""


def write_inputs(folder: Path) -> None:
    """Write small inputs of every command to `folder`."""
    data = write_data(folder / "groups", 3)
    write_run(folder / "run", data, steps=4, total_steps=4, every=2)
    hf = save_model(folder / "hf", hidden_size=32, num_hidden_layers=1)
    _write_rows(folder)
    _write_checkpoints(folder, hf)
    _write_configurations(folder)


def _write_rows(folder: Path) -> None:
    responses = [{"text": "yes", "reward": 0.5, "num_tokens": 3}, {"text": "no", "reward": 0.1, "num_tokens": 2}]
    lines = [{"group_id": f"g{index}", "prompt": "Why?", "reference_answer": "yes", "responses": responses} for index in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name in ("lines.jsonl", "other.jsonl"):
        (folder / name).write_text(text)
    (folder / "lines.json").write_text(json.dumps(lines))
    prompts = [{"prompt": f"Say {index}.", "reference_answer": "yes"} for index in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    pairs = [{"prompt": f"Say {index}.", "chosen": "yes", "rejected": "no"} for index in range(4)]
    pq.write_table(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(pairs)


def _write_checkpoints(folder: Path, hf: Path) -> None:
    """A sharded model, a converted one, a run with a step, and an adapter in both forms."""
    weights = load_file(hf / "model.safetensors")
    shutil.copytree(hf, folder / "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    half = len(weights) // 2
    places = {name: "one.safetensors" if index < half else "two.safetensors" for index, name in enumerate(weights)}
    for file in ("one.safetensors", "two.safetensors"):
        save_file({name: weight for name, weight in weights.items() if places[name] == file}, folder / "sharded" / file)
    total = sum(weight.numel() * weight.itemsize for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(ConvertConfig(input=str(hf), output=str(folder / "model")))
    save_groups(folder / "random", random_groups(4), folder / "model")
    train(from_dict(TrainConfig, run_options(folder), "run"))
    torch.manual_seed(0)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "base_model_name_or_path": "base"}
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    name, (rows, columns) = "model.layers.0.self_attn.o_proj", weights["model.layers.0.self_attn.o_proj.weight"].shape
    matrices = {"A": torch.randn(2, columns), "B": torch.randn(rows, 2)}
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": matrix for side, matrix in matrices.items()},
        folder / "peft" / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    convert(ConvertConfig(input=str(folder / "peft"), base=str(folder / "model"), output=str(folder / "adapter")))


def run_options(folder: Path) -> dict[str, Any]:
    """A run of one step."""
    return {
        "output": str(folder / "trained"),
        "model": {"checkpoint": str(folder / "model"), "precision": "fp32"},
        "data": {"train": str(folder / "random"), "groups_per_step": 2, "row_tokens": 256},
        "loss": {"name": "mpo", "params": {"beta": 0.1}},
        "checkpoint": {"asynchronous": False},
        "optimizer": {"lr": 1e-5},
        "max_steps": 1,
    }


def _write_configurations(folder: Path) -> None:
    """A YAML file of each command's options."""
    lines, hf, train = (str(folder / name) for name in ("lines.jsonl", "hf", "train.yaml"))
    lora = {"rank": 2, "alpha": 4, "target_modules": ["o_proj"]}
    scorers = {"m": {"kind": "match", "weight": 0.5}, "r": {"kind": "regex", "pattern": "y[a-z]s", "weight": 0.5}}
    stages = {
        "train": {"loss": {"name": "mpo", "params": {"beta": 0.1}}, "lora": {"rank": 2}, "data": {"row_tokens": 256}},
        "prepare": {"max_prompt_tokens": 64},
        "generate": {"max_tokens": 8},
    }
    rounds = {
        "prompts": str(folder / "prompts.jsonl"),
        "rounds": 2,
        "score": {"scorers": scorers},
        "iterate": {"reference": "initial"},
    }
    configurations: dict[str, dict[str, Any]] = {
        "run": run_options(folder),
        "train": run_options(folder)
        | {"model": {"checkpoint": hf, "precision": "fp32"}, "parallel": {"tensor": 1, "context": 1}},
        "tune": run_options(folder) | {"lora": lora},
        "plan": {"train": train, "gpus": 8, "gpus_per_node": 8, "hardware": "h100", "efficiency": 0.5, "suggest": 0},
        "launch": {"train": train, "gpus_per_node": 1},
        "slurm": {"train": train, "gpus_per_node": 1, "nodes": 2, "time": "2:00:00", "sbatch": ["--exclusive"]},
        "kubernetes": {"train": train, "gpus_per_node": 1, "image": "i", "volumes": {"claim": str(folder)}},
        "array": {"generate": str(folder / "generate.yaml"), "tasks": 4},
        "generate": {"prompts": rounds["prompts"], "model": hf, "output": str(folder / "samples")},
        "score": {"input": lines, "scorers": scorers},
        "align": {"model": hf, "data": [lines], "held_out": 2, **stages},
        "rounds": {"model": hf, **rounds, **stages, "iterate": {"reference": "initial"}},
        "prepare": {"input": [lines], "tokenizer": hf, "seed": 3},
    }
    for name, options in configurations.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options, sort_keys=False))


@contextlib.contextmanager
def without_processes() -> Iterator[None]:
    """Within it, commands start no ranks and no other processes, and draw no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for picture in ("evaluate.evaluate.plot_evaluation", "rollout.select.plot_spacing"):
            patch.setattr(f"mpo_megatron.{picture}", lambda *_: None)  # half a second each
        patch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # five megabytes
        patch.setattr("mpo_megatron.train.launcher.launch", lambda *_, **__: 0)
        patch.setattr("mpo_megatron.doctor.abilities.ask", _ask)
        patch.setattr("mpo_megatron.doctor.doctor.describe_software", lambda **_: ([], []))
        patch.setattr(parsing, "build_parser", functools.cache(parsing.build_parser))  # half a second for `mpo train`
        yield


def _ask(config: str | None) -> dict[str, Any]:
    """`abilities.ask` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        abilities.main([config] if config else [])
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


def files_of(command: str, folder: Path) -> list[str]:
    """Names of the files to damage; see `RESEALED`."""
    [step] = (folder / "trained" / "checkpoints").iterdir()
    return COMMANDS[command][1].replace("{step}", str(step.relative_to(folder))).split()


def run_damaged(command: str, folder: Path, name: str, seed: int | None, out: Path) -> int:
    """The exit code of a command on inputs of which one file is damaged; the file is then restored.

    Args:
        seed: of the damage; None: no damage
    """
    path = folder / name.removesuffix(RESEALED)
    sealed = _sealing(path) if name.endswith(RESEALED) else None
    before = {file: file.read_bytes() for file in {path, sealed or path}}
    places = {item.name: str(item) for item in folder.iterdir()} | {"out": str(out)}
    try:
        if seed is not None:
            path.write_bytes(damaged(path, seed))
        if sealed is not None:
            _seal_again(path, sealed)
        with contextlib.chdir(out):
            return cli._run([_fill(word, places) for word in COMMANDS[command][0].split()])
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def _sealing(path: Path) -> Path:
    """The file with the digest of another."""
    for folder in path.parents:
        for name in (digests.LIST, digests.STATE):
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(path)


def _seal_again(path: Path, sealed: Path) -> None:
    """Write the digests for a file's present content."""
    if path == sealed:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(path.read_bytes())
            del content[digests.DIGEST]
            sealed.write_bytes(digests.seal(content))
    elif sealed.name == digests.LIST:
        digests.write_list(sealed.parent)
    else:
        content = digests.unseal(sealed)
        content["files"][path.relative_to(sealed.parent).as_posix()] = digests.digest_file(path)
        sealed.write_bytes(digests.seal_sorted(content))


def _fill(word: str, places: dict[str, str]) -> str:
    """The word with paths in place of names in braces."""
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", path)
    return word
