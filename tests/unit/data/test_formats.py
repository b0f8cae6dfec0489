from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mpo_megatron.data import conversations, format_groups
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, Options, build_group, detect, parse, unfold
from mpo_megatron.data.group import Group
from mpo_megatron.files import DataError
from tests.unit.data.messages import assistant, user


def read(row: dict[str, Any], format_name: str = "auto", rating: str | None = None) -> tuple[InputLayout, Group]:
    layout = detect([row], format_name, Options(ratings=tuple(rating.split("+")) if rating else ()))
    return layout, build_group(parse(row, layout), "rows.jsonl:1")


def texts(group: Group) -> tuple[Any, ...]:
    """The responses; a single plain message becomes its text."""
    return tuple(
        answer[0]["content"] if isinstance(answer, tuple) and [{*part} for part in answer] == [{"role", "content"}] else answer
        for answer in group.responses
    )


# ------------------------------------------------------------------------------------------ one test per format


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "responses": [{"text": "A", "reward": 1}, {"text": "B", "reward": -0.5}]},
        {"prompt": "Q", "responses": ["A", "B"], "rewards": [1, -0.5]},
        {"messages": [user("Q")], "responses": ["A", "B"], "scores": [1, -0.5]},
        {"prompt": [{"from": "human", "value": "Q"}], "responses": ["A", "B"], "rewards": [1, -0.5]},
        {"prompt": "Q", "responses": [[assistant("A")], [assistant("B")]], "rewards": [1, -0.5]},
        {
            "prompt": "Q",
            "all_generated_responses": ["A", "B"],
            "all_rm_scores": [1, -0.5],
            "chosen": [user("Q"), assistant("A")],
            "rejected": [user("Q"), assistant("B")],
        },
        {"prompt": "Q", "responses": {"text": ["A", "B"], "reward": [1, -0.5]}},  # as Arrow stores a sequence of records
    ],
)
def test_groups(row: dict[str, Any]) -> None:
    layout, group = read(row)
    assert (layout.format, layout.reward_kind) == ("groups", "scores")
    assert group.prompt == (user("Q"),)
    assert texts(group) == ("A", "B")
    assert group.rewards == (1.0, -0.5)


def test_groups_with_labels_with_or_without_rewards() -> None:
    layout, group = read({"prompt": "Q", "responses": ["A", "B"], "labels": [True, 0]})
    assert layout.reward_kind == "labels"
    assert (group.rewards, group.labels) == (None, (1, 0))
    items = [{"text": "A", "reward": 2.0, "label": 1}, {"text": "B", "reward": 1.0, "label": 0}]
    layout, group = read({"prompt": "Q", "responses": items})
    assert layout.reward_kind == "scores"
    assert (group.rewards, group.labels) == ((2.0, 1.0), (1, 0))


def test_groups_with_a_rating_of_choice() -> None:
    items = [{"text": "A", "helpful": 1, "safe": 4}, {"text": "B", "helpful": 2, "safe": 0}]
    assert read({"prompt": "Q", "responses": items}, rating="helpful+safe")[1].rewards == (2.5, 1.0)


def test_multi_turn_prompt_with_system_message() -> None:
    turns = [user("Q1"), assistant("A1"), {"role": "user", "content": [{"type": "text", "text": "Q2"}]}]
    row = {"system": "Be brief.", "prompt": turns, "responses": ["A", "B"], "rewards": [0, 1]}
    _, group = read(row)
    assert group.prompt == ({"role": "system", "content": "Be brief."}, user("Q1"), assistant("A1"), user("Q2"))


def ultrafeedback(overall: Any = 7.5, honesty: str = "4") -> dict[str, Any]:
    def completion(text: str, score: Any, ratings: list[str]) -> dict[str, Any]:
        names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        aspects = {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(names, ratings, strict=True)}
        return {"model": "m", "response": text, "annotations": aspects} | ({} if score is None else {"overall_score": score})

    items = [
        completion("A", overall, ["5", honesty, "5", "4"]),
        completion("B", None if overall is None else 3, ["1", "2", "3", "4"]),
    ]
    return {"source": "s", "instruction": "Q", "completions": items}


