from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig
from mpo_megatron.data import tokenizing
from mpo_megatron.data.formats import InputLayout
from mpo_megatron.data.prepare import PrepareSummary, prepare
from mpo_megatron.data.raw_rows import RawRow
from mpo_megatron.data.readers import InputReader, RowStream
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.workers import map_in_order
from mpo_megatron.files import DataError
from tests.unit.data.conftest import Writer, digest_of

Run = Callable[..., PrepareSummary]
TALE = "two doors stood still, one key was lost. "


def row(index: int, size: int = 4, **changes: Any) -> dict[str, Any]:
    responses = [{"text": f"The sum is {index + k}.", "reward": k / 2 - index} for k in range(size)]
    return {"id": f"row-{index}", "prompt": f"What is {index}?", "responses": responses} | changes


@pytest.fixture
def run(bpe_folder: Path, tmp_path: Path) -> Run:
    """Prepare into tmp_path/out (or `output`) with the small tokenizer, without printing."""

    def call(source: str, output: str = "out", console: Console | None = None, **options: Any) -> PrepareSummary:
        config = PrepareConfig(input=source, output=str(tmp_path / output), tokenizer=str(bpe_folder), **options)
        return prepare(config, console or Console(file=io.StringIO(), width=120))

    return call


def rejected(folder: Path) -> list[tuple[Any, ...]]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in ("line", "group_id", "field", "reason")) for line in lines]


def rewards_by_id(folder: Path) -> dict[str, list[float]]:
    return {group.group_id: group.rewards.tolist() for group in load_groups(folder) if group.rewards is not None}


# ------------------------------------------------------------------------------------------ what is written


def test_groups_and_what_the_folder_says_of_them(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    from mpo_megatron.data.chat import Chat
    from mpo_megatron.data.tokenizer import load_tokenizer

    out = io.StringIO()
    same = [{"text": "Same.", "reward": 1.0}, {"text": "Same.", "reward": 1.0}]
    path = write_lines(row(0), row(1, 2), "{", row(2, responses=same), row(3, prompt="What is 0?"), row(4, 1))
    summary = run(path, console=Console(file=out, width=120))
    groups = load_groups(tmp_path / "out")
    assert summary.train == groups.info
    assert sorted(os.listdir(tmp_path / "out")) == ["groups.arrow", "groups.pieces", "prepare.json", "rejected.jsonl"]
    chat = Chat(load_tokenizer(groups.info.config["tokenizer"]))
    group = groups[0]
    assert (group.group_id, group.where) == ("row-0", f"{path}:1")
    text, ids = chat.prompt([{"role": "user", "content": "What is 0?"}])
    assert (group.prompt_text, group.prompt_tokens.tolist()) == (text, ids.tolist())
    wanted = [chat.response(f"The sum is {k}.").tolist() for k in range(4)]
    assert [tokens.tolist() for tokens in group.response_tokens] == wanted
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.0, 0.5, 1.0, 1.5]
    info = groups.info
    assert (info.num_groups, info.num_responses, info.max_responses) == (4, 12, 4)
    assert (info.reward_kind, info.has_labels) == ("scores", False)
    assert info.end_token_ids == (chat.end_token_id,)
    assert (info.tokenizer_digest, info.vocab_size) == (chat.tokenizer.digest(), chat.tokenizer.vocab_size)
    stats = info.statistics
    assert stats["num_responses"] == {"2": 2, "4": 2}
    assert (stats["without_contrast"], stats["groups_with_duplicate_responses"]) == (1, 1)
    assert stats["preparation"]["duplicate_prompts"] == 1
    assert stats["preparation"]["rejected_by_field"] == {"responses": 1, "row": 1}
    assert stats["reward_spacing"]["mean_by_num_responses"] == {"2": 0.25, "4": 0.5}
    assert [item[:3] for item in rejected(tmp_path / "out")] == [(3, None, "row"), (6, "row-4", "responses")]
    printed = out.getvalue()
    for pattern in (r"groups\s+│ 4, 12 responses", r"K = 2\s+2 █", r"groups without contrast\s+│ 1 \(25.0%\)", r"rejected\s+│ 2"):
        assert re.search(pattern, printed), pattern


