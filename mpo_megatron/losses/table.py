"""`mpo losses`: every method with its hyper-parameters, source and needs, as text."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mpo_megatron.losses.registry import Loss, Needs, get_loss, list_losses

WIDTH = 110


def print_losses(arguments: Sequence[str] = ()) -> None:
    """Print all methods, or those named with what each hyper-parameter means."""
    parser = argparse.ArgumentParser(prog="mpo losses", description="List the losses.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods to explain in full; by default all, in short")
    names = parser.parse_args(list(arguments)).names
    try:
        chosen = [get_loss(name) for name in names]
    except ValueError as error:
        parser.error(str(error))
    if chosen:
        print("\n\n".join(format_loss(loss, in_full=True) for loss in chosen))
        return
    print("\n\n".join(format_loss(loss) for loss in list_losses()))
    print("\nHyper-parameters go under `loss.params` in the configuration; `mpo losses NAME` explains a method's.")


def format_loss(loss: Loss, *, in_full: bool = False) -> str:
    """One method as text: summary, source, needs, hyper-parameters with defaults (and their meaning)."""
    defaults = loss.params()
    lines = [loss.name, *wrap(loss.summary, "    "), *wrap(f"source  {loss.source}", "    ")]
    lines += wrap(f"needs   {format_needs(loss.needs(defaults))}", "    ")
    fields = dataclasses.fields(loss.params)
    if not in_full:
        values = ", ".join(f"{field.name} = {getattr(defaults, field.name)}" for field in fields)
        return "\n".join([*lines, *wrap(f"params  {values}", "    ")])
    hints, docs = get_type_hints(loss.params), read_field_docs(loss.params)
    for field in fields:
        lines.append(f"    {field.name} = {getattr(defaults, field.name)}  ({format_type(hints[field.name])})")
        lines += wrap(docs[field.name], "        ")
    return "\n".join(lines)


def format_needs(needs: Needs) -> str:
    """What a method needs, as text, for its default hyper-parameters."""
    words = {
        "reference": "reference policy",
        "rewards": "rewards",
        "labels": "labels (chosen / rejected)",
        "preferences": "rewards or labels",
        "lengths": "lengths",
        "tokens": "log-probs per token",
        "token_kl": "KL divergences over the vocabulary",
        "batch_statistics": "the whole global batch",
        "sampled": "a seeded generator",
    }
    return ", ".join(text for name, text in words.items() if getattr(needs, name)) or "log-probs only"


def format_type(hint: Any) -> str:
    """A hyper-parameter's type, or its choices."""
    return " | ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else str(hint.__name__)


def read_field_docs(params: type[Any]) -> dict[str, str]:
    """The docstrings under a dataclass's fields, read from its source; inherited ones included."""
    docs: dict[str, str] = {}
    for parent in reversed(params.__mro__[:-1]):  # object has no source
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for item, following in zip(definition.body, definition.body[1:], strict=False):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_text:
                docs[item.target.id] = " ".join(ast.literal_eval(ast.unparse(following)).split())
    return docs


def wrap(text: str, indent: str) -> list[str]:
    """`text` in lines of at most `WIDTH` characters."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
