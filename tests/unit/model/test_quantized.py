"""Base weights in 4 bits (QLoRA): blocks, loading layer by layer, what autograd keeps, merging, memory, and what is refused.

Loss, gradients and steps on several layouts are compared with `transformers` and PEFT in tests/distributed/parity.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpo_megatron.config import ConfigError, ConvertConfig, LoraConfig, ModelConfig, ParallelConfig
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.hf import quantization
from mpo_megatron.hf.adapter import AdapterRecord, read_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.hf.identity import ADAPTER_FILE
from mpo_megatron.hf.quantization import BYTES_PER_WEIGHT, validate_quantization
from mpo_megatron.model import quantized
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.plan.parameters import Part, part_weights
from mpo_megatron.train.adapting import choose_shape, find_record
from mpo_megatron.train.checkpoints import checkpoint
from tests.unit.model.adapted import build_adapted, save_base, save_peft

functional: Any = pytest.importorskip("bitsandbytes.functional")
nf4 = pytest.importorskip("mpo_megatron.model.nf4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats: hf and megatron."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    return save_base(tmp_path_factory.mktemp("base"), model_type="qwen2", **sizes)


def build(base: Path, ranks: Ranks) -> tuple[Family, Any]:
    """The family of a base, and a policy with base weights in 4 bits."""
    adapter = choose_adapter(load_family(base / "megatron" / "hf"), LoraConfig(rank=4, quantize="nf4"))
    family, (part,) = build_adapted(base, adapter, ranks)
    return family, part


def test_blocks_do_not_depend_on_the_layout() -> None:
    """Rows (column-parallel layers) and whole blocks of columns (row-parallel ones), in other shards or orders."""
    matrix = torch.randn(12, 256, generator=torch.Generator().manual_seed(0))
    whole = nf4.rounded(matrix)
    assert torch.equal(nf4.rounded(matrix[4:8]), whole[4:8])
    assert torch.equal(nf4.rounded(matrix[:, 128:]), whole[:, 128:])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nf4.rounded(matrix[order]), whole[order])
    assert torch.equal(nf4.rounded(whole), whole)  # a second round trip changes nothing
    # Half the widest gap between two of the 16 values, 1 − 0.6962, times the block's largest value.
    largest = matrix.view(12, 4, 64).abs().amax(-1, keepdim=True).expand(-1, -1, 64).reshape(12, 256)
    assert ((whole - matrix).abs() <= 0.152 * largest).all()
    assert (whole - matrix).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_library_s(dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    assert torch.equal(nf4.rounded(matrix), functional.dequantize_4bit(codes, state))
    assert nf4.rounded(matrix).dtype is dtype
    assert nf4.quantize(matrix).num_bytes == matrix.numel() * BYTES_PER_WEIGHT


def test_weights_are_loaded_layer_by_layer(base: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time, from building on, are the weights of more than one layer unquantized; blocks equal the checkpoint's."""
    _, part = build(base, ranks)
    homes = quantized.quantized_layers(part)
    assert len(homes) == 2 * 4
    assert not [name for name, _ in part.named_parameters() if name.endswith("linear_fc1.weight")]
    whole: list[int] = []
    original = quantized.held_boxes

    def count(*arguments: Any, **options: Any) -> Any:
        whole.append(sum("weight" in home._parameters for home in homes))
        return original(*arguments, **options)

    monkeypatch.setattr(quantized, "held_boxes", count)
    checkpoint.load_weights([part], base / "megatron", ranks)
    assert whole == [4, 4]
    assert not [name for name, _ in part.named_parameters() if name.endswith("linear_fc1.weight")]
    stored = load_file(base / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(homes[-1].blocks.dequantize(), nf4.rounded(stored[name]))


def test_bf16_weights_keep_float32_scales(base: Path, ranks: Ranks) -> None:
    """Blocks come from the weights of training without them; casting the model to bf16 does not change them."""
    family = load_family(base / "megatron" / "hf")
    adapter = choose_adapter(family, LoraConfig(rank=4, quantize="nf4"))
    padded = load_conversion(base / "megatron").padded_vocab_size
    (part,) = build_policy(family, ModelConfig(checkpoint=""), ParallelConfig(), ranks, padded, adapter)
    checkpoint.load_weights([part], base / "megatron", ranks)
    home = quantized.quantized_layers(part)[-1]
    assert home.blocks.state.absmax.dtype is torch.float32
    stored = load_file(base / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    found = home.blocks.dequantize()
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, nf4.rounded(stored.bfloat16()))
    x = torch.randn(5, 1, 192, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(home(x)[0], x @ found.T)


def test_autograd_keeps_blocks_alone(base: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward dequantizes the weight again, and its gradient is that of the rounded weight."""
    _, part = build(base, ranks)
    checkpoint.load_weights([part], base / "megatron", ranks)
    home = quantized.quantized_layers(part)[-1]  # linear_fc2
    weight = home.blocks.dequantize()
    made: list[Tensor] = []
    original = nf4.Blocks.dequantize
    monkeypatch.setattr(nf4.Blocks, "dequantize", lambda self: made.append(original(self)) or made[-1])
    x = torch.randn(5, 1, 192, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output, _ = home(x)
    assert not hasattr(home, "weight")
    assert len(made) == 1
    made[0].fill_(torch.nan)  # it is no longer read
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    output.backward(gradient)
    assert len(made) == 2
    assert torch.equal(output, x @ weight.T)  # the adapter's B is 0
    assert torch.allclose(x.grad, gradient @ weight, rtol=1e-6, atol=1e-5)  # type: ignore[arg-type]


def test_the_planner_counts_the_bytes(base: Path, ranks: Ranks) -> None:
    family, part = build(base, ranks)
    checkpoint.load_weights([part], base / "megatron", ranks)
    padded = load_conversion(base / "megatron").padded_vocab_size
    weights = part_weights(family, ParallelConfig(), Part(layers=range(2), first=True, last=True), padded)
    matrices = sum(weight.total for weight in weights if weight.matrix)
    assert sum(home.blocks.num_bytes for home in quantized.quantized_layers(part)) == matrices * BYTES_PER_WEIGHT


def test_gated_delta_nets_keep_their_projections_in_blocks(tmp_path: Path, ranks: Ranks) -> None:
    """Convolution, decays and norms are not quantized; a fused row of blocks is the row of the checkpoint's own layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "linear_value_head_dim": 32}
    save_base(tmp_path, model_type="qwen3_5_text", **sizes)
    family, part = build(tmp_path, ranks)
    validate_quantization(family, ModelConfig(checkpoint="", backend="local"), ParallelConfig(), samples=False)
    checkpoint.load_weights([part], tmp_path / "megatron", ranks)
    assert len(quantized.quantized_layers(part)) == 4 * 4
    layer = part.decoder.layers[0].self_attention
    assert [name for name, _ in layer.named_parameters() if ".adapter." not in name] == [
        *("A_log", "dt_bias", "conv1d.weight", "out_norm.weight")
    ]
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    prefix = "model.layers.0.linear_attn."
    assert torch.equal(layer.out_proj.blocks.dequantize(), nf4.rounded(stored[prefix + "out_proj.weight"]))
    gates = layer.in_proj.blocks.dequantize().view(2, -1, 128)[:, -4:-2]  # two β of each key head, then two α
    assert torch.equal(gates.reshape(4, 128), nf4.rounded(stored[prefix + "in_proj_b.weight"]))


def test_a_merge_adds_to_the_weights_that_were_trained_with(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4-bit weights, for layers with and without adapter; output layer, embedding, norms and biases are the base model's."""
    save_peft(base, tmp_path / "peft", r=3, lora_alpha=6, target_modules=["v_proj", "lm_head"])
    adapter = tmp_path / "adapter"
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(adapter), base=str(base / "megatron")))
    record = read_adapter(adapter)
    trained = dataclasses.replace(record, adapter=dataclasses.replace(record.adapter, quantize="nf4"))
    rewrite(adapter, trained)
    assert read_adapter(adapter) == trained
    convert(ConvertConfig(input=str(adapter), output=str(tmp_path / "merged"), merge=True))
    assert "base weights as nf4 rounds them" in capsys.readouterr().err
    stored, merged = load_file(base / "hf" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    matrices = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in matrices if ".lora_" in name} == {"v_proj", "lm_head"}
    for name, weight in stored.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = nf4.rounded(weight) if "proj.weight" in name else weight
        if f"{prefix}.lora_A.weight" in matrices:
            expected = (
                expected.double()
                + 2 * matrices[f"{prefix}.lora_B.weight"].double() @ matrices[f"{prefix}.lora_A.weight"].double()
            ).float()
        assert torch.equal(merged[name], expected), name


def rewrite(folder: Path, record: AdapterRecord) -> None:
    """adapter.json of an adapter that a run with these options would have saved."""
    from mpo_megatron.files import digests

    (folder / ADAPTER_FILE).write_bytes(record.to_bytes())
    (folder / digests.LIST).unlink()
    digests.write_list(folder)


def test_an_adapter_goes_on_beside_either_format(base: Path, tmp_path: Path) -> None:
    """By default on the weights that it was trained with; without adapters there is nothing to quantize."""
    from mpo_megatron.config.train import DataConfig, TrainConfig

    def train(**lora: Any) -> TrainConfig:
        model = ModelConfig(checkpoint=str(base / "megatron"))
        return TrainConfig(output=str(tmp_path), model=model, data=DataConfig(train=""), lora=LoraConfig(**lora))

    family = load_family(base / "megatron" / "hf")
    shape = choose_shape(train(rank=2, quantize="nf4"), family)
    assert shape is not None
    assert shape.quantize == "nf4"
    found = find_record(train(rank=2), shape)
    plain = choose_shape(train(rank=2), family)
    assert plain is not None
    assert plain.quantize == "none"
    with pytest.raises(ConfigError, match=r"lora\.quantize = nf4, but all weights are trained"):
        choose_shape(train(quantize="nf4"), family)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / ADAPTER_FILE).write_bytes(found.to_bytes())
    for option, expected in ((None, "nf4"), ("none", "none")):
        config = train(quantize=option)
        config = dataclasses.replace(config, model=ModelConfig(checkpoint=str(folder)))
        again = choose_shape(config, family)
        assert again is not None
        assert find_record(config, again).adapter.quantize == expected


def test_what_cannot_be_quantized_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = load_family(base / "megatron" / "hf"), ModelConfig(checkpoint="", backend="local")

    def check(message: str, *, parallel: ParallelConfig | None = None, samples: bool = False, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            validate_quantization(family, dataclasses.replace(model, **options), parallel or ParallelConfig(), samples=samples)

    validate_quantization(family, model, ParallelConfig(), samples=False)
    cut = r"down_proj has 192 inputs, but parallel\.tensor = 2 splits blocks of 64; choose one of 1, 3"
    check(cut, parallel=ParallelConfig(tensor=2))
    check(r"online\.kl_weight", samples=True)
    check(r"model\.fp8 = current", fp8="current", backend="transformer_engine")
    monkeypatch.setattr(quantization, "PACKAGE", "no_such_package")
    check(r"needs the package no_such_package, which is not installed: pip install 'mpo-megatron\[qlora\]'")
