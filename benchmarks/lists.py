"""Options of the programs that are lists: words or numbers with commas between."""

from __future__ import annotations

from collections.abc import Sequence

import typer


def split_words(text: str, allowed: Sequence[str], option: str) -> list[str]:
    """The words of an option, in the order given.

    Raises:
        typer.BadParameter: there are none, or one is not allowed.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or (unknown := [word for word in words if word not in allowed]):
        message = f"{option} is {text!r}; allowed are {', '.join(allowed)}, with commas between"
        raise typer.BadParameter(message if not words else f"{message} (unknown: {', '.join(unknown)})")
    return words


def split_numbers(text: str, option: str) -> list[int]:
    """The numbers of an option, rising, each once.

    Raises:
        typer.BadParameter: there are none, or one is not a positive whole number.
    """
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        message = f"{option} is {text!r}; expected positive whole numbers with commas between"
        raise typer.BadParameter(message)
    return numbers
