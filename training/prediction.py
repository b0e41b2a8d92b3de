"""What a language model says about sequences, token by token: one protocol for encoders and decoders.

An encoder is asked for residues that it does not see, a decoder for each next token. Whoever judges them sees neither
the model nor how it is run: chunks of log-probabilities with the true labels, of bounded size.

Shapes: N predicted tokens of a chunk, V vocabulary, T tokens of one sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..engine.alphabet import AMINO_ACIDS, MASK_ID, TOKEN_IDS, TOKENS
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.queries import Query, QueryRunner, token_ids
from ..engine.retry import DoesNotFit
from .corpus import Tokens, crop
from .masking import ASKED

Integers = npt.NDArray[np.int64]

CHUNK_NUMBERS = 1 << 24
"""Most log-probabilities in a chunk, N x V: 64 MB; with 50,257 tokens in the vocabulary, 333 rows."""

_STANDARD = np.array([TOKEN_IDS[letter] for letter in AMINO_ACIDS], dtype=np.uint8)
# Sequences whose logits are held at once: 1,024 of 1,022 residues have 157,000 masked ones, 21 MB of logits.
_ROUND = 1024


@dataclass(frozen=True, eq=False)
class Predictions:
    """A chunk of what a model says.

    Attributes:
        log_probs_NV: fp32, on any device; each row's exponentials add up to one.
        label_N: int64, the token that is there.
        residues_N: int64, how many residues that token stands for: 1 for a residue, 0 for an end, several in a
            vocabulary of pieces.
        sequence_N: int64, which of the sequences it belongs to, from 0, never falling.
    """

    log_probs_NV: torch.Tensor
    label_N: Integers
    residues_N: Integers
    sequence_N: Integers


class Predictor(Protocol):
    """A language model that can be judged.

    Attributes:
        name: how reports call it.
        task: what it is asked for: "masked residues" or "next tokens".
        vocabulary: its tokens, by id.
        context: most residues (encoders) or tokens (decoders) of a sequence that it sees.
    """

    @property
    def name(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def vocabulary(self) -> tuple[str, ...]: ...

    @property
    def context(self) -> int: ...

    def predictions(self, sequences: Sequence[str], *, context: int | None = None) -> Iterator[Predictions]:
        """Yields chunks in the order of the sequences, each of at most about `CHUNK_NUMBERS` log-probabilities.

        Which tokens are asked for, and where chunks end, follows from the sequences, `context` and the vocabulary
        alone: two models of one vocabulary are walked side by side.

        Args:
            sequences: letters of `alphabet.RESIDUES`. One without anything to ask for has no rows.
            context: sees no more of a sequence than this, where the model itself could.
        """
        ...

    def residues_run(self, sequences: Sequence[str], *, context: int | None = None) -> int:
        """Residues that `predictions` runs for the same arguments: what a progress bar ends at."""
        ...


class EncoderPredictor:
    """A masked language model: 15 % of each sequence's standard residues are shown as `<mask>` and asked for.

    Which ones is decided by a hash of the sequence, so neither its place nor its batch matters. A sequence beyond the
    model's length is cropped, at a place decided the same way.

    Args:
        encoder: has a language-model head.
        seed: other residues with another one.
        max_tokens: most tokens in a batch, as `QueryRunner` has it.
        after_batch: called with the number of residues that have just been run.

    Raises:
        InputError: the encoder has no language-model head.
    """

    task = "masked residues"
    vocabulary = TOKENS

    def __init__(
        self,
        encoder: Encoder,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        after_batch: Callable[[int], None] = lambda residues: None,
    ) -> None:
        self._runner = QueryRunner(encoder, max_tokens=max_tokens, after_batch=after_batch)
        self._seed = seed
        self.name = encoder.name
        self.context = encoder.config.max_residues

    def predictions(self, sequences: Sequence[str], *, context: int | None = None) -> Iterator[Predictions]:
        """As `Predictor.predictions`; a chunk is what 1,024 sequences give."""
        most = self.context if context is None else min(context, self.context)
        for begin in range(0, len(sequences), _ROUND):
            queries, labels, numbers = list[Query](), list[Integers](), list[Integers]()
            for number, sequence in enumerate(sequences[begin : begin + _ROUND], start=begin):
                shown, rows, hidden = mask_by_hash(sequence, context=most, seed=self._seed)
                if rows.size:
                    queries.append(Query(tokens=shown, places=tuple(rows.tolist())))
                    labels.append(hidden.astype(np.int64))
                    numbers.append(np.full(rows.size, number, dtype=np.int64))
            if queries:
                yield self._chunk(queries, np.concatenate(labels), np.concatenate(numbers))

    def residues_run(self, sequences: Sequence[str], *, context: int | None = None) -> int:
        """As `Predictor.residues_run`; sequences without a residue to hide are not run."""
        most = self.context if context is None else min(context, self.context)
        return sum(min(len(each), most) for each in sequences if self._is_run(each, most))

    def _is_run(self, sequence: str, most: int) -> bool:
        if len(sequence) <= most:
            return not set(sequence).isdisjoint(AMINO_ACIDS)
        return mask_by_hash(sequence, context=most, seed=self._seed)[1].size > 0

    def _chunk(self, queries: list[Query], label_N: Integers, sequence_N: Integers) -> Predictions:
        ends = np.cumsum([len(query.places) for query in queries]).tolist()
        logits_NV = np.empty((ends[-1], len(TOKENS)), dtype=np.float32)

        def keep(number: int, logits_RV: npt.NDArray[np.float32]) -> None:
            logits_NV[ends[number] - len(logits_RV) : ends[number]] = logits_RV

        try:
            self._runner.run(queries, keep)
        except DoesNotFit as error:
            # Numbered among this round's queries, which nobody else knows.
            raise InputError(error.reason) from error
        return Predictions(
            log_probs_NV=torch.from_numpy(logits_NV).log_softmax(dim=-1),
            label_N=label_N,
            residues_N=np.ones_like(label_N),
            sequence_N=sequence_N,
        )


def mask_by_hash(sequence: str, *, context: int, seed: int = 0) -> tuple[Tokens, Integers, Tokens]:
    """Hides 15 % of a sequence's standard residues, at least one where there is one.

    Args:
        sequence: letters of the alphabet.
        context: most residues shown; beyond it the sequence is cropped.
        seed: other residues with another one.

    Returns:
        The tokens to show, uint8 (T,), `<cls>` and `<eos>` included; the hidden rows, int64; and what they hide, uint8.
    """
    key = hashlib.blake2b(f"{seed} {sequence}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(key, "big"))
    tokens_T = crop(token_ids(sequence), context, rng)
    residues = np.flatnonzero(np.isin(tokens_T, _STANDARD))
    rows = residues[rng.random(residues.size) < ASKED]
    if not rows.size and residues.size:
        rows = rng.choice(residues, size=1)
    shown_T = tokens_T.copy()
    shown_T[rows] = MASK_ID
    return shown_T, rows, tokens_T[rows]
