"""A converted checkpoint loads through Megatron-Core at any TP × PP × EP and computes what `transformers` computes; saved by
Megatron-Core from the widest layout, it exports to the very weights it came from.

The test starts this file on four ranks (gloo on a CPU); each runs `main`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpo_megatron.config import ConvertConfig, ModelConfig, ParallelConfig
from mpo_megatron.files.digests import write_list
from tests.distributed.launch import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUTS = [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2)]
"""TP × PP × EP (of the models with experts); with 4 ranks, the rest is data parallelism."""
DENSE = ("qwen2", "qwen2.5-tied", "qwen3")
MODELS = (*DENSE, "qwen2-moe", "qwen3-moe")
SIZES = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "tie_word_embeddings": False}
NUM_TOKENS = 24
# Largest difference of a logit: rounding through 4 layers is a few 1e-6 on logits of size 5; a wrong mapping is off by 1.
FLOAT32_TOLERANCE = 1e-4
# In bf16 each implementation rounds at other places, and neither is right: both are compared with the float32 logits,
# and ours may be off by no more than this times what `transformers` is off by (root mean square over 24 × 1003 logits).
BF16_ERROR_RATIO = 1.25


def write_models(folder: Path) -> None:
    """Random checkpoints, with sizes of weights that keep logits near 1 and attention far from uniform."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

    configs = {
        "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
        "qwen2.5-tied": Qwen2Config(
            **SIZES, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
        ),
        "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
        # The first and third layer are dense, so layers have separate keys in the checkpoint.
        "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2, shared_expert_intermediate_size=80),
        "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_config(config).float()
        for key, weight in model.named_parameters():
            if "norm" in key:
                torch.nn.init.normal_(weight, 1.0, 0.3)
            elif key.endswith("bias"):
                torch.nn.init.normal_(weight, 0.0, 0.5)
            else:
                torch.nn.init.normal_(weight, 0.0, 0.15)
        model.save_pretrained(folder / name / "hf", max_shard_size="100KB")
        # Reference logits from the model that was just built, not from a reloaded one: only weights are compared.
        logits = {}
        with torch.no_grad():
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                logits[precision] = model.to(dtype)(tokens()).logits[0].float().contiguous()
        save_file(logits, folder / name / "logits.safetensors")


def tokens() -> Tensor:
    """The row that every model sees: [1, T]."""
    return torch.randint(0, SIZES["vocab_size"] or 0, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def read_hf(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder with the checkpoints, and the ranks' results."""
    from mpo_megatron.model.convert import convert

    folder = tmp_path_factory.mktemp("layouts")
    write_models(folder)
    for path in folder.iterdir():
        convert(ConvertConfig(input=str(path / "hf"), output=str(path / "converted")))
    run_ranks(4, "tests.distributed.test_convert_layouts", [str(folder)])
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers_at_every_layout(results: tuple[Path, dict[str, Any]], name: str) -> None:
    for layout in LAYOUTS:
        found = results[1][f"{name} fp32 {layout}"]
        assert found["difference"] < FLOAT32_TOLERANCE, layout
        assert found["range"] > 1, "logits too small for the tolerance to mean anything"
        assert found["padding"] == 0, "padded rows of the vocabulary must be zero"


@pytest.mark.parametrize("name", DENSE)
def test_bf16_logits_are_as_good_as_those_of_transformers(results: tuple[Path, dict[str, Any]], name: str) -> None:
    found = results[1][f"{name} bf16 {LAYOUTS[0]}"]
    assert 0 < found["error"] < BF16_ERROR_RATIO * found["transformers_error"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_saved_by_megatron_export_bit_identical(results: tuple[Path, dict[str, Any]], name: str, tmp_path: Path) -> None:
    from mpo_megatron.model.convert import convert

    folder = results[0] / name
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(folder / "saved", step / "megatron")
    shutil.copytree(folder / "converted" / "hf", step / "hf")
    shutil.copy(folder / "converted" / "conversion.json", step)
    write_list(step)
    convert(ConvertConfig(input=str(tmp_path / "run"), output=str(tmp_path / "back")))
    before, after = read_hf(folder / "hf"), read_hf(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def main(folder: Path) -> None:
    """The work of each of the 4 ranks: every model at every layout."""
    from mpo_megatron.model.parallel import model_parallel

    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        dense = ParallelConfig(tensor=layout[0], pipeline=layout[1])
        sparse = dataclasses.replace(dense, expert=layout[2])
        for parallel, names in ((dense, DENSE), (sparse, set(MODELS) - set(DENSE))):
            with model_parallel(parallel, seed=1) as ranks:
                for name in sorted(names):
                    for precision in ("fp32", "bf16") if layout == LAYOUTS[0] and name in DENSE else ("fp32",):
                        found = compare(folder / name, parallel, precision, ranks, save=layout == LAYOUTS[-1])
                        results[f"{name} {precision} {layout}"] = found
    # The last rank is on the last stage of every layout, so it has the logits.
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        (folder / "results.json").write_text(json.dumps(results, indent=2))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@torch.no_grad()
def compare(folder: Path, parallel: ParallelConfig, precision: Any, ranks: Any, save: bool) -> dict[str, float]:
    """Load the converted checkpoint at this layout, and compare its logits with those of `transformers`."""
    from megatron.core import dist_checkpointing

    from mpo_megatron.families import load_family
    from mpo_megatron.hf.conversion import load_conversion
    from mpo_megatron.model.policy import build_policy

    family = load_family(folder / "hf")
    settings = ModelConfig(checkpoint=str(folder / "converted"), precision=precision)
    padded = load_conversion(folder / "converted").padded_vocab_size
    [model] = build_policy(family, settings, parallel, ranks, padded)
    model = getattr(model, "module", model).eval()
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "converted" / "megatron"))
    model.load_state_dict(loaded, strict=True)

    logits = megatron_logits(model, tokens(), ranks)
    if save:
        (folder / "saved").mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(), str(folder / "saved"))
    if logits is None:
        return {}
    reference = load_file(folder / "logits.safetensors")
    vocab, expected, exact = family.vocab_size, reference[precision], reference["fp32"]
    return {
        "difference": (logits[:, :vocab] - expected).abs().max().item(),
        "padding": logits[:, vocab:].abs().max().item(),
        "range": expected.abs().max().item(),
        "error": (logits[:, :vocab] - exact).square().mean().sqrt().item(),
        "transformers_error": (expected - exact).square().mean().sqrt().item(),
    }


def megatron_logits(model: Any, row: Tensor, ranks: Any) -> Tensor | None:
    """Logits [T, padded vocabulary] of one row on the last stage, None before; stages pass hidden states by hand."""
    from mpo_megatron.model.attention import row_layout

    num_tokens = row.shape[1]
    layout = row_layout([(0, num_tokens, 0, 0)])
    positions = torch.arange(num_tokens)[None]
    rows = num_tokens // ranks.tensor.size()  # sequence parallelism is on with TP
    if not ranks.is_first_stage:
        hidden = torch.empty(rows, 1, model.config.hidden_size, dtype=model.config.params_dtype)
        torch.distributed.recv(hidden, group=ranks.pipeline, group_src=0)
        model.set_input_tensor([hidden])
    hidden = model.hidden_states(row, positions, layout)
    if not ranks.is_last_stage:
        torch.distributed.send(hidden.contiguous(), group=ranks.pipeline, group_dst=1)
        return None
    local = (model.gather_sequence(hidden).squeeze(1) @ model.output_weight().T).float()
    shards = [torch.empty_like(local) for _ in range(ranks.tensor.size())]
    torch.distributed.all_gather(shards, local, group=ranks.tensor)
    return torch.cat(shards, dim=-1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
