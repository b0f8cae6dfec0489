"""Small files of every kind that the package writes, and their readers: the inputs of tools/damage.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mpo_megatron.config import (
    CheckpointConfig,
    ConvertConfig,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PrepareConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    load_yaml,
)
from mpo_megatron.config.generate import TransformersConfig
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.readers import read_groups
from mpo_megatron.data.sources import open_source
from mpo_megatron.data.store import load_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.evaluate import held_out
from mpo_megatron.files.digests import DamagedError, seal_lines, unseal_lines, write_list
from mpo_megatron.hf.layout import read_model
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.safetensors_io import RowReader, list_tensors
from mpo_megatron.report.run_record import read_lines as read_metrics
from mpo_megatron.report.run_record import read_run
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.models import EXPORT_FOLDER, hugging_face_folder, read_model_settings
from mpo_megatron.rollout.records import LineWriter, encode_line, find_lines, read_ids, read_lines, read_summary, write_summary
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.select import select
from mpo_megatron.rollout.stages import save_config
from mpo_megatron.terminal.console import Console
from mpo_megatron.train import loop
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.checkpoints.step_folders import complete_steps, read_state
from mpo_megatron.train.checkpoints.verification import check_whole
from mpo_megatron.train.reference_cache import read_cache
from mpo_megatron.train.setup import build_setup
from mpo_megatron.train.tracking.facts import earlier_starts
from mpo_megatron.train.tracking.files import JsonlTracker
from mpo_megatron.train.tracking.services import read_id, write_id
from mpo_megatron.viewer.source import num_replicas
from tests.tiny import random_groups, save_groups, save_model

Read = Callable[[], Any]
"""Reads all files of a kind, as the package does; returns what would be used."""
NUMBER_GROUPS = 12


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Files that are read together."""

    name: str
    files: list[Path]
    """Files to damage in turn."""
    open: Callable[[], AbstractContextManager[Read]]
    """Prepares a reader, once per process."""
    lines: bool = False
    """The result is a list of lines, and a file truncated at a line's end equals a killed command's."""
    slow: bool = False
    """A reader that takes seconds: it gets a fifth of the trials."""
    again: bool = False
    """Damaged parts of the result may be None: they are computed again, with a message."""


def length_reward(response: str, group: dict[str, Any]) -> float:
    """Score of a response."""
    return float(len(response))


LAYERS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 1},
    "qwen3_5_text": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}
"""The layers of each kind of model."""


def write_inputs(root: Path, model_type: str = "qwen3") -> None:
    """Write small files of every kind, with the commands that write them."""
    quiet = Console(quiet=True)
    save_model(root / "hf", model_type=model_type, hidden_size=32, **LAYERS[model_type])
    convert(ConvertConfig(input=str(root / "hf"), output=str(root / "model")))
    texts = [
        f"Question {index}: {''.join(chr(97 + (index * step) % 26) for step in range(30))}?" for index in range(NUMBER_GROUPS)
    ]
    lines = [json.dumps({"id": f"p{index}", "prompt": text}) + "\n" for index, text in enumerate(texts)]
    (root / "prompts.jsonl").write_text("".join(lines))
    generated = GenerateConfig(
        prompts=str(root / "prompts.jsonl"),
        model=str(root / "model"),
        output=str(root / "samples"),
        num_responses=3,
        max_tokens=6,
        empty="keep",
        transformers=TransformersConfig(device="cpu"),
    )
    generate(generated, quiet)
    function = {"kind": "function", "function": "tools.damage_kinds:length_reward"}
    score(ScoreConfig(input=str(root / "samples"), output=str(root / "scored"), scorers={"length": function}), quiet)
    select(SelectConfig(input=str(root / "scored"), output=str(root / "selected"), truncated="keep"), quiet)
    chosen = root / "selected" / "groups.jsonl"
    prepare(PrepareConfig(input=str(chosen), output=str(root / "prepared"), tokenizer=str(root / "model")), quiet)
    for name, seed in (("train", 1), ("eval", 2)):
        save_groups(root / name, random_groups(NUMBER_GROUPS, seed=seed), root / "model")
    loop.train(build_setup(train_config(root), 1))
    convert(ConvertConfig(input=str(newest(root)), output=str(root / "export")))
    write_rest(root)


