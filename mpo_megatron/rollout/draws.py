"""Unfinished groups: which responses to draw, and which to redraw because they are empty, repeated or unusable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpo_megatron.config import GenerateConfig
from mpo_megatron.rollout.engines import Engine, Generation, Miss, Prompt, Response, Sampling, response_seed
from mpo_megatron.rollout.records import Record


@dataclass(kw_only=True)
class DrawnGroup:
    """An unfinished group: its responses by index, and the attempts of each."""

    record: Record
    token_ids: tuple[int, ...]
    responses: dict[int, Response] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)
    """By index: the attempt that is drawn next, or that gave the response; part of its seed."""
    draws: Counter[int] = field(default_factory=Counter)
    """By index: draws in this run that ended in a response or a miss."""
    given_up: dict[int, Miss] = field(default_factory=dict)
    """By index: the last miss of a response that is not redrawn."""
    misses: Counter[str] = field(default_factory=Counter)
    """Draws that gave no response, counted by label."""

    @classmethod
    def begin(cls, record: Record, token_ids: tuple[int, ...], failure: Record | None) -> DrawnGroup:
        """A group that starts with the responses of an earlier run's failure; missing ones continue at the next attempt."""
        group = cls(record=record, token_ids=token_ids)
        for line in failure["responses"] if failure is not None else ():
            values: dict[str, Any] = {name: line[name] for name in ("text", "finish_reason", "num_tokens", "seed")}
            others = {"token_ids": tuple(line.get("token_ids", ())), "model": line.get("model", "")}
            group.responses[line["index"]] = Response(**values, **others)
            group.attempts[line["index"]] = line.get("attempt", 0)
        for index, attempt in (failure.get("attempts", {}) if failure is not None else {}).items():
            group.attempts[int(index)] = attempt
        return group

    def missing(self, sampling: Sampling) -> list[int]:
        """Indices of the responses still to be drawn."""
        return [index for index in range(sampling.num_responses) if index not in self.responses and index not in self.given_up]

    def prompt(self, sampling: Sampling, indices: Sequence[int] | None = None) -> Prompt:
        """The prompt with the seeds of these responses; by default, of all missing ones."""
        group_id = self.record["group_id"]
        indices = self.missing(sampling) if indices is None else indices
        return Prompt(
            group_id=group_id,
            token_ids=self.token_ids,
            messages=tuple(self.record["prompt"]),
            tools=tuple(self.record.get("tools", ())),
            seeds=tuple(response_seed(sampling.seed, group_id, index, self.attempts.get(index, 0)) for index in indices),
        )

    def receive(self, generation: Generation, sampling: Sampling, indices: Sequence[int], max_attempts: int) -> None:
        """Take over what the engine returned for these responses; redraw misses with another seed, or give up on them."""
        came: dict[int, Response | Miss] = {miss.seed: miss for miss in generation.misses}
        came |= {response.seed: response for response in generation.responses}
        for index, seed in zip(indices, self.prompt(sampling, indices).seeds, strict=True):
            draw = came.get(seed)
            if draw is None:
                if generation.error is not None:
                    continue  # not lost: a later call may return it
                draw = Miss(seed=seed, label="nothing", reason="the engine gave neither a response nor a reason")
            self.draws[index] += 1
            if isinstance(draw, Response):
                self.responses[index] = draw
                continue
            self.misses[draw.label] += 1
            self.attempts[index] = self.attempts.get(index, 0) + 1
            if not draw.again or self.draws[index] >= max_attempts:
                self.given_up[index] = draw

    def faults(self) -> dict[int, str]:
        """By index: the responses that are `empty`, or `duplicates` of an earlier one."""
        faults, seen = {}, set[str]()
        for index, response in sorted(self.responses.items()):
            if not response.text.strip():
                faults[index] = "empty"
            elif response.text in seen:
                faults[index] = "duplicates"
            seen.add(response.text)
        return faults

    def drop_to_redraw(self, config: GenerateConfig) -> bool:
        """Remove the responses to be redrawn; whether there were any."""
        again = [
            index
            for index, fault in self.faults().items()
            if getattr(config, fault) == "resample" and max(self.draws[index], 1) < config.max_attempts
        ]
        for index in again:
            del self.responses[index]
            self.attempts[index] = self.attempts.get(index, 0) + 1
            self.draws[index] = max(self.draws[index], 1)
        return bool(again)

    def as_record(self, config: GenerateConfig, sampling: Sampling) -> Record:
        """The finished group line; `unusable` counts all draws without a response, `dropped` the missing responses."""
        faults = {index: fault for index, fault in self.faults().items() if getattr(config, fault) == "drop"}
        kept = [self.as_line(index, sampling) for index in sorted(self.responses) if index not in faults]
        dropped = Counter(faults.values()) + Counter(miss.label for miss in self.given_up.values())
        record = self.record | {"responses": kept}
        record |= {"dropped": dict(sorted(dropped.items()))} if dropped else {}
        return record | ({"unusable": dict(sorted(self.misses.items()))} if self.misses else {})

    def as_line(self, index: int, sampling: Sampling) -> Record:
        """One response of the group line; `attempt` counts its redraws, `temperature` is set where there are several."""
        line, attempt = self.responses[index].as_line(), self.attempts.get(index, 0)
        line |= {"temperature": sampling.temperature_of(index)} if sampling.temperatures else {}
        return line | {"attempt": attempt} if attempt else line

    def as_failure(self, error: str, sampling: Sampling) -> Record:
        """A line of failures.jsonl: the reason, the responses that arrived, and the attempts to continue from."""
        arrived = [self.as_line(index, sampling) | {"index": index} for index in sorted(self.responses)]
        line = {"group_id": self.record["group_id"], "error": error, "responses": arrived}
        attempts = {str(index): attempt for index, attempt in self.attempts.items() if index not in self.responses}
        return line | ({"attempts": attempts} if attempts else {})

    def explain_misses(self) -> str:
        """Why the group has no response at all."""
        counted = Counter(f"{miss.label} ({miss.reason})" for miss in self.given_up.values())
        return "no usable response: " + "; ".join(f"{count} × {reason}" for reason, count in counted.most_common(3))


