"""A ridge head: a linear read-out of pooled embeddings, fitted on a mutational scan, that scores further variants.

    score = features @ weight + bias          in the assay's units

The features are a model's embedding, or a chain's nested row, as the mean over all residues or over the mutated sites.
`protnest probe --save` fits one. Its file is safetensors: `weight` (W,) and `bias` (1,) in fp64; the metadata hold
`schema_version` and, as JSON under `head`, everything else.

Shapes: N variants, W width of the features, L residues of a mutant, S of them read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .atomic import write_atomically
from .chain import Chain, ChainModel
from .embedder import Embedder
from .errors import InputError
from .exported_encoder import AnyEncoder
from .family import Family, Member, listed
from .schema_version import check_schema_version
from .variants import Variant, confine

SCHEMA_VERSION = 1
HEAD_POOLINGS = ("mean", "site")

# Mutants are embedded in chunks of so many bytes of residues' rows, so that memory does not grow with their number.
_CHUNK_BYTES = 1 << 28


def wild_type_hash(sequence: str) -> str:
    """How a head knows its wild type: a hash of the residues."""
    return hashlib.blake2b(sequence.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class RidgeHead:
    """A linear read-out of pooled embeddings, fitted on a mutational scan.

    Attributes:
        weight_W: fp64.
        bias: the score of features that are zero, in the assay's units like all scores.
        pooling: "mean" over all residues, or "site", over the mutated ones.
        models: whose embeddings are read, smallest first; a single one without a chain.
        strength: of the ridge, in units of the features' mean variance.
        chain_fingerprint: of the chain whose rows are read; None for a model's raw embedding.
        data: what it was fitted on: `scan` and `column`, `variants` (how many), `wild_type` (`residues` and `hash`),
            `region` (first and last residue that the models saw, from 1, or None), and for people `folds`, `seed`,
            `precision` and the cross-validated `spearman` with its interval, `low` and `high`.

    Raises:
        InputError: the weight does not fit the models, a number is not finite, the pooling is unknown, or `data` lacks
            the wild type or holds a region that is none.
    """

    weight_W: npt.NDArray[np.float64]
    bias: float
    pooling: str
    models: tuple[ChainModel, ...]
    strength: float
    chain_fingerprint: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pooling not in HEAD_POOLINGS:
            message = f"pooling is {self.pooling!r}; allowed: {', '.join(HEAD_POOLINGS)}"
            raise InputError(message)
        if not self.models or (self.chain_fingerprint is None and len(self.models) > 1):
            message = f"{len(self.models)} models and no chain: a head reads one model, or a chain's row"
            raise InputError(message)
        if self.weight_W.shape != (self.width,) or self.weight_W.dtype != np.float64:
            got = f"{self.weight_W.dtype} {self.weight_W.shape}"
            message = f"weight is {got}, expected float64 {(self.width,)} for {self.models[-1].name}"
            raise InputError(message)
        for name, value in (("weight", self.weight_W), ("bias", self.bias), ("strength", self.strength)):
            if not np.isfinite(value).all():
                message = f"{name} is not finite"
                raise InputError(message)
        match self.data.get("wild_type"):
            case {"residues": int(), "hash": str()}:
                pass
            case other:
                message = f"data's wild_type is {other!r}, expected `residues` and `hash`"
                raise InputError(message)
        match self.data.get("region"):
            case None:
                pass
            case [int(first), int(last)] if 1 <= first <= last <= self.data["wild_type"]["residues"]:
                pass
            case other:
                residues = self.data["wild_type"]["residues"]
                message = f"data's region is {other!r}, expected first and last of the wild type's {residues} residues"
                raise InputError(message)

    @property
    def width(self) -> int:
        """W, of the features: the largest model's own, also where they are a chain's row."""
        return self.models[-1].width

    @property
    def region(self) -> tuple[int, int] | None:
        """First and last residue that the models see, from 1; None for all."""
        region = self.data.get("region")
        return None if region is None else (region[0], region[1])

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides a score."""
        facts = [[asdict(model) for model in self.models], self.pooling, self.chain_fingerprint, self.region]
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
        digest.update(np.append(self.weight_W, self.bias).astype("<f8", copy=False).tobytes())
        return digest.hexdigest()

    def predict(self, features_NW: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Scores of features that are pooled as `pooling` says: float32 (N,), from a product in fp64.

        Raises:
            ValueError: the features are not (N, W).
        """
        rows_NW = np.asarray(features_NW, dtype=np.float64)
        if rows_NW.ndim != 2 or rows_NW.shape[1] != self.width:
            message = f"features have shape {rows_NW.shape}, expected (N, {self.width})"
            raise ValueError(message)
        return (rows_NW @ self.weight_W + self.bias).astype(np.float32)

    def check_models(self, members: Sequence[Member], chain: Chain | None = None) -> None:
        """Checks that these are the models and the chain that it was fitted on. A chain's models may go on further:
        only those that the head's width needs are run.

        Raises:
            InputError: the chain or a model is another, is missing or too many, or the order is another.
        """
        order = _order(self.models)
        self._check_chain(chain, order)
        if len(members) < len(self.models) or (chain is None and len(members) > 1):
            names = ", ".join(member.name for member in members) or "none"
            message = f"the head reads {order}, got {names}"
            raise InputError(message)
        known = {model.fingerprint: model.name for model in self.models if model.fingerprint is not None}
        for place, (model, member) in enumerate(zip(self.models, members, strict=False), start=1):
            if _is_the_model(member, model):
                continue
            expected = f"model {place} of the head is {model.name} ({model.width})"
            if member.fingerprint in known:
                message = f"{expected}, got its {known[member.fingerprint]}: the order must be {order}"
            elif member.dim != model.width:
                message = f"{expected}, got {member.name} of width {member.dim}"
            else:
                message = (
                    f"{expected}, got {member.name}, another checkpoint of that width: its hash is "
                    f"{member.fingerprint or 'not known'}, the head was fitted on {model.fingerprint or 'one without'}"
                )
            raise InputError(message)
        if chain is not None:
            chain.check_models(members)

    def _check_chain(self, chain: Chain | None, order: str) -> None:
        if self.chain_fingerprint is None and chain is not None:
            message = f"the head reads the raw embedding of {order}: it takes no chain, got {_order(chain.models)}"
            raise InputError(message)
        if self.chain_fingerprint is not None and chain is None:
            message = f"the head reads rows of a chain of {order} (hash {self.chain_fingerprint}): no chain is given"
            raise InputError(message)
        if chain is not None and chain.fingerprint != self.chain_fingerprint:
            message = (
                f"the head reads rows of another chain: it was fitted on {order} with the hash "
                f"{self.chain_fingerprint}, got {_order(chain.models)} with {chain.fingerprint}"
            )
            raise InputError(message)

    def check_variants(self, variants: Sequence[Variant], *, wild_type: str | None = None) -> list[Variant]:
        """What the models see of variants of the whole protein: all of them, or where the head was fitted on a region
        that part. Needs no model, so that what is wrong is known before one is loaded.

        Args:
            variants: of the protein that the head was fitted on.
            wild_type: its residues; None does not check them.

        Raises:
            InputError: the wild type is another; a head that reads mutated sites is given a variant without one, or a
                head of a region one that reaches beyond it or has another length than the wild type.
        """
        known = self.data["wild_type"]
        if wild_type is not None and wild_type_hash(wild_type) != known["hash"]:
            message = (
                f"the head was fitted on variants of another protein: of {known['residues']} residues with the hash "
                f"{known['hash']}, got {len(wild_type)} residues with {wild_type_hash(wild_type)}"
            )
            raise InputError(message)
        return [self._seen(variant, known["residues"]) for variant in variants]

    def _seen(self, variant: Variant, residues: int) -> Variant:
        if self.pooling == "site" and not variant.sites:
            message = (
                f"variant {variant.name!r} has no substituted site, and the head reads those alone: one saved with "
                "--save-pooling mean takes it"
            )
            raise InputError(message)
        if self.region is None:
            return variant
        first, last = self.region
        if len(variant.sequence) != residues:
            message = (
                f"variant {variant.name!r} has {len(variant.sequence)} residues, the wild type {residues}: a head that "
                f"was fitted on the region {first}-{last} takes substitutions only"
            )
            raise InputError(message)
        return confine(variant, first, last)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: weight and bias in fp64, everything else as JSON in its metadata."""
        facts = {
            "models": [asdict(model) for model in self.models],
            "width": self.width,
            "pooling": self.pooling,
            "chain_fingerprint": self.chain_fingerprint,
            "strength": self.strength,
            "data": self.data,
            "fingerprint": self.fingerprint,
        }
        metadata = {"schema_version": str(SCHEMA_VERSION), "head": json.dumps(facts, allow_nan=False)}
        tensors = {"weight": np.ascontiguousarray(self.weight_W), "bias": np.array([self.bias])}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> RidgeHead:
        """Reads a head's file.

        Raises:
            InputError: it is missing, damaged, no head, or of a schema version that this release does not know.
        """
        metadata, tensors = _read(path)
        try:
            facts = json.loads(metadata["head"])
            bias = tensors["bias"]
            if bias.shape != (1,) or bias.dtype != np.float64:
                message = f"bias is {bias.dtype} {bias.shape}, expected float64 (1,)"
                raise InputError(message)
            head = cls(
                weight_W=tensors["weight"],
                bias=float(bias[0]),
                pooling=facts["pooling"],
                models=tuple(ChainModel(**model) for model in facts["models"]),
                strength=float(facts["strength"]),
                chain_fingerprint=facts["chain_fingerprint"],
                data=dict(facts["data"]),
            )
            stated = facts["fingerprint"]
        except InputError as error:
            raise InputError(error.problem, file=path) from error
        except (KeyError, TypeError, ValueError) as error:
            message = f"not a readable head: {type(error).__name__} {error}"
            raise InputError(message, file=path) from error
        if head.fingerprint != stated:
            message = f"is damaged: what it holds has the hash {head.fingerprint}, its metadata say {stated}"
            raise InputError(message, file=path)
        return head


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Metadata and tensors of a file that says that it is a head of a version that is known."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            # Names first: another file's tensors may have types that numpy lacks.
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias") if name in file.keys()}
    except FileNotFoundError as error:
        message = "no such file; `protnest probe --save` writes one"
        raise InputError(message, file=path) from error
    except (SafetensorError, OSError, TypeError) as error:
        message = f"not a readable head ({error})"
        raise InputError(message, file=path) from error
    if "head" not in metadata:
        message = "is a safetensors file, but no head: its metadata lack `head`"
        raise InputError(message, file=path)
    check_schema_version(metadata.get("schema_version"), str(SCHEMA_VERSION), file=path)
    return metadata, tensors


def _order(models: Sequence[ChainModel]) -> str:
    return " -> ".join(f"{model.name} ({model.width})" for model in models)


def _is_the_model(member: Member, model: ChainModel) -> bool:
    if (member.dim, member.fingerprint) != (model.width, model.fingerprint):
        return False
    # An encoder that came from no checkpoint has no hash: then its name must do.
    return model.fingerprint is not None or member.name == model.name


def score_with_head(
    head: RidgeHead,
    model: AnyEncoder | Sequence[AnyEncoder] | Family,
    variants: Sequence[Variant],
    *,
    wild_type: str | None = None,
    chain: Chain | None = None,
    max_tokens: int | None = None,
    after_batch: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Scores variants, higher as the assay's score is higher. Each distinct mutant is embedded once.

    Args:
        head: what was fitted.
        model: the encoder that it was fitted on; with a chain several, smallest first, as a list or a `Family`.
        variants: of the whole protein, also where the head was fitted on a region.
        wild_type: the protein's residues, to be checked against those that the head was fitted on; None does not.
        chain: the one that it was fitted on, or None.
        max_tokens: most tokens in a batch, as of `Embedder`.
        after_batch: called with the number of residues that have just been run.

    Returns:
        float32 (N,) in the assay's units, in the order of `variants`.

    Raises:
        InputError: models, chain or wild type are others than the head's; it cannot read a variant (see
            `RidgeHead.check_variants`); or embeddings are not finite.
    """
    seen = head.check_variants(variants, wild_type=wild_type)
    family = model if isinstance(model, Family) else Family.of(listed(model))
    head.check_models(family.members, chain)
    embedder = Embedder(
        family,
        chain=chain,
        dims=None if chain is None else head.width,
        # Means, too, are taken here, in fp64 as the fit's were. Mutants' means differ little and a weak ridge has large
        # weights: means in fp32 cost up to 2e-4 of the scores' spread (GB1, nano-s), and were no faster.
        pool="residue",
        max_tokens=max_tokens,
    )
    places: dict[str, list[int]] = {}
    for place, variant in enumerate(seen):
        places.setdefault(variant.sequence, []).append(place)
    scores_N = np.empty(len(seen), dtype=np.float32)
    for mutants in _chunks(list(places), head):
        for mutant, rows_LW in zip(mutants, embedder.embed_clean(mutants, after_batch=after_batch), strict=True):
            for place in places[mutant]:
                read_SW = rows_LW if head.pooling == "mean" else rows_LW[list(seen[place].sites)]
                scores_N[place] = head.predict(read_SW.mean(axis=0, dtype=np.float64)[None])[0]
    if not np.isfinite(scores_N).all():
        name = seen[int(np.isfinite(scores_N).argmin())].name
        message = f"variant {name!r}: its score is not finite: fp16 ends at 65,504; take --precision bf16 or fp32"
        raise InputError(message)
    return scores_N


def _chunks(mutants: Sequence[str], head: RidgeHead) -> Iterator[list[str]]:
    """Consecutive mutants whose embeddings fit into the memory that is meant for them; one at least."""
    most_residues = _CHUNK_BYTES // (4 * head.width)
    chunk: list[str] = []
    residues = 0
    for mutant in mutants:
        if chunk and residues + len(mutant) > most_residues:
            yield chunk
            chunk, residues = [], 0
        chunk.append(mutant)
        residues += len(mutant)
    if chunk:
        yield chunk