def write_rest(root: Path) -> None:
    """Write files that would need a GPU, a service or many rounds, with the functions that write them."""
    (root / "rest").mkdir()
    with LineWriter(root / "rest" / "begun.jsonl") as writer:  # as left by a killed stage
        for record in itertools.islice(read_lines(root / "samples" / "samples.jsonl"), 6):
            writer.write(record)
    metrics = [held_out.GroupMetrics(group_id=f"g{i}", totals={"margin": i / 7}, counts={"margin": 1.0}) for i in range(9)]
    held_out.write_groups(root / "rest" / "held_out.jsonl", metrics)
    for name in ("iterate.json", "train.json", "kl.json"):
        write_summary(root / "rest" / name, {"name": name, "kl": 0.25, "checkpoint": str(newest(root)), "seeds": [1, 2, 3]})
    write_id(root / "rest" / "wandb_run_id", "a1b2c3d4")
    samples = list(read_lines(root / "samples" / "samples.jsonl"))
    (root / "rest" / "samples_00000004.jsonl").write_bytes(b"".join(seal_lines(samples)))
    (root / "prompts").mkdir()
    (root / "prompts" / "round-01.jsonl").write_bytes(b"".join(map(encode_line, samples)))
    write_list(root / "prompts")
    save_config(root / "rest" / "evaluate.yaml", EvaluateConfig(output=str(root / "evaluation"), candidate=str(root / "samples")))
    (root / "run" / "incidents").mkdir(exist_ok=True)
    incident = {"step": 2, "wrong": "loss", "grad_norm": 3.0, "group_id": "g", "loss": "inf", "prompt": "p", "responses": []}
    (root / "run" / "incidents" / "step_00000002.jsonl").write_bytes(b"".join(seal_lines([incident, incident])))


def train_config(root: Path) -> TrainConfig:
    """A run of two steps."""
    return TrainConfig(
        output=str(root / "run"),
        model=ModelConfig(checkpoint=str(root / "model"), precision="fp32"),
        data=DataConfig(train=str(root / "train"), eval=str(root / "eval"), groups_per_step=6, row_tokens=256),
        loss=LossConfig(name="mpo", params={"beta": 0.1}),
        checkpoint=CheckpointConfig(every=1, keep=1),
        max_steps=2,
        eval_every=1,
    )


def newest(root: Path) -> Path:
    """The run's last checkpoint."""
    return complete_steps(root / "run")[-1]


