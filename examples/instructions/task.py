"""Verifiable instructions in the style of IFEval: prompts, and the reward of an answer.

    prompt    "What is a lighthouse for? Do not use commas. Use at most 12 words."
    answer    "It guides ships." (reward 1), "It guides ships, boats and people." (reward 0.5: one instruction of two)

The reward is the share of a prompt's instructions that the answer follows. It does not check whether the answer is correct: the
reference policy preserves what the model knows. The kinds are those that a model of this size sometimes follows. Kinds it never
follows (capital letters, quotation marks) do not occur among its samples, and so cannot be learned from them.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBJECTS = (
    *("a lighthouse", "a compass", "a bicycle", "a library", "a garden", "a bridge", "a candle", "a kitchen", "a school"),
    *("a market", "a telescope", "a windmill", "a museum", "a bakery", "a harbor", "a camera", "a piano", "a map"),
    *("a hospital", "a farm"),
)
QUESTIONS = (
    "What is {subject} for?",
    "Describe {subject} to a child.",
    "Why do people like {subject}?",
    "Say something surprising about {subject}.",
    "What would you miss without {subject}?",
    "Give some advice to someone who visits {subject} for the first time.",
)
WORDS = ("light", "friend", "water", "careful", "morning", "story")
FORBIDDEN = ("the", "and", "is")
FEWEST_WORDS = 3
"""Minimum words of an answer; a shorter one follows no instruction."""
ECHOES = ("do not use", "use at most", "use the word", "answer in one", "answer with")
"""An answer that repeats the instructions follows none. A small model often does so, and rewards would reinforce it."""


@dataclass(frozen=True)
class Instruction:
    """One kind of instruction."""

    text: str
    """Text in the prompt; `{value}` is the drawn value."""
    values: tuple[Any, ...]
    """Values to draw from."""
    follows: Callable[[str, Any], bool]
    """Whether an answer follows it."""


def has_no_comma(answer: str, _: None) -> bool:
    """No comma."""
    return "," not in answer


def is_short(answer: str, most: int) -> bool:
    """At most this many words."""
    return len(answer.split()) <= most


def has_bullets(answer: str, number: int) -> bool:
    """Exactly this many lines that start with a star, and no other text."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return len(lines) == number and all(re.match(r"\s*\* ", line) for line in lines)


def has_word(answer: str, word: str) -> bool:
    """Contains the word, as a whole word, in any case."""
    return word in re.findall(r"[a-z]+", answer.lower())


def lacks_word(answer: str, word: str) -> bool:
    """Does not contain the word, in any case."""
    return not has_word(answer, word)


def is_one_sentence(answer: str, _: None) -> bool:
    """Exactly one end of a sentence, at the last character."""
    stripped = answer.strip()
    return len(re.findall(r"[.!?]", stripped)) == 1 and stripped[-1] in ".!?"


INSTRUCTIONS = {
    "no_comma": Instruction("Do not use commas.", (None,), has_no_comma),
    "short": Instruction("Use at most {value} words.", (12, 16, 20), is_short),
    "bullets": Instruction("Answer with {value} bullet points that begin with *.", (2, 3), has_bullets),
    "word": Instruction('Use the word "{value}".', WORDS, has_word),
    "forbidden": Instruction('Do not use the word "{value}".', FORBIDDEN, lacks_word),
    "sentence": Instruction("Answer in one sentence.", (None,), is_one_sentence),
}
CONTRADICTIONS = [{"bullets", "short"}, {"bullets", "sentence"}]
"""Kinds that one answer cannot, or can hardly, follow together."""
PAIRS = [pair for pair in itertools.combinations(INSTRUCTIONS, 2) if set(pair) not in CONTRADICTIONS]


def build_prompts(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct prompts, each a question with two instructions; `reward` reads these from the prompt's fields."""
    draw, prompts = random.Random(seed), dict[str, dict[str, Any]]()
    most = len(QUESTIONS) * len(SUBJECTS) * len(PAIRS)
    if number > most:
        raise ValueError(f"number = {number}; there are {most} different questions with instructions.")
    while len(prompts) < number:
        question = draw.choice(QUESTIONS).format(subject=draw.choice(SUBJECTS))
        asked = [[kind, draw.choice(INSTRUCTIONS[kind].values)] for kind in draw.choice(PAIRS)]
        draw.shuffle(asked)
        prompt = " ".join([question, *(INSTRUCTIONS[kind].text.format(value=value) for kind, value in asked)])
        prompts[prompt] = {"prompt": prompt, "instructions": asked}
    return list(prompts.values())


def follow(response: str, instructions: Sequence[Sequence[Any]]) -> list[bool]:
    """For each instruction (kind and drawn value), whether the answer follows it."""
    is_answer = len(response.split()) >= FEWEST_WORDS and not any(echo in response.lower() for echo in ECHOES)
    return [is_answer and INSTRUCTIONS[kind].follows(response, value) for kind, value in instructions]


def reward(response: str, group: Mapping[str, Any]) -> float:
    """The share of the prompt's instructions that an answer follows; called by `mpo score`."""
    followed = follow(response, group["meta"]["instructions"])
    return sum(followed) / len(followed)


def write_prompts(path: Path, prompts: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
