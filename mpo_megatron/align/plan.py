"""Every stage's configuration, built and checked before anything runs, with defaults from the model, the data and the GPUs.

<output>/align.json               configuration, digests of the model and the data: must not change
<output>/prepare.yaml, train.yaml configurations of `mpo prepare` and `mpo train`
<output>/groups, groups-eval      prepared groups
<output>/run                      training; its checkpoints, its metrics, the converted model
<output>/answers/before, after    answers of both models to held-out prompts
<output>/aligned                  the Hugging Face model
<output>/report.html, align.md    curves, and the changes
<output>/rounds                   on-policy rounds, with prompts
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_megatron import device
from mpo_megatron.align.defaults import build_training, choose_options
from mpo_megatron.align.precision import ROUNDS_FOLDER
from mpo_megatron.config import (
    AlignConfig,
    ConvertConfig,
    GenerateConfig,
    IterateConfig,
    PrepareConfig,
    TrainConfig,
    check_writable,
    from_dict,
    is_hub_name,
    require,
    validate_generate,
)
from mpo_megatron.config.checks import within
from mpo_megatron.config.iterate import STAGES
from mpo_megatron.config.sections import has_option, set_option
from mpo_megatron.data.hub import download_model
from mpo_megatron.data.sources import open_source
from mpo_megatron.data.store import INFO_FILE, read_info
from mpo_megatron.hf.identity import PEFT_CONFIG
from mpo_megatron.plan.models import find_model
from mpo_megatron.rollout.iterate import TRAIN_FILE
from mpo_megatron.rollout.records import GENERATE_FILE
from mpo_megatron.rollout.trained_policy import check_trained_policy
from mpo_megatron.rollout.validation import check_generate
from mpo_megatron.train.inputs import check_training
from mpo_megatron.train.launcher import count_ranks
from mpo_megatron.train.tracking import check_installed

HELD_OUT = 100
"""Groups to hold out of 1,000 or more."""
ANSWER_TOKENS = 256
"""Maximum tokens of an answer in the comparison."""
SET = {
    "prepare": ("input", "output", "tokenizer", "held_out"),
    "train": ("output", "model.checkpoint", "model.reference", "data.train", "data.eval"),
    "generate": ("prompts", "model", "output", "shard", "num_responses", "max_prompts"),
}
"""Options that the command sets itself."""
OWN = ("output", "model", "prompts", "rounds", "held_out", "nproc", "seed")
SET_IN_ROUNDS = {"iterate": (*OWN, *STAGES)}
"""The same with prompts: these are options of the command itself."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The configurations of the stages."""

    folder: Path
    model: Path
    """The Hugging Face folder."""
    prepare: PrepareConfig
    train: TrainConfig
    export: ConvertConfig
    before: GenerateConfig
    after: GenerateConfig
    exported: Path
    """The last file that the export writes."""
    chosen: dict[str, object]
    """Training options that the user did not set, and their chosen values."""


def find_folder(name: str) -> Path:
    """The model's folder; for a name on the hub, its folder in the hub's cache.

    Raises:
        ConfigError: the model does not exist.
    """
    folder = Path(name)
    if not folder.exists() and is_hub_name(name):
        return download_model(name, "model", None)
    require(folder.is_dir(), f"model = {name}; no such folder; give a Hugging Face folder, or a name on the hub.")
    require((folder / "config.json").is_file(), f"model = {name}; not a Hugging Face folder: it has no config.json.")
    return folder


def check_sections(config: AlignConfig, fixed: Mapping[str, tuple[str, ...]]) -> None:
    """Check that no section sets an option that the command sets itself.

    Raises:
        ConfigError: names the option.
    """
    for stage, names in fixed.items():
        for name in names:
            require(not has_option(getattr(config, stage), name), f"{stage}.{name} is set by mpo align itself; remove it.")


