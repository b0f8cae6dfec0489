"""`mpo convert` from a name on the hub, and with a tokenizer that is larger than the embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, ConvertConfig
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.convert import convert
from tests.hub import COMMIT, Hub, running_hub
from tests.tiny import save_model, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the hub's additional files."""
    folder = save_model(tmp_path_factory.mktemp("hub") / "model", num_hidden_layers=1, hidden_size=32)
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the model ran')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    with running_hub(tmp_path / "cache", monkeypatch) as running:
        running.models = {"owner/model": folder, "owner/gated": folder}
        running.gated = {"owner/gated"}
        yield running


def convert_name(name: str, output: Path, **options: str) -> None:
    convert(ConvertConfig(input=name, output=str(output), **options))


def test_a_name_on_the_hub(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_name("owner/model", tmp_path / "named")
    convert_name(str(folder), tmp_path / "local")
    assert load_conversion(tmp_path / "named") == load_conversion(tmp_path / "local")
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= set(hub.taken)
    assert not {"modeling_own.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json"} & set(hub.taken)
    taken = len(hub.taken)
    convert_name("owner/model", tmp_path / "again", revision=COMMIT)
    assert len(hub.taken) == taken  # everything is in the cache
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    convert_name("owner/model", tmp_path / "offline")
    assert load_conversion(tmp_path / "offline") == load_conversion(tmp_path / "local")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--input owner/none", "input = owner/none; no such folder here, and no such model on the hub; log in"),
        ("--input owner/gated", "input = owner/gated; no such folder here, and on the hub it is gated: accept its terms"),
        ("--input owner/model --revision v2", "revision = v2; owner/model has no such branch, tag or commit on the hub."),
        ("--input . --revision main", "revision = main, but input = . is a folder"),
        ("--input /a/b/c", "input = /a/b/c; no such folder, and not a hub name such as Qwen/Qwen3-14B."),
    ],
)
def test_names_that_cannot_be_read(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["convert", *arguments.split(), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"mpo convert: {message}")
    assert not (tmp_path / "out").exists()


def test_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = r"^input = owner/model; no such folder here, and the hub cannot be reached; .* `hf download owner/model --local-dir"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=advice):
        convert_name("owner/model", tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=advice):
        convert_name("owner/model", tmp_path / "out")


def test_pickles_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    hub.models["owner/pickled"] = tmp_path / "pickled"
    with pytest.raises(ConfigError, match=r"^input = owner/pickled has no safetensors on the hub; save it in that format"):
        convert_name("owner/pickled", tmp_path / "out")
    assert "pytorch_model.bin" not in hub.taken


@pytest.mark.parametrize("tied", [False, True])
def test_a_tokenizer_larger_than_the_embedding(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = save_tokenizer(tmp_path / "tokenizer")
    folder = save_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=32, tied=tied, vocab_size=tokens - 3)
    command = ["convert", "--input", str(folder), "--output"]
    assert main([*command, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(
        f"mpo convert: {folder}: its tokenizer has {tokens} tokens, its embedding only {tokens - 3} rows (vocab_size in "
        "config.json); add the rows with `mpo convert --resize_vocabulary true`, or take the tokenizer that the model was "
        "trained with.\n"
    )
    assert main([*command, str(tmp_path / "megatron"), "--resize_vocabulary", "true"]) == 0
    assert f"3 rows are added to the vocabulary of {tokens - 3}" in capsys.readouterr().out
    assert load_conversion(tmp_path / "megatron").vocab_size == tokens
    convert(ConvertConfig(input=str(tmp_path / "megatron"), output=str(tmp_path / "back")))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == tokens

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokens, mean_resizing=True)
    theirs, ours = model.state_dict(), load_file(tmp_path / "back" / "model.safetensors")
    grown = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    for name, weight in ours.items():
        if name not in grown:
            assert torch.equal(weight, theirs[name])
            continue
        assert torch.equal(weight[: tokens - 3], theirs[name][: tokens - 3])
        # Theirs adds noise with a variance of 1e-9 of that of the rows: five of its standard deviations.
        assert (weight[tokens - 3 :] - theirs[name][tokens - 3 :]).abs().max() < 5 * (1e-9**0.5) * weight.std()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    last = AutoTokenizer.from_pretrained(tmp_path / "back").convert_tokens_to_ids("<|im_start|>")
    assert loaded(torch.tensor([[last]])).logits.isfinite().all()


def test_a_vocabulary_that_needs_no_rows_stays(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=32)
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "plain")))
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "resized"), resize_vocabulary=True))
    assert load_conversion(tmp_path / "plain") == load_conversion(tmp_path / "resized")
    with pytest.raises(ConfigError, match=r"resize_vocabulary = true, but input = .* is a Megatron checkpoint"):
        convert(ConvertConfig(input=str(tmp_path / "plain"), output=str(tmp_path / "back"), resize_vocabulary=True))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer to resize to"):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "none"), resize_vocabulary=True))


def test_a_tokenizer_that_cannot_be_read_is_moved_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=32)
    (folder / "tokenizer.json").write_text("{}")
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))
    warning = f"warning: tokenizer = {folder}; tokenizer.json does not hold a tokenizer (Model missing"
    assert warning in capsys.readouterr().err
    assert (tmp_path / "out" / "hf" / "tokenizer.json").read_text() == "{}"
    convert(ConvertConfig(input=str(tmp_path / "out"), output=str(tmp_path / "back")))
    assert f"warning: tokenizer = {tmp_path / 'out' / 'hf'}; tokenizer.json does not hold a tok" in capsys.readouterr().err
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def test_a_tokenizer_that_is_too_large_is_named_by_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = save_tokenizer(tmp_path / "tokenizer")
    folder = save_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=32, vocab_size=tokens - 3)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "out" / "hf", dirs_exist_ok=True)
    (tmp_path / "out" / digests.LIST).unlink()
    digests.write_list(tmp_path / "out")
    capsys.readouterr()
    convert(ConvertConfig(input=str(tmp_path / "out"), output=str(tmp_path / "back")))
    assert f"its tokenizer has {tokens} tokens, its embedding only {tokens - 3} rows; take" in capsys.readouterr().err
