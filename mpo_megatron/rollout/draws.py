"""Groups under way: which responses are still to be drawn, and which again because they are empty or repeat another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mpo_megatron.config import GenerateConfig
from mpo_megatron.rollout.engines import Engine, Generation, Prompt, Response, Sampling, response_seed
from mpo_megatron.rollout.records import Record


@dataclass(kw_only=True)
class Group:
    """A group under way: its responses by index, and how often each was drawn again."""

    record: Record
    token_ids: tuple[int, ...]
    responses: dict[int, Response] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, record: Record, token_ids: tuple[int, ...], failure: Record | None) -> Group:
        """A group with what an earlier run's failure holds; what is missing starts with its first attempt."""
        group = cls(record=record, token_ids=token_ids)
        for line in failure["responses"] if failure is not None else ():
            values = {name: line[name] for name in ("text", "finish_reason", "num_tokens", "seed")}
            group.responses[line["index"]] = Response(**values)
            group.attempts[line["index"]] = line.get("attempt", 0)
        return group

    def missing(self, sampling: Sampling) -> list[int]:
        """Indices of the responses that are not there."""
        return [index for index in range(sampling.num_responses) if index not in self.responses]

    def prompt(self, sampling: Sampling) -> Prompt:
        """The prompt with the seeds of what is missing."""
        group_id = self.record["group_id"]
        indices = self.missing(sampling)
        return Prompt(
            group_id=group_id,
            token_ids=self.token_ids,
            messages=tuple(self.record["prompt"]),
            seeds=tuple(response_seed(sampling.seed, group_id, index, self.attempts.get(index, 0)) for index in indices),
        )

    def receive(self, generation: Generation, sampling: Sampling) -> None:
        """Take over what came, by its seed: with an error, some did not come."""
        by_seed = {response.seed: response for response in generation.responses}
        for index, seed in zip(self.missing(sampling), self.prompt(sampling).seeds, strict=True):
            if seed in by_seed:
                self.responses[index] = by_seed[seed]

    def faults(self) -> dict[int, str]:
        """By index: which responses are `empty`, or `duplicates` of an earlier one."""
        faults, seen = {}, set[str]()
        for index, response in sorted(self.responses.items()):
            if not response.text.strip():
                faults[index] = "empty"
            elif response.text in seen:
                faults[index] = "duplicates"
            seen.add(response.text)
        return faults

    def drop_to_redraw(self, config: GenerateConfig) -> bool:
        """Remove the responses that are to be drawn again; whether there are any."""
        again = [
            index
            for index, fault in self.faults().items()
            if getattr(config, fault) == "resample" and self.attempts.get(index, 0) + 1 < config.max_attempts
        ]
        for index in again:
            del self.responses[index]
            self.attempts[index] = self.attempts.get(index, 0) + 1
        return bool(again)

    def as_record(self, config: GenerateConfig) -> Record:
        """The finished group line."""
        faults = {index: fault for index, fault in self.faults().items() if getattr(config, fault) == "drop"}
        kept = [self.as_line(index) for index in sorted(self.responses) if index not in faults]
        record = self.record | {"responses": kept}
        return record | {"dropped": dict(sorted(Counter(faults.values()).items()))} if faults else record

    def as_line(self, index: int) -> Record:
        """One response of the group line; `attempt` tells how often it was drawn again."""
        line, attempt = self.responses[index].as_line(), self.attempts.get(index, 0)
        return line | {"attempt": attempt} if attempt else line

    def as_failure(self, error: str) -> Record:
        """A line of failures.jsonl: why, and what did arrive."""
        arrived = [self.as_line(index) | {"index": index} for index in sorted(self.responses)]
        return {"group_id": self.record["group_id"], "error": error, "responses": arrived}


def answer(engine: Engine, window: Sequence[Group], sampling: Sampling, config: GenerateConfig) -> Iterator[Record]:
    """Finished lines of some groups, of failed ones the line with `error`; what is to be drawn again is, after the others."""
    waiting = list(window)
    while waiting:
        again = []
        for group, error in _draw(engine, waiting, sampling):
            if error is not None:
                yield group.as_failure(error)
            elif group.drop_to_redraw(config):
                again.append(group)
            else:
                yield group.as_record(config)
        waiting = again


def _draw(engine: Engine, groups: Sequence[Group], sampling: Sampling) -> Iterator[tuple[Group, str | None]]:
    """Each group once the engine has drawn what it lacked, and why something still is missing; whole ones first."""
    lacking = {group.record["group_id"]: group for group in groups if group.missing(sampling)}
    yield from ((group, None) for group in groups if group.record["group_id"] not in lacking)
    for generation in engine.generate([group.prompt(sampling) for group in lacking.values()], sampling):
        group = lacking[generation.group_id]
        group.receive(generation, sampling)
        yield group, generation.error
