"""An embedder as words: what to load and how to run it, to be made in whichever process it shall run in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embedder import Embedder


@dataclass(frozen=True, kw_only=True)
class EmbedderPlan:
    """Everything of which an `Embedder` is made.

    Attributes:
        models: names or paths of models, smallest first, or of one exported file; empty: the chain's own, or without a
            chain the bundled nano-s.
        chain: file or bundled name of a chain; None for a single model.
        dims: dimensions to keep of a nested row; None for all.
        resident: keep several models in memory; else they run one after another.
        device: "auto", "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32", "bf16", "fp16" or "int8".
        pool: "mean", "max", "bos" or "residue".
        long: "window", "full", "truncate" or "error".
        layer: whose hidden states are embeddings, from 0, or negative from the end; None for the last.
        max_tokens: most tokens in a batch; None for the device's default.
    """

    models: tuple[str, ...] = ()
    chain: Path | None = None
    dims: int | None = None
    resident: bool = True
    device: str = "auto"
    precision: str = "auto"
    pool: str = "mean"
    long: str = "window"
    layer: int | None = None
    max_tokens: int | None = None

    def on(self, device: str) -> EmbedderPlan:
        """The same on another device."""
        return replace(self, device=device)

    def make(self) -> Embedder:
        """Loads what is needed; models beyond those that `dims` needs are not loaded.

        Raises:
            InputError: a model or chain cannot be read, or they do not go together.
        """
        from .chain import Chain
        from .embedder import Embedder
        from .family import Family
        from .models import DEFAULT_MODEL, load_any_encoder

        chain = None if self.chain is None else Chain.load(self.chain)
        own = (DEFAULT_MODEL,) if chain is None else tuple(each.name for each in chain.models)
        names = self.models or own
        if chain is not None and self.dims is not None:
            names = names[: chain.models_for(self.dims)]
        family = Family(
            lambda place: load_any_encoder(names[place], device=self.device, precision=self.precision),
            len(names),
            resident=self.resident,
        )
        return Embedder(
            family,
            chain=chain,
            dims=self.dims,
            pool=self.pool,
            long=self.long,
            layer=self.layer,
            max_tokens=self.max_tokens,
        )
