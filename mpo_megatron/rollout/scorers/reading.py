"""Determine how to call a user's reward function from the names of its parameters.

    reward(response, group)  ·  reward(prompt, response, **fields)           one response per call
    compute_score(data_source, solution_str, ground_truth, extra_info)      the same, as verl names them
    reward(prompt, responses)  ·  reward(responses, group)                  one group per call, returns K numbers
    reward(completions, ground_truth, **kwargs)                             many responses per call, every argument a list: TRL

Any other parameter is a field of the group, or of its `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mpo_megatron.config import ConfigError, require
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import join_messages

Unit = Literal["response", "group", "batch"]
_RESPONSE = ("response", "completion", "solution_str")
_RESPONSES = ("responses", "completions", "solution_strs")
_OF_GROUP = {"prompt", "messages", "group"}
"""Names that stand for one group, and so distinguish a function of a group from one of a batch."""
_PLURALS = {"prompts": "prompt", "groups": "group", "ground_truths": "ground_truth", "data_sources": "data_source",
            "extra_infos": "extra_info", "reference_answers": "reference_answer"}  # fmt: skip
"""For a batch: names of lists → names of their items."""
_NOT_FIELDS = {"responses", "notes", "dropped", "unusable", "uncontrolled", "missing", "prompt_digests"}
"""Keys of a group line that are not fields of the prompt."""


class Parameter(NamedTuple):
    """One parameter of a function, as `inspect` describes it."""

    name: str
    kind: str
    """Name of the `inspect.Parameter` kind."""
    has_default: bool


class Call(NamedTuple):
    """Arguments of one call, and the responses it scores."""

    arguments: dict[str, Any]
    places: list[tuple[int, int]]
    """(index of the group, index of the response)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to call a function."""

    where: str
    """Scorer and function, for messages."""
    unit: Unit
    required: tuple[str, ...]
    """Parameters that need a value from the group, in the function's order."""
    optional: tuple[str, ...]
    """Parameters that receive a field if the group has it."""
    takes_all: bool
    """Whether it accepts further arguments through `**`."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments from the configuration."""

    def calls(self, groups: Sequence[Record]) -> list[Call]:
        """The calls that score all responses of these groups.

        Raises:
            ConfigError: a parameter is neither a known name nor a field of the group.
        """
        if self.unit == "group":
            texts = [[response["text"] for response in group["responses"]] for group in groups]
            return [
                Call(
                    self._choose(group, dict.fromkeys(_RESPONSES, texts[index])),
                    [(index, number) for number in range(len(texts[index]))],
                )
                for index, group in enumerate(groups)
                if texts[index]
            ]
        names = _RESPONSE if self.unit == "response" else _RESPONSES
        single = [
            Call(
                self._choose(group, dict.fromkeys(names, response["text"]) | {"completion_ids": response.get("token_ids")}),
                [(index, number)],
            )
            for index, group in enumerate(groups)
            for number, response in enumerate(group["responses"])
        ]
        if self.unit == "response" or not single:
            return single
        # Some groups may lack a field: their entries are None, so that all lists have equal length.
        keys = {key for call in single for key in call.arguments if key not in self.params}
        lists = {key: [call.arguments.get(key) for call in single] for key in sorted(keys)}
        return [Call(lists | dict(self.params), [place for call in single for place in call.places])]

    def _choose(self, group: Record, of_response: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name: named parameters, and with `**` the prompt and the group's other fields."""
        meta = group.get("meta") or {}
        fields = {name: value for name, value in group.items() if name not in _NOT_FIELDS} | dict(meta)
        fields |= {"prompt": join_messages(group["prompt"])}
        values = {"data_source": "", "extra_info": meta, "ground_truth": fields.get("reference_answer")} | fields
        values |= {"messages": group["prompt"], "group": group, **of_response}
        if self.unit == "batch":
            values |= {plural: values[name] for plural, name in _PLURALS.items() if name in values and plural not in fields}
        lacking = next((name for name in self.required if name not in values), None)
        if lacking is not None:
            raise ConfigError(
                f"{self.where}; its parameter {lacking} is neither response, prompt, messages, group nor a field of group "
                f"{group['group_id']}, which has {', '.join(sorted(fields))}; rename it, or give it a value in params."
            )
        chosen = dict(fields) if self.takes_all else {}
        chosen |= {name: values[name] for name in (*self.required, *self.optional) if name in values}
        return chosen | dict(self.params)


def find_reading(where: str, parameters: Sequence[Parameter], params: Mapping[str, Any]) -> Reading:
    """Determine how to call a function.

    Raises:
        ConfigError: no supported signature fits; names the parameter.
    """
    for parameter in parameters:
        require(
            parameter.kind not in ("POSITIONAL_ONLY", "VAR_POSITIONAL"),
            f"{where}; its parameter {parameter.name} cannot be passed by name; write reward(response, group) or similar.",
        )
    named = [parameter for parameter in parameters if parameter.kind != "VAR_KEYWORD"]
    names = {parameter.name for parameter in named}
    takes_all = len(named) < len(parameters)
    unknown = next((name for name in params if name not in names), None)
    require(unknown is None or takes_all, f"{where}; params sets {unknown}, but the function has no such parameter.")
    free = [parameter for parameter in named if parameter.name not in params]
    one = [parameter.name for parameter in free if parameter.name in _RESPONSE]
    many = [parameter.name for parameter in free if parameter.name in _RESPONSES]
    require(
        len(one) + len(many) == 1,
        f"{where}; its parameters ({', '.join(parameter.name for parameter in parameters)}) name "
        f"{'several of' if one or many else 'none of'} {', '.join(_RESPONSE + _RESPONSES)}; name the response by exactly one.",
    )
    unit: Unit = "response" if one else "group" if names & _OF_GROUP else "batch"
    return Reading(
        where=where,
        unit=unit,
        required=tuple(parameter.name for parameter in free if not parameter.has_default),
        optional=tuple(parameter.name for parameter in free if parameter.has_default),
        takes_all=takes_all,
        params=dict(params),
    )


def read_values(where: str, call: Call, returned: Any, groups: Sequence[Record]) -> list[float | None]:
    """The numbers that a call returned, one per response.

    Raises:
        DataError: they are not numbers, or their count differs from the responses'.
    """
    if not isinstance(returned, list) or len(returned) != len(call.places):
        what = f"{len(returned)} values" if isinstance(returned, list) else repr(returned)[:80]
        raise DataError(f"{where}: returned {what} for {len(call.places)} responses; return one number for each.")
    for value, (index, number) in zip(returned, call.places, strict=True):
        if isinstance(value, str):  # the worker describes non-numbers as text
            place = f"group {groups[index]['group_id']}, response {number}"
            raise DataError(f"{where}, {place}: returned {value}; return a number, or None for a missing score.")
    return returned
