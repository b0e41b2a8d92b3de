"""The encoder's Triton kernels beside the same steps in torch and beside their rooflines; small models' graphs.

A roofline is the time that nothing can beat: the larger of what the operations take at the rate of the model's own
matrix products and what the bytes take at the rate of copying. Each function takes a device and whom to time, so that
all but the kernels themselves can be tried without a GPU, at tiny sizes.

Shapes: T tokens, H heads, K head width, D width, F feed-forward width, J = K/2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from protnest.benchmarks.ceiling import best_seconds, copy_gbytes_per_s, gemm_gflops, synchronise
from protnest.benchmarks.comparison import spread
from protnest.benchmarks.parity import ALLOWED, row_errors
from protnest.benchmarks.peers import random_encoder
from protnest.benchmarks.proteins import make_up
from protnest.benchmarks.rows import Row
from protnest.engine import Embedder
from protnest.engine.config import EncoderConfig
from protnest.engine.device import PRECISIONS
from protnest.engine.graphs import GraphedEncoder
from protnest.kernels.rotary import apply_rotary, rotary_table
from protnest.kernels.varlen_attention import varlen_attention

TRITON, TORCH = "triton", "torch"
GRAPHS, EAGER = "graphs", "eager"

Step = Callable[..., torch.Tensor]

# A step's error against fp32 may be this many times torch's in the same precision, plus so many roundings.
_TIMES_TORCH_ERROR, _ROUNDINGS = 2.0, 2.0


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One step of a layer on one kind of data.

    Attributes:
        name: of the operation.
        inputs: what every engine is given.
        steps: engine -> how it does the step; gives rows.
        flops: operations in matrix products.
        moved_bytes: that must be read and written once.
    """

    name: str
    inputs: tuple[torch.Tensor | None, ...]
    steps: dict[str, Step]
    flops: float
    moved_bytes: float


