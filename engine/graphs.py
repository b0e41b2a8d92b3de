"""CUDA graphs: small models on small batches, whose kernels are shorter than the host takes to launch them.

A graph replays one forward pass on fixed buffers. A batch is padded to a bucket of tokens, sequences and length with
sequences that nobody looks at; `cu_seqlens` lies in a buffer, and kernels leave at once where a sequence has no tiles.
A bucket is captured when it is met for the second time, and its first replay is held against the eager run: an
attention whose launches depend on lengths would be seen, and then all runs are eager, with the reason in the log.

Shapes: B sequences, T tokens of all of them, D width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels.hardware import why_not_triton
from .alphabet import EOS_ID
from .config import EncoderConfig
from .encoder import Encoder, EncoderOutput
from .exported_encoder import AnyEncoder, ExportedEncoder
from .packing import PackedBatch
from .transfer import to_device

_logger = logging.getLogger(__name__)
_explained: set[str] = set()

SWITCH = "PROTNEST_CUDA_GRAPHS"
"""Environment variable; 0 switches graphs off."""

# A layer of these widths at these tokens takes a GPU some 100 us, which is what its launches take the host.
WIDEST = 640
MOST_TOKENS = 16384
_FEWEST_TOKENS, _FEWEST_SEQUENCES, _SHORTEST = 256, 8, 128
# Each holds its output; what lies between is shared.
_MOST_GRAPHS = 32
# Of a token's norm: rounding stays below it in every precision, tokens of another sequence do not.
_MOST_ERROR = 0.1


@dataclass(frozen=True)
class Bucket:
    """What a graph is made for.

    Attributes:
        tokens: of a padded batch.
        sequences: with those that pad it, and empty ones.
        longest: tokens of the longest sequence at most.
    """

    tokens: int
    sequences: int
    longest: int


def _next_power(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def round_tokens(tokens: int) -> int:
    """The next of four steps to each power of two: a quarter of the tokens is padding at most."""
    step = _next_power(tokens, _FEWEST_TOKENS) // 8
    return max(_FEWEST_TOKENS, -(-tokens // step) * step)


def bucket_of(lengths_B: Sequence[int]) -> Bucket | None:
    """The bucket for sequences of so many tokens; None where there are no tokens, or more than graphs pay for."""
    total, longest = sum(lengths_B), max(lengths_B, default=0)
    if not 0 < total <= MOST_TOKENS:
        return None
    tokens = round_tokens(total)
    bound = min(tokens, _next_power(longest, _SHORTEST))
    padding = -(-(tokens - total) // bound)
    return Bucket(tokens, _next_power(len(lengths_B) + padding, _FEWEST_SEQUENCES), bound)


def pad_lengths(lengths_B: Sequence[int], bucket: Bucket) -> tuple[int, ...]:
    """The lengths with those that fill the bucket: `bucket.sequences` of them, adding up to `bucket.tokens`.

    Raises:
        ValueError: the sequences do not fit into the bucket.
    """
    left = bucket.tokens - sum(lengths_B)
    whole, rest = divmod(max(0, left), bucket.longest)
    padded = (*lengths_B, *([bucket.longest] * whole), *([rest] if rest else []))
    empty = bucket.sequences - len(padded)
    if left < 0 or empty < 0 or max(lengths_B, default=0) > bucket.longest:
        message = f"{len(lengths_B)} sequences, {sum(lengths_B)} tokens, do not fit into {bucket}"
        raise ValueError(message)
    return padded + (0,) * empty


def why_not_graphs(config: EncoderConfig, device: torch.device, *, wanted: bool = True) -> str | None:
    """Why a model's forward pass is not captured, in one line; None where it may be."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if not wanted:
        return "the caller wants none"
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if config.width > WIDEST:
        return f"the model's width is {config.width}, and they pay up to {WIDEST}"
    # Without Triton and units for bf16 attention may run sequence by sequence.
    return why_not_triton(device)


def pad_batch(batch: PackedBatch, bucket: Bucket) -> PackedBatch:
    """The batch with sequences of `<eos>` behind it that fill the bucket, on the same device. Nothing waits.

    Raises:
        ValueError: the batch does not fit into the bucket.
    """
    device, lengths_B = batch.tokens_T.device, pad_lengths(batch.lengths_B, bucket)
    extra = bucket.tokens - batch.tokens_T.shape[0]
    return PackedBatch(
        tokens_T=F.pad(batch.tokens_T, (0, extra), value=EOS_ID),
        cu_seqlens=to_device(torch.from_numpy(np.cumsum((0, *lengths_B)).astype(np.int32)), device),
        lengths_B=lengths_B,
        index_B=np.arange(bucket.sequences, dtype=np.int64),
    )


