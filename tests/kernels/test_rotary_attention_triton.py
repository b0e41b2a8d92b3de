"""The Triton twin of rotary_attention: every element against NumPy's fp64, hostile lengths and scores, NaN all around.

Shapes: T tokens, B sequences, L one sequence, H heads, K head width, J = K/2, P rows of the tables.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

from support.encoder_kernel_mutants import ROTARY_ATTENTION_MUTANTS
from support.poisoned import DEVICE, INTERPRETED, for_mutants, guarded, half_ulp, on_triton, poisoned_memory
from support.source_mutants import load_mutant

pytest.importorskip("triton")
from protnest.kernels.gpu import rotary_attention as module

pytestmark = on_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = (16, 20, 24, 32, 64, 128)
Doubles = npt.NDArray[np.float64]


class Given(NamedTuple):
    qkv: torch.Tensor
    cos_PJ: torch.Tensor
    sin_PJ: torch.Tensor
    cu_seqlens: torch.Tensor
    longest: int


def _given(
    lengths: Sequence[int], H: int, K: int, dtype: torch.dtype, *, scale: float = 1.0, more: int = 0, seed: int = 0
) -> Given:
    """Queries, keys and values that have a mean, heads of their own sizes; tables `more` rows longer than needed."""
    generator = torch.Generator().manual_seed(seed)
    qkv = 0.2 + torch.randn((sum(lengths), 3 * H, K), generator=generator)
    qkv *= 0.5 + torch.rand((3 * H, 1), generator=generator)
    qkv[:, : 2 * H] *= scale
    longest = max(lengths, default=0)
    angles_PJ = torch.arange(longest + more)[:, None] * 10000 ** (-torch.arange(0, K, 2) / K)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    tables = guarded(angles_PJ.cos(), pages=200), guarded(angles_PJ.sin(), pages=200)
    return Given(guarded(qkv.to(dtype), pages=200), *tables, cu_seqlens, longest)


def _gold(given: Given) -> tuple[Doubles, Doubles]:
    """fp64 result (T, H, K), and how far from it one may be.

    With u one rounding of an operand and e eps of fp32: a score, of sizes s = |R q| . |R k| / sqrt(K), is off by
    d = (2 u + 4 e) s, its weight by the factor exp(d + mean of d), and by u + 4 e in what follows. The result is
    rounded to its dtype. The product is at a tenth of it: roundings do not all go one way.
    """
    qkv, cos, sin = (each.double().cpu().numpy() for each in given[:3])
    T, heads, K = qkv.shape
    H = heads // 3
    gold, bound = np.zeros((T, H, K)), np.zeros((T, H, K))
    u = half_ulp(given.qkv.dtype) if given.qkv.dtype != torch.float32 else 0.0
    e = torch.finfo(torch.float32).eps
    ends = given.cu_seqlens.cpu().tolist()
    for begin, end in itertools.pairwise(ends):
        L = end - begin
        c, s = cos[:L, None], sin[:L, None]
        own = qkv[begin:end]
        first, second = np.split(own[:, : 2 * H], 2, axis=-1)
        turned = np.concatenate((first * c - second * s, second * c + first * s), axis=-1)
        sizes = np.concatenate(
            [np.abs(first * c) + np.abs(second * s), np.abs(second * c) + np.abs(first * s)], axis=-1
        )
        scores = np.einsum("qhk,uhk->hqu", turned[:, :H], turned[:, H:]) / math.sqrt(K)
        size = np.einsum("qhk,uhk->hqu", sizes[:, :H], sizes[:, H:]) / math.sqrt(K)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) if L else scores
        weights /= weights.sum(-1, keepdims=True)
        off = (2 * u + 4 * e) * size
        off = np.expm1(off + (weights * off).sum(-1, keepdims=True)) + u + 4 * e
        gold[begin:end] = np.einsum("hqu,uhk->qhk", weights, own[:, 2 * H :])
        bound[begin:end] = np.einsum("hqu,uhk->qhk", weights * off, np.abs(own[:, 2 * H :]))
    return gold, bound + half_ulp(given.qkv.dtype) * np.abs(gold) + torch.finfo(given.qkv.dtype).tiny


def _failure(given: Given, *, twin: ModuleType = module) -> str | None:
    """The worst element, if one lies further from gold than rounding explains."""
    with poisoned_memory():
        got = twin.rotary_attention(*given)
    gold, bound = _gold(given)
    found = got.double().cpu().numpy()
    if found.shape != gold.shape or got.dtype != given.qkv.dtype:
        return f"{got.dtype} {found.shape}"
    excess = np.nan_to_num(np.abs(found - gold) - bound, nan=np.inf)
    if excess.size and excess.max() > 0:
        place = np.unravel_index(int(excess.argmax()), gold.shape)
        return f"{place}: got {found[place]:.9g}, gold {gold[place]:.9g}, bound {bound[place]:.3g}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [2, 8, *WIDTHS])
def test_every_head_width(K: int, dtype: torch.dtype) -> None:
    assert _failure(_given((1, 0, 37, 70, 2), 2, K, dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [(1,), (0, 0, 3), (31, 32, 33), (63, 64, 65), (127, 128, 129), (4, 300, 1, 0), (0,)],
    ids=str,
)
def test_lengths_around_the_tiles(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    assert _failure(_given(lengths, 3, 20, dtype)) is None


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_scores_of_any_size(scale: float) -> None:
    """At 30 scores reach some thousands, far beyond what exp can hold."""
    given = _given((5, 70, 33), 2, 24, torch.float32, scale=scale)
    assert _failure(given) is None
    narrow = module.rotary_attention(given.qkv.bfloat16(), *given[1:])
    assert narrow.isfinite().all()


def test_rising_scores_do_not_overflow() -> None:
    """The maximum rises and falls from tile to tile by hundreds: whatever fades must not grow."""
    given = _given((160,), 1, 16, torch.float32)
    given.qkv[:, 1] *= (1 + torch.arange(160, device=DEVICE) % 50)[:, None] / 3
    given.qkv[:, 0] *= 30
    assert _failure(given) is None


def test_no_sequences() -> None:
    given = _given((), 2, 16, torch.float32)
    assert module.rotary_attention(*given).shape == (0, 2, 16)


def test_neighbours_leave_no_trace() -> None:
    """Bit for bit the same beside sequences of NaN and of infinities."""
    given = _given((40, 33, 70), 2, 20, torch.float32)
    together = module.rotary_attention(*given)
    given.qkv[:40], given.qkv[73:] = torch.nan, torch.inf
    alone = module.rotary_attention(*given)
    assert torch.equal(together[40:73], alone[40:73])
    assert not alone[:40].isfinite().any()


def test_a_bound_for_the_longest_is_enough() -> None:
    """As in a captured graph: more tiles than needed, longer tables, empty sequences behind; the same bits."""
    given = _given((40, 33, 7), 2, 20, torch.float32)
    exact = module.rotary_attention(*given)
    padded = torch.cat((given.cu_seqlens, given.cu_seqlens[-1:].expand(3)))
    longer = _given((40, 33, 7), 2, 20, torch.float32, more=160)
    loose = module.rotary_attention(longer.qkv, longer.cos_PJ, longer.sin_PJ, padded, 200)
    assert torch.equal(exact, loose)


def test_heads_and_sequences_keep_their_places() -> None:
    """Reordered sequences and heads give reordered results."""
    lengths, H, K = (3, 40, 9), 4, 16
    given = _given(lengths, H, K, torch.float32)
    pieces, order, heads = torch.split(given.qkv, lengths), (2, 0, 1), torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved = torch.cat([pieces[place] for place in order]).view(-1, 3, H, K)[:, :, heads].reshape(-1, 3 * H, K)
    ends = np.cumsum([lengths[place] for place in order])
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    right = torch.split(module.rotary_attention(*given), lengths)
    got = module.rotary_attention(moved, given.cos_PJ, given.sin_PJ, cu_seqlens, given.longest)
    assert torch.equal(got, torch.cat([right[place] for place in order])[:, heads])


@for_mutants
@pytest.mark.parametrize("name", ROTARY_ATTENTION_MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path) -> None:
    mutant = load_mutant("kernels.gpu.rotary_attention", ROTARY_ATTENTION_MUTANTS[name], tmp_path)
    cases = [_given((5, 70), 2, 20, torch.float32), _given((33, 65), 2, 16, torch.float32, scale=30.0)]
    assert any(_failure(given, twin=mutant) for given in cases), f"nothing notices: {name}"


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="4.3 GB of tokens: a GPU's work")
def test_offsets_beyond_32_bits() -> None:
    """The last of so many tokens that their numbers do not fit into 32 bits, as if it stood first."""
    H, K, L = 20, 64, 1000
    T = 2**31 // (3 * H * K) + 3 * L
    qkv = torch.zeros((T, 3 * H, K), dtype=torch.bfloat16, device=DEVICE)
    given = _given((L,), H, K, torch.bfloat16)
    qkv[-L:] = given.qkv
    lengths = [*([L] * ((T - L) // L)), (T - L) % L, L]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    got = module.rotary_attention(qkv, given.cos_PJ, given.sin_PJ, cu_seqlens, L)
    assert torch.equal(got[-L:], module.rotary_attention(*given))
    assert not got[:-L].any()


@pytest.mark.parametrize(
    ("place", "broken", "problem"),
    [
        (0, lambda qkv: qkv[:, :5], "qkv is torch.float32 (9, 5, 16), expected contiguous (T, 3 H, K)"),
        (0, lambda qkv: qkv.double(), "qkv is torch.float64 (9, 6, 16), expected contiguous (T, 3 H, K) in one of"),
        (0, lambda qkv: qkv[:, :, :8], "qkv is torch.float32 (9, 6, 8), expected contiguous"),
        (0, lambda qkv: qkv.repeat(1, 1, 9), "the head width is 144; allowed: even, 2 to 128"),
        (0, lambda qkv: qkv[:, :, :15].contiguous(), "the head width is 15; allowed: even"),
        (1, lambda cos: cos.half(), "cos is torch.float16 (6, 8), expected contiguous torch.float32 (P, 8)"),
        (2, lambda sin: sin[:5], "sin is torch.float32 (5, 8), expected contiguous torch.float32 (P, 8)"),
        (3, lambda cu: cu.long(), "cu_seqlens is torch.int64 (3,), expected contiguous torch.int32 (B + 1,)"),
        (4, lambda longest: 7, "the longest sequence has 7 tokens, the tables of cosines and sines 6 rows"),
    ],
)
def test_what_it_cannot_take_is_shown(place: int, broken: Any, problem: str) -> None:
    given: list[Any] = list(_given((3, 6), 2, 16, torch.float32))
    given[place] = broken(given[place])
    with pytest.raises(ValueError, match=re.escape(problem)):
        module.rotary_attention(*given)