def test_ultrafeedback() -> None:
    layout, group = read(ultrafeedback())
    assert (layout.format, layout.reward_kind) == ("ultrafeedback", "scores")
    assert (group.prompt, group.responses, group.rewards) == ((user("Q"),), ("A", "B"), (7.5, 3.0))
    assert read(ultrafeedback(overall=None))[1].rewards == (4.5, 2.5)  # no overall score: mean of the four aspects
    assert read(ultrafeedback(), rating="honesty")[1].rewards == (4.0, 2.0)
    assert read(ultrafeedback(), rating="honesty+helpfulness")[1].rewards == (4.0, 3.0)
    with pytest.raises(RowError, match=r"completions\[0\].annotations.honesty.Rating is 'N/A', not a number"):
        read(ultrafeedback(honesty="N/A"), rating="honesty")


def test_nectar() -> None:
    prompt = "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: "
    answers = [{"answer": "A", "model": "m", "rank": 2.0}, {"answer": "B", "model": "n", "rank": 1.0}]
    layout, group = read({"prompt": prompt, "answers": answers})
    assert (layout.format, layout.reward_kind) == ("nectar", "ranks")
    assert group.prompt == (user("Q1"), assistant("A1"), user("Q2"))
    assert group.rewards == (-2.0, -1.0)
    with pytest.raises(DataError, match="no effect on format nectar"):
        read({"prompt": prompt, "answers": answers}, rating="rank")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"question": "Q", "chosen": "A", "rejected": "B"},
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    layout, group = read(row)
    assert (layout.format, layout.reward_kind) == ("pairs", "labels")
    assert (group.prompt, texts(group)) == ((user("Q"),), ("A", "B"))
    assert (group.rewards, group.labels) == (None, (1, 0))


@pytest.mark.parametrize(
    "names",
    [
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_reward", "rejected_reward"),
    ],
)
def test_pairs_with_scores(names: tuple[str, str]) -> None:
    layout, group = read({"prompt": "Q", "chosen": "A", "rejected": "B", names[0]: 8, names[1]: 5.5})
    assert layout.reward_kind == "scores"
    assert (group.rewards, group.labels) == ((8.0, 5.5), (1, 0))


def test_openai_s_form_with_scores() -> None:
    row = {"prompt": "Q", "preferred_output": "A", "non_preferred_output": "B", "preferred_score": 8, "non_preferred_score": 5.5}
    for options in (Options(), Options(ratings=("score",))):
        layout = detect([row], options=options)
        assert (layout.reward_kind, parse(row, layout).rewards) == ("scores", (8.0, 5.5))


def test_ratings() -> None:
    row = {"prompt": "Q", "response": "A", "helpfulness": 3, "correctness": 4, "verbosity": 1}
    layout = detect([row])
    assert (layout.format, layout.ratings) == ("ratings", ("helpfulness",))
    assert parse(row, layout).rewards == (3.0,)
    assert parse(row, detect([row], options=Options(ratings=("helpfulness", "correctness")))).rewards == (3.5,)
    assert detect([row]).why.endswith("; the reward is helpfulness")


def test_a_label_in_words_is_named() -> None:
    with pytest.raises(RowError, match=r"label is 'good'; a label is 1 \(chosen\) or 0 \(rejected\)"):
        read({"prompt": "Q", "completion": "A", "label": "good"})


@pytest.mark.parametrize("field", ["prompt", "chosen"])
def test_messages_as_python_prints_them_are_refused(field: str) -> None:
    """`str(messages)` in a CSV file would be read as the response's text."""
    for value in (user("Q"), [user("Q")]):
        row = {"prompt": "Q", "chosen": "A", "rejected": "B"} | {field: str(value)}
        with pytest.raises(RowError, match=rf"{field} is a message, or a list of them, as Python prints it; write it as JSON"):
            read(row)


def test_an_answer_in_json_is_one_answer() -> None:
    """As of data about structured output; only a list itself holds several answers."""
    for words in ('["a", "b"]', "[1, 2]", '{"role": "king", "content": 1}', '{"a": 1}', "[]"):
        assert texts(read({"prompt": "Q", "chosen": words, "rejected": "B"})[1]) == (words, "B")
    assert texts(read({"prompt": "Q", "chosen": ["a", "b"], "rejected": "B"})[1]) == ("a", "b", "B")


def test_one_message_as_a_json_string() -> None:
    row = {"prompt": user("Q"), "chosen": {"from": "gpt", "value": "A"}, "rejected": assistant("B")}
    group = read({name: json.dumps(value) for name, value in row.items()})[1]
    assert (group.prompt, texts(group)) == ((user("Q"),), ("A", "B"))
    turns = [user("Q"), {"role": "assistant", "function_call": {"name": "f"}}, user("R")]
    with pytest.raises(RowError, match=r"prompt\[1\].function_call is not read"):
        read({"prompt": json.dumps(turns), "chosen": "A", "rejected": "B"})
    with pytest.raises(RowError, match=r"prompt\[0\].content is missing"):
        read({"prompt": '[{"role": "user", "text": "Q"}]', "chosen": "A", "rejected": "B"})