class _Graph:
    """One captured pass, with the buffers that it reads and writes."""

    def __init__(self, encoder: Encoder, bucket: Bucket, pool: Any) -> None:
        device = encoder.device
        nothing = torch.zeros(0, dtype=torch.int32, device=device)
        # The host's lengths are such that launches are made for the longest sequence of the bucket.
        self._static = pad_batch(
            PackedBatch(nothing, nothing, lengths_B=(), index_B=np.zeros(0, dtype=np.int64)), bucket
        )
        # Compiling, cuBLAS's workspaces and tables that are kept must not happen while capturing.
        warm_up, stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        warm_up.wait_stream(stream)
        with torch.cuda.stream(warm_up):
            encoder.stream(self._static)
        stream.wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._out_TD = encoder.stream(self._static)

    def replay(self, padded: PackedBatch) -> torch.Tensor:
        """The stream of a padded batch: the buffer itself, which the next replay overwrites."""
        self._static.tokens_T.copy_(padded.tokens_T)
        self._static.cu_seqlens.copy_(padded.cu_seqlens)
        self._graph.replay()
        return self._out_TD


class GraphedEncoder:
    """An encoder that replays a graph where it has one for the batch's bucket.

    Batches of up to `MOST_TOKENS` tokens run padded to their bucket also where there is no graph yet, or none any more:
    so a batch's bits do not depend on what ran before it, and a resumed library has those of an uninterrupted one.
    Results of `stream` are overwritten by the next run: they are to be used up before.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.config = encoder.config
        self._graphs: dict[Bucket, _Graph] = {}
        self._met: set[Bucket] = set()
        self._pool: Any = None
        self._tensors_at = encoder.tensors_at()
        self._given_up = False

    def __call__(self, batch: PackedBatch) -> EncoderOutput:
        """As the encoder's, without inner layers."""
        stream_TD = self._padded_stream(batch)
        if stream_TD is None:
            return self.encoder(batch)  # type: ignore[no-any-return]
        return EncoderOutput(self.encoder.final_norm(stream_TD))

    def stream(self, batch: PackedBatch) -> torch.Tensor:
        """As the encoder's."""
        stream_TD = self._padded_stream(batch)
        return self.encoder.stream(batch) if stream_TD is None else stream_TD

    def hidden(self, batch: PackedBatch, layer: int) -> torch.Tensor:
        """As the encoder's, without a graph: those that there are hold all layers."""
        return self.encoder.hidden(batch, layer)

    def release(self) -> None:
        """Lets go of all graphs and makes no more: their memory is needed."""
        self._graphs.clear()
        self._given_up = True

    def _padded_stream(self, batch: PackedBatch) -> torch.Tensor | None:
        """The stream of the batch, run in its bucket; None where it has none, or gradients are wanted."""
        bucket = None if torch.is_grad_enabled() else bucket_of(batch.lengths_B)
        if bucket is None:
            return None
        padded = pad_batch(batch.to(self.encoder.device), bucket)
        graph = self._find(bucket, padded)
        stream_TD = self.encoder.stream(padded) if graph is None else graph.replay(padded)
        return stream_TD[: batch.tokens_T.shape[0]]

    def _find(self, bucket: Bucket, padded: PackedBatch) -> _Graph | None:
        self._forget_stale()
        if bucket not in self._graphs:
            if self._given_up or bucket not in self._met or len(self._graphs) >= _MOST_GRAPHS:
                self._met.add(bucket)
                return None
            problem = self._capture(bucket, padded)
            if problem is not None:
                _logger.warning("%s runs without CUDA graphs: %s", self.encoder.name, problem)
                self.release()
                return None
        return self._graphs[bucket]

    def _forget_stale(self) -> None:
        """`encoder.to(...)`, or a longer protein, may have put other tensors in the place of those that graphs read."""
        if self._tensors_at != self.encoder.tensors_at():
            self._graphs.clear()
            self._tensors_at = self.encoder.tensors_at()

    def _capture(self, bucket: Bucket, padded: PackedBatch) -> str | None:
        """Makes a bucket's graph and holds it against the eager run; what went wrong, if anything did."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        right_TD = self.encoder.stream(padded)
        self._forget_stale()
        try:
            graph = _Graph(self.encoder, bucket, self._pool)
            got_TD = graph.replay(padded)
        # Torch has no narrower class for what cannot be captured. Whatever ails the device itself, the eager run meets.
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        worst = float(((got_TD - right_TD).norm(dim=-1) / right_TD.norm(dim=-1)).max())
        if not worst <= _MOST_ERROR:
            return f"a replay for {bucket} is {worst:.2g} of a token's norm away from the eager run"
        self._graphs[bucket] = graph
        return None


Runner = AnyEncoder | GraphedEncoder


def graphed(encoder: AnyEncoder, *, wanted: bool = True) -> Runner:
    """The encoder with graphs, or itself where they cannot be had or do not pay; which of them is logged once."""
    if isinstance(encoder, ExportedEncoder):
        return encoder
    reason = why_not_graphs(encoder.config, encoder.device, wanted=wanted)
    if encoder.device.type == "cuda":
        line = f"{encoder.name} runs {'with' if reason is None else 'without'} CUDA graphs"
        line += f": {reason}" if reason else f" for batches of up to {MOST_TOKENS} tokens"
        if line not in _explained:
            _explained.add(line)
            _logger.info(line)
    return GraphedEncoder(encoder) if reason is None else encoder
