"""What decides the bytes of embeddings, and what has to be known of an embedder before it is there.

Settings are compared: a run is gone on with under equal ones only. Facts travel: the process that plans a run need not
be the one, nor on the machine, that has the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedder import Embedder
    from .fasta import Record


@dataclass(frozen=True, kw_only=True)
class EmbedderFacts:
    """What planning a run takes of an embedder.

    Attributes:
        settings: everything of it that decides bytes.
        width: of an embedding.
        pool: "mean", "max", "bos" or "residue".
        is_chain: whether it runs several models as one.
        long: what becomes of proteins beyond `max_residues`.
        max_residues: length beyond which `long` decides.
        why_not_beyond: why longer ones cannot be embedded; None where they can.
    """

    settings: dict[str, Any]
    width: int
    pool: str
    is_chain: bool
    long: str
    max_residues: int
    why_not_beyond: str | None

    @classmethod
    def of(cls, embedder: Embedder) -> EmbedderFacts:
        """Reads them off an embedder."""
        # The reason is the same for every length; only the number that it begins with is not.
        reason = embedder.why_too_long(embedder.max_residues + 1)
        return cls(
            settings=embedder_settings(embedder),
            width=embedder.dims[-1],
            pool=embedder.pool,
            is_chain=embedder.chain is not None,
            long=embedder.long,
            max_residues=embedder.max_residues,
            why_not_beyond=reason and reason.removeprefix(f"{embedder.max_residues + 1} "),
        )

    def why_too_long(self, residues: int) -> str | None:
        """Why a protein of so many residues cannot be embedded; None where it can."""
        if residues <= self.max_residues or self.why_not_beyond is None:
            return None
        return f"{residues} {self.why_not_beyond}"


def embedder_settings(embedder: Embedder) -> dict[str, Any]:
    """Everything of an embedder that decides bytes."""
    largest = embedder.members[-1]
    return {
        "model": largest.name,
        "model_fingerprint": largest.fingerprint,
        "layers": largest.config.layers,
        # Absent for the last one, as in stores that were written before others could be chosen.
        **({} if embedder.layer is None else {"layer": embedder.layer}),
        **_chain_settings(embedder),
        **_exported_settings(embedder),
        "width": embedder.dims[-1],
        "pool": embedder.pool,
        "precision": embedder.precision,
        "device": embedder.device.type,
        "max_tokens": embedder.max_tokens,
        "long": embedder.long,
        "max_residues": embedder.max_residues,
    }


def record_flags(record: Record, *, max_residues: int, long: str) -> tuple[str, ...]:
    """What is done to a record before it is embedded, in words."""
    if len(record.sequence) <= max_residues:
        return record.flags
    return (*record.flags, {"window": "windowed", "full": "full-length", "truncate": "truncated"}[long])


def _chain_settings(embedder: Embedder) -> dict[str, Any]:
    """Nothing for a single model, whose settings are those of stores that were written before there were chains."""
    if embedder.chain is None:
        return {}
    return {
        "models": [member.name for member in embedder.members],
        "model_fingerprints": [member.fingerprint for member in embedder.members],
        "chain_fingerprint": embedder.chain.fingerprint,
        "dims": list(embedder.dims),
    }


def _exported_settings(embedder: Embedder) -> dict[str, Any]:
    """Of an exported file: its runtime, whose bits are not torch's, and the chain inside where its row is taken."""
    exported = embedder.exported
    if exported is None:
        return {}
    models = exported.facts["models"]
    return {
        "runtime": exported.runtime,
        "models": [model["name"] for model in models],
        "model_fingerprints": [model["fingerprint"] for model in models],
        "chain_fingerprint": exported.facts["chain"],
        "dims": list(embedder.dims),
    }
