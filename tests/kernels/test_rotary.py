"""rotary: every element against complex multiplication in fp64, fair-esm's table bit for bit, gradients, errors.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from protnest.kernels.rotary import apply_rotary, rotary_table

from support.mutants import ROTARY_MUTANTS

HEAD_WIDTHS = [16, 20, 24, 32, 64, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

each_head_width = pytest.mark.parametrize("K", HEAD_WIDTHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Two sequences, one token alone, and one token as far as the longest UniProt protein reaches.
POSITIONS = torch.tensor([*range(40), 0, *range(1024), 35_213])


def _hostile(T: int, H: int, K: int, dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Mean not zero, scales from 1e-3 to 10 over the heads, a constant row; NaN all around in memory."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.full((T + 2, H + 2, K), torch.nan, dtype=dtype)
    scales = torch.logspace(-3, 1, H)[:, None]
    values = (torch.randn((T, H, K), generator=generator) + 0.3) * scales
    if T:
        values[T // 2] = 0.7
    around[1:-1, 1:-1] = values.to(dtype)
    return around[1:-1, 1:-1]


def _turn(x_THK: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    return apply_rotary(x_THK, *rotary_table(positions_T, x_THK.shape[-1], x_THK.dtype))


def _angles(positions_T: torch.Tensor, K: int) -> torch.Tensor:
    """fp64 (T, 1, K / 2), from the published fp32 frequencies."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, K, 2, dtype=torch.float32) / K)
    return positions_T.double()[:, None, None] * frequencies.double()