def test_tasks_grow_with_the_rows_before_them() -> None:
    layout = InputLayout(format="groups", reward_kind="scores")
    rows = [RawRow("rows.jsonl", line, b"{}") for line in range(20_000)]
    tasks = list(tokenizing.cut_tasks([RowStream(InputReader(layout=layout, columns={}), None, iter(rows), Counter())]))
    assert [row for task in tasks for row in task.rows] == rows
    sizes = [len(task.rows) for task in tasks]
    assert sizes[:-1] == sorted(sizes[:-1])
    assert (sizes[0], max(sizes)) == (32, 256)
    assert all(len(task.rows) <= max(32, task.first // 8) for task in tasks)


def test_special_tokens_in_texts_are_counted_and_stay(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    spelled = [{"text": "It begins with <|im_start|> here.", "reward": 1.0}, {"text": "No.", "reward": 0.0}]
    ended = [{"text": "The end.<|im_end|>", "reward": 1.0}, {"text": "<|im|> <im_start>", "reward": 0.0}]
    out = io.StringIO()
    path = write_lines(row(0), row(1, responses=spelled), row(2, responses=ended), row(3, prompt="What is <|im_end|>?"))
    summary = run(path, console=Console(file=out, width=120), num_workers=1)
    assert summary.tally.special_tokens == 2
    assert load_groups(tmp_path / "out").info.statistics["preparation"]["special_tokens"] == 2
    assert re.search(r"special tokens in their text +│ 2: encoded as control tokens", out.getvalue())


def test_tokens_that_the_template_writes_between_turns_are_no_special_text(run: Run, write_lines: Writer) -> None:
    turns = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}, {"role": "assistant", "content": "C"}]
    spelled = [*turns[:2], {"role": "assistant", "content": "<|im_start|>"}]
    responses = [{"text": turns, "reward": 1.0}, {"text": "No.", "reward": 0.0}]
    path = write_lines(row(0, responses=responses), row(1, responses=[*responses, {"text": spelled, "reward": 0.5}]))
    assert run(path, num_workers=1).tally.special_tokens == 1


def test_labels_travel(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    run(write_lines({"prompt": "Q", "chosen": "A", "rejected": "B"}))
    groups = load_groups(tmp_path / "out")
    assert (groups.info.reward_kind, groups.info.has_labels) == ("labels", True)
    assert groups[0].rewards is None
    assert groups[0].labels is not None
    assert groups[0].labels.tolist() == [1, 0]


def test_the_result_does_not_depend_on_the_number_of_workers(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    rows = [row(index) if index % 7 else row(index, 1) for index in range(150)]
    path = write_lines(*rows)
    options = {"held_out": 20, "reward_noise": 0.5, "responses_per_prompt": 3, "fraction": 0.8}
    alone, many = (run(path, f"out{number}", num_workers=number, **options) for number in (1, 3))
    assert alone.train.data_digest == many.train.data_digest
    for suffix in ("", "-eval"):
        first, second = (tmp_path / f"out{number}{suffix}" for number in (1, 3))
        assert (first / "groups.arrow").read_bytes() == (second / "groups.arrow").read_bytes()
    assert (tmp_path / "out1" / "rejected.jsonl").read_text() == (tmp_path / "out3" / "rejected.jsonl").read_text()
    assert len(rejected(tmp_path / "out1")) == 22


def test_workers_use_one_thread() -> None:
    assert list(map_in_order(os.getenv, ["TOKENIZERS_PARALLELISM"] * 4, 2)) == ["false"] * 4


def test_a_repeated_id_takes_its_group_out_of_a_chunk(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    """Also one that is over-long, counts nothing else of it, and leaves the order of rejections."""
    again = [row(1, prompt="x <|im_end|>"), {"prompt": "no answers"}, row(2, prompt="word " * 3000)]
    path = write_lines(row(0), row(1), row(2), *again, row(3))
    summary = run(path)
    assert rejected(tmp_path / "out") == [
        (4, "row-1", "id", f"repeats the id of {path}:2"),
        (5, None, "responses", "is missing"),
        (6, "row-2", "id", f"repeats the id of {path}:3"),
    ]
    assert [group.group_id for group in load_groups(tmp_path / "out")] == ["row-0", "row-1", "row-2", "row-3"]
    assert (summary.tally.rows, summary.tally.special_tokens, summary.tally.num_rejected) == (7, 0, 3)


def test_an_id_that_utf_8_cannot_hold_is_rejected_and_written(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    run(write_lines(row(0), row(1, id="x\ud83d")))
    assert rejected(tmp_path / "out") == [(2, "x\ud83d", "id", "has half a surrogate pair at character 1")]


def test_rows_that_nothing_changes_are_copied(
    run: Run, write_lines: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as if every group were read and written again."""
    path = write_lines(*(row(index) for index in range(300)))
    run(path, held_out=5)
    monkeypatch.setattr("mpo_megatron.data.prepare.changes_nothing", lambda config: False)
    run(path, "again", held_out=5)
    for suffix in ("", "-eval"):
        files = [tmp_path / f"{name}{suffix}" / "groups.arrow" for name in ("out", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_worker_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="num_workers = 2; a tokenizing process died, perhaps out of memory; use fewer workers"):
        list(map_in_order(os._exit, [1, 1], 2))


# ------------------------------------------------------------------------------------------ over-long


def test_overlong_responses_leave_or_are_cut_one_by_one(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    long = {"text": TALE * 20, "reward": 9.0}
    short = row(0)["responses"][:2]
    path = write_lines(row(0, responses=[short[0], long, short[1]]), row(1, responses=[short[0], long]), row(2))
    summary = run(path, "dropped", max_response_tokens=30)
    groups = load_groups(tmp_path / "dropped")
    assert (groups[0].num_responses, summary.tally.overlong_dropped, summary.tally.overlong_truncated) == (2, 1, 0)
    assert rewards_by_id(tmp_path / "dropped")["row-0"] == [0.0, 0.5]
    reason = "leave K = 1 of 2 within max_response_tokens = 30; a group needs at least two"
    assert rejected(tmp_path / "dropped") == [(2, "row-1", "responses", reason)]

    summary = run(path, "cut", max_response_tokens=30, overlong="truncate")
    groups = load_groups(tmp_path / "cut")
    assert (groups[0].num_responses, summary.tally.overlong_dropped, summary.tally.overlong_truncated) == (3, 0, 2)
    cut = groups[0].response_tokens[1]
    assert len(cut) == 30
    assert groups.info.end_token_ids[0] not in cut  # the response did not end there
    assert groups[0].response_tokens[2][-1] == groups.info.end_token_ids[0]


def test_an_overlong_prompt_rejects_its_group(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    run(write_lines(row(0), row(1, prompt=TALE * 20)), max_prompt_tokens=40)
    (line, group_id, field, reason) = rejected(tmp_path / "out")[0]
    assert (line, group_id, field) == (2, "row-1", "prompt")
    assert re.fullmatch(r"has \d+ tokens, but max_prompt_tokens = 40", reason)


def test_a_prompt_that_the_template_refuses_is_rejected(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    turns = [{"role": "user", "content": "Hello?"}, {"role": "user", "content": "Anyone?"}]
    run(write_lines(row(0), row(1, prompt=turns)), chat_template=str(tmp_path / "template.jinja"))
    assert rejected(tmp_path / "out") == [(2, "row-1", "prompt", "is refused by the chat template: roles must alternate")]


# ------------------------------------------------------------------------------------------ held-out, options


def prompts(groups: PreparedGroups) -> set[str]:
    return {groups.text(index)[0] for index in range(len(groups))}


def test_held_out_groups_share_no_prompt_and_do_not_depend_on_the_order(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    rows = [row(index, prompt=f"What is {index // 2}?") for index in range(60)]  # every prompt twice
    summary = run(write_lines(*rows), "one", held_out=9)
    assert summary.eval is not None
    assert summary.eval.num_groups == 10  # whole prompts
    assert summary.train.num_groups == 50
    train, evaluation = load_groups(tmp_path / "one"), load_groups(tmp_path / "one-eval")
    assert not prompts(train) & prompts(evaluation)
    random.Random(0).shuffle(rows)
    run(write_lines(*rows), "two", held_out=9)
    assert prompts(load_groups(tmp_path / "two-eval")) == prompts(evaluation)
    run(write_lines(*rows), "three", held_out=9, seed=5)
    assert prompts(load_groups(tmp_path / "three-eval")) != prompts(evaluation)
    with pytest.raises(ConfigError, match="held_out = 60; only 60 groups are usable, so none would remain for training"):
        run(write_lines(*rows), "four", held_out=60)


def test_options_act_on_training_groups_only(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(*(row(index) for index in range(60)))
    run(path, "plain", held_out=10)
    run(path, "noisy", held_out=10, reward_noise=0.1, responses_per_prompt=2, fraction=0.5)
    plain, noisy = rewards_by_id(tmp_path / "plain"), rewards_by_id(tmp_path / "noisy")
    assert set(noisy) < set(plain)
    for name, values in noisy.items():
        assert len(values) == 2
        assert all(min(abs(value - other) for other in plain[name]) < 0.6 for value in values)  # six σ
        assert all(value not in plain[name] for value in values)
    assert rewards_by_id(tmp_path / "noisy-eval") == rewards_by_id(tmp_path / "plain-eval")


def test_noise_is_drawn_before_responses_are_chosen(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(*(row(index) for index in range(20)))
    run(path, "all", reward_noise=1.0)
    run(path, "some", reward_noise=1.0, responses_per_prompt=2)
    everything = rewards_by_id(tmp_path / "all")
    assert all(set(values) < set(everything[name]) for name, values in rewards_by_id(tmp_path / "some").items())


def test_normalisation(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(*(row(index) for index in range(10)))
    run(path, "raw", held_out=3)
    for kind in ("zscore", "minmax", "dataset_zscore", "dataset_minmax"):
        run(path, kind, held_out=3, reward_normalization=kind)
    assert all(np.isclose(np.std(values), 1) for values in rewards_by_id(tmp_path / "zscore").values())
    assert all(min(values) == 0 and max(values) == 1 for values in rewards_by_id(tmp_path / "minmax-eval").values())
    for kind in ("raw", "dataset_zscore", "dataset_minmax"):
        both = rewards_by_id(tmp_path / kind) | rewards_by_id(tmp_path / f"{kind}-eval")
        values = np.concatenate([both[name] for name in sorted(both)])
        if kind == "raw":
            raw = values
        else:
            shift, scale = (raw.mean(), raw.std()) if kind == "dataset_zscore" else (raw.min(), np.ptp(raw))
            np.testing.assert_allclose(values, (raw - shift) / scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "value"), [("reward_noise", 0.5), ("reward_normalization", "zscore")])
def test_reward_options_need_rewards(run: Run, write_lines: Writer, tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} = {value}; the data has labels but no rewards"):
        run(write_lines({"prompt": "Q", "chosen": "A", "rejected": "B"}), **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_prompt_tokens", 0),
        ("max_response_tokens", 0),
        ("num_workers", 0),
        ("held_out", -1),
        ("max_rows", 0),
        ("fraction", 0.0),
        ("fraction", 1.5),
        ("responses_per_prompt", 1),
        ("reward_noise", -0.1),
        ("reward_noise", float("inf")),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    config = PrepareConfig(input="x.jsonl", output="y", tokenizer="z")
    with pytest.raises(ConfigError, match=f"{name} = {value}; "):
        replace(config, **{name: value})


def test_a_thinking_template_is_pointed_out(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<think></think>' }}"
        "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    out = io.StringIO()
    run(write_lines(row(0)), chat_template=str(tmp_path / "template.jinja"), console=Console(file=out, width=400))
    assert "The chat template puts '<think></think>' before an assistant's answer" in out.getvalue()


# ------------------------------------------------------------------------------------------ nothing half-written


def test_no_usable_group_is_an_error(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(row(0, 1), row(1, prompt=""), name="bad.jsonl")
    with pytest.raises(
        DataError,
        match=r"none of 2 groups is usable .format groups because .*: 1 × responses: .*:1: responses has K = 1 .*; 1 × prompt",
    ):
        run(path)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_outputs_in_use_are_refused(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(row(0), row(1))
    (tmp_path / "out-eval").mkdir()
    (tmp_path / "out-eval" / "precious").write_text("")
    with pytest.raises(ConfigError, match=r"out-eval; exists and is not an empty folder; remove it, or choose another output"):
        run(path, held_out=1)
    run(path)
    with pytest.raises(ConfigError, match=r"out; exists and is not an empty folder"):
        run(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        run(path, "file/out")


def test_a_full_disk_leaves_nothing(run: Run, write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(*(row(index) for index in range(200)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # a real write error: no file may grow beyond 8 KiB
    try:
        with pytest.raises(DataError, match=r"out: cannot write: .*; no partial output remains; free space"):
            run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_both_folders_appear_at_the_end(run: Run, write_lines: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    rename = os.rename

    def watch(source: Any, target: Any) -> None:
        seen.append(sorted(name for name in os.listdir(tmp_path) if name.startswith("out")))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    run(write_lines(*(row(index) for index in range(9))), held_out=2)
    assert seen == [[], ["out-eval"]]
    assert sorted(os.listdir(tmp_path)) == ["out", "out-eval", "rows.jsonl"]


def test_a_killed_run_leaves_nothing_under_the_name(write_lines: Writer, bpe_folder: Path, tmp_path: Path) -> None:
    path = write_lines(*(row(index, 8) for index in range(20_000)))
    config = PrepareConfig(input=path, output=str(tmp_path / "out"), tokenizer=str(bpe_folder))
    code = f"from mpo_megatron.config import PrepareConfig; from mpo_megatron.data.prepare import prepare; prepare({config!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (partial := list(tmp_path.glob(".out.partial-*/tokenized.arrow"))) or not partial[0].stat().st_size:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no prepared groups there"):
        load_groups(tmp_path / "out")


# ------------------------------------------------------------------------------------------ real data


def test_real_data(run: Run, real_data: Path, tmp_path: Path) -> None:
    summary = run(str(real_data / "gsm8k_k4.jsonl"), "gsm8k", max_rows=400)
    without = sum(len(set(values)) == 1 for values in rewards_by_id(tmp_path / "gsm8k").values())
    assert summary.train.num_groups == 400
    assert summary.train.statistics["without_contrast"] == without > 100
    summary = run(str(real_data / "alpaca_eval_k8.jsonl"), "alpaca", max_rows=60, held_out=10, max_response_tokens=1400)
    assert summary.eval is not None
    assert summary.tally.num_rejected == 0
    kept = summary.train.num_responses + summary.eval.num_responses
    assert kept + summary.tally.overlong_dropped == 60 * 8
    assert summary.tally.overlong_dropped > 0
    assert digest_of(load_groups(tmp_path / "alpaca")) == summary.train.data_digest