def keep_arrived(record: Record, failure: Record, num_responses: int) -> Record:
    """The group line of a failed prompt, with the responses that did arrive."""
    lines = [{name: value for name, value in line.items() if name != "index"} for line in failure["responses"]]
    return record | {"responses": lines, "dropped": {"lost": num_responses - len(lines)}}


def answer(engine: Engine, window: Sequence[DrawnGroup], sampling: Sampling, config: GenerateConfig) -> Iterator[Record]:
    """Yield finished lines of some groups, and for failed ones a line with `error`; redraws come after all others."""
    waiting = list(window)
    while waiting:
        again = []
        for group, error in _draw(engine, waiting, sampling, config.max_attempts):
            if error is not None:
                yield group.as_failure(error, sampling)
            elif group.drop_to_redraw(config) or group.missing(sampling):
                again.append(group)
            elif group.given_up and not group.responses:
                yield group.as_failure(group.explain_misses(), sampling)
            else:
                yield group.as_record(config, sampling)
        waiting = again


def _draw(
    engine: Engine, groups: Sequence[DrawnGroup], sampling: Sampling, max_attempts: int
) -> Iterator[tuple[DrawnGroup, str | None]]:
    """Yield each group once the engine has drawn its missing responses, and why some are still missing; complete ones first."""
    by_id = {group.record["group_id"]: group for group in groups}
    errors: dict[str, str] = {}
    wanted: dict[float, dict[str, list[int]]] = {}
    for group_id, group in by_id.items():
        for index in group.missing(sampling):
            wanted.setdefault(sampling.temperature_of(index), {}).setdefault(group_id, []).append(index)
    passes = Counter(group_id for of_group in wanted.values() for group_id in of_group)
    yield from ((group, None) for group_id, group in by_id.items() if not passes[group_id])
    for temperature, of_group in wanted.items():
        prompts = [by_id[group_id].prompt(sampling, indices) for group_id, indices in of_group.items()]
        for generation in engine.generate(prompts, sampling.at(temperature)):
            group_id = generation.group_id
            by_id[group_id].receive(generation, sampling, of_group[group_id], max_attempts)
            if generation.error is not None:
                errors[group_id] = generation.error
            passes[group_id] -= 1
            if not passes[group_id]:
                yield by_id[group_id], errors.get(group_id)
