"""Folders around a conversion's weights: finding, copying, staging, progress."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mpo_megatron.config import ConfigError, require
from mpo_megatron.files.atomic import appear, require_no_writer, sync
from mpo_megatron.files.digests import LIST
from mpo_megatron.files.partial import partial_folder
from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.terminal.console import Console

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp")
"""Files of a Hugging Face folder that are weights, in any format."""
MAX_CHUNK_BYTES = 128 * 2**20
"""Largest piece of a tensor read, written or stored at once; memory use is a small multiple of it."""
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json")
"""JSON files of a Hugging Face folder that hold objects; a run writes some of them again."""


def find_megatron_checkpoint(source: Path) -> Path | None:
    """The Megatron checkpoint folder at `source`, or a training run's newest complete one; None if neither.

    Raises:
        CheckpointError: the folder is a training run without any complete checkpoint.
    """
    if (source / "megatron").is_dir():
        return source
    if not (source / "checkpoints").is_dir():
        return None
    # Saves in progress, killed saves and damaged checkpoints have a suffix: step_*.partial-….
    steps = sorted((path for path in (source / "checkpoints").glob("step_*") if not path.suffix), reverse=True)
    for step in steps:
        # Megatron-Core writes metadata.json once everything else of the checkpoint is on disk.
        if all((step / name).is_file() for name in ("megatron/metadata.json", "hf/config.json", "conversion.json")):
            return step
    raise CheckpointError(f"input = {source}: none of its {len(steps)} checkpoints/step_* is complete.")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy all files except weights and hidden folders (version control, caches).

    Raises:
        CheckpointError: a JSON file does not parse.
    """
    target.mkdir(exist_ok=True)
    for path in side_files(source):
        _check_json(path)
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def side_files(source: Path) -> list[Path]:
    """All files of a Hugging Face folder except weights and hidden folders."""
    found = []
    for path in sorted(source.rglob("*")):
        is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith((".safetensors.index.json", ".bin.index.json"))
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts[:-1])
        if path.is_file() and not is_weight and path.name != LIST and not hidden:
            found.append(path)
    return found


def _check_json(path: Path) -> None:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: does not parse ({error}); copy or download it again.") from error
        require(
            isinstance(content, dict) or path.name not in OBJECTS,
            f"{path}: holds a {type(content).__name__}, not an object; copy or download it again.",
        )


def set_config_dtype(path: Path, dtype: str) -> None:
    """Change the dtype declared in a config.json, under the field name that it uses."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    change_config(path, "torch_dtype" if "torch_dtype" in settings else "dtype", dtype)


def change_config(path: Path, name: str, value: str | int) -> None:
    """Change one field of a config.json, also in a multimodal model's text config, and nothing else."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    text = settings.get("text_config")
    if text is None or name in settings:
        settings[name] = value
    if text is not None and (name in text or name not in settings):
        text[name] = value
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> str:
    """The dtype of most elements of a checkpoint, by its name in a config.json.

    Args:
        tensors: dtype and number of elements of each tensor
    """
    count: Counter[torch.dtype] = Counter()
    for dtype, elements in tensors:
        count[dtype] += elements
    return str(count.most_common(1)[0][0]).removeprefix("torch.")


def first_names(names: Sequence[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


@contextlib.contextmanager
def staged(output: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `output` that is renamed to it on success and removed on failure.

    Raises:
        ConfigError: the disk has too little space, before or during the writing.
        DataError: another process is writing this output.
    """
    output = output.resolve()  # follow links: the target may be on another disk
    require(
        not output.is_mount(),
        f"output = {output}; it is a mount point; name a folder in it.",
    )
    parent = output.parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    need = f"{needed_bytes / 2**30:,.2f} GiB of weights"
    require(
        free > needed_bytes,
        f"output = {output}: {need}, but only {free / 2**30:,.2f} GiB are free on its disk; free space, or choose another disk.",
    )
    require_no_writer(output)
    try:
        with partial_folder(output) as folder:
            yield folder
            for path in [*folder.rglob("*"), folder]:
                sync(path)
            appear(folder, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(
                f"output = {output}: {error.strerror} while writing {need}; free space and run the same command again."
            ) from error
        raise


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes, and at the end a line with rate and peak memory; both on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
    seconds = time.perf_counter() - start
    console.print(
        f"{title}: {total / 2**30:,.2f} GiB in {seconds:,.1f} s ({total / 2**20 / seconds:,.0f} MiB/s), "
        f"peak memory {_peak_memory() / 2**30:,.2f} GiB",
        highlight=False,
        soft_wrap=True,
    )


def _peak_memory() -> int:
    """Peak resident size of this process, in bytes."""
    with contextlib.suppress(OSError):  # Linux; getrusage would also count the parent process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
