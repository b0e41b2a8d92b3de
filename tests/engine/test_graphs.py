"""Which graph a batch runs in, and when none: on the CPU, with a stand-in for what is captured.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protnest.benchmarks.gpu_suite import mixed_batch
from protnest.engine import Embedder, graphs
from protnest.engine.config import PUBLISHED
from protnest.engine.graphs import (
    MOST_TOKENS,
    SWITCH,
    Bucket,
    GraphedEncoder,
    bucket_of,
    graphed,
    pad_batch,
    pad_lengths,
    round_tokens,
    why_not_graphs,
)
from protnest.engine.packing import PackedBatch, pack

from support.families import tiny_family

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = PUBLISHED["esm2_t6_8M_UR50D"]

# Buckets


@given(st.integers(1, MOST_TOKENS))
def test_tokens_are_rounded_up_by_a_quarter_at_most(tokens: int) -> None:
    rounded = round_tokens(tokens)
    assert rounded >= max(tokens, 256)
    assert rounded == 256 or rounded < 1.25 * tokens
    assert rounded % 32 == 0
    assert round_tokens(rounded) == rounded


def test_buckets_are_few() -> None:
    assert len({round_tokens(tokens) for tokens in range(1, MOST_TOKENS + 1)}) == 25
    assert round_tokens(MOST_TOKENS) == MOST_TOKENS


@given(st.lists(st.integers(0, 700), max_size=60))
def test_every_batch_fits_its_bucket(lengths: list[int]) -> None:
    bucket = bucket_of(lengths)
    if not 0 < sum(lengths) <= MOST_TOKENS:
        assert bucket is None
        return
    assert bucket is not None
    padded = pad_lengths(lengths, bucket)
    assert padded[: len(lengths)] == tuple(lengths)
    assert len(padded) == bucket.sequences
    assert sum(padded) == bucket.tokens
    assert max(padded) <= bucket.longest
    # Empty ones stand behind, since `cu_seqlens` ends with the number of tokens.
    extra = [length > 0 for length in padded[len(lengths) :]]
    assert extra == sorted(extra, reverse=True)
    # The lengths for which launches are made: as long as any, and as many.
    made_for = pad_lengths((), bucket)
    assert (max(made_for), sum(made_for), len(made_for)) == (bucket.longest, bucket.tokens, bucket.sequences)


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ((3,), Bucket(256, 8, 128)),
        ((256,), Bucket(256, 8, 256)),
        ((1100,), Bucket(1280, 8, 1280)),
        ((130,) * 40, Bucket(6144, 64, 256)),
        ((MOST_TOKENS,), Bucket(MOST_TOKENS, 8, MOST_TOKENS)),
        ((MOST_TOKENS, 1), None),
        ((), None),
    ],
)
def test_bucket(lengths: tuple[int, ...], bucket: Bucket | None) -> None:
    assert bucket_of(lengths) == bucket


@pytest.mark.parametrize("lengths", [(257,), (129, 3), (3,) * 9])
def test_what_does_not_fit_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit into Bucket"):
        pad_lengths(lengths, Bucket(256, 8, 128))


def test_a_padded_batch_gives_the_same_states() -> None:
    """Masks, whose share scales a sequence's embedding, included; what pads it is finite."""
    encoder, lengths = tiny_family()[0], (1, 2, 7, 33, 130, 60)
    batch = mixed_batch(seed=2, lengths=lengths)
    bucket = bucket_of(batch.lengths_B)
    assert bucket is not None
    padded = pad_batch(batch, bucket)
    begins = padded.cu_seqlens.tolist()
    assert padded.tokens_T.dtype == batch.tokens_T.dtype
    assert begins == [0, *itertools.accumulate(padded.lengths_B)]
    right_TD, got_TD = encoder.stream(batch), encoder.stream(padded)
    assert len(got_TD) == bucket.tokens
    assert got_TD.isfinite().all()
    torch.testing.assert_close(got_TD[: len(right_TD)], right_TD, rtol=1e-5, atol=1e-5)


# When there are none


@pytest.mark.parametrize(
    ("name", "device", "wanted", "switch", "reason"),
    [
        ("esm2_t6_8M_UR50D", CUDA, True, None, None),
        ("esm2_t30_150M_UR50D", CUDA, True, "1", None),
        ("esm2_t33_650M_UR50D", CUDA, True, None, "the model's width is 1280, and they pay up to 640"),
        ("esm2_t6_8M_UR50D", CPU, True, None, "the model is on cpu"),
        ("esm2_t6_8M_UR50D", CUDA, False, None, "the caller wants none"),
        ("esm2_t6_8M_UR50D", CUDA, True, "0", "PROTNEST_CUDA_GRAPHS is 0"),
    ],
)
def test_reasons(
    name: str, device: torch.device, wanted: bool, switch: str | None, reason: str | None, monkeypatch: Any
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(SWITCH, switch)
    monkeypatch.setattr(graphs, "why_not_triton", lambda device: None)
    assert why_not_graphs(PUBLISHED[name], device, wanted=wanted) == reason


def test_no_graphs_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "why_not_triton", lambda device: "triton is not installed")
    assert why_not_graphs(SMALL, CUDA) == "triton is not installed"


