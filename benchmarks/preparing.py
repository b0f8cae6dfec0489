"""The speed of `mpo prepare` relative to the tokenizer alone and to `datasets.map`, by number of groups, and its memory.

    python -m benchmarks.preparing
    python -m benchmarks.preparing --size 100k --tokenizer checkpoints/qwen
    python -m benchmarks.preparing --input groups.jsonl

All sides read the same file, each in its own processes, in turn. `tokenizer` parses the rows, encodes their texts with the
threads of the `tokenizers` library, and makes an int32 array of each text's ids. `map` is what many projects run: `datasets.map`
with a tokenizer of `transformers`, saved as Arrow files. `prepare` is the whole command. The slope between two sizes excludes
what every run pays once: imports, loading the tokenizer, its digest.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

SIZES = {
    "tiny": (16, 32),
    "small": (1_000, 4_000),
    "10k": (1_000, 10_000),
    "100k": (10_000, 100_000),
    "million": (100_000, 1_000_000),
}
"""Groups of the smaller and the larger file."""
RESPONSES, WORDS = 8, 60
"""Responses per group, and mean words per response."""
WORKERS = (1, 2)
SIDES = ("tokenizer", "prepare", "map")
PREPARE = "import sys; from mpo_megatron.cli import main; sys.argv[0] = 'mpo'; main()"
TOKENIZE = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
def encode(texts):
    return [np.array(found.ids, np.int32) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
texts = []
for line in open(sys.argv[1]):
    row = json.loads(line)
    texts += [row["prompt"], *(response["text"] for response in row["responses"])]
    if len(texts) > 512:
        encode(texts)
        texts = []
encode(texts)
"""
MAP = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
file, folder, output, workers = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
def encode(row):
    question = [{"role": "user", "content": row["prompt"]}]
    texts = [response["text"] + tokenizer.eos_token for response in row["responses"]]
    return {
        "prompt_ids": tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False),
        "response_ids": tokenizer(texts, add_special_tokens=False)["input_ids"],
    }
rows = load_dataset("json", data_files=file, split="train", cache_dir=output + "/cache")
rows.map(encode, num_proc=int(workers) if workers != "1" else None).save_to_disk(output + "/saved")
"""
METER = """
import ctypes, json, os, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: processes whose parents end become this one's children
began, cpu, memory = time.perf_counter(), 0.0, 0.0
first = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
while True:
    try:
        pid, status, usage = os.wait4(-1, 0)
    except ChildProcessError:
        break
    cpu += usage.ru_utime + usage.ru_stime
    memory = max(memory, usage.ru_maxrss / 1024)
    if pid == first:
        code, wall = os.waitstatus_to_exitcode(status), time.perf_counter() - began
