"""Typical reward functions: called by their parameter names, in a separate process, or refused by name."""

from __future__ import annotations

import contextlib
import os
import py_compile
import time
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError
from mpo_megatron.config.score import build_scorer_config
from mpo_megatron.files import DataError
from mpo_megatron.files.functions import check_source
from mpo_megatron.rollout.scorers import Scores, build_scorer
from mpo_megatron.rollout.scorers.function import Function
from mpo_megatron.rollout.scorers.function_worker import describe
from mpo_megatron.rollout.scorers.reading import Parameter, find_reading
from tests.unit.rollout.conftest import group_line

GROUPS = [
    group_line("a", "xy", "none", reference_answer="7", meta={"bonus": 0.5, "level": 1}),
    group_line("b", "z", reference_answer="8", meta={"bonus": 2}),
]


def write(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path / 'mine.py'}:reward"


def build(function: str, **options: Any) -> Function:
    scorer = build_scorer("it", build_scorer_config("it", {"kind": "function", "function": function, **options}))
    assert isinstance(scorer, Function)
    return scorer


def run_reading(function: Any, params: dict[str, Any] | None = None) -> Scores:
    """The worker's result, computed in this process."""
    reading = find_reading("it", [Parameter(*item) for item in describe(function)], params or {})
    scores: Scores = [[None] * len(group["responses"]) for group in GROUPS]
    for call in reading.calls(GROUPS):
        value = function(**call.arguments)
        for number, (index, place) in zip(value if reading.unit != "response" else [value], call.places, strict=True):
            scores[index][place] = number
    return scores


def response_and_group(response, group):  # type: ignore[no-untyped-def]
    return len(response) + group["meta"]["bonus"]


def prompt_and_response(prompt, response, **kw):  # type: ignore[no-untyped-def]
    return float(prompt.startswith("Question")) + len(response) + 10 * kw["bonus"]


def verl(data_source, solution_str, ground_truth, extra_info=None):  # type: ignore[no-untyped-def]
    assert data_source == ""
    return float(ground_truth) + len(solution_str) + extra_info["bonus"]


def fields_by_name(completion, bonus, reference_answer, level=9):  # type: ignore[no-untyped-def]
    return bonus * level + float(reference_answer) + len(completion)


def trl(completions, reference_answer, **kwargs):  # type: ignore[no-untyped-def]
    assert kwargs["level"] == [1, 1, None]
    return [len(text) + float(answer) for text, answer in zip(completions, reference_answer, strict=True)]


def trl_with_prompts(prompts, completions, completion_ids):  # type: ignore[no-untyped-def]
    assert completion_ids == [None] * 3
    return [len(text) + (prompt == "Question b") for text, prompt in zip(completions, prompts, strict=True)]


def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):  # type: ignore[no-untyped-def]
    return [float(truth) + info["bonus"] for truth, info in zip(ground_truths, extra_infos, strict=True)]


def one_group(prompt, responses, bonus):  # type: ignore[no-untyped-def]
    return [rank * bonus for rank, _ in enumerate(responses, start=1)]


@pytest.mark.parametrize(
    "function, expected",
    [
        (response_and_group, [[2.5, 4.5], [3]]),
        (prompt_and_response, [[8.0, 10.0], [22.0]]),
        (verl, [[9.5, 11.5], [11.0]]),
        (fields_by_name, [[9.5, 11.5], [27.0]]),
        (trl, [[9.0, 11.0], [9.0]]),
        (trl_with_prompts, [[2, 4], [2]]),
        (verl_batch, [[7.5, 7.5], [10.0]]),
        (one_group, [[0.5, 1.0], [2]]),
    ],
)
def test_functions_are_called_by_the_names_of_their_parameters(function: Any, expected: Scores) -> None:
    assert run_reading(function) == expected


def test_params_are_arguments_too() -> None:
    def scaled(response, scale, power=1):  # type: ignore[no-untyped-def]
        return scale * len(response) ** power

    assert run_reading(scaled, {"scale": 2}) == [[4, 8], [2]]
    assert run_reading(scaled, {"scale": 2, "power": 2}) == [[8, 32], [2]]
    with pytest.raises(ConfigError, match="params sets size, but the function has no such parameter"):
        run_reading(scaled, {"scale": 2, "size": 1})


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda text, meta: 0, r"its parameters \(text, meta\) name none of response, completion"),
        (lambda response, completions: 0, r"name several of response, completion"),
        (lambda *texts: 0, "its parameter texts cannot be passed by name"),
        (len, "its parameter obj cannot be passed by name"),
        (
            lambda response, truth: 0,
            r"its parameter truth is neither .* which has bonus, group_id, level, meta, prompt, reference_answer;",
        ),
    ],
)
def test_what_no_reading_fits_is_refused_by_name(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_reading(function)


def test_in_a_process_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("BONUS = 100\n")
    function = write(
        tmp_path,
        "import os\nfrom beside import BONUS\n"
        "def reward(response, pid):\n"
        "    print('said by the function')\n"
        "    assert os.getpid() != pid\n"
        "    if response == 'bad': raise KeyError('oops')\n"
        "    if response == 'text': return 'high'\n"
        "    if response == 'nan': return float('nan')\n"
        "    return None if response == 'none' else BONUS + len(response)\n",
    )
    scorer = build(function, params={"pid": os.getpid()})
    assert scorer.score([group_line("a", "xy", "none")]) == [[102.0, None]]
    [[value]] = scorer.score([group_line("a", "nan")])
    assert value is not None
    assert value != value
    assert scorer.notes == {"a": {"not_finite": 1}}
    with pytest.raises(DataError, match=r"mine\.py:reward, group g, response 1: raised KeyError: 'oops'"):
        scorer.score([group_line("g", "x", "bad")])
    with pytest.raises(DataError, match=r"group g, response 0: returned 'high'; return a number"):
        scorer.score([group_line("g", "text")])
    digest = scorer.digest()
    scorer.close()
    assert "said by the function" not in capfd.readouterr().out
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "# changed\n")
    changed = build(function, params={"pid": os.getpid()})
    assert changed.digest() != digest
    changed.close()


