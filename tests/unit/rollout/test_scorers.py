"""Scorers one by one, each against an independent computation."""

from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config
from transformers.models.qwen3 import Qwen3ForSequenceClassification

from mpo_megatron.config import ConfigError
from mpo_megatron.config.score import KINDS, build_scorer_config
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.models import choose_device
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, build_scorer
from mpo_megatron.rollout.scorers.comparison import Pair, score_by_comparison
from mpo_megatron.rollout.scorers.verifiable import read_number
from mpo_megatron.rollout.shards import choose_shard
from tests.tiny import save_tokenizer
from tests.unit.rollout.conftest import Server, completion, group_line

GROUPS = [
    group_line("a", "short", "a much longer response, with words", ""),
    group_line("b", "ä🙂", "yes" * 20, "no", "maybe"),
    group_line("c", "one"),
]


def build(kind: str, **options: Any) -> Scorer:
    return build_scorer("it", build_scorer_config("it", {"kind": kind, **options}))


def save_classifier(folder: Path, *, num_labels: int = 1, pad: bool = True, seed: int = 0) -> Path:
    """A random sequence classifier with a tokenizer and chat template."""
    vocab_size = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=vocab_size, num_labels=num_labels, max_position_embeddings=300, pad_token_id=257 if pad else None,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def conversation_logit(folder: Path, group: Record, text: str) -> float:
    """transformers' result for a single conversation, with its own chat template."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    messages = [*group["prompt"], {"role": "assistant", "content": text}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.inference_mode():
        return float(model(ids).logits[0, 0])


# --------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("pad", [True, False])
def test_reward_model_equals_one_at_a_time(tmp_path: Path, pad: bool) -> None:
    folder = save_classifier(tmp_path / "rm", pad=pad)
    scorer = build("reward_model", model=str(folder), batch_size=3, device="cpu")
    for group, scores in zip(GROUPS, scorer.score(GROUPS), strict=True):
        expected = [conversation_logit(folder, group, response["text"]) for response in group["responses"]]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert len({score for scores in scorer.score(GROUPS) for score in scores}) == 8


def test_too_long_is_never_cut(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "rm")
    groups = [group_line("a", "fine", "x" * 300)]
    with pytest.raises(DataError, match=r"group a, response 1 has 3\d\d tokens with its prompt, but max_length = 300"):
        build("reward_model", model=str(folder), device="cpu").score(groups)
    scorer = build("reward_model", model=str(folder), device="cpu", too_long="missing")
    [[first, second]] = scorer.score(groups)
    assert first == pytest.approx(conversation_logit(folder, groups[0], "fine"), abs=1e-5)
    assert second is None
    assert scorer.notes == {"a": {"too_long": 1}}


def test_wrong_heads_are_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the head of Qwen3ForCausalLM gives no score"):
        build("reward_model", model=str(model_folder))
    two = save_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(ConfigError, match="its head has 2 outputs"):
        build("reward_model", model=str(two))
    headless = save_classifier(tmp_path / "headless")
    from safetensors.torch import load_file, save_file

    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing in the checkpoint, for example score\.weight"):
        build("reward_model", model=str(headless), device="cpu")


def test_code_of_a_checkpoint_runs_only_when_asked_for(tmp_path: Path) -> None:
    """A model like ArmoRM: its own class, whose output names the reward `score`."""
    folder = save_classifier(tmp_path / "armo")
    (folder / "modeling_armo_tiny.py").write_text(
        "from types import SimpleNamespace\n"
        "from transformers.models.qwen3 import Qwen3ForSequenceClassification\n"
        "class ArmoTiny(Qwen3ForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        return SimpleNamespace(logits=output.logits.repeat(1, 19), score=10 * output.logits[:, 0])\n"
    )
    plain = build("reward_model", model=str(folder), device="cpu").score(GROUPS)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["ArmoTiny"], "auto_map": {"AutoModelForSequenceClassification": "modeling_armo_tiny.ArmoTiny"}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"ArmoTiny is defined by Python code .* set scorers\.it\.trust_remote_code = true"):
        build("reward_model", model=str(folder))
    trusted = build("reward_model", model=str(folder), device="cpu", trust_remote_code=True).score(GROUPS)
    for mine, theirs in zip(trusted, plain, strict=True):
        assert mine == pytest.approx([10 * (value or 0.0) for value in theirs], abs=1e-4)


def test_pairwise_ranker_is_the_mean_of_its_comparisons(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "ranker")
    template = "{prompt}|{a}|{b}"
    scorer = build("pairwise", model=str(folder), template=template, device="cpu", batch_size=4)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), load_tokenizer(folder)

    def prefers(group: Record, first: int, second: int) -> float:
        prompt, texts = group["prompt"][0]["content"], [response["text"] for response in group["responses"]]
        ids = torch.tensor([tokenizer.encode(f"{prompt}|{texts[first]}|{texts[second]}")])
        with torch.inference_mode():
            return float(torch.sigmoid(model(ids).logits[0, 0]))

    for group, scores in zip(GROUPS, scorer.score(GROUPS), strict=True):
        number = len(group["responses"])
        for index, score in enumerate(scores):
            others = [other for other in range(number) if other != index]
            wins = [(prefers(group, index, other) + 1 - prefers(group, other, index)) / 2 for other in others]
            assert score == pytest.approx(sum(wins) / len(wins) if wins else 0.5, abs=1e-5)


# --------------------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize("number", [2, 3, 8, 13])
def test_tournament_finds_best_and_worst_with_fewer_questions(number: int) -> None:
    strengths = random.Random(number).sample(range(100), number)
    asked: list[Pair] = []

    def compare(pairs: Any) -> list[float | None]:
        asked.extend(pairs)
        return [float(strengths[pair.a] > strengths[pair.b]) for pair in pairs]

    group = group_line("a", *map(str, strengths))
    [scores] = score_by_comparison([group], compare, tournament=True, both_orders=False)
    rounds = math.ceil(math.log2(number))
    assert len(asked) <= rounds * (number // 2)
    assert len({frozenset((pair.a, pair.b)) for pair in asked}) == len(asked)  # no pair is repeated
    assert scores[strengths.index(max(strengths))] == max(score for score in scores if score is not None) == 1.0
    assert scores[strengths.index(min(strengths))] in (0.0, None)
    [full] = score_by_comparison([group], compare, tournament=False, both_orders=False)
    order = sorted(range(number), key=lambda index: strengths[index])
    assert full == pytest.approx([order.index(index) / (number - 1) for index in range(number)])


def test_a_bias_for_the_first_place_cancels() -> None:
    scores = score_by_comparison(
        [group_line("a", "x", "y", "z")], lambda pairs: [0.9] * len(pairs), tournament=False, both_orders=True
    )
    assert scores == [pytest.approx([0.5] * 3)]


def test_comparisons_without_verdict_do_not_count() -> None:
    def compare(pairs: Any) -> list[float | None]:
        return [None if 2 in (pair.a, pair.b) else 1.0 for pair in pairs]

    assert score_by_comparison([group_line("a", "x", "y", "z")], compare, tournament=False, both_orders=False) == [
        [1.0, 0.0, None]
    ]


# --------------------------------------------------------------------------------------------------- verifiable


@pytest.mark.parametrize(
    "text, value",
    [
        ("42", 42.0), ("-3.5", -3.5), ("1,234,567", 1234567.0), ("1e3", 1000.0), ("3/4", 0.75), ("$7.", 7.0), ("−2", -2.0),
        (".5", 0.5), ("12 %", 12.0), ("none", None), ("1 or 2", None), ("1/0", None), ("", None),
    ],
)  # fmt: skip
def test_numbers(text: str, value: float | None) -> None:
    assert read_number(text) == value


@pytest.mark.parametrize(
    "options, reference, texts, scores",
    [
        ({}, "Blue", ["Blue", " Blue\n", "blue", "Blue."], [1, 1, 0, 0]),
        ({"ignore_case": True}, ["Red", "Blue"], ["bLUE", "green", "red"], [1, 0, 1]),
        ({"mode": "numeric"}, 1000, ["First 3, then 1,000", "1e3", "= 2000/2", "1000 of 7", "none"], [1, 1, 1, 0, 0]),
        ({"mode": "numeric", "tolerance": 0.01}, "3.14", ["3.15", "3.2"], [1, 0]),
        ({"extract": r"\\boxed\{(.*?)\}"}, "7", [r"\boxed{6} no: \boxed{7}", "7", r"\boxed{8}"], [1, 0, 0]),
        ({"mode": "numeric", "extract": r"Answer:.*"}, 5, ["5. Answer: 4", "4. Answer: five", "Answer: 5.0"], [0, 0, 1]),
    ],
)
def test_match(options: dict[str, Any], reference: Any, texts: list[str], scores: list[int]) -> None:
    assert build("match", **options).score([group_line("a", *texts, reference_answer=reference)]) == [[float(x) for x in scores]]


def test_match_names_what_is_amiss() -> None:
    scorer = build("match", field="meta.answer")
    assert scorer.score([group_line("a", "x", "y"), group_line("b", "x", meta={"answer": "x"})]) == [[None, None], [1.0]]
    assert scorer.notes == {"a": {"no_reference": 1}}
    with pytest.raises(DataError, match=r"group a: reference_answer = 'five' is not a number"):
        build("match", mode="numeric").score([group_line("a", "x", reference_answer="five")])


def test_regex() -> None:
    group = group_line("a", "<think>x</think> y", "y <think>x</think>", "none")
    assert build("regex", pattern=r"^<think>").score([group]) == [[1.0, 0.0, 0.0]]
    assert build("regex", pattern=r"\w+", full=True, found=0.5, absent=-1).score([group]) == [[-1.0, -1.0, 0.5]]


# --------------------------------------------------------------------------------------------------- judge


def judge(server: Server, template: Path, **options: Any) -> Scorer:
    endpoint = {"base_url": server.url, "model": "judge", "retries": 0, "concurrency": 4}
    return build("judge", template=str(template), endpoint=endpoint, **options)


def test_judge_grades(server: Server, tmp_path: Path) -> None:
    template = tmp_path / "grade.txt"
    template.write_text("Q: {{ prompt }}\nR: {{ response }}\nReference: {{ group.reference_answer }}")
    lock, calls = threading.Lock(), dict[str, int]()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        question = body["messages"][0]["content"]
        text = question.split("R: ")[1].split("\n")[0]
        with lock:
            calls[text] = calls.get(text, 0) + 1
        if text == "lost":
            return 500, {}, b"no"
        if text == "never" or (text == "late" and calls[text] < 3):
            return completion("I cannot say.")
        assert "Reference: 5" in question
        return completion(f"First I thought Score: 1, but. Score: {len(text)}.5")

    server.answer = answer
    scorer = judge(server, template)
    groups = [group_line("a", "four", "late", "never", "lost", reference_answer=5)]
    assert scorer.score(groups) == [[4.5, 4.5, None, None]]
    assert scorer.notes["a"]["garbage"] == 2 + 3
    assert sum(count for note, count in scorer.notes["a"].items() if note.startswith("failed: 500")) == 1
    assert len({body["seed"] for body in server.requests}) == len(server.requests)  # garbage is requested again with another seed


def test_judge_compares_and_ties(server: Server, tmp_path: Path) -> None:
    """The longer one wins; equal lengths tie; a judge that always says A contradicts itself, which is a tie."""
    template = tmp_path / "compare.txt"
    template.write_text("{{ a }}|{{ b }}")

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        a, b = body["messages"][0]["content"].split("|")
        verdict = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
        return completion(f"… Verdict: [[{verdict}]]")

    server.answer = answer
    scorer = judge(server, template, mode="compare")
    assert scorer.score([group_line("a", "x", "yyy", "zzz")]) == [pytest.approx([0.0, 0.75, 0.75])]
    told = {"answers": 6, "prompt_tokens": 6, "completion_tokens": 18}
    assert scorer.notes == {"a": {"ties": 1, "first_place_won": 2, "second_place_won": 2, "orders_agree": 3, **told}}
    server.answer = lambda path, body: completion("Verdict: A")
    biased = judge(server, template, mode="compare")
    assert biased.score([group_line("a", "x", "yyy")]) == [[0.5, 0.5]]
    told = {"answers": 2, "prompt_tokens": 2, "completion_tokens": 6}
    assert biased.notes == {"a": {"ties": 1, "first_place_won": 2, "orders_differ": 1, **told}}


def test_judge_templates_are_checked(server: Server, tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text("{{ unknown }}")
    with pytest.raises(ConfigError, match="cannot be filled for group a: 'unknown' is undefined; it may use prompt"):
        judge(server, template).score([group_line("a", "x")])
    template.write_text("{% if %}")
    with pytest.raises(ConfigError, match="it cannot be compiled"):
        judge(server, template)
    assert not server.requests


# --------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "oracle"}, r"scorers\.it\.kind = oracle; choose one of"),
        ({"kind": "match", "modes": "exact"}, r"scorers\.it: modes: there is no such option; did you mean mode\?"),
        ({"kind": "match", "mode": "fuzzy"}, r"scorers\.it: .*(?s:.*)exact"),
        ({"kind": "regex", "pattern": "("}, r"scorers\.it\.pattern = \(; not a regular expression"),
        ({"kind": "regex"}, r"scorers\.it: .*pattern"),
        ({"kind": "pairwise", "model": "m", "template": "{a}{b}"}, r"must contain {prompt} exactly once"),
        ({"kind": "judge", "template": "t", "endpoint": {}, "parse": "x"}, "needs a group"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scorer_config("it", options)


def test_every_kind_has_a_name() -> None:
    assert set(KINDS) == {"reward_model", "served_reward_model", "pairwise", "match", "regex", "function", "judge"}


def test_a_reward_model_spread_over_all_devices_scores_the_same(tmp_path: Path) -> None:
    """Without GPUs all layers land on the CPU, by the path that spreads them."""
    folder = save_classifier(tmp_path / "rm")
    alone, spread = build("reward_model", model=str(folder)), build("reward_model", model=str(folder), device="balanced")
    assert spread.score(GROUPS) == alone.score(GROUPS)


def test_ranks_of_torchrun_share_the_groups_and_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_shard(None) == (0, 1)  # of another launcher's job
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert choose_shard(None) == (5, 8)
    assert choose_shard("1/3") == (1, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda:1"
    for name, value in {"TASK_ID": "3", "TASK_MIN": "1", "TASK_STEP": "2", "TASK_COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert choose_shard(None) == (1 * 8 + 5, 4 * 8)
