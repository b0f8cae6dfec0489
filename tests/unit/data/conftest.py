"""Tokenizers without a hub: a small byte-level BPE, Qwen's real one (optional packages), a small SentencePiece model."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mpo_megatron.data.batches import Digest
from mpo_megatron.data.store import StoredGroups

Writer = Callable[..., str]
"""Writes rows to a file of JSON lines and returns its path."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "What is the sum of 12 and 30? The sum is 42.",
    "Name a colour of the sky.\n\nBlue, of course; at dusk it is red or even green.",
    "Write a short poem about two doors, one key.  Two doors stood still, one key was lost.",
    "def add(a, b):\n    return a + b\n",
]


def digest_of(groups: StoredGroups) -> str:
    """The digest of what the file holds; equals `PreparedInfo.data_digest` unless the file changed."""
    digest = Digest()
    for batch in groups.batches(np.arange(len(groups))):
        digest.update(batch)
    return digest.hexdigest()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": settings.get("chat_template", CHATML)}))
    return folder


def train_bpe(folder: Path, special: list[str], **settings: Any) -> Path:
    """Save a byte-level BPE of about 400 entries; ChatML is its template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return save_tokenizer(tokenizer, folder, **settings)


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with ChatML."""
    return train_bpe(tmp_path_factory.mktemp("bpe"), SPECIAL)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen's tokenizer, rebuilt from the ranks in the `dashscope` package."""
    dashscope = pytest.importorskip("dashscope", reason="brings Qwen's vocabulary")
    ranks_file = Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(str.split, ranks_file.read_text().splitlines())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(sorted(set(range(256)) - set(printable)))}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    def last_merge(token: bytes, rank: int) -> list[bytes]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    merges = [last_merge(token, rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(spell(left), spell(right)) for left, right in merges]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return save_tokenizer(tokenizer, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece BPE with byte fallback, as Llama's and Mistral's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def write_lines(tmp_path: Path) -> Writer:
    """Write rows (objects, or raw text) as a JSONL file; returns its path."""

    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with alpaca_eval_k8.jsonl and gsm8k_k4.jsonl, which are not part of the repository."""
    folder = Path(os.environ.get("MPO_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (folder / "gsm8k_k4.jsonl").is_file():
        pytest.skip("no real data; set MPO_DATA to the folder that holds gsm8k_k4.jsonl")
    return folder
