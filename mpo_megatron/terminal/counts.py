"""Numbers of things, as text."""

from __future__ import annotations


def count_of(number: int, things: str) -> str:
    """`1 group`, `2,000 groups`.

    Args:
        things: a plural that ends with s
    """
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"
