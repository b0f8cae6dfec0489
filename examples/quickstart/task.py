"""The quickstart's task: name things of a kind. A small program writes the groups and checks every answer.

    prompt    "Please help Nora: list 4 fruits for the school fair."
    responses "apple, hammer, plum, violin" (reward 0.5), "pear, plum, fig, cherry" (reward 1.0), … K of them

The reward is the share of named things that are of the requested kind. No response is good or bad by itself: the same words are
right for one prompt and wrong for another, so a policy scores only by relating the response to the prompt.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "fruits": "apple pear plum cherry fig lemon mango peach grape melon",
    "animals": "horse tiger rabbit goat otter camel zebra mouse badger wolf",
    "tools": "hammer saw drill pliers chisel wrench ladder shovel rake axe",
    "instruments": "violin flute drum cello harp trumpet guitar oboe banjo piano",
    "colours": "red green blue purple orange brown pink grey yellow white",
    "clothes": "shirt coat scarf sock glove hat jacket skirt belt boot",
    "countries": "Spain Peru Kenya Japan Norway Chile Egypt Canada India Cuba",
    "sports": "tennis rowing judo hockey golf fencing boxing rugby skiing diving",
}
WORDS = {kind: tuple(words.split()) for kind, words in KINDS.items()}
PEOPLE = ("Nora", "Ben", "Ada", "Omar", "Lucy", "Ivan", "Mei", "Tom", "Zoe", "Raj", "Eva", "Sam")
OCCASIONS = ("a quiz", "the school fair", "a crossword", "her new story", "our game night", "the exhibition", "a poem", "class")
TEMPLATES = (
    "Name {count} {kind} for {occasion}. {person} needs them today.",
    "Please help {person}: list {count} {kind} for {occasion}.",
    "{person} is preparing {occasion}. Which {count} {kind} come to mind?",
    "For {occasion}, give {person} {count} {kind}, separated by commas.",
)
COUNTS = (2, 4, 8)  # their halves, quarters and eighths add up without rounding
NUM_RESPONSES = 8


def compute_reward(kind: str, response: str) -> float:
    """The share of the response's comma-separated things that are of this kind."""
    things = [thing.strip() for thing in response.split(",")]
    return sum(thing in WORDS[kind] for thing in things) / len(things)


def build_groups(num_groups: int, seed: int = 0) -> list[dict[str, Any]]:
    """Groups with distinct prompts, in the plain format that `mpo prepare` reads."""
    generator = random.Random(seed)
    choices = list(itertools.product(TEMPLATES, PEOPLE, OCCASIONS, COUNTS, WORDS))
    if num_groups > len(choices):
        raise ValueError(f"num_groups = {num_groups}; there are {len(choices)} different prompts.")
    groups: list[dict[str, Any]] = []
    for template, person, occasion, count, kind in generator.sample(choices, num_groups):
        texts = [_draw_response(kind, count, generator) for _ in range(NUM_RESPONSES)]
        responses = [{"text": text, "reward": compute_reward(kind, text)} for text in texts]
        prompt = template.format(person=person, occasion=occasion, count=count, kind=kind)
        groups.append({"prompt": prompt, "responses": responses})
    return groups


def _draw_response(kind: str, count: int, generator: random.Random) -> str:
    """`count` things, any number of them of the requested kind, the others of one other kind, in any order."""
    num_right = generator.randint(0, count)
    other = generator.choice([name for name in WORDS if name != kind])
    things = generator.sample(WORDS[kind], num_right) + generator.sample(WORDS[other], count - num_right)
    generator.shuffle(things)
    return ", ".join(things)


def write_groups(path: Path, groups: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(group) + "\n" for group in groups), encoding="utf-8")
