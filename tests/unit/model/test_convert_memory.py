"""Conversion's memory is that of a few pieces of tensors, not of the model: measured in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

from mpo_megatron.families import read_family
from mpo_megatron.model.safetensors_io import INDEX
from mpo_megatron.model.weight_map import build_weight_map
from tests.waiting import TIMEOUT

MIB = 2**20
CONFIG = Qwen2Config(
    vocab_size=16384,
    hidden_size=1024,
    intermediate_size=8192,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
CHUNK = 16 * MIB
"""One MLP matrix; an embedding is two of them."""

MEASURE = """
import sys
from pathlib import Path
from mpo_megatron.model.convert_export import export_to_hf
from mpo_megatron.model.convert_import import import_from_hf

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

small, source, target, chunk = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
import_from_hf(small, target / "tiny", vocab_multiple=1)  # whatever is loaded or allocated once
export_to_hf(target / "tiny", target / "tiny-back", max_shard_bytes=chunk)
before = peak()
import_from_hf(source, target / "megatron", vocab_multiple=1000, max_chunk_bytes=chunk)
middle = peak()
export_to_hf(target / "megatron", target / "back", max_shard_bytes=8 * chunk)
print(before, middle, peak())
"""


def write_checkpoint(folder: Path, config: Qwen2Config) -> int:
    """Random bits as bf16 weights, one file per layer; returns their bytes."""
    folder.mkdir()
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for item in build_weight_map(read_family(config), config.vocab_size):
        for placement in item.placements:
            bits = torch.randint(-(2**15), 2**15, placement.shape, dtype=torch.int16)
            name = f"layer-{'.'.join(map(str, item.index))}.safetensors"
            files.setdefault(name, {})[placement.name] = bits.view(torch.bfloat16)
    total = 0
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {key: name for name, tensors in files.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_a_few_chunks(tmp_path: Path) -> None:
    small = Qwen2Config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, vocab_size=8)
    write_checkpoint(tmp_path / "small", small)
    total = write_checkpoint(tmp_path / "hf", CONFIG)
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "hf", tmp_path, str(CHUNK)]
    # glibc keeps freed blocks of up to 32 MiB, here as large as a piece: count what is in use, not what it keeps.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    before, middle, after = (int(number) for number in done.stdout.split())
    # The piece written before, the one being gathered or written, torch.save's copy of it, and one to spare.
    allowed = 5 * CHUNK
    assert total > 5 * allowed
    assert middle - before < allowed, f"in: {(middle - before) / MIB:.0f} MiB of {total / MIB:.0f}"
    assert after - before < allowed, f"out: {(after - before) / MIB:.0f} MiB of {total / MIB:.0f}"
    print(f"model {total / MIB:.0f} MiB, in {(middle - before) / MIB:.0f} MiB, in and out {(after - before) / MIB:.0f} MiB")