def build_stages(config: AlignConfig, model: Path) -> Stages:
    """All stages; training gets the defaults for the prepared groups, if they exist.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    output = Path(config.output)
    check_writable(output, "output")
    check_sections(config, SET)
    family = find_model(str(model))
    prepare = copy.deepcopy(config.prepare)
    prepare |= {"input": config.data, "output": str(output / "groups"), "tokenizer": str(model)}
    prepare.setdefault("seed", config.seed)
    prepared = from_dict(PrepareConfig, prepare, "prepare")
    prepared = dataclasses.replace(prepared, held_out=choose_held_out(config, prepared, output))
    train, chosen = build_training(config, model, family)
    answers = copy.deepcopy(config.generate) | {"prompts": str(output / "groups-eval"), "shard": "0/1"}
    for name, value in (("temperature", 0.0), ("max_tokens", ANSWER_TOKENS), ("empty", "keep"), ("seed", config.seed)):
        answers.setdefault(name, value)
    answers |= {"num_responses": 1, "max_prompts": max(1, config.answers)}

    def answering(name: str, checkpoint: Path) -> GenerateConfig:
        own = {"model": str(checkpoint), "output": str(output / "answers" / name)}
        return from_dict(GenerateConfig, answers | own, "generate")

    after = answering("after", output / "aligned")
    if not (output / TRAIN_FILE).is_file():  # a finished stage may be looked at on another machine
        check_installed(train.logging)
        if not device.has_gpu() or has_option(config.train, "parallel") or (output / "groups" / INFO_FILE).is_file():
            check_training(train, config.nproc or count_ranks(train.parallel), family)  # else the layout follows from the groups
    if config.answers:
        with within("generate"):
            if (Path(after.output) / GENERATE_FILE).is_file():  # its packages are no longer needed
                validate_generate(after)
            else:
                check_generate(after)
        check_trained_policy(after, train.lora, family, model)
    return Stages(
        folder=output,
        model=model,
        prepare=prepared,
        train=train,
        export=ConvertConfig(input=str(output / "run"), output=str(output / "aligned")),
        before=answering("before", model),
        after=after,
        exported=output / "aligned" / (PEFT_CONFIG if train.lora.rank else "config.json"),
        chosen=chosen,
    )


def build_rounds(config: AlignConfig, model: Path) -> IterateConfig:
    """The on-policy rounds on the prompts.

    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    check_sections(config, SET_IN_ROUNDS)
    train = copy.deepcopy(config.train)
    family = find_model(str(model))
    for name, value in choose_options(family, train, Path(config.output)).items():
        if not has_option(train, name):
            set_option(train, name, value)
    options: dict[str, Any] = {
        **copy.deepcopy(config.iterate),
        "output": str(Path(config.output) / ROUNDS_FOLDER),
        "model": str(model),
        "prompts": str(config.prompts),
        "rounds": config.rounds,
        "held_out": config.held_out or min(HELD_OUT, max(2, count_rows([str(config.prompts)], "prompts") // 10)),
        "generate": copy.deepcopy(config.generate),
        "score": copy.deepcopy(config.score),
        "select": copy.deepcopy(config.select),
        "prepare": copy.deepcopy(config.prepare),
        "train": train,
        "nproc": config.nproc,
        "seed": config.seed,
    }
    return from_dict(IterateConfig, options, "iterate")


# ----------------------------------------------------------------------------------------------------- the data


def choose_held_out(config: AlignConfig, prepare: PrepareConfig, output: Path) -> int:
    """Number of groups to hold out; the actual number, once the groups are prepared."""
    if (output / "groups-eval" / INFO_FILE).is_file() and (output / "groups" / INFO_FILE).is_file():
        return read_info(output / "groups-eval").num_groups
    rows = count_rows(config.data, "data", prepare)
    return config.held_out or min(HELD_OUT, max(2, rows // 10))


def count_rows(data: list[str], option: str, prepare: PrepareConfig | None = None) -> int:
    """Number of rows of the inputs, which are groups in most formats.

    Args:
        option: name of the option that names the inputs, for messages
        prepare: which of their rows count; by default all
    Raises:
        DataError: an input cannot be read.
    """
    split, subset, max_rows = (prepare.split, prepare.subset, prepare.max_rows) if prepare else ("train", None, None)
    total = 0
    for name in data:
        source = open_source(name, split=split, subset=subset, option=option)
        rows = source.total if source.total is not None else sum(1 for _ in itertools.islice(source.rows, max_rows))
        total += min(rows, max_rows or rows)
    return total


def data_digest(data: list[str]) -> str:
    """A fingerprint of the content of files, folders and patterns, wherever they are; of a dataset on the hub, of its name."""
    digest = hashlib.sha256()
    for name in data:
        path = Path(name)
        files = find_files(path)
        for file in files:
            if len(files) > 1:  # a single file may have been renamed
                digest.update(str(file.relative_to(path) if path.is_dir() else file.name).encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        if not files:
            digest.update(name.encode())
    return digest.hexdigest()


def find_files(path: Path) -> list[Path]:
    """The files of an input: the file itself, those of a folder, or those that match a pattern; empty for a dataset on the
    hub."""
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    return sorted(item for item in found if item.is_file())
