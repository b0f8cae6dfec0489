"""Commands on damaged inputs: one sentence that names the file, or a result; never a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from mpo_megatron import cli
from tests.damages import damaged
from tests.run_folder import write_data, write_run
from tests.tiny import save_model

TRIALS = 5
"""Of each file."""
OPTION = re.compile(r": [a-z_]+(\.[a-z_]+)* = ")
"""The option that a configuration's message names."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small inputs of every command tried here."""
    folder = tmp_path_factory.mktemp("damaged")
    data = write_data(folder / "groups", 3)
    write_run(folder / "run", data, steps=4, total_steps=4, every=2)
    save_model(folder / "hf", hidden_size=32, num_hidden_layers=1)
    responses = [{"text": "yes", "reward": 0.5, "num_tokens": 3}, {"text": "no", "reward": 0.1, "num_tokens": 2}]
    lines = [{"group_id": f"g{index}", "prompt": "Why?", "reference_answer": "yes", "responses": responses} for index in range(3)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "other.jsonl").write_text((folder / "lines.jsonl").read_text())
    train = {
        "output": str(folder / "new"),
        "model": {"checkpoint": str(folder / "hf")},
        "data": {"train": str(folder / "groups"), "groups_per_step": 2},
        "loss": {"name": "mpo", "params": {"beta": 0.1}},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    launch = {"train": str(folder / "train.yaml"), "gpus_per_node": 1, "dry_run": True}
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch))
    return folder


COMMANDS = {
    "report": ("{run} --output {out}/page.html", "run/metrics.jsonl run/config.yaml run/run.json groups/prepare.json"),
    "inspect": ("--data {groups} --tokenizer {hf}", "groups/prepare.json groups/groups.arrow hf/tokenizer_config.json"),
    "evaluate": ("--candidate {lines.jsonl} --baseline {other.jsonl} --num_resamples 2 --output {out}/e", "lines.jsonl"),
    "select": ("--input {lines.jsonl} --output {out}/s --sets mean --length_unit tokens --max_length 9", "lines.jsonl"),
    "score": ('--input {lines.jsonl} --output {out}/s --scorers {{"m":{{"kind":"match"}}}}', "lines.jsonl"),
    "plan": ("--train {train.yaml} --gpus 1 --suggest 0", "train.yaml hf/config.json"),
    "launch": ("torchrun --config {launch.yaml}", "launch.yaml train.yaml"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_inputs_end_in_a_sentence(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for picture in ("evaluate.evaluate.plot_evaluation", "rollout.select.plot_spacing"):
        monkeypatch.setattr(f"mpo_megatron.{picture}", lambda *_: None)  # half a second each
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # five megabytes
    template, files = COMMANDS[command]
    ends = set()
    for file in (folder / name for name in files.split()):
        whole = file.read_bytes()
        for seed in range(TRIALS):
            places = {path.name: str(path) for path in folder.iterdir()} | {"out": str(tmp_path / f"{file.name}-{seed}")}
            Path(places["out"]).mkdir()
            file.write_bytes(changed := damaged(file, seed))
            try:
                code = cli._run([command, *(_fill(word, places) for word in template.split())])
            except Exception as error:
                raise AssertionError(f"{file.name} with seed {seed}: {changed[:3000]!r}") from error
            finally:
                file.write_bytes(whole)
            ends.add(code)
            said = capsys.readouterr().err.splitlines()
            if code:
                assert code == 2
                assert said[-1].startswith(f"mpo {command}: "), said
                assert file.name in said[-1] or file.parent.name in said[-1] or OPTION.search(said[-1]), said[-1]
                assert len(said[-1]) < 2000
    assert 2 in ends


def _fill(word: str, places: dict[str, str]) -> str:
    """The word with paths in place of names in braces."""
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", path)
    return word.replace("{{", "{").replace("}}", "}")
