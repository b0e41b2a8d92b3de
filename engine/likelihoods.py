"""Log-likelihoods of proteins under a decoder, by which it scores variants.

With z_0 the start, z_1 .. z_T the tokens of a protein and z_T the end,

    LL(z) = sum_t  log p(z_t | z_0 .. z_(t-1))       t = 1 .. T, in nats

of the one way in which the vocabulary spells the protein: over byte pairs the line breaks of FASTA text are among the
tokens, and other spellings of the same residues are not added. The end is one of the tokens, so that insertions and
deletions are scored like substitutions.

Shapes: N proteins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .decoder import Decoder
from .decoder_batches import DecoderBatches
from .errors import InputError
from .packing import PackedBatch
from .retry import DoesNotFit
from .vocabulary import Ids, Vocabulary, most_tokens

Floats = npt.NDArray[np.float64]

DECODER_METHOD = "pseudo-ll"

# Proteins are spelt and dealt into batches in rounds of so many batches' tokens, as queries to an encoder are.
_ROUND_BATCHES = 64
# Logits that exist at a time, in fp64: 134 MB.
_LOGITS = 1 << 24


def check_decoder_method(name: str, method: str, compat: str | None = None) -> None:
    """Raises InputError where a decoder does not score in this way.

    Args:
        name: the decoder's.
        method, compat: see `scoring`.
    """
    if method != DECODER_METHOD:
        default = ", the default" if method == "masked-marginal" else ""
        message = (
            f"{name} is a decoder, which predicts each token from those before it and no masked one: it scores by "
            f"{DECODER_METHOD} alone, got {method}{default}"
        )
        raise InputError(message)
    if compat is not None:
        message = f"{name} is a decoder: compat {compat!r} repeats scripts for masked language models; leave it out"
        raise InputError(message)


@dataclass(frozen=True, eq=False)
class Reach:
    """How long a protein a decoder reads, known without the decoder in memory.

    Attributes:
        name: the decoder's.
        vocabulary: its tokens.
        places: most tokens of a sequence.
    """

    name: str
    vocabulary: Vocabulary
    places: int

    @classmethod
    def of(cls, decoder: Decoder) -> Reach:
        return cls(decoder.name, decoder.vocabulary, decoder.config.places)

    def check(self, sequence: str) -> None:
        """Raises InputError for a protein of more tokens than places."""
        if most_tokens(len(sequence)) > self.places:
            self.check_tokens(sequence, len(self.vocabulary.encode(sequence)))

    def check_tokens(self, sequence: str, tokens: int) -> None:
        """The same where the tokens are known."""
        if tokens > self.places:
            message = (
                f"{len(sequence):,} residues are {tokens:,} tokens, and {self.name} has places for {self.places:,}: a "
                "decoder reads a protein whole, windows are an encoder's"
            )
            raise InputError(message)


class LikelihoodRunner:
    """Log-likelihoods of proteins under one decoder, in near-full batches.

    Args:
        decoder: any precision, any device.
        max_tokens, after_batch: see `DecoderBatches`.

    Raises:
        ValueError: `max_tokens` is not positive.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_tokens: int | None = None,
        after_batch: Callable[[int], None] = lambda residues: None,
    ) -> None:
        self.decoder = decoder
        self._reach = Reach.of(decoder)
        self._batches = DecoderBatches(decoder, max_tokens=max_tokens, after_batch=after_batch)
        self.max_tokens = self._batches.max_tokens

    def run(self, sequences: Sequence[str]) -> Floats:
        """LL of each protein in nats, the end included: float64 (N,).

        Args:
            sequences: N proteins, letters of `alphabet.RESIDUES`.

        Raises:
            InputError: a protein has more tokens than the decoder places, the vocabulary cannot spell it, or it does
                not fit into the GPU's memory.
        """
        values = np.full(len(sequences), np.nan)
        round_, tokens, first = list[Ids](), 0, 0
        for number, sequence in enumerate(sequences, start=1):
            round_.append(self._spelt(sequence))
            tokens += len(round_[-1])
            if tokens >= _ROUND_BATCHES * self.max_tokens or number == len(sequences):
                self._run_round(round_, values[first:number])
                round_, tokens, first = [], 0, number
        return values

    def _spelt(self, sequence: str) -> Ids:
        vocabulary = self.decoder.vocabulary
        ids = vocabulary.encode(sequence)
        self._reach.check_tokens(sequence, len(ids))
        read = vocabulary.decode(ids)
        if read != sequence:
            place = next(
                (place for place, (one, other) in enumerate(zip(sequence, read, strict=False)) if one != other),
                min(len(sequence), len(read)),
            )
            letter = sequence[place : place + 1]
            message = (
                f"{self.decoder.name} cannot spell the protein: residue {place + 1}, {letter!r}, is not what its "
                "vocabulary reads back"
            )
            raise InputError(message)
        return ids

    def _run_round(self, round_: Sequence[Ids], values: Floats) -> None:
        rows_at_once = max(1, _LOGITS // self.decoder.vocabulary.size)

        def take(rows: list[int], batch: PackedBatch) -> None:
            values[rows] = [each.sum() for each in self.decoder.log_likelihoods(batch, rows_at_once=rows_at_once)]

        try:
            self._batches.run(round_, take)
        except DoesNotFit as error:
            raise InputError(error.reason) from error