def kinds(root: Path) -> list[Kind]:
    """Every kind of file with its readers; some files are read in several ways."""
    model, step, export, run = root / "model", newest(root), root / "export", root / "run"
    [cache] = (root / "train" / "reference").iterdir()
    stages = {"samples": "generate", "scored": "score", "selected": "select"}
    lines = {"samples": "samples.jsonl", "scored": "scored.jsonl", "selected": "groups.jsonl"}
    rest, own = root / "rest", [path for path in files_of(model) if not any(EXPORT_FOLDER in part for part in path.parts)]
    return [
        *(
            Kind(name=f"groups: {name}", files=files_of(root / name, "groups.*", "prepare.json"), open=plain(groups(root / name)))
            for name in ("train", "prepared")
        ),
        Kind(name="model, trained from", files=own, open=lambda: trained_from(model)),
        Kind(name="model, exported", files=own, open=plain(lambda: converted(model, root / "back"))),
        Kind(
            name="model, generated from",
            files=files_of(model / EXPORT_FOLDER),
            open=plain(lambda: generated_from(model / EXPORT_FOLDER)),
        ),
        Kind(name="step, resumed from", files=files_of(step), open=lambda: resumed_from(step)),
        Kind(name="step, exported", files=files_of(step), open=plain(lambda: converted(step, root / "back"))),
        Kind(name="export, generated from", files=files_of(export), open=plain(lambda: generated_from(export))),
        Kind(name="export, converted", files=files_of(export), open=plain(lambda: converted(export, root / "back"))),
        Kind(
            name="mpo train, all of it",
            files=[root / "train" / "groups.arrow", *files_of(model / "megatron", "*.distcp"), *files_of(cache)],
            open=plain(lambda: trained(root)),
            slow=True,
        ),
        Kind(name="reference cache", files=files_of(cache), open=lambda: cached(root / "train", cache), again=True),
        *(
            Kind(name=f"run: {path.name}", files=[path], open=plain(partial(read_metrics, path)), lines=True)
            for path in (run / "metrics.jsonl", run / "samples.jsonl")
        ),
        Kind(name="run, resumed: metrics.jsonl", files=[run / "metrics.jsonl"], open=plain(lambda: continued(run)), again=True),
        Kind(
            name="run, reported",
            files=[run / "run.json", run / "config.yaml", *files_of(run / "groups"), *files_of(run / "incidents")],
            open=plain(lambda: reported(run)),
        ),
        Kind(
            name="run, inspected",
            files=[run / "run.json", run / "config.yaml"],
            open=plain(lambda: (load_yaml(TrainConfig, run / "config.yaml"), num_replicas(run))),
        ),
        Kind(name="run, resumed: run.json", files=[run / "run.json"], open=plain(lambda: earlier(run)), again=True),
        *(
            Kind(
                name=f"stage {stages[name]}",
                files=[root / name / lines[name], root / name / f"{stages[name]}.json"],
                open=plain(partial(stage, root / name, lines[name], f"{stages[name]}.json")),
            )
            for name in stages
        ),
        Kind(name="stage generate, note", files=files_of(root / "samples", "*.started.json"), open=plain(note(root / "samples"))),
        Kind(name="stage score, note", files=files_of(root / "scored", "*.started.json"), open=plain(note(root / "scored"))),
        Kind(
            name="stage select, prepared",
            files=[root / "selected" / "groups.jsonl", root / "selected" / "select.json"],
            open=plain(lambda: list(read_groups(str(root / "selected" / "groups.jsonl")).items)),
        ),
        Kind(name="stage begun", files=[rest / "begun.jsonl"], open=plain(lambda: begun(rest / "begun.jsonl")), lines=True),
        Kind(name="held-out metrics", files=[rest / "held_out.jsonl"], open=plain(lambda: held(rest / "held_out.jsonl"))),
        Kind(
            name="live samples",
            files=[rest / "samples_00000004.jsonl"],
            open=plain(lambda: unseal_lines(rest / "samples_00000004.jsonl", "remove it")),
        ),
        Kind(
            name="prompts of a round",
            files=files_of(root / "prompts"),
            open=plain(lambda: list(open_source(str(root / "prompts" / "round-01.jsonl")).rows)),
        ),
        *(
            Kind(name=f"iterate: {name}", files=[rest / name], open=plain(partial(read_summary, rest / name)))
            for name in ("iterate.json", "train.json", "kl.json")
        ),
        Kind(name="id at a service", files=[rest / "wandb_run_id"], open=plain(lambda: read_id(rest / "wandb_run_id"))),
        Kind(
            name="configuration of ranks",
            files=[rest / "evaluate.yaml"],
            open=plain(lambda: load_yaml(EvaluateConfig, rest / "evaluate.yaml")),
        ),
    ]


