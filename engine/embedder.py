"""Embeddings of many proteins: cut, planned into near-full batches, run, pooled, and put back in order.

Shapes: B proteins, L residues of one, D width, in a chain the nested row's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import plan_batches
from .chain import Chain
from .device import precision_name
from .errors import InputError
from .exported_encoder import AnyEncoder, ExportedEncoder
from .family import Family, listed
from .fasta import clean_sequence
from .graphs import GraphedEncoder, Runner, graphed
from .nesting import Gathering, Nesting, PlainRows, PooledNesting, PooledRuns, ResidueNesting
from .packing import pack, refuse_one_string
from .pooling import check_pool
from .retry import MemoryBudget, Work, half
from .windows import Piece, check_policy, cut

Vectors = npt.NDArray[np.float32]

# Tokens a batch when the caller names none. On a CPU larger batches leave the caches and gain nothing; a GPU needs
# many to be busy.
_DEFAULT_TOKENS = {"cpu": 4096, "cuda": 65536}


def default_max_tokens(device: torch.device) -> int:
    """Tokens a batch where nobody names another number."""
    return _DEFAULT_TOKENS[device.type]


class Embedder:
    """Embeds proteins with one model, or with an initial run of a chain's models as one nested embedding.

    Args:
        model: the encoder, or an exported file; or several encoders, smallest first, as a list or a `Family`. A file
            with a chain's nested row gives that for the pool "mean", and nothing for others.
        chain: makes one row of their embeddings; needed for several models. A row's first dimensions are the very row
            that fewer of the models give. With an exported file it must be the one that is inside.
        dims: of the row, keep so many dimensions, and run no model beyond the one that they need; all by default.
        pool: "mean", "max" or "bos" for one vector a protein, "residue" for one a residue. The mean and the maximum are
            over residues only; "bos" is the `<cls>` token's vector, of the first window where there are several. In a
            chain `<cls>`, `<eos>` and masks are mapped as residues are.
        long: what becomes of proteins beyond `max_residues`: "window", "full", "truncate" or "error"
            (see `protnest.engine.windows`).
        layer: whose hidden states become the embedding, as fair-esm's `repr_layers`: 0 is the token embedding, 1 and on
            the residual stream after that layer, the last, which is the default, what leaves the final LayerNorm;
            -1 is the last, -2 the one before it. Layers above do not run. A chain and exported files have the last one.
        max_tokens: most tokens in a batch, `<cls>` and `<eos>` counted; a longer protein has a batch of its own.
            By default 4,096 on a CPU and 65,536 on a GPU. A batch that does not fit into a GPU's memory is cut in two.
        cuda_graphs: on a GPU, replay small models' passes over small batches where that is possible and pays. The
            environment variable PROTNEST_CUDA_GRAPHS=0 forbids it, too.

    Attributes:
        dims: widths at which the embedding may be cut and is a smaller model's; the last is its own width.
        members: what is known of each model that runs.
        exported: the exported file, where it is one that runs.
        layer: whose hidden states these are, counted from 0; None for the last.

    Raises:
        InputError: several models and no chain, models that are not the chain's, `dims` beyond the chain, an exported
            file that lacks what is asked for, or a layer that the model has not.
        ValueError: `pool` or `long` is unknown, or `max_tokens` is not positive.
    """

    def __init__(
        self,
        model: AnyEncoder | Sequence[AnyEncoder] | Family,
        *,
        chain: Chain | None = None,
        dims: int | None = None,
        pool: str = "mean",
        long: str = "window",
        layer: int | None = None,
        max_tokens: int | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        check_pool(pool)
        check_policy(long)
        if not isinstance(model, Family):
            model = Family.of(listed(model))
        if max_tokens is None:
            max_tokens = default_max_tokens(model.members[0].device)
        if max_tokens < 1:
            message = f"max_tokens must be positive, got {max_tokens}"
            raise ValueError(message)
        self.pool = pool
        self.long = long
        self.max_tokens = max_tokens
        self.chain = chain
        self._family = model
        self._cuda_graphs = cuda_graphs
        self._graphed: dict[int, Runner] = {}
        self._budget = MemoryBudget(model.members[0].device, after_failure=self._release_graphs)
        self.members = model.members
        self._nesting: Nesting | None = None
        self.dims: tuple[int, ...] = (self.members[0].dim,)
        self.exported: ExportedEncoder | None = None
        self._output: str | None = None
        if any(member.norm is None for member in self.members):
            self._export(chain, dims)
        elif chain is not None:
            self._nest(chain, dims)
        elif len(self.members) > 1:
            message = f"{len(self.members)} models and no chain: `protnest fit-chain` makes one row of their embeddings"
            raise InputError(message)
        elif dims is not None and dims != self.dims[0]:
            message = f"dims is {dims}, but without a chain the model's whole width is kept, {self.dims[0]}"
            raise InputError(message)
        self.layer = None if layer is None else self._find_layer(layer)

    def _find_layer(self, layer: int) -> int | None:
        """The layer counted from 0; None for the last, whose embeddings are those of no layer asked for."""
        if self.chain is not None:
            message = f"layer is {layer}, but a chain is fitted on last layers: leave one of the two out"
            raise InputError(message)
        if self.exported is not None:
            message = f"layer is {layer}, but an exported file gives the last one alone: take its checkpoint"
            raise InputError(message, file=self.exported.path)
        name, deepest = self.members[0].name, self.members[0].config.layers
        if not -deepest - 1 <= layer <= deepest:
            message = (
                f"layer is {layer}, but {name} has layers 0 (the token embedding) to {deepest}; "
                f"from the end these are {-deepest - 1} to -1"
            )
            raise InputError(message)
        layer %= deepest + 1
        return None if layer == deepest else layer

    def _nest(self, chain: Chain, dims: int | None) -> None:
        chain.check_models(self.members)
        if dims is not None:
            needed = chain.models_for(dims)
            if needed > len(self.members):
                message = f"dims is {dims}, which takes {needed} models of the chain; {len(self.members)} are given"
                raise InputError(message)
            self.members = self.members[:needed]
        self._nesting = Nesting(chain, self.members)
        widths = self._nesting.widths
        width = widths[-1] if dims is None else dims
        self.dims = (width,) if chain.is_naive else (*widths[:-1], width)

    def _export(self, chain: Chain | None, dims: int | None) -> None:
        encoder = self._family[0]
        if len(self.members) > 1 or not isinstance(encoder, ExportedEncoder):
            message = (
                f"{len(self.members)} models, and an exported file is among them: it runs alone; "
                "`protnest export --chain` puts a chain and its models into one"
            )
            raise InputError(message)
        if chain is not None:
            encoder.check_chain(chain.fingerprint)
        self.exported, self.chain = encoder, None
        self._output = encoder.pooled_output(self.pool)
        widths = encoder.widths if self._output == "nested" else (encoder.dim,)
        width = widths[-1] if dims is None else dims
        if not 1 <= width <= widths[-1] or (len(widths) == 1 and width != widths[-1]):
            message = f"dims is {dims}, but the file gives {widths[-1]}, nested at {', '.join(map(str, widths))}"
            raise InputError(message, file=encoder.path)
        self.dims = (*(each for each in widths if each < width), width)

    def release(self) -> None:
        """Lets go of the models' memory; what is known of them stays, and the next batch loads them again."""
        self._release_graphs()
        self._graphed.clear()
        self._family.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def why_too_long(self, residues: int) -> str | None:
        """Why a protein of so many residues cannot be embedded; None where it can."""
        if residues <= self.max_residues:
            return None
        if self.long == "error":
            return f"{residues} residues, but the model was trained on at most {self.max_residues}"
        why = None if self.exported is None else self.exported.why_not_beyond(self.long, self.pool)
        return None if why is None else f"{residues} residues, but {why}"

    @property
    def model(self) -> AnyEncoder:
        """The largest model that runs."""
        return self._family[len(self.members) - 1]

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def precision(self) -> str:
        """Name of the precision in which the models run."""
        return precision_name(self.members[0].dtype)

    @property
    def max_residues(self) -> int:
        """Length beyond which `long` decides: the model's, and in a chain the shortest of its models'."""
        return self.members[0].config.max_residues if self.chain is None else self.chain.max_residues

    def embed(
        self, sequences: Sequence[str], *, after_batch: Callable[[int], None] | None = None
    ) -> Vectors | list[Vectors]:
        """Embeds proteins.

        Args:
            sequences: B strings; lower case, spaces and a final `*` are accepted.
            after_batch: called with the number of residues that have just been run, on a GPU those that it was asked
                to run: it may be two batches behind.

        Returns:
            float32 (B, D), or with pool="residue" a list of B arrays float32 (L, D), in the order of `sequences`.

        Raises:
            TypeError: `sequences` is a plain string, or holds something else than strings.
            InputError: a sequence is empty, holds a letter outside the alphabet, is too long with long="error", or
                does not fit into the GPU's memory even in a batch of its own.
        """
        refuse_one_string(sequences)
        cleaned: list[str] = []
        for row, sequence in enumerate(cast("Sequence[object]", sequences)):
            if not isinstance(sequence, str):
                message = f"sequence {row} is {sequence!r:.60}, expected a string"
                raise TypeError(message)
            try:
                cleaned.append(clean_sequence(sequence))
            except InputError as error:
                message = f"sequence {row}: {error.problem}"
                raise InputError(message) from error
        return self.embed_clean(cleaned, after_batch=after_batch)

    def embed_clean(
        self, sequences: Sequence[str], *, after_batch: Callable[[int], None] | None = None
    ) -> Vectors | list[Vectors]:
        """`embed` for sequences that hold letters of the alphabet only, as `read_fasta` gives them."""
        refuse_one_string(sequences)
        pieces: list[Piece] = []
        for row, sequence in enumerate(sequences):
            if why := self.why_too_long(len(sequence)):
                message = f"sequence {row}: {why}"
                raise InputError(message)
            pieces += cut(row, len(sequence), max_residues=self.max_residues, long=self.long)
        gathered = self._gathering(len(sequences))
        planned = list(self._plan(pieces))
        numbers = itertools.count(len(planned))
        levels = range(len(self.members))

        def run(work: Work) -> None:
            packed = pack([sequences[piece.row][piece.begin : piece.end] for piece in work.pieces]).to(self.device)
            with torch.inference_mode():
                while work.levels:
                    level = work.levels[0]
                    gathered.take(level, work.number, work.pieces, packed, self._runner(level))
                    del work.levels[0]

        def divide(work: Work) -> tuple[Work, Work]:
            place = half(work.pieces)
            first = Work(next(numbers), work.pieces[:place], list(work.levels))
            second = Work(next(numbers), work.pieces[place:], list(work.levels))
            gathered.divide(work.number, first.number, second.number, first.tokens)
            return first, second

        # Resident models take turns on each batch; otherwise each runs all batches before the next one is loaded.
        together = self._family.resident
        turns = (levels,) if together else tuple((level,) for level in levels)
        batches = list(enumerate(planned))
        for turn in turns:
            ran: list[tuple[int, list[Piece]]] = []
            for level in turn if batches else ():
                # Loaded out here: a model that does not fit is no batch that does not.
                self._runner(level)
            for number, batch in batches:
                parts = self._budget.run(Work(number, batch, list(turn)), run, divide)
                ran += [(part.number, part.pieces) for part in parts]
                if after_batch is not None and turn[-1] == levels[-1]:
                    after_batch(sum(piece.end - piece.begin for piece in batch))
            # What did not fit as a whole goes on in its parts.
            batches = ran
        with torch.inference_mode():
            return gathered.result()

    def _runner(self, level: int) -> Runner:
        """The model at a place. One that is let go of after its turn has no graphs, which would hold it."""
        encoder = self._family[level]
        if not self._family.resident:
            return encoder
        if level not in self._graphed:
            # Graphs hold all layers.
            self._graphed[level] = graphed(encoder, wanted=self._cuda_graphs and self.layer is None)
        return self._graphed[level]

    def _release_graphs(self) -> None:
        for runner in self._graphed.values():
            if isinstance(runner, GraphedEncoder):
                runner.release()

    def _gathering(self, proteins: int) -> Gathering:
        width = self.dims[-1]
        if self._output is not None:
            return PooledRuns(self._output, proteins, width)
        if self._nesting is None:
            return PlainRows(self.pool, proteins, width, layer=self.layer)
        if self.pool in ("mean", "bos"):
            return PooledNesting(self._nesting, self.pool, proteins, width)
        return ResidueNesting(self._nesting, self.pool, proteins, width, resident=self._family.resident)

    def _plan(self, pieces: list[Piece]) -> Iterator[list[Piece]]:
        order, offsets = plan_batches([piece.tokens for piece in pieces], self.max_tokens)
        for begin, end in itertools.pairwise(offsets.tolist()):
            yield [pieces[index] for index in order[begin:end].tolist()]