print(json.dumps({"wall": wall, "cpu": cpu, "memory_mib": memory}))
sys.exit(code)
"""
"""Runs a command; CPU seconds of all its processes, and the memory of the largest."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides at both sizes, with each number of workers."""
    parser = timing.build_parser(__doc__, list(SIZES), repeat=1)
    parser.add_argument("--input", help="a .jsonl file of groups, copied as often as a size needs; by default words are drawn")
    parser.add_argument("--tokenizer", help="a Hugging Face folder with tokenizer.json; by default a small one is trained")
    options = timing.parse(parser, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = options.tokenizer or train_tokenizer(folder / "tokenizer")
        files = {number: write_groups(folder / f"{number}.jsonl", number, options.input) for number in SIZES[options.size]}
        counts = WORKERS[-1:] if options.size == "tiny" else WORKERS
        cases = [(workers, number) for workers in counts for number in files]
        rows = timing.measure_each(
            "preparing", options, cases, lambda case: measure(*case, files[case[1]], tokenizer, folder, options.repeat)
        )
    table = [describe(row, rows) for row in rows]
    note = (
        "CPU s: of all processes of a side. share: CPU seconds of the tokenizer with as many threads / those of `mpo prepare`; "
        "of the slope: the same for the larger file's additional seconds. Wall seconds, in the same order, need an idle machine."
    )
    settings = {"responses": RESPONSES, "words": WORDS, "input": options.input, "tokenizer": options.tokenizer}
    timing.report("preparing", options, settings, rows, table, note)


def measure(workers: int, groups: int, file: Path, tokenizer: str, folder: Path, repeat: int) -> timing.Row:
    """For each side its wall and CPU seconds, and its largest process."""
    output = folder / "output"
    options = ["--input", str(file), "--tokenizer", tokenizer, "--output", str(output), "--num_workers", str(workers)]
    limits = ["--max_prompt_tokens", "4096", "--max_response_tokens", "8192"]  # nothing is dropped: the sides encode the same
    sides = {
        "tokenizer": [TOKENIZE, str(file), tokenizer],
        "prepare": [PREPARE, "prepare", *options, *limits],
        "map": [MAP, str(file), tokenizer, str(output), str(workers)],
    }
    found = {name: list[dict[str, float]]() for name in sides}
    for _ in range(repeat):
        for name, command in sides.items():
            found[name].append(run(command, workers))
            shutil.rmtree(output, ignore_errors=True)
    quantities = ("wall", "cpu", "memory_mib")
    return {"workers": workers, "groups": groups} | {
        name: {quantity: timing.summarize([measured[quantity] for measured in runs]) for quantity in quantities}
        for name, runs in found.items()
    }


def run(program: Sequence[str], workers: int) -> dict[str, float]:
    """Run a Python program.

    Raises:
        RuntimeError: it failed.
    """
    threads = {"TOKENIZERS_PARALLELISM": str(workers > 1).lower(), "RAYON_NUM_THREADS": str(workers), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", METER, sys.executable, "-c", *program]
    done = subprocess.run(command, env=os.environ | threads, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe(row: timing.Row, rows: Sequence[timing.Row]) -> dict[str, Any]:
    """One line of the table."""
    smaller = next(each for each in rows if each["workers"] == row["workers"])

    def cpu(name: str) -> float:
        return float(row[name]["cpu"]["median"])

    def more(name: str) -> float:
        return cpu(name) - float(smaller[name]["cpu"]["median"])

    return {
        "groups": f"{row['groups']:,}",
        "workers": row["workers"],
        **{f"{name}, CPU s": f"{cpu(name):.1f}" for name in SIDES},
        "wall s": " / ".join(f"{row[name]['wall']['median']:.1f}" for name in SIDES),
        "share": f"{cpu('tokenizer') / cpu('prepare'):.0%}",
        "share of the slope": f"{more('tokenizer') / more('prepare'):.0%}" if row is not smaller and more("prepare") > 0 else "",
        "MiB": f"{row['prepare']['memory_mib']['median']:.0f}",
    }


# --------------------------------------------------------------------------------------------------- what is prepared


def write_groups(path: Path, number: int, source: str | None = None) -> Path:
    """Write a file of groups whose words follow Zipf's law, or of those of another file with new ids."""
    with path.open("w", encoding="utf-8") as file:
        rows = draw_groups(number) if source is None else repeat_groups(Path(source), number)
        file.writelines(json.dumps(row | {"id": str(index)}) + "\n" for index, row in enumerate(rows))
    return path


def draw_groups(number: int) -> Iterator[dict[str, Any]]:
    """Groups of drawn words."""
    draw = random.Random(number)
    words = make_words()
    weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(words))))
    for index in range(number):
        lengths = [draw.randint(WORDS // 2, WORDS * 3 // 2) for _ in range(RESPONSES)]
        texts = [" ".join(draw.choices(words, cum_weights=weights, k=length)) for length in lengths]
        responses = [{"text": f"{text}.", "reward": draw.random()} for text in texts]
        yield {"prompt": f"{index}: {texts[0][:60]}?", "responses": responses}


def repeat_groups(source: Path, number: int) -> Iterator[dict[str, Any]]:
    """The groups of a file, from its start again when it ends."""
    with source.open(encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    return map(json.loads, itertools.islice(itertools.cycle(lines), number))


def make_words() -> list[str]:
    """20,000 words made of syllables."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvw" for vowel in ("a", "e", "i", "o", "u", "ai", "en", "or")]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]


def train_tokenizer(folder: Path) -> str:
    """A byte-level BPE tokenizer of 8,000 entries with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(make_words())], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    main()