ANNOTATED = """
from __future__ import annotations
import dataclasses, pickle

@dataclasses.dataclass
class Rule:
    letter: str = "x"
    weight: float = 2.0

@dataclasses.dataclass(kw_only=True)
class Rules(Rule):
    factor: dataclasses.InitVar[float] = 1.0

def reward(response):
    rule = pickle.loads(pickle.dumps(Rules()))
    return rule.weight * response.count(rule.letter)
"""


@pytest.mark.parametrize("name", ["mine.py", "my.rules.py", "dataclasses.py", "json.py"])
def test_a_file_may_define_dataclasses_and_be_called_as_another_module(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(ANNOTATED + "import json\nassert json.dumps([1]) == '[1]'\n")
    assert build(f"{tmp_path / name}:reward").score(GROUPS) == [[2.0, 0.0], [0.0]]


def test_a_call_that_hangs_or_crashes_costs_its_own_score(tmp_path: Path) -> None:
    function = write(
        tmp_path,
        "import os, time\n"
        "def reward(response):\n"
        "    if response == 'hang': time.sleep(600)\n"
        "    if response == 'crash': os._exit(3)\n"
        "    if response == 'quit': raise SystemExit\n"
        "    return len(response)\n",
    )
    scorer = build(function, timeout=1.0)
    started = time.monotonic()
    assert scorer.score([group_line("a", "x", "hang", "yy"), group_line("b", "crash", "zzz")]) == [[1.0, None, 2.0], [None, 3.0]]
    assert time.monotonic() - started < 60  # an idle machine takes three seconds
    assert scorer.notes == {"a": {"timed_out": 1}, "b": {"crashed": 1}}
    with pytest.raises(DataError, match="group a, response 0: raised SystemExit"):
        scorer.score([group_line("a", "quit")])
    scorer.close()


def test_batches_return_one_number_a_response(tmp_path: Path) -> None:
    scorer = build(write(tmp_path, "def reward(completions):\n    return [1.0] * (len(completions) - 1)\n"))
    with pytest.raises(DataError, match="returned 2 values for 3 responses; return one number for each"):
        scorer.score(GROUPS)
    scorer.close()


@pytest.mark.parametrize(
    "function, message",
    [
        ("nowhere:x", "ModuleNotFoundError"),
        ("math:nothing", "AttributeError"),
        ("math:pi", "it is of type float, not a function"),
        ("no.py:f", "no such file"),
        ("builtins:len", "cannot be passed by name"),
        ("asyncio:sleep", "it is asynchronous"),
    ],
)
def test_what_cannot_be_imported_is_named(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(function)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def reward(response):\n    return 1\n", None),
        ("from rewards import *\n", None),
        ("import os.path, rewards\ntry:\n    import nowhere\nexcept ImportError:\n    reward = len\n", None),
        ("import sys\nsys.path.append('lib')\nimport nowhere\nreward = nowhere.reward\n", None),
        (
            "import math\nfrom nowhere.scores import reward\n",
            r"f\.py, line 2, imports nowhere, which is not installed; install it",
        ),
        ("raise RuntimeError('this file runs only when it scores')\nreward = 1\n", None),
        ("def reward(response:\n", "not valid Python"),
        ("def prize(response):\n    return 1\n", "has no function reward; check its spelling"),
    ],
)
def test_a_file_is_checked_without_running_it(tmp_path: Path, source: str, message: str | None) -> None:
    (tmp_path / "f.py").write_text(source)
    (tmp_path / "rewards.py").touch()
    with contextlib.nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_source("scorers.x.function", f"{tmp_path / 'f.py'}:reward")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfdef reward(response):\n    return 1\n",
        b"# -*- coding: latin-1 -*-\ndef reward(response):\n    return len('\xe9')\n",
    ],
    ids=["byte-order mark", "latin-1"],
)
def test_a_file_is_read_as_python_reads_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.py").write_bytes(content)
    check_source("scorers.x.function", f"{tmp_path / 'f.py'}:reward")
    with contextlib.closing(build(f"{tmp_path / 'f.py'}:reward")) as scorer:
        assert scorer.score(GROUPS) == [[1, 1, 1][: len(group["responses"])] for group in GROUPS]


def test_a_neighbour_may_be_compiled_and_may_change_the_path(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("import paths, nowhere\nreward = nowhere.reward\n")
    (tmp_path / "paths.source").touch()
    py_compile.compile(str(tmp_path / "paths.source"), cfile=str(tmp_path / "paths.pyc"))
    check_source("scorers.x.function", f"{tmp_path / 'f.py'}:reward")


def test_a_dubious_escape_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def reward(response):\n    return len('\\d')\n")
    with pytest.warns(SyntaxWarning, match="invalid escape sequence") as said:
        check_source("scorers.x.function", f"{tmp_path / 'f.py'}:reward")
    assert len(said) == 1