def _gold_and_bound(x_THK: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x_THK.double().chunk(2, dim=-1)
    angles = _angles(positions_T, x_THK.shape[-1])
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    terms = torch.cat((first.abs() + second.abs(),) * 2, dim=-1)
    # The table, the two products and the sum are each rounded to the dtype of x: half an eps each. An angle is rounded
    # to fp32 (fp64) before, by half an eps of its own size, and its cosine or sine moves by as much.
    exact = torch.finfo(torch.float64 if x_THK.dtype == torch.float64 else torch.float32).eps
    off_by = 2 * torch.finfo(x_THK.dtype).eps + exact * (1 + angles.abs().repeat(1, 1, 2))
    # Below its normal numbers fp16 steps by its smallest.
    return torch.cat((turned.real, turned.imag), dim=-1), terms * off_by + 2 * torch.finfo(x_THK.dtype).smallest_normal


def _failure(got: torch.Tensor, x_THK: torch.Tensor, positions_T: torch.Tensor) -> str | None:
    gold, bound = _gold_and_bound(x_THK, positions_T)
    assert (got.shape, got.dtype) == (x_THK.shape, x_THK.dtype)
    excess = ((got.double() - gold).abs() - bound).nan_to_num(nan=torch.inf)
    if not excess.numel() or excess.max() <= 0:
        return None
    worst = np.unravel_index(int(excess.argmax()), gold.shape)
    return f"{worst}: got {got[worst]:.9g}, gold {gold[worst]:.9g}, bound {bound[worst]:.3g}"


@each_dtype
@each_head_width
def test_rotary(K: int, dtype: torch.dtype) -> None:
    x_THK = _hostile(len(POSITIONS), 3, K, dtype)
    assert _failure(_turn(x_THK, POSITIONS), x_THK, POSITIONS) is None


@each_dtype
@pytest.mark.parametrize(
    "positions", [[], [0], [1021], [7, 3, 3, 0]], ids=["no token", "one token", "one far", "not in order"]
)
def test_rotary_of_few_tokens(positions: list[int], dtype: torch.dtype) -> None:
    positions_T = torch.tensor(positions, dtype=torch.int64)
    x_THK = _hostile(len(positions), 2, 20, dtype)
    assert _failure(_turn(x_THK, positions_T), x_THK, positions_T) is None


@pytest.mark.parametrize("name", ROTARY_MUTANTS)
def test_rotary_bound_kills_mutant(name: str) -> None:
    positions_T = torch.tensor([*range(30), 0, *range(50)])
    x_THK = _hostile(len(positions_T), 3, 24, torch.float32)
    assert _failure(_turn(x_THK, positions_T), x_THK, positions_T) is None
    assert _failure(ROTARY_MUTANTS[name](x_THK, positions_T), x_THK, positions_T) is not None


@each_head_width
def test_table_is_that_of_fair_esm_bit_for_bit(K: int) -> None:
    rotary_embedding = pytest.importorskip("esm.rotary_embedding")
    cos, sin = rotary_embedding.RotaryEmbedding(K)._update_cos_sin_tables(torch.zeros(1, 2048, K))
    ours = rotary_table(torch.arange(2048), K, torch.float32)
    for table, theirs in zip(ours, (cos, sin), strict=True):
        assert (table.shape, table.dtype) == ((2048, 1, K // 2), torch.float32)
        assert torch.equal(table[:, 0], theirs[0, :, : K // 2])


@each_head_width
def test_frequencies_are_the_published_ones(K: int) -> None:
    # At position 1 the angle is the frequency itself.
    cos, sin = rotary_table(torch.ones(1, dtype=torch.int64), K, torch.float64)
    exact = 10000.0 ** (-np.arange(0, K, 2) / K)
    # A power in fp32 is off by a few ulps: 4.7 half-ulps at K = 20 when written.
    np.testing.assert_allclose(torch.atan2(sin, cos)[0, 0].numpy(), exact, rtol=5 * np.finfo(np.float32).eps)


@each_dtype
def test_position_zero_turns_nothing(dtype: torch.dtype) -> None:
    x_THK = _hostile(5, 2, 16, dtype)
    assert torch.equal(_turn(x_THK, torch.zeros(5, dtype=torch.int64)), x_THK)


def test_scores_depend_on_distance_alone() -> None:
    q_THK, k_THK = (_hostile(30, 2, 24, torch.float64, seed=seed) for seed in (1, 2))

    def scores(positions_T: torch.Tensor) -> torch.Tensor:
        return torch.einsum("qhk,lhk->hql", _turn(q_THK, positions_T), _turn(k_THK, positions_T))

    torch.testing.assert_close(scores(torch.arange(30)), scores(torch.arange(30) + 500), rtol=0, atol=1e-11)


def test_leaves_its_inputs_alone() -> None:
    x_THK = _hostile(4, 2, 16, torch.float32)
    positions_T = torch.arange(4)
    cos, sin = rotary_table(positions_T, 16, torch.float32)
    before = [tensor.clone() for tensor in (x_THK, cos, sin, positions_T)]
    out = apply_rotary(x_THK, cos, sin)
    for tensor, copy in zip((x_THK, cos, sin, positions_T), before, strict=True):
        assert torch.equal(tensor, copy)
    assert out.untyped_storage().data_ptr() != x_THK.untyped_storage().data_ptr()


def test_gradients() -> None:
    x_THK = _hostile(5, 2, 6, torch.float64).clone().requires_grad_()
    positions_T = torch.tensor([0, 1, 2, 0, 900])
    check: Callable[..., bool] = torch.autograd.gradcheck
    assert check(lambda x: _turn(x, positions_T), (x_THK,))


@each_dtype
def test_gradient_is_the_turn_backwards(dtype: torch.dtype) -> None:
    x_THK = _hostile(40, 2, 24, dtype).clone().requires_grad_()
    upstream_THK = _hostile(40, 2, 24, dtype, seed=1)
    torch.autograd.backward(_turn(x_THK, torch.arange(40)), upstream_THK)
    assert x_THK.grad is not None
    assert _failure(x_THK.grad, upstream_THK, -torch.arange(40)) is None


@pytest.mark.parametrize(
    ("x_shape", "head_width", "tokens"),
    [
        pytest.param((5, 2, 16), 32, 5, id="table of another head width"),
        pytest.param((5, 2, 16), 16, 6, id="table of more tokens"),
        pytest.param((5, 2, 16), 16, 1, id="table of one token"),
        pytest.param((5, 2, 15), 15, 5, id="odd head width"),
        pytest.param((5, 32), 32, 5, id="no axis of heads"),
        pytest.param((5, 2, 3, 32), 32, 5, id="an axis too many"),
    ],
)
def test_shapes_that_disagree(x_shape: tuple[int, ...], head_width: int, tokens: int) -> None:
    cos, sin = rotary_table(torch.arange(tokens), head_width, torch.float32)
    named = re.escape(f"x has shape {x_shape}, the table {tuple(cos.shape)}: expected (T, H, K) and (T, 1, K / 2)")
    with pytest.raises(ValueError, match=named):
        apply_rotary(torch.zeros(x_shape), cos, sin)