def test_a_strength_outside_the_scale_is_refused() -> None:
    """HelpSteer marks comparisons without a valid answer by -100."""
    row = {"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": -100}
    with pytest.raises(RowError, match="preference_strength is -100; it must be within ±3"):
        read(row)


def test_ratings_of_a_conversation_written_in_one_string() -> None:
    text = "Q1\n\n<extra_id_1>Assistant\nA1\n\n<extra_id_1>User\nQ2\n"
    row = {"prompt": text, "response": "A", "helpfulness": 3}
    assert parse(row, detect([row])).prompt == (user("Q1"), assistant("A1"), user("Q2"))


def test_ids_come_from_the_row_or_from_its_content() -> None:
    row: dict[str, Any] = {"prompt": "Q", "responses": ["A", "B"], "rewards": [1.0, 0.0]}
    assert read(row | {"id": 17})[1].group_id == "17"
    assert read(row | {"group_id": "g", "id": 17})[1].group_id == "g"
    first, again, other = read(row)[1], read(row | {"note": "x"})[1], read(row | {"rewards": [2.0, 0.0]})[1]
    assert first.group_id == again.group_id != other.group_id


# ------------------------------------------------------------------------------------------ detection


def test_an_unknown_format_lists_the_columns_and_how_to_map_them() -> None:
    message = r"the columns \['text', 'url'\] match no known format .*groups: a prompt and a list of responses"
    with pytest.raises(DataError, match=message + ".*--columns prompt=question"):
        detect([{"text": "…", "url": "…"}])
    with pytest.raises(DataError, match=r"chosen=good rejected=bad, or response_a=first response_b=second winner=better\.$"):
        detect([{"question": "Q", "accepted": "A", "rejected": "B"}])


def test_responses_without_rewards_beside_a_pair_are_not_the_group() -> None:
    row: dict[str, Any] = {"prompt": "Q", "generations": ["A", "B", "C"], "chosen": "A", "rejected": "B"}
    assert detect([row]).format == "pairs"
    assert parse(row, detect([row])).unused == ("generations",)
    assert detect([row | {"scores": [2, 1, 0]}]).format == "groups"
    layout = detect([{"prompt": "Q", "all_generated_responses": [{"text": "A", "reward": 1}], "chosen": "A", "rejected": "B"}])
    assert layout.format == "groups"


def test_columns_that_do_not_judge_are_unused() -> None:
    """A `rank` beside rewards may be the number of the process that sampled the row."""
    plain = {"prompt": "Q", "responses": [{"text": "A", "reward": 1.0}, {"text": "B", "reward": 0.0}]}
    beside = {"prompt": "Q", "responses": ["A", "B"], "rewards": [1, 0]}
    for row in (plain | {"rank": 0}, beside | {"rank": 0}, beside | {"rank": [2, 1]}):
        parsed = parse(row, detect([row]))
        assert (parsed.rewards, parsed.unused) == ((1.0, 0.0), ("rank",))
    row = {"prompt": "Q", "responses": [{"text": "A", "stars": 3}, {"text": "B", "stars": 4}], "rewards": [1, 0]}
    parsed = parse(row, detect([row], options=Options(ratings=("stars",))))
    assert (parsed.rewards, parsed.unused) == ((3.0, 4.0), ("rewards",))
    row = {"id": 7, "prompt": "Q", "completion": "A", "label": True}
    assert parse(row, detect([row])).unused == ("id",)  # the group is of several rows


def test_a_dropped_response_s_other_keys_are_not_unused() -> None:
    """It has none that are read: its error came first."""
    items = [{"text": "A", "reward": 1.0}, {"text": "B", "reward": 0.0}, {"text": "", "reward": 2.0, "note": "n"}]
    parsed = parse({"prompt": "Q", "responses": items}, detect([{"prompt": "Q", "responses": items}]))
    assert ([str(error) for error in parsed.dropped], parsed.unused) == (["responses[2].text is empty"], ())


