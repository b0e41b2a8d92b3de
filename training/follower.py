"""What follows a judgement that takes minutes: which part runs, and how far it is, in residues."""

from __future__ import annotations

from typing import Protocol


class Follower(Protocol):
    """`stage` when another part begins, with all that it runs; `advance` as parts of that are done.

    What a stage is told adds up to what it announced.
    """

    def stage(self, words: str, residues: int) -> None: ...

    def advance(self, residues: int) -> None: ...


class Unfollowed:
    """Nobody looks."""

    def stage(self, words: str, residues: int) -> None:
        pass

    def advance(self, residues: int) -> None:
        pass


NOBODY = Unfollowed()
