"""The embedder on a tiny random encoder: order, windows, batches of any size, and what is refused.

Shapes: B proteins, L residues of one, D width. W residues in a window.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from protnest.engine import Embedder, Encoder, InputError
from protnest.engine.config import EncoderConfig
from protnest.engine.packing import pack
from protnest.engine.pooling import POOLS
from protnest.engine.windows import residues_run

from support.tiny import random_proteins

Floats = npt.NDArray[np.float32]

W = 20
D = 32
CONFIG = EncoderConfig(layers=2, width=D, heads=2, feedforward=64, max_residues=W)
TOLERANCE = 1e-5
"""The final LayerNorm brings values to about 1, so this is some 80 eps of fp32, for two layers and a mean."""

LONG = random_proteins(1, seed=9, longest=1)[0] + "".join(random_proteins(12, seed=8, longest=30))
PROTEINS = [
    *random_proteins(25, seed=1, longest=W),
    *(LONG[: W + more] for more in (0, 1, 9, 10, 11, W, W + 1, 3 * W)),
    *random_proteins(5, seed=2, longest=3 * W),
    "M",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A second thread gains nothing on tensors this small, and on a busy machine its waiting costs tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        # Norms and biases are random too: with ones and zeros, leaving them out would not show.
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    return encoder


def _vectors(embedder: Embedder, sequences: Sequence[str]) -> Floats:
    rows = embedder.embed(sequences)
    assert isinstance(rows, np.ndarray)
    assert rows.dtype == np.float32
    assert rows.shape == (len(sequences), D)
    return rows


def _residues(embedder: Embedder, sequences: Sequence[str]) -> list[Floats]:
    rows = embedder.embed(sequences)
    assert isinstance(rows, list)
    assert all(row_LD.dtype == np.float32 for row_LD in rows)
    return rows


def _assert_close(got: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=tolerance)


def _literal_residues(sequence: str) -> npt.NDArray[np.float64]:
    """The documented blending, each window a run of its own."""
    if len(sequence) <= W:
        return _encoder().encode([sequence])[0].astype(np.float64)
    begins = []
    begin = 0
    while begin + W < len(sequence):
        begins.append(begin)
        begin += W // 2
    above, below = np.zeros((len(sequence), D)), np.zeros(len(sequence))
    for begin in (*begins, len(sequence) - W):
        (window_LD,) = _encoder().encode([sequence[begin : begin + W]])
        for place in range(W):
            weight = min(place + 1, W - place)
            above[begin + place] += weight * window_LD[place].astype(np.float64)
            below[begin + place] += weight
    return above / below[:, None]


def _literal(sequence: str, pool: str) -> npt.NDArray[np.float64]:
    if pool == "bos":
        with torch.inference_mode():
            first_D: torch.Tensor = _encoder()(pack([sequence[:W]])).hidden_TD[0]
        return np.asarray(first_D, dtype=np.float64)
    residues_LD = _literal_residues(sequence)
    return residues_LD if pool == "residue" else residues_LD.mean(axis=0) if pool == "mean" else residues_LD.max(axis=0)


# What comes out


@pytest.mark.parametrize("pool", POOLS)
def test_every_protein_gets_the_documented_vector(pool: str) -> None:
    rows = Embedder(_encoder(), pool=pool, max_tokens=64).embed(PROTEINS)
    assert len(rows) == len(PROTEINS)
    for sequence, row in zip(PROTEINS, rows, strict=True):
        _assert_close(row, _literal(sequence, pool))


def test_proteins_that_fit_are_as_encode_gives_them() -> None:
    short = [sequence for sequence in PROTEINS if len(sequence) <= W]
    rows = _residues(Embedder(_encoder(), pool="residue"), short)
    for sequence, row_LD, encoded_LD in zip(short, rows, _encoder().encode(short), strict=True):
        assert row_LD.shape == (len(sequence), D)
        _assert_close(row_LD, encoded_LD)


def test_order_and_duplicates_are_kept() -> None:
    rng = np.random.default_rng(0)
    order = rng.integers(len(PROTEINS), size=60).tolist()
    embedder = Embedder(_encoder(), max_tokens=50)
    alone = np.concatenate([_vectors(embedder, [sequence]) for sequence in PROTEINS])
    # Proteins of this size differ by far more than the tolerance, so a row in another's place would show.
    gaps = np.abs(alone[:, None] - alone[None]).max(axis=-1) + np.eye(len(PROTEINS))
    assert gaps.min() > 100 * TOLERANCE
    _assert_close(_vectors(embedder, [PROTEINS[row] for row in order]), alone[order])


@pytest.mark.parametrize("pool", POOLS)
def test_nothing_in_nothing_out(pool: str) -> None:
    rows = Embedder(_encoder(), pool=pool).embed([])
    if pool == "residue":
        assert rows == []
    else:
        assert isinstance(rows, np.ndarray)
        assert rows.shape == (0, D)
        assert rows.dtype == np.float32
    assert _encoder().encode([]) == []


@pytest.mark.parametrize("max_tokens", [1, 7, W + 1, W + 2, W + 3, 64, 100_000])
@pytest.mark.parametrize("pool", POOLS)
def test_any_token_budget_gives_the_same_answer(pool: str, max_tokens: int) -> None:
    """Also one below the longest window: what does not fit has a batch of its own."""
    expected = Embedder(_encoder(), pool=pool).embed(PROTEINS)
    rows = Embedder(_encoder(), pool=pool, max_tokens=max_tokens).embed(PROTEINS)
    for row, row_expected in zip(rows, expected, strict=True):
        _assert_close(row, row_expected)


@pytest.mark.parametrize("pool", POOLS)
def test_a_protein_longer_than_the_budget_runs_whole(pool: str) -> None:
    sequences = ["MKT", LONG[:90], "ACD"]
    expected = Embedder(_encoder(), pool=pool, long="full").embed(sequences)
    rows = Embedder(_encoder(), pool=pool, long="full", max_tokens=30).embed(sequences)
    for row, row_expected in zip(rows, expected, strict=True):
        _assert_close(row, row_expected)


def test_full_runs_a_long_protein_in_one_go() -> None:
    rows = _residues(Embedder(_encoder(), pool="residue", long="full"), PROTEINS)
    for row_LD, whole_LD in zip(rows, _encoder().encode(PROTEINS), strict=True):
        _assert_close(row_LD, whole_LD)
    means = _vectors(Embedder(_encoder(), long="full"), PROTEINS)
    _assert_close(means, [row_LD.mean(axis=0, dtype=np.float64) for row_LD in rows])
    windowed = _vectors(Embedder(_encoder()), PROTEINS)
    long = np.array([len(sequence) > W for sequence in PROTEINS])
    assert (np.abs(windowed - means).max(axis=1)[long] > 100 * TOLERANCE).all()
    _assert_close(windowed[~long], means[~long])


@pytest.mark.parametrize("pool", POOLS)
def test_truncate_keeps_the_first_residues(pool: str) -> None:
    rows = Embedder(_encoder(), pool=pool, long="truncate").embed(PROTEINS)
    expected = Embedder(_encoder(), pool=pool, long="error").embed([sequence[:W] for sequence in PROTEINS])
    for row, row_expected in zip(rows, expected, strict=True):
        assert row.shape == row_expected.shape
        _assert_close(row, row_expected)


def test_error_policy_names_the_sequence() -> None:
    embedder = Embedder(_encoder(), long="error")
    _vectors(embedder, [LONG[:W]])
    with pytest.raises(InputError, match="sequence 2: 21 residues, but the model was trained on at most 20"):
        embedder.embed(["MKT", "ACD", LONG[: W + 1]])


@pytest.mark.parametrize("pool", POOLS)
def test_low_precision_encoder_gives_fp32(pool: str) -> None:
    encoder = copy.deepcopy(_encoder()).to(torch.bfloat16)
    embedder = Embedder(encoder, pool=pool)
    assert embedder.precision == "bf16"
    sequences = PROTEINS[-9:]
    for sequence, row in zip(sequences, embedder.embed(sequences), strict=True):
        assert row.dtype == np.float32
        # bf16 has 8 bits: values of up to 4 are off by 0.02 in the last rounding alone.
        _assert_close(row, _literal(sequence, pool), tolerance=0.2)


def test_low_precision_mean_is_not_rounded_to_it() -> None:
    # One residue is its own mean, and as the layer left it.
    proteins = [protein for protein in PROTEINS if len(protein) > 1]
    means = _vectors(Embedder(copy.deepcopy(_encoder()).to(torch.bfloat16)), proteins)
    rounded = torch.from_numpy(means).bfloat16().float().numpy()
    assert (means != rounded).mean() > 0.9


# What goes in


def test_untidy_sequences_are_accepted() -> None:
    tidy = ["MKTAYIAKQR", "ACDEFGHIKL", LONG[:33]]
    untidy = ["mktayIAKQR*", " ACDEF GHIKL\n", LONG[:33].lower() + " **"]
    embedder = Embedder(_encoder(), max_tokens=40)
    np.testing.assert_array_equal(_vectors(embedder, untidy), _vectors(embedder, tidy))
    np.testing.assert_array_equal(_vectors(embedder, tuple(untidy)), _vectors(embedder, tidy))


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("MK1T", "'1' at residue 3 is not a residue"),
        ("MK*T", r"'\*' at residue 3 is not a residue"),
        ("MKÄ", "'Ä' at residue 3 is not a residue"),
        ("", "the sequence is empty"),
        (" **", "the sequence is empty"),
    ],
)
def test_bad_sequences_are_named_by_their_number(bad: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"^sequence 2: {problem}"):
        Embedder(_encoder()).embed(["MKT", "ACD", bad, "MKT"])


@pytest.mark.parametrize("call", ["embed", "embed_clean", "encode"])
def test_a_plain_string_is_refused(call: str) -> None:
    method = _encoder().encode if call == "encode" else getattr(Embedder(_encoder()), call)
    with pytest.raises((TypeError, ValueError), match=r"list|sequence"):
        method("MKT")


@pytest.mark.parametrize("item", [None, 5, b"MKT"])
def test_items_that_are_no_strings_are_named(item: object) -> None:
    with pytest.raises((TypeError, ValueError), match="sequence"):
        Embedder(_encoder()).embed(["MKT", item])  # type: ignore[list-item]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="pool is 'sum'; allowed: mean, max, bos, residue"):
        Embedder(_encoder(), pool="sum")
    with pytest.raises(ValueError, match="long is 'cut'; allowed: window, full, truncate, error"):
        Embedder(_encoder(), long="cut")
    for max_tokens in (0, -1):
        with pytest.raises(ValueError, match=f"max_tokens must be positive, got {max_tokens}"):
            Embedder(_encoder(), max_tokens=max_tokens)


# What it says of itself


@pytest.mark.parametrize("long", ["window", "full", "truncate"])
@pytest.mark.parametrize("pool", POOLS)
def test_progress_adds_up_to_the_residues_run(pool: str, long: str) -> None:
    reports: list[int] = []
    rows = Embedder(_encoder(), pool=pool, long=long, max_tokens=50).embed(PROTEINS, after_batch=reports.append)
    assert len(rows) == len(PROTEINS)
    assert sum(reports) == sum(residues_run(len(sequence), max_residues=W, long=long) for sequence in PROTEINS)
    assert len(reports) > 5
    assert all(0 < residues <= 50 or long == "full" for residues in reports)


def test_batches_keep_to_the_budget() -> None:
    encoder = copy.deepcopy(_encoder())
    tokens: list[int] = []
    encoder.register_forward_pre_hook(lambda module, given: tokens.append(given[0].tokens_T.numel()))
    embedder = Embedder(encoder, max_tokens=64)
    embedder.embed(PROTEINS)
    assert max(tokens) <= 64
    windows = sum(residues_run(len(s), max_residues=W, long="window") // W for s in PROTEINS if len(s) > W)
    run = sum(len(s) + 2 for s in PROTEINS if len(s) <= W) + windows * (W + 2)
    assert sum(tokens) == run
    assert len(tokens) <= 1.5 * run / 64 + 1


def test_no_gradients_are_kept() -> None:
    encoder = copy.deepcopy(_encoder()).requires_grad_(True)
    rows = Embedder(encoder, pool="residue").embed(["MKT", LONG[:33]])
    assert all(isinstance(row, np.ndarray) and row.flags.writeable for row in rows)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_attributes() -> None:
    embedder = Embedder(_encoder())
    assert embedder.dims == (D,)
    assert embedder.max_residues == W
    assert embedder.precision == "fp32"
    assert (embedder.pool, embedder.long, embedder.max_tokens) == ("mean", "window", 4096)
