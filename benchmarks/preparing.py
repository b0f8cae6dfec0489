"""The speed of `mpo prepare` relative to the tokenizer alone, by number of groups, and its memory.

    python -m benchmarks.preparing
    python -m benchmarks.preparing --size 100k --tokenizer checkpoints/qwen

Both sides read the same file, each in a separate process, in turn. `tokenizer` encodes the texts with the threads of the
`tokenizers` library, and counts nothing else; `prepare` is the whole command. The slope between two sizes excludes what every run
pays once: imports, loading the tokenizer, its digest.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
PREPARE = "import sys; from mpo_megatron.cli import main; sys.argv[0] = 'mpo'; main()"
TOKENIZE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
seconds = 0.0
def encode(texts):
    began = time.perf_counter()
    tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - began
texts = []
for line in open(sys.argv[1]):
    row = json.loads(line)
    texts += [row["prompt"], *(response["text"] for response in row["responses"])]
    if len(texts) > 512:
        seconds, texts = seconds + encode(texts), []
print(seconds + encode(texts))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides at both sizes, with each number of workers."""
    parser = timing.build_parser(__doc__, list(SIZES), repeat=1)
    parser.add_argument("--tokenizer", help="a Hugging Face folder with tokenizer.json; by default a small one is trained")
    options = timing.parse(parser, arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = options.tokenizer or train_tokenizer(folder / "tokenizer")
        files = {number: write_groups(folder / f"{number}.jsonl", number) for number in SIZES[options.size]}
        cases = [(workers, number) for workers in WORKERS for number in files]
        rows = timing.measure_each(
            "preparing", options, cases, lambda case: measure(*case, files[case[1]], tokenizer, folder, options.repeat)
        )
    table = [describe(row, rows) for row in rows]
    note = (
        "share: seconds of the tokenizer with as many threads / seconds of `mpo prepare`; of the slope: the same for the larger "
        "file's additional seconds. Wall seconds: run nothing else meanwhile."
    )
    timing.report("preparing", options, {"responses": RESPONSES, "words": WORDS, "tokenizer": tokenizer}, rows, table, note)


def measure(workers: int, groups: int, file: Path, tokenizer: str, folder: Path, repeat: int) -> timing.Row:
    """Wall seconds of both sides; CPU seconds and the largest process of `mpo prepare`."""
    found: dict[str, list[float]] = {"tokenizer": [], "prepare": [], "cpu": [], "memory_mib": []}
    for _ in range(repeat):
        threads = {"TOKENIZERS_PARALLELISM": str(workers > 1).lower(), "RAYON_NUM_THREADS": str(workers)}
        command = [sys.executable, "-c", TOKENIZE, str(file), tokenizer]
        bare = subprocess.run(command, env=os.environ | threads, check=True, capture_output=True, text=True)
        found["tokenizer"].append(float(bare.stdout))
        for name, value in run_prepare(workers, file, tokenizer, folder / "prepared").items():
            found[name].append(value)
    return {"workers": workers, "groups": groups, **{name: timing.summarize(values) for name, values in found.items()}}


def run_prepare(workers: int, file: Path, tokenizer: str, output: Path) -> dict[str, float]:
    """Run the command once.

    Raises:
        RuntimeError: it failed.
    """
    options = ["--input", str(file), "--tokenizer", tokenizer, "--output", str(output), "--num_workers", str(workers)]
    began = time.perf_counter()
    with output.with_name("prepare.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", PREPARE, "prepare", *options], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(output.with_name("prepare.log").read_text())
    shutil.rmtree(output)
    return {"prepare": seconds, "cpu": usage.ru_utime + usage.ru_stime, "memory_mib": usage.ru_maxrss / 1024}


def describe(row: timing.Row, rows: Sequence[timing.Row]) -> dict[str, Any]:
    """One line of the table."""
    smaller = next(each for each in rows if each["workers"] == row["workers"])

    def more(name: str) -> float:
        return float(row[name]["median"] - smaller[name]["median"])

    return {
        "groups": f"{row['groups']:,}",
        "workers": row["workers"],
        "tokenizer, s": timing.shown(row["tokenizer"], 1),
        "mpo prepare, s": timing.shown(row["prepare"], 1),
        "CPU s": timing.shown(row["cpu"], 1),
        "groups/s": f"{row['groups'] / row['prepare']['median']:,.0f}",
        "share": f"{row['tokenizer']['median'] / row['prepare']['median']:.0%}",
        "share of the slope": f"{more('tokenizer') / more('prepare'):.0%}" if row is not smaller and more("prepare") else "",
        "MiB": timing.shown(row["memory_mib"], 0),
    }


# --------------------------------------------------------------------------------------------------- what is prepared


def write_groups(path: Path, number: int) -> Path:
    """Write a file of groups whose words follow Zipf's law."""
    draw = random.Random(number)
    words = make_words()
    weights = [1 / (rank + 2) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            texts = [" ".join(draw.choices(words, weights, k=draw.randint(WORDS // 2, WORDS * 3 // 2))) for _ in range(RESPONSES)]
            responses = [{"text": f"{text}.", "reward": draw.random()} for text in texts]
            file.write(json.dumps({"id": str(index), "prompt": f"{index}: {texts[0][:60]}?", "responses": responses}) + "\n")
    return path


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
