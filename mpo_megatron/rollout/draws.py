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
        response, attempt = self.responses[index], self.attempts.get(index, 0)
        line = {
            "text": response.text,
            "finish_reason": response.finish_reason,
            "num_tokens": response.num_tokens,
            "seed": response.seed,
        }
        return line | {"attempt": attempt} if attempt else line

    def as_failure(self, error: str) -> Record:
        """A line of failures.jsonl: why, and what did arrive."""
        arrived = [self.as_line(index) | {"index": index} for index in sorted(self.responses)]
        return {"group_id": self.record["group_id"], "error": error, "responses": arrived}

    def restore(self, failure: Record) -> None:
        """Take over what an earlier run's failure holds; what is missing starts with its first attempt."""
        for line in failure["responses"]:
            values = {name: line[name] for name in ("text", "finish_reason", "num_tokens", "seed")}
            self.responses[line["index"]] = Response(**values)
            self.attempts[line["index"]] = line.get("attempt", 0)


def answer(
    engine: Engine, window: Sequence[Group], sampling: Sampling, config: GenerateConfig
) -> Iterator[Record | tuple[Group, str]]:
    """Finished lines of some groups, or the group with why it has none; what is to be drawn again is, after the others."""
    waiting = {group.record["group_id"]: group for group in window}
    while waiting:
        again: dict[str, Group] = {}
        complete = [group_id for group_id, group in waiting.items() if not group.missing(sampling)]  # restored
        for group_id in complete:
            group = waiting.pop(group_id)
            if group.drop_to_redraw(config):
                again[group_id] = group
            else:
                yield group.as_record(config)
        for generation in engine.generate([group.prompt(sampling) for group in waiting.values()], sampling):
            group = waiting[generation.group_id]
            group.receive(generation, sampling)
            if generation.error is not None:
                yield group, generation.error
            elif group.drop_to_redraw(config):
                again[generation.group_id] = group
            else:
                yield group.as_record(config)
        waiting = again
