"""Broken twins of `nested_embed` and of `fit_chain`: each must fail the very check that the product passes.

Shapes: T rows, X width of the row so far, D the new model's width, N dimensions it adds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from protnest.engine import Chain
from protnest.kernels.nested_embed import nested_embed_reference
from protnest.training.chain_fit import fit_chain
from protnest.training.gram import GramPair

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
NestedEmbed = Callable[[Arguments, float | None], torch.Tensor]


def _given(change: Callable[[Arguments], Arguments]) -> NestedEmbed:
    """The product on changed arguments."""
    return lambda given, eps: nested_embed_reference(*change(given), eps=eps)


def _normalised_by(normalise: Callable[[torch.Tensor, float], torch.Tensor]) -> NestedEmbed:
    """The product with another normalisation."""

    def broken(given: Arguments, eps: float | None) -> torch.Tensor:
        x, h, *rest = given
        h = h.to(x.dtype)
        return nested_embed_reference(x, h if eps is None else normalise(h, eps), *rest, eps=None)

    return broken


def _by_moments(h: torch.Tensor, eps: float) -> torch.Tensor:
    """The variance as the difference of two large numbers."""
    mean = h.mean(-1, keepdim=True)
    return (h - mean) / ((h.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0) + eps).sqrt()


def _padded(h: torch.Tensor, eps: float) -> torch.Tensor:
    """Statistics over the next multiple of 32 channels, the lanes beyond being zeros that count."""
    padded = F.pad(h, (0, -h.shape[-1] % 32))
    return F.layer_norm(padded, padded.shape[-1:], eps=eps)[:, : h.shape[-1]]


def _prefix_rounded(given: Arguments, eps: float | None) -> torch.Tensor:
    out = nested_embed_reference(*given, eps=eps)
    X = given[0].shape[1]
    return torch.cat((out[:, :X].bfloat16().to(out.dtype), out[:, X:]), dim=-1)


def _last_left_out(axis: int) -> NestedEmbed:
    def broken(given: Arguments, eps: float | None) -> torch.Tensor:
        out = nested_embed_reference(*given, eps=eps).clone()
        out.select(axis, -1)[...] = 0
        return out

    return broken


def _added_first(given: Arguments, eps: float | None) -> torch.Tensor:
    out = nested_embed_reference(*given, eps=eps)
    X = given[0].shape[1]
    return torch.cat((out[:, X:], out[:, :X]), dim=-1)


NESTED_MUTANTS: dict[str, NestedEmbed] = {
    "offset left out": _given(lambda g: (*g[:4], torch.zeros_like(g[4]))),
    "row so far left out": _given(lambda g: (*g[:3], torch.zeros_like(g[3]), g[4])),
    "prediction added instead of taken away": _given(lambda g: (*g[:3], -g[3], g[4])),
    "new model left out": _given(lambda g: (*g[:2], torch.zeros_like(g[2]), *g[3:])),
    "last channel of the new model left out": _given(
        lambda g: (*g[:2], torch.cat((g[2][:-1], torch.zeros_like(g[2][-1:]))), *g[3:])
    ),
    "last column of the row so far left out": _given(
        lambda g: (*g[:3], torch.cat((g[3][:-1], torch.zeros_like(g[3][-1:]))), g[4])
    ),
    "rows of the new model one late": _given(lambda g: (g[0], g[1].roll(1, 0), *g[2:])),
    "offset one column late": _given(lambda g: (*g[:4], g[4].roll(1))),
    "not normalised": _normalised_by(lambda h, eps: h),
    "not centred": _normalised_by(lambda h, eps: h / (h.square().mean(-1, keepdim=True) + eps).sqrt()),
    "eps left out": _normalised_by(lambda h, eps: F.layer_norm(h, h.shape[-1:], eps=1e-30)),
    "eps beside the deviation": _normalised_by(
        lambda h, eps: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True, correction=0) + eps)
    ),
    "Bessel's correction": _normalised_by(
        lambda h, eps: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + eps).sqrt()
    ),
    "variance by moments": _normalised_by(_by_moments),
    "statistics over the padded width": _normalised_by(_padded),
    "statistics over all rows": _normalised_by(lambda h, eps: (h - h.mean()) / (h.var(correction=0) + eps).sqrt()),
    "normalised in bf16": _normalised_by(lambda h, eps: F.layer_norm(h, h.shape[-1:], eps=eps).bfloat16().to(h.dtype)),
    "prefix rounded": _prefix_rounded,
    "last column not written": _last_left_out(1),
    "last row not written": _last_left_out(0),
    "new dimensions first": _added_first,
    "output 0.1 % short": lambda given, eps: nested_embed_reference(*given, eps=eps) * 0.999,
}
"""Name of the mistake -> a function of (row, hidden, P, G, c) and eps that makes it."""


def fit_chain_on_raw(pair: GramPair, *, regressor: str) -> Chain:
    """The published mismatch: each stage is fitted on the smaller model's raw embedding, and applied to the row so far.

    A chain of two of the models at a time gives these stages; the first one is right, since there the two are the same.
    """
    pairs = [
        fit_chain(pair.select(places), regressor=regressor) for places in itertools.pairwise(range(len(pair.models)))
    ]
    return dataclasses.replace(
        pairs[0], models=pair.models, stages=tuple(chain.stages[0] for chain in pairs), fitted_on="raw"
    )
