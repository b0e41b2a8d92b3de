"""A nesting chain: how the embeddings of ever larger models become one row whose prefixes are the smaller models'.

Stage k takes the accumulated row x and the new model's embedding y, and appends what x cannot predict:

    row_k = [x | (y - f(x) - m) C^T]          f(x) = x W + b

(Catrina, Bepler, Sledzieski, Singh, ICLR 2026, algorithm 3.) With y = n diag(gamma) + beta, n the normalised hidden
state, that is [x | n P + x G + c], which is what runs:

    P = diag(gamma) C^T          G = -W C^T          c = (beta - b - m) C^T

A naive chain (a baseline) has principal components of the concatenation instead, and no prefixes:

    row_k = ([x | y] - m) C^T

Shapes: X width of the row so far, D of the new model, N dimensions it adds; Z = X + D.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import write_atomically
from .config import BUNDLED_CHAINS, BUNDLED_FOLDER, PUBLISHED
from .errors import InputError
from .family import Member
from .schema_version import check_schema_version

SCHEMA_VERSION = 1
_STAGE_TENSORS = ("weight", "bias", "mean", "components")


@dataclass(frozen=True, kw_only=True)
class ChainModel:
    """A model of a chain.

    Attributes:
        name: how it was called when the chain was fitted.
        width: D, of its embeddings.
        max_residues: length that it was trained on.
        fingerprint: hash of its architecture and weights; None in chains that were imported, which know sizes alone.
    """

    name: str
    width: int
    max_residues: int
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """A stage as one affine map of the row and the normalised hidden state: P (D, N), G (X, N), c (N,)."""

    projection_DN: torch.Tensor
    base_XN: torch.Tensor
    offset_N: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Fold:
        """On `device`, with the matrices in `dtype`; the offset is fp32."""
        return Fold(
            projection_DN=self.projection_DN.to(device, dtype).contiguous(),
            base_XN=self.base_XN.to(device, dtype).contiguous(),
            offset_N=self.offset_N.to(device, torch.float32),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One stage, as it was fitted.

    Attributes:
        weight_XD, bias_D: W and b of the regression f; None in a naive stage.
        mean: m, (D,); in a naive stage (Z,).
        components: C, (N, D), orthonormal rows; in a naive stage (N, Z).
    """

    weight_XD: torch.Tensor | None
    bias_D: torch.Tensor | None
    mean: torch.Tensor
    components: torch.Tensor

    def fold(self, norm_weight_D: torch.Tensor, norm_bias_D: torch.Tensor) -> Fold:
        """The stage on hidden states that are normalised but not yet scaled; computed in fp64, in the stage's dtype."""
        gamma_D, beta_D, mean, components = (
            each.detach().to("cpu", torch.float64) for each in (norm_weight_D, norm_bias_D, self.mean, self.components)
        )
        if self.weight_XD is None or self.bias_D is None:
            X = components.shape[1] - gamma_D.numel()
            base_XN, of_new_DN = components[:, :X].T, components[:, X:].T
            offset_N = beta_D @ of_new_DN - mean @ components.T
        else:
            base_XN, of_new_DN = -self.weight_XD.double() @ components.T, components.T
            offset_N = (beta_D - self.bias_D.double() - mean) @ of_new_DN
        dtype = self.mean.dtype
        return Fold(
            projection_DN=(gamma_D[:, None] * of_new_DN).to(dtype),
            base_XN=base_XN.to(dtype),
            offset_N=offset_N.to(dtype),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that a chain file gives them."""
        named = dict(zip(_STAGE_TENSORS, (self.weight_XD, self.bias_D, self.mean, self.components), strict=True))
        return {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """An ordered list of models of growing width, with a stage for each but the first.

    Attributes:
        models: smallest first.
        stages: one fewer.
        regressor: "linear", "ridge", "pcr" or "naive".
        fitted_on: what the stages were fitted on: "accumulated" rows, as at inference; "raw" embeddings, as the
            published script does; or "unknown".
        data: what the chain was fitted on, for people.
        report: per stage what the fit says of itself: `held_out_r2`, `train_r2` and more.

    Raises:
        InputError: widths do not grow, or a stage does not fit its models.
    """

    models: tuple[ChainModel, ...]
    stages: tuple[Stage, ...]
    regressor: str
    fitted_on: str = "accumulated"
    data: dict[str, Any] = field(default_factory=dict)
    report: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_widths([model.width for model in self.models], [model.name for model in self.models])
        if len(self.stages) != len(self.models) - 1 or not self.stages:
            message = (
                f"a chain of {len(self.models)} models with {len(self.stages)} stages: expected one fewer, from one"
            )
            raise InputError(message)
        for number, (stage, X, D) in enumerate(zip(self.stages, self.widths, self.widths[1:], strict=False), start=1):
            naive = self.is_naive
            expected = {
                "weight": None if naive else (X, D),
                "bias": None if naive else (D,),
                "mean": (X + D,) if naive else (D,),
                "components": (D, X + D) if naive else (D - X, D),
            }
            tensors = stage.tensors()
            for name, shape in expected.items():
                got = tuple(tensors[name].shape) if name in tensors else None
                if got != shape:
                    message = f"stage {number}: {name} has shape {got}, expected {shape} for widths {X} and {D}"
                    raise InputError(message)
                if name in tensors and not torch.isfinite(tensors[name]).all():
                    message = f"stage {number}: {name} is not finite"
                    raise InputError(message)

    @property
    def is_naive(self) -> bool:
        """Whether rows are principal components of the concatenation, without prefixes."""
        return self.regressor == "naive"

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the row after each model, which is the model's own."""
        return tuple(model.width for model in self.models)

    @property
    def max_residues(self) -> int:
        """The shortest length that one of the models was trained on: also for an initial run of them, so that a
        prefix's long proteins are cut into the same windows."""
        return min(model.max_residues for model in self.models)

    @property
    def fingerprint(self) -> str:
        """Hash of the models' names and hashes and of all tensors, as they are stored."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([asdict(model) for model in self.models], sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def models_for(self, dims: int | None) -> int:
        """How many models it takes for a row of `dims` dimensions; all of them for None.

        Raises:
            InputError: `dims` is not positive, beyond the chain's width, or cuts a naive chain, which has no prefixes.
        """
        if dims is None:
            return len(self.models)
        if not 1 <= dims <= self.widths[-1]:
            message = f"dims is {dims}; this chain gives 1 to {self.widths[-1]}, nested at {_listed(self.widths)}"
            raise InputError(message)
        if self.is_naive and dims != self.widths[-1]:
            message = f"dims is {dims}, but a naive chain has no prefixes: only its whole width, {self.widths[-1]}"
            raise InputError(message)
        return next(count for count, width in enumerate(self.widths, start=1) if width >= dims)

    def check_models(self, members: Sequence[Member]) -> None:
        """Checks that these are an initial run of the chain's models.

        Raises:
            InputError: there are too many, one is another model, or they come in another order.
        """
        order = " -> ".join(f"{model.name} ({model.width})" for model in self.models)
        if not 1 <= len(members) <= len(self.models):
            message = f"{len(members)} models for a chain of {len(self.models)}: {order}"
            raise InputError(message)
        known = {model.fingerprint: model.name for model in self.models if model.fingerprint is not None}
        for place, (model, member) in enumerate(zip(self.models, members, strict=False), start=1):
            expected = f"model {place} of the chain is {model.name} ({model.width})"
            if member.dim == model.width and _is_the_model(member, model):
                continue
            if member.fingerprint in known:
                message = f"{expected}, got its {known[member.fingerprint]}: the order must be {order}"
            elif member.dim != model.width:
                message = f"{expected}, got {member.name} of width {member.dim}; the chain is {order}"
            else:
                message = (
                    f"{expected}, got {member.name}, another checkpoint of that width: its hash is "
                    f"{member.fingerprint or 'not known'}, the chain was fitted on {model.fingerprint or 'published'}"
                )
            raise InputError(message)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"stages.{number}.{name}": tensor
            for number, stage in enumerate(self.stages, start=1)
            for name, tensor in stage.tensors().items()
        }

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: tensors in fp32, everything else as JSON in its metadata."""
        facts = {
            "models": [asdict(model) for model in self.models],
            "widths": list(self.widths),
            "regressor": self.regressor,
            "fitted_on": self.fitted_on,
            "data": self.data,
            "report": list(self.report),
            "fingerprint": self.fingerprint,
        }
        metadata = {"schema_version": str(SCHEMA_VERSION), "chain": json.dumps(facts)}
        write_atomically(Path(path), lambda temporary: save_file(self._tensors(), temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Chain:
        """Reads a chain file.

        Args:
            path: a bundled chain's name (`nano`), which comes before a file of that name; or a file.

        Raises:
            InputError: it is missing, damaged, no chain, or of a schema version that this release does not know.
        """
        is_bundled = str(path) in BUNDLED_CHAINS
        path = BUNDLED_FOLDER / f"{path}.chain" if is_bundled else path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError as error:
            message = f"no such file; `protnest fit-chain` writes one; bundled chains: {', '.join(BUNDLED_CHAINS)}"
            if is_bundled:
                message = "no such file, though it belongs to this package"
            raise InputError(message, file=path) from error
        except (SafetensorError, OSError) as error:
            message = f"not a readable chain ({error})"
            raise InputError(message, file=path) from error
        if "chain" not in metadata:
            message = "is a safetensors file, but no chain: its metadata lack `chain`"
            raise InputError(message, file=path)
        check_schema_version(metadata.get("schema_version"), str(SCHEMA_VERSION), file=path)
        try:
            facts = json.loads(metadata["chain"])
            chain = cls(
                models=tuple(ChainModel(**model) for model in facts["models"]),
                stages=tuple(_stage(tensors, number) for number in range(1, len(facts["models"]))),
                regressor=facts["regressor"],
                fitted_on=facts["fitted_on"],
                data=facts["data"],
                report=tuple(facts["report"]),
            )
            stated = facts["fingerprint"]
        except InputError as error:
            raise InputError(error.problem, file=path) from error
        except (KeyError, TypeError, ValueError) as error:
            message = f"not a readable chain: {type(error).__name__} {error}"
            raise InputError(message, file=path) from error
        if chain.fingerprint != stated:
            message = f"is damaged: its tensors have the hash {chain.fingerprint}, its metadata say {stated}"
            raise InputError(message, file=path)
        return chain


def _stage(tensors: dict[str, torch.Tensor], number: int) -> Stage:
    prefix = f"stages.{number}."
    return Stage(
        weight_XD=tensors.get(prefix + "weight"),
        bias_D=tensors.get(prefix + "bias"),
        mean=tensors[prefix + "mean"],
        components=tensors[prefix + "components"],
    )


def _is_the_model(member: Member, model: ChainModel) -> bool:
    if model.fingerprint is not None:
        return member.fingerprint == model.fingerprint
    # An imported chain knows the published name alone: then the architecture must be that name's.
    return model.name not in PUBLISHED or member.config == PUBLISHED[model.name]


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def check_widths(widths: Sequence[int], names: Sequence[str]) -> None:
    """Raises InputError unless there are at least two models and each is wider than the one before."""
    if len(widths) < 2:
        message = f"a chain takes at least two models, got {len(widths)}"
        raise InputError(message)
    for (small, narrow), (large, wide) in itertools.pairwise(zip(names, widths, strict=True)):
        if wide <= narrow:
            message = f"widths must grow along a chain: {small} has {narrow}, {large} after it {wide}"
            raise InputError(message)