def test_on_a_cpu_the_encoder_itself_runs(caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_family()[0]
    with caplog.at_level(logging.INFO, logger="protnest.engine.graphs"):
        assert graphed(encoder) is encoder
        assert Embedder(encoder)._runner(0) is encoder
    assert not caplog.messages


# At work, with a stand-in for the graph


class _Standin:
    """Runs eagerly what a graph would replay, and counts."""

    made: list[Bucket]
    replays: list[int]
    off_by = 1.0

    def __init__(self, encoder: Any, bucket: Bucket, pool: object) -> None:
        self.made.append(bucket)
        self._encoder = encoder

    def replay(self, batch: PackedBatch) -> torch.Tensor:
        self.replays.append(sum(length > 0 for length in batch.lengths_B))
        stream_TD: torch.Tensor = self._encoder.stream(batch)
        return stream_TD * self.off_by


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GraphedEncoder:
    monkeypatch.setattr(graphs, "_Graph", _Standin)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(_Standin, "made", [], raising=False)
    monkeypatch.setattr(_Standin, "replays", [], raising=False)
    return GraphedEncoder(tiny_family()[0])


def _run(runner: GraphedEncoder, *sequences: str) -> None:
    batch = pack(sequences)
    with torch.inference_mode():
        assert torch.allclose(runner.stream(batch), runner.encoder.stream(batch), atol=1e-6)
        assert torch.allclose(runner(batch).hidden_TD, runner.encoder(batch).hidden_TD, atol=1e-6)


def test_a_bucket_is_captured_at_its_second_batch(runner: GraphedEncoder) -> None:
    _run(runner, "MKT", "MKTAY")
    # Eager first, then captured, held against the eager run, and replayed. Sequences that pad it are two.
    assert (_Standin.made, _Standin.replays) == ([Bucket(256, 8, 128)], [4, 4])
    _run(runner, "MKTAYIAKQR")
    assert (len(_Standin.made), _Standin.replays[2:]) == (1, [3, 3])
    _run(runner, "M" * 300)
    assert _Standin.made[1:] == [Bucket(320, 8, 320)]


def test_bits_do_not_depend_on_what_ran_before(runner: GraphedEncoder) -> None:
    """First eager, then replayed, then eager again: always the bucket's shapes."""
    batch, shapes, real = pack(["MKT", "MKTAY"]), [], runner.encoder.stream

    def stream(given: PackedBatch) -> torch.Tensor:
        shapes.append(len(given.tokens_T))
        return real(given)

    runner.encoder.stream = stream  # type: ignore[method-assign]
    with torch.inference_mode():
        first = runner.stream(batch).clone()
        assert torch.equal(first, runner.stream(batch))
        runner.release()
        assert torch.equal(first, runner.stream(batch))
    assert set(shapes) == {256}


def test_gradients_run_eagerly(runner: GraphedEncoder) -> None:
    for _ in range(3):
        runner(pack(["MKT"]))
    assert not _Standin.made


def test_no_more_than_so_many_graphs(runner: GraphedEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    for length in (1, 300, 600, 1):
        _run(runner, "M" * length)
    assert len(_Standin.made) == 2


def test_an_encoder_that_has_moved_is_captured_anew(runner: GraphedEncoder) -> None:
    _run(runner, "MKT")
    runner.encoder.double()
    _run(runner, "MKT")
    assert len(_Standin.made) == 2


def test_after_release_everything_is_eager(runner: GraphedEncoder) -> None:
    _run(runner, "MKT")
    runner.release()
    before = len(_Standin.replays)
    _run(runner, "MKT")
    assert (len(_Standin.made), len(_Standin.replays)) == (1, before)


@pytest.mark.parametrize("wrong", ["far off", "no number", "cannot"])
def test_what_cannot_be_captured_runs_eagerly_and_says_why(
    wrong: str, runner: GraphedEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if wrong == "cannot":

        def refuse(*given: object) -> None:
            message = "operation not permitted when stream is capturing\nmore"
            raise RuntimeError(message)

        monkeypatch.setattr(graphs, "_Graph", refuse)
    monkeypatch.setattr(_Standin, "off_by", torch.nan if wrong == "no number" else 1.3)
    with caplog.at_level(logging.INFO, logger="protnest.engine.graphs"):
        for _ in range(3):
            _run(runner, "MKT", "MKTAY")
    (message,) = caplog.messages
    reason = {
        "far off": "a replay for Bucket(tokens=256, sequences=8, longest=128) is 0.3 of a token's norm away from",
        "no number": "a replay for Bucket(tokens=256, sequences=8, longest=128) is nan of a token's norm away from",
        "cannot": "operation not permitted when stream is capturing",
    }[wrong]
    assert message.startswith(f"tiny16 runs without CUDA graphs: {reason}")
    assert "more" not in message


def test_an_embedder_lets_go_of_graphs_when_memory_ends(runner: GraphedEncoder) -> None:
    embedder = Embedder(runner.encoder)
    embedder._graphed[0] = runner
    _run(runner, "MKT")
    limit, real = itertools.count(), runner.encoder._run

    def run(*given: Any) -> object:
        if next(limit) == 0:
            raise torch.OutOfMemoryError
        return real(*given)

    runner.encoder._run = run  # type: ignore[method-assign]
    assert len(embedder.embed(["MKT", "MKTA"])) == 2
    assert not runner._graphs