def kernel_cases(
    config: EncoderConfig, dtype: torch.dtype, device: torch.device, lengths: Sequence[int]
) -> list[KernelCase]:
    """Attention, residual with norm and activation of a layer, on sequences of so many tokens each."""
    T, D, H, K = sum(lengths), config.width, config.heads, config.head_width
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(kind)

    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    cos_PJ, sin_PJ = (
        table[:, 0].contiguous() for table in rotary_table(torch.arange(max(lengths), device=device), K, torch.float32)
    )

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        turn = rotary_table(positions_T, K, qkv.dtype)
        qk_THK = apply_rotary(qkv[:, : 2 * H], *turn)
        return varlen_attention(qk_THK[:, :H], qk_THK[:, H:], qkv[:, 2 * H :], cu_seqlens, tuple(lengths)).flatten(1)

    def attend_fused(qkv: torch.Tensor) -> torch.Tensor:
        from protnest.kernels.gpu.rotary_attention import rotary_attention

        return rotary_attention(qkv, cos_PJ, sin_PJ, cu_seqlens, max(lengths)).flatten(1)

    def add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x + delta, (D,), weight.float(), bias.float(), config.layer_norm_eps)
        return normed.to(delta.dtype)

    def add_norm_fused(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        from protnest.kernels.gpu.add_norm import add_norm as fused

        return fused(x, delta, weight, bias, config.layer_norm_eps, delta.dtype)[1]

    def gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + bias)

    def gelu_fused(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        from protnest.kernels.gpu.gelu import bias_gelu

        return bias_gelu(x, bias)

    size = dtype.itemsize
    return [
        KernelCase(
            name="rotary_attention",
            inputs=(normal(T, 3 * H, K),),
            steps={TRITON: attend_fused, TORCH: attend},
            flops=4 * D * sum(length * length for length in lengths),
            moved_bytes=4 * T * D * size,
        ),
        KernelCase(
            name="add_norm",
            inputs=(normal(T, D, kind=torch.float32), normal(T, D), normal(D), normal(D)),
            steps={TRITON: add_norm_fused, TORCH: add_norm},
            flops=0,
            # fp32 in and out for the stream; what is added and the norm in the model's dtype.
            moved_bytes=T * D * (8 + 2 * size),
        ),
        KernelCase(
            name="bias_gelu",
            inputs=(normal(T, config.feedforward), normal(config.feedforward)),
            steps={TRITON: gelu_fused, TORCH: gelu},
            flops=0,
            moved_bytes=2 * T * config.feedforward * size,
        ),
    ]


def kernel_rows(
    shape: str,
    config: EncoderConfig,
    precision: str,
    device: torch.device,
    *,
    engines: Sequence[str] = (TRITON, TORCH),
    tokens: int = 65536,
    longest: int = 1022,
    ceiling_rows: Sequence[int] = (8192, 32768),
    repeats: int = 5,
) -> list[Row]:
    """Each kernel of a layer, right first and then timed, as a share of its roofline.

    Args:
        shape: what rows call the model.
        config: its architecture.
        precision: of products and of what moves between them.
        device: where.
        engines: whom to time.
        tokens: of the batch, about; sequences have UniProt's lengths.
        longest: residues of the longest one.
        ceiling_rows: rows of the matrix products that give the ceiling.
        repeats: measurements, of which the best counts.

    Returns:
        A row for each kernel and engine; `ok` where its errors are within the bound.
    """
    dtype = PRECISIONS[precision]
    lengths = _lengths(tokens, longest)
    gflops = gemm_gflops(config, dtype, device, rows=ceiling_rows, repeats=repeats)
    copy_rate = copy_gbytes_per_s(device, repeats=repeats)
    rows: list[Row] = []
    for case in kernel_cases(config, dtype, device, lengths):
        roofline_ms = max(case.flops / gflops / 1e6, case.moved_bytes / copy_rate / 1e6)
        with torch.inference_mode():
            right = case.steps[TORCH](*(each if each is None else each.float() for each in case.inputs))
            torch_error = _error(right, case.steps[TORCH](*case.inputs))
            bound = _TIMES_TORCH_ERROR * torch_error + _ROUNDINGS * torch.finfo(dtype).eps
            for engine in engines:
                step = case.steps[engine]
                error = _error(right, step(*case.inputs))
                ms = 1e3 * best_seconds(partial(step, *case.inputs), device, repeats)
                rows.append(
                    {
                        "kernel": case.name,
                        "shape": shape,
                        "engine": engine,
                        "precision": precision,
                        "tokens": sum(lengths),
                        "ms": ms,
                        "roofline_ms": roofline_ms,
                        "percent_of_roofline": 100 * roofline_ms / ms,
                        "gemm_gflops": gflops,
                        "copy_gbytes_per_s": copy_rate,
                        "error": error if math.isfinite(error) else None,
                        "bound": bound if math.isfinite(bound) else None,
                        "ok": error <= bound,
                    }
                )
    return rows


def _lengths(tokens: int, longest: int) -> list[int]:
    """Tokens of sequences that have so many together, or a few less."""
    lengths: list[int] = []
    for sequence in make_up(count=max(1, tokens // 20), seed=0, longest=longest).sequences:
        if sum(lengths) + len(sequence) + 2 > tokens:
            break
        lengths.append(len(sequence) + 2)
    return lengths


def _error(right: torch.Tensor, got: torch.Tensor) -> float:
    """Largest of a row, of its norm."""
    return float(((got.float() - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-30)).max())


def graph_rows(
    shape: str,
    config: EncoderConfig,
    device: torch.device,
    *,
    precision: str = "bf16",
    budgets: Sequence[int] = (512, 2048, 8192),
    batches: int = 40,
    pairs: int = 5,
    longest: int = 250,
) -> list[Row]:
    """A model with and without CUDA graphs, in turns, at several budgets of tokens a batch.

    Args:
        shape: what rows call the model.
        config: its architecture.
        device: where.
        precision: of the model.
        budgets: tokens a batch.
        batches: of each pass.
        pairs: turns.
        longest: residues of the longest protein.

    Returns:
        Two rows a budget; `ok` where both give the same embeddings.
    """
    encoder = random_encoder(config, seed=0).to(device, PRECISIONS[precision]).requires_grad_(False)
    rows: list[Row] = []
    for budget in budgets:
        proteins = make_up(count=max(1, batches * budget // 100), seed=1, longest=longest).sequences
        embedders = {name: Embedder(encoder, max_tokens=budget, cuda_graphs=name == GRAPHS) for name in (GRAPHS, EAGER)}
        # Buckets are captured at their second batch: the first pass has all of them.
        vectors = {name: embedder.embed(proteins) for name, embedder in embedders.items()}
        error = float(row_errors(np.asarray(vectors[EAGER]), np.asarray(vectors[GRAPHS])).max())
        seconds: dict[str, list[float]] = {name: [] for name in embedders}
        for _ in range(pairs):
            for name, embedder in embedders.items():
                seconds[name].append(_clock(embedder, proteins, device))
        residues = sum(map(len, proteins))
        faster = spread([eager / graphs for graphs, eager in zip(seconds[GRAPHS], seconds[EAGER], strict=True)])
        for name, embedder in embedders.items():
            runner: Any = embedder._graphed[0]
            rows.append(
                {
                    "shape": shape,
                    "engine": name,
                    "precision": precision,
                    "budget_tokens": budget,
                    "graphs": len(runner._graphs) if isinstance(runner, GraphedEncoder) else 0,
                    "residues_per_s_median": residues / spread(seconds[name]).median,
                    "ours_times_faster_median": faster.median if name == EAGER else None,
                    "error": error if math.isfinite(error) else None,
                    "ok": error <= ALLOWED[precision],
                }
            )
    return rows


def _clock(embedder: Embedder, proteins: Sequence[str], device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    embedder.embed(proteins)
    synchronise(device)
    return time.perf_counter() - begin
