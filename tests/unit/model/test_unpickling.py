"""Pickles of a checkpoint folder that name a function which would run a command: refused wherever they are, and never run."""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.config import ConvertConfig
from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.model import unpickling
from mpo_megatron.model.convert import convert
from mpo_megatron.model.unpickling import read_metadata, reading_safely
from tests.tiny import save_model

COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key


class Command:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    convert(ConvertConfig(input=str(save_model(folder / "hf", num_hidden_layers=1)), output=str(folder / "model")))
    return folder / "model"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def test_metadata_is_what_torch_reads(model: Path) -> None:
    own = read_metadata(model / "megatron")
    assert (
        own.state_dict_metadata
        == torch.distributed.checkpoint.FileSystemReader(model / "megatron").read_metadata().state_dict_metadata
    )


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"nested": [evil]}])
def test_metadata_runs_nothing(wrap: Callable[[Any], Any], protocol: int, tmp_path: Path, mark: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(wrap(Command(mark)), protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused without running it: it names .*getattr|pathlib"):
        read_metadata(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert mark.exists(), "the pickle runs nothing to begin with"


@pytest.mark.parametrize("module, name", [("torch", "load"), ("torch.serialization", "os"), ("torch", "float32.__class__")])
def test_metadata_knows_no_other_names_of_a_known_module(module: str, name: str, tmp_path: Path) -> None:
    stream = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(stream)
    with pytest.raises(CheckpointError, match=f"it names {module}.{name}"):
        read_metadata(tmp_path)


def test_metadata_points_to_files_of_its_folder(model: Path, tmp_path: Path) -> None:
    metadata = read_metadata(model / "megatron")
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"damaged .*'\.\./\.\./secret', which is no file in this folder"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04}.", pickle.dumps(3), b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"garbage"]
)
def test_damaged_metadata(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("put", [b"r\x00\x00\x00\x10", b"p268435456\n"])
def test_an_index_does_not_decide_how_much_memory_is_taken(put: bytes, tmp_path: Path) -> None:
    """Python's own reader takes 4 GiB for this one."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04N" + put + b".")
    with pytest.raises(CheckpointError, match=r"damaged .*at byte 3, index 268,435,456 in \d+ bytes"):
        read_metadata(tmp_path)


def test_a_flipped_bit_of_metadata_ends_in_no_other_error(model: Path, tmp_path: Path) -> None:
    content = (model / "megatron" / ".metadata").read_bytes()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / ".metadata").write_bytes(bytes(flipped))
        with contextlib.suppress(CheckpointError):
            read_metadata(tmp_path)


def save_common(folder: Path, content: Any) -> None:
    """Store `content` where Megatron-Core stores non-tensors, as any object."""
    stream = io.BytesIO()
    torch.save(content, stream)
    torch.distributed.checkpoint.save({COMMON: stream}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def replace_object(folder: Path, evil: Command) -> None:
    """Put a pickle in place of an object of a *.distcp file; `torch.save` writes one archive per entry there."""
    metadata = read_metadata(folder)
    [where] = [place for index, place in metadata.storage_data.items() if index.fqn == COMMON]
    path = folder / where.relative_path
    content, stream = path.read_bytes(), io.BytesIO()
    torch.save([evil], stream)
    path.write_bytes(content[: where.offset] + stream.getvalue() + content[where.offset + where.length :])
    where.length = len(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_object_among_the_tensors_runs_nothing(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_common(folder, [{}])
    replace_object(folder, Command(mark))
    with reading_safely(), pytest.raises(CheckpointException) as caught:
        dist_checkpointing.load({}, str(folder))
    assert "weights" in str(caught.value).lower()
    assert not mark.exists()
    dist_checkpointing.load_common_state_dict(str(folder))
    assert mark.exists(), "Megatron-Core runs it when it may"


def test_common_pt_runs_nothing(model: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in (".metadata", "metadata.json"):
        (tmp_path / name).write_bytes((model / "megatron" / name).read_bytes())
    torch.save({"args": Command(mark)}, tmp_path / "common.pt")
    with reading_safely(), pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights only"):
        dist_checkpointing.load({}, str(tmp_path))
    assert not mark.exists()


def test_megatron_reads_metadata_through_the_list(model: Path, tmp_path: Path, mark: Path) -> None:
    (tmp_path / "metadata.json").write_bytes((model / "megatron" / "metadata.json").read_bytes())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    with reading_safely(), pytest.raises(CheckpointError, match="refused"):
        dist_checkpointing.serialization.load_sharded_metadata(str(tmp_path))
    with reading_safely(), pytest.raises(CheckpointException, match="refused"):
        torch.distributed.checkpoint.load({"weight": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
    assert not mark.exists()


def test_no_other_place_of_the_package_reads_pickles() -> None:
    """Except for entries by the process itself in a private database that no other process can open."""
    package = Path(unpickling.__file__).parents[1]
    readers = ("pickle.load", "Unpickler", "torch.load(", "FileSystemReader(", "joblib", "allow_pickle", "load_common_state_dict")
    found = {
        path.name
        for path in package.rglob("*.py")
        if any(name in path.read_text(encoding="utf-8") for name in readers) and path != Path(unpickling.__file__)
    }
    assert found == {"spill.py"}
