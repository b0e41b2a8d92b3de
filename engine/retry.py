"""Batches that do not fit into a GPU's memory: cut in two and run again.

What is known to be too large is cut before it is tried, so that a library pays once. Each size is logged once, with the
budget that fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import InputError
from .windows import Piece

_logger = logging.getLogger(__name__)

# Sizes this close to one that failed are not tried: planned batches differ by less.
_CLOSE = 0.9


class DoesNotFit(InputError):
    """A protein, or a window of one, that does not fit into memory alone.

    Args:
        row: which of the caller's proteins.
        reason: what was tried where.

    Attributes:
        row, reason: as given.
    """

    def __init__(self, row: int, reason: str) -> None:
        self.row = row
        self.reason = reason
        super().__init__(f"sequence {row}: {reason}")


@dataclass(eq=False)
class Work:
    """A batch on its way through the models that run it.

    Attributes:
        number: by which whatever is kept of it between models is known.
        pieces: what it holds, in packed order.
        levels: places of the models that have yet to run it; those that have are taken off.
    """

    number: int
    pieces: list[Piece]
    levels: list[int]

    @property
    def tokens(self) -> int:
        """Of all pieces, `<cls>` and `<eos>` counted."""
        return sum(piece.tokens for piece in self.pieces)


def half(pieces: list[Piece]) -> int:
    """How many of two or more pieces make up the first half, by tokens; one at least is left for the second."""
    total, before = sum(piece.tokens for piece in pieces), 0
    for count, piece in enumerate(pieces[:-1], start=1):
        before += piece.tokens
        # Closer to the middle with this piece than with the next one, too.
        if 2 * before + pieces[count].tokens >= total:
            return count
    return len(pieces) - 1


def cut_in_two(work: Work) -> tuple[Work, Work]:
    """Two halves of work of which nothing is kept under its number."""
    place = half(work.pieces)
    first, second = work.pieces[:place], work.pieces[place:]
    return Work(work.number, first, list(work.levels)), Work(work.number, second, list(work.levels))


class MemoryBudget:
    """Runs work, and learns how much of it fits.

    Args:
        device: what messages call the place that is short of memory.
        after_failure: called before work is cut, to let go of memory that can be done without.
        advice: what messages say needs less memory.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        after_failure: Callable[[], None] = lambda: None,
        advice: str = "windows, a lower precision or a smaller model need less",
    ) -> None:
        self._device = device
        self._after_failure = after_failure
        self._advice = advice
        # By level: the fewest tokens that failed, and the most that ran since.
        self._failed: dict[int, int] = {}
        self._fitted: dict[int, int] = {}
        self._unsaid: set[int] = set()

    def run(self, work: Work, run: Callable[[Work], None], cut: Callable[[Work], tuple[Work, Work]]) -> list[Work]:
        """Runs work, in parts where it does not fit; gives the parts that ran, in order.

        Args:
            work: what to run.
            run: runs the levels in order and takes each off `levels` when it is done. Where it raises
                `torch.OutOfMemoryError`, the level that failed has left nothing behind.
            cut: makes two of work that has more than one piece.

        Raises:
            DoesNotFit: a piece does not fit alone.
        """
        todo, done = [work], []
        while todo:
            part = todo.pop(0)
            if len(part.pieces) == 1 or not self._is_hopeless(part):
                problem = self._attempt(part, run)
                if problem is None:
                    done.append(part)
                    continue
                if len(part.pieces) == 1:
                    raise self._too_long(part.pieces[0], problem)
            todo[:0] = cut(part)
        return done

    def _is_hopeless(self, work: Work) -> bool:
        return any(
            work.tokens > _CLOSE * self._failed[level] and work.tokens > self._fitted.get(level, 0)
            for level in work.levels
            if level in self._failed
        )

    def _attempt(self, work: Work, run: Callable[[Work], None]) -> str | None:
        """What torch says where the work does not fit. The error itself is let go of: it holds on to tensors."""
        levels = list(work.levels)
        try:
            run(work)
        except torch.OutOfMemoryError as error:
            problem = str(error).partition(". ")[0]
        else:
            self._note(levels, work.tokens)
            return None
        failed = work.levels[0]
        self._failed[failed] = min(work.tokens, self._failed.get(failed, work.tokens))
        # Fragments of memory differ from batch to batch: what ran before tells nothing any more.
        self._fitted.pop(failed, None)
        self._unsaid.add(failed)
        self._after_failure()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return problem

    def _note(self, levels: list[int], tokens: int) -> None:
        for level in self._failed.keys() & levels:
            self._fitted[level] = max(tokens, self._fitted.get(level, 0))
            if level in self._unsaid:
                self._unsaid.remove(level)
                _logger.warning(
                    "a batch of %d tokens does not fit into the memory of %s, one of %d does: larger ones are cut in "
                    "two; max_tokens=%d saves the attempt",
                    *(self._failed[level], self._device, tokens, tokens),
                )

    def _too_long(self, piece: Piece, problem: str) -> DoesNotFit:
        reason = (
            f"a run of {piece.end - piece.begin} residues does not fit into the memory of "
            f"{self._device}, not even alone ({problem}); {self._advice}"
        )
        return DoesNotFit(piece.row, reason)