def files_of(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder and its subfolders that match one of the patterns; by default all."""
    names = {path for pattern in patterns or ("*",) for path in folder.rglob(pattern)}
    return sorted(path for path in names if path.is_file() and path.name != "rejected.jsonl")


def plain(read: Read) -> Callable[[], AbstractContextManager[Read]]:
    """A reader that needs no preparation."""
    return lambda: contextlib.nullcontext(read)


# --------------------------------------------------------------------------------------------------- readers


def groups(folder: Path) -> Read:
    """All groups and all columns of a prepared folder."""

    def read() -> Any:
        data = load_groups(folder)
        columns = [data.group_ids(), data.prompt_lengths(), data.all_response_lengths(), data.all_rewards(), data.all_labels()]
        return vars(data.info), columns, [vars(group) for group in data]

    return read


def check_model(folder: Path) -> Any:
    """What training reads of a checkpoint before its weights."""
    checkpoint.verify(folder)
    family, padded_vocab = read_model(folder, ParallelConfig())
    tokenizer = load_tokenizer(folder)
    text = tokenizer.render([{"role": "user", "content": "Why?"}], add_generation_prompt=True, variables={})
    return family, padded_vocab, tokenizer.digest(), text


@contextlib.contextmanager
def trained_from(folder: Path) -> Iterator[Read]:
    """Weights, and everything else that training reads of a checkpoint."""
    family, padded_vocab = read_model(folder, ParallelConfig())
    with model_parallel(ParallelConfig(), 1) as ranks:
        parts = build_policy(family, ModelConfig(checkpoint="", precision="fp32"), ParallelConfig(), ranks, padded_vocab)

        def read() -> Any:
            found = check_model(folder)
            checkpoint.load_weights(parts, folder, ranks)
            return found[1:], dict(parts[0].named_parameters())

        yield read


@contextlib.contextmanager
def resumed_from(folder: Path) -> Iterator[Read]:
    """All files of a step, as a resumption checks and reads them."""
    with model_parallel(ParallelConfig(), 1):

        def read() -> Any:
            check_whole(folder)
            reader = CheckpointReader(folder / "megatron")
            tensors = {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}
            return vars(read_state(folder)[0]), tensors

        yield read


def trained(root: Path) -> Any:
    """Losses and last weights of a whole run."""
    config = train_config(root)
    try:
        loop.train(build_setup(replace(config, output=str(root / "again"), data=replace(config.data, eval=None)), 1))
        [step] = complete_steps(root / "again")
        reader = CheckpointReader(step / "megatron")
        tensors = {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}
        return read_state(step)[0].recent_losses, tensors
    finally:
        shutil.rmtree(root / "again", ignore_errors=True)


def converted(source: Path, output: Path) -> Any:
    """What `mpo convert` makes of a checkpoint: tensors, and the other files."""
    try:
        convert(ConvertConfig(input=str(source), output=str(output)))
        weights: dict[str, Any] = {}
        if (output / "megatron").is_dir():
            reader = CheckpointReader(output / "megatron")
            weights = {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}
        else:
            import torch

            with RowReader() as rows:
                for name, tensor in list_tensors(output).items():
                    weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    rows.read(tensor, 0, weights[name])
        others = [
            path for path in files_of(output) if path.suffix in (".json", ".jinja", ".txt") and path.name != "mpo_digests.json"
        ]
        return weights, {path.name: path.read_bytes() for path in others if path.name != "metadata.json"}
    finally:
        shutil.rmtree(output, ignore_errors=True)


def generated_from(folder: Path) -> Any:
    """What `mpo generate` reads of a Hugging Face checkpoint."""
    from safetensors.torch import load_file

    weights = load_file(hugging_face_folder(folder) / "model.safetensors")
    settings = [read_model_settings(folder, name) for name in ("config.json", "generation_config.json")]
    tokenizer = load_tokenizer(folder)
    text = tokenizer.render([{"role": "user", "content": "Why?"}], add_generation_prompt=True, variables={})
    return weights, settings, tokenizer.digest(), text


@contextlib.contextmanager
def cached(data_folder: Path, cache: Path) -> Iterator[Read]:
    """Reference log-probs of each group; None where they are computed again."""
    data = load_groups(data_folder)
    with model_parallel(ParallelConfig(), 1) as ranks:

        def read() -> Any:
            logps = read_cache(cache, data, ranks, tokens=False)
            missing = set(logps.missing().tolist())
            return [None if index in missing else logps.response[logps.of_group(index)] for index in range(len(data))]

        yield read


def continued(run: Path) -> Any:
    """Lines of metrics.jsonl that a resumption at step 2 keeps; None for one that it leaves out."""
    copy = run.with_name("continued")
    copy.mkdir()
    try:
        shutil.copy(run / "metrics.jsonl", copy)
        JsonlTracker(copy, start_step=2).close()
        kept = {(line["step"], "lr" in line): line for line in read_metrics(copy / "metrics.jsonl")}
        return [kept.get((number, training)) for number in range(3) for training in (False, True)]
    finally:
        shutil.rmtree(copy)


def earlier(run: Path) -> Any:
    """Facts of the run's earlier starts; [None] if they are lost."""
    found = earlier_starts(run / "run.json")
    return found if found else [None]


def reported(run: Path) -> Any:
    """What a report reads of a run, besides data."""
    record = vars(read_run(run))
    return {name: value for name, value in record.items() if name not in ("age", "train_data", "held_out_data")}


def stage(folder: Path, name: str, summary: str) -> Any:
    """Lines and summary of a finished stage."""
    return list(read_lines(find_lines(folder, name, summary))), read_summary(folder / summary)


def note(folder: Path) -> Read:
    """What a stage that goes on compares itself with."""
    return lambda: [read_summary(path) for path in files_of(folder, "*.started.json")]


def begun(path: Path) -> Any:
    """What a stage that goes on takes over."""
    assert read_ids(path) == {record["group_id"] for record in read_lines(path)}
    return list(read_lines(path))


def held(path: Path) -> Any:
    """Metrics of held-out groups."""
    groups = held_out.read_groups(path)
    if not groups:
        raise DamagedError(f"{path}: no groups.")
    return [vars(group) for group in groups]
