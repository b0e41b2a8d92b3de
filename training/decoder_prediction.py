"""What a decoder says about sequences: each next token, given those before it.

Shapes: N predicted tokens of a round, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..engine.decoder import Decoder
from ..engine.decoder_batches import DecoderBatches
from ..engine.errors import InputError
from ..engine.packing import PackedBatch
from ..engine.retry import DoesNotFit
from ..engine.vocabulary import most_tokens
from .prediction import CHUNK_NUMBERS, Integers, Predictions

# Tokens whose hidden states are held at once: 168 MB at ProtGPT2's width. A round is whole sequences.
_ROUND_TOKENS = 1 << 15


class DecoderPredictor:
    """A causal language model, asked for every token after the first: those of the protein, and the end.

    A sequence with more tokens than the model has positions is asked for its first ones, and for no end.

    Args:
        decoder: any precision, any device.
        max_tokens: most tokens in a batch; by default as many as `Embedder` takes. A longer sequence has a batch of its
            own. A batch that does not fit into a GPU's memory is cut in two.
        after_batch: called with the number of residues that have just been run.

    Raises:
        ValueError: `max_tokens` is not positive.
    """

    task = "next tokens"

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_tokens: int | None = None,
        after_batch: Callable[[int], None] = lambda residues: None,
    ) -> None:
        self._decoder = decoder
        self._batches = DecoderBatches(decoder, max_tokens=max_tokens, after_batch=after_batch)
        self.name = decoder.name
        self.vocabulary = decoder.vocabulary.tokens
        self.context = decoder.config.places

    def predictions(self, sequences: Sequence[str], *, context: int | None = None) -> Iterator[Predictions]:
        """As `Predictor.predictions`; the rows of a round of sequences are cut into chunks of equal size."""
        most = self.context if context is None else min(context, self.context)
        vocabulary = self._decoder.vocabulary
        rows = max(1, CHUNK_NUMBERS // vocabulary.size)
        first, round_, tokens = 0, list[Integers](), 0
        for number, sequence in enumerate(sequences, start=1):
            round_.append(vocabulary.encode(sequence)[:most])
            tokens += len(round_[-1])
            if tokens < _ROUND_TOKENS and number < len(sequences):
                continue
            hidden_ND = self._hidden(round_)
            label_N = np.concatenate([ids[1:] for ids in round_])
            sequence_N = np.repeat(np.arange(first, number, dtype=np.int64), [len(ids) - 1 for ids in round_])
            for begin in range(0, len(label_N), rows):
                some = slice(begin, begin + rows)
                yield Predictions(
                    log_probs_NV=self._log_probs(hidden_ND[some]),
                    label_N=label_N[some],
                    residues_N=vocabulary.residues_V[label_N[some]],
                    sequence_N=sequence_N[some],
                )
            first, round_, tokens = number, [], 0

    def residues_run(self, sequences: Sequence[str], *, context: int | None = None) -> int:
        """As `Predictor.residues_run`: tokens are cut off, and residues counted."""
        most = self.context if context is None else min(context, self.context)
        return sum(self._residues(each, most) for each in sequences)

    def _residues(self, sequence: str, most: int) -> int:
        if most_tokens(len(sequence)) <= most:
            return len(sequence)
        vocabulary = self._decoder.vocabulary
        return int(vocabulary.residues_V[vocabulary.encode(sequence)[:most]].sum())

    @torch.inference_mode()
    def _hidden(self, round_: list[Integers]) -> torch.Tensor:
        """Hidden states of every token but the sequences' last ones, in the sequences' order: (N, D) on the device."""
        decoder = self._decoder
        begins = np.cumsum([0, *(len(ids) - 1 for ids in round_)])
        hidden_ND = torch.empty((int(begins[-1]), decoder.dim), dtype=torch.float32, device=decoder.device)

        def take(numbers: list[int], batch: PackedBatch) -> None:
            parts = decoder(batch).split(list(batch.lengths_B))
            for number, part_LD in zip(numbers, parts, strict=True):
                hidden_ND[begins[number] : begins[number + 1]] = part_LD[:-1]

        try:
            self._batches.run(round_, take)
        except DoesNotFit as error:
            # Numbered among this round's sequences, which nobody else knows.
            raise InputError(error.reason) from error
        return hidden_ND

    @torch.inference_mode()
    def _log_probs(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(hidden_ND).float().log_softmax(dim=-1)