def test_openai_s_form_of_a_pair() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    row = {
        "input": {"messages": [user("Q")], "tools": [tool], "parallel_tool_calls": True},
        "preferred_output": [assistant("A")],
        "non_preferred_output": [assistant("B")],
    }
    layout = detect([row])
    parsed = parse(row, layout)
    assert (layout.format, parsed.prompt, parsed.tools, parsed.labels) == ("pairs", (user("Q"),), (tool,), (1, 0))
    assert parsed.responses == ((assistant("A"),), (assistant("B"),))
    assert parsed.unused == ("parallel_tool_calls",)
    for same in ({"tools": [tool]}, {"tools": []}, {"input": json.dumps(row["input"])}):
        assert parse(row | same, layout) == parsed
    for nothing in (None, []):  # Arrow gives every record all keys
        assert parse(row | {"input": row["input"] | {"tools": nothing}, "tools": [tool]}, layout) == parsed
    assert unfold({"input": row["input"], "note": "", "tools": None}) == {"note": "", **row["input"]}
    with pytest.raises(RowError, match=r"^input\.tools contradicts tools: the row has both$"):
        parse(row | {"tools": [tool | {"type": "other"}]}, layout)


def test_json_beside_an_instruction_is_its_input() -> None:
    text = json.dumps({"messages": [user("Hello")]})
    row = {"instruction": "Who speaks?", "input": text, "chosen": "A", "rejected": "B"}
    assert parse(row, detect([row])).prompt == (user(f"Who speaks?\n{text}"),)


def test_a_comparison_without_a_winner_asks_for_it() -> None:
    with pytest.raises(DataError, match=r"which column names the better answer\? Set rating to one of \['pick', 'response_a'"):
        detect([{"response_a": "A", "response_b": "B", "pick": "a"}], "comparison")


def test_the_reason_names_each_column_once() -> None:
    row = {"messages": [user("Q"), assistant("A")], "rejected_response": "B"}
    assert detect([row]).why == "its columns rejected_response, messages look like a chosen and a rejected answer"


def test_an_ambiguous_or_unknown_rating_lists_the_numbers() -> None:
    row: dict[str, Any] = {"prompt": "Q", "response": "A", "clarity": 3, "depth": 4, "id": 9}
    with pytest.raises(DataError, match=r"Set rating to one or more \(a\+b\) of \['clarity', 'depth'\]"):
        detect([row])
    with pytest.raises(DataError, match=r"Set rating to one or more \(a\+b\) of \['seed'\]"):  # no known name of a reward
        detect([{"prompt": "Q", "response": "A", "seed": 7}])
    with pytest.raises(DataError, match="match no known format"):
        detect([{"prompt": "Q", "response": "A", "url": "u"}])
    with pytest.raises(DataError, match=r"no column width; choose from \['clarity', 'depth'\]"):
        detect([row], options=Options(ratings=("clarity", "width")))
    with pytest.raises(DataError, match="no column chosen_stars or rejected_stars"):
        detect([{"prompt": "Q", "chosen": "A", "rejected": "B"}], options=Options(ratings=("stars",)))


# ------------------------------------------------------------------------------------------ short ways


@pytest.mark.parametrize(
    "value",
    [
        *("words", "7", "é", "", " ", "\n words", "[words]", '[{"role": "assistant", "content": "words"}]', "\ud800", "a\ud800"),
        *("[{'role': 'assistant', 'content': 'words'}]", "\n\nHuman: a\n\nAssistant: b", "Human: a\n\nAssistant: b", "Human: a"),
        *(
            "a\n\nHuman: b\n\nAssistant: c",
            "a<extra_id_1>User\nb\n<extra_id_1>Assistant\nc",
            "<extra_id_1>User\na",
            "**a**",
            '{"a": 1}',
            "\x1c a",
            None,
            7,
            ["a"],
        ),
    ],
)
def test_plain_responses_are_read_as_all_others(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = (0.5, 1, "2", True, None, "none", float("nan"), 1e30, 10**30, 1e31)
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "Q", "responses": [{"text": value, "reward": reward}, *({"text": t, "reward": 0.0} for t in "AB")]}
        for reward in rewards
    ]
    rows += [{"prompt": value, "responses": [{"text": text, "reward": 1} for text in "AB"]}]
    layout = detect([{"prompt": "Q", "responses": [{"text": "A", "reward": 1.0}]}])

    def outcomes() -> list[Any]:
        found = list[Any]()
        for row in rows:
            try:
                parsed = parse(row, layout)
                found.append((replace(parsed, dropped=()), [str(error) for error in parsed.dropped]))
            except RowError as error:
                found.append(str(error))
        return found

    short = outcomes()
    for module in (conversations, format_groups):
        monkeypatch.setattr(module, "is_ordinary", lambda value: False)
    assert short == outcomes()
