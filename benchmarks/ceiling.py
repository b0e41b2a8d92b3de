"""What the machine could do at most: its rate at the model's own matrix products, and at copying memory.

Shapes: M rows (tokens), D width, F feed-forward width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from protnest.engine.config import EncoderConfig

# A measurement repeats its work until it lasts this long, so that clocks and launches do not count.
_LEAST_SECONDS = 0.05


def synchronise(device: torch.device) -> None:
    """Waits until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_flops(config: EncoderConfig, lengths: Sequence[int]) -> int:
    """Floating-point operations of one forward pass without padding: matrix products and attention, nothing else.

    A layer of a sequence of L tokens costs 2 L (4 D^2 + 2 D F) for its products and 4 L^2 D for attention; a
    multiply-add counts as two. The language-model head is left out: an embedding does not need it.

    Args:
        config: the architecture.
        lengths: tokens of each sequence, `<cls>` and `<eos>` counted.
    """
    D = config.width
    products = 2 * sum(lengths) * (4 * D * D + 2 * D * config.feedforward)
    attention = 4 * D * sum(length * length for length in lengths)
    return config.layers * (products + attention)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds that `work` takes, done again and again until that can be timed; the best of `repeats` measurements."""

    def clock(times: int) -> float:
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(times):
            work()
        synchronise(device)
        return (time.perf_counter() - begin) / times

    clock(1)
    times = max(1, round(_LEAST_SECONDS / max(clock(1), 1e-9)))
    return min(clock(times) for _ in range(repeats))


def gemm_gflops(
    config: EncoderConfig, dtype: torch.dtype, device: torch.device, *, rows: Sequence[int], repeats: int = 5
) -> float:
    """GFLOP/s of a layer's four matrix products (QKV, output, two feed-forward ones) with their biases, on random data.

    The best of `repeats` measurements at the best of the row counts: nothing that shares the machine can raise it.

    Args:
        config: the architecture; D and F give the shapes.
        dtype: of inputs, weights and outputs.
        device: where to measure.
        rows: values of M to try.
        repeats: measurements for each.
    """
    D, inner = config.width, config.feedforward
    shapes = ((D, 3 * D), (D, D), (D, inner), (inner, D))
    return product_gflops(shapes, dtype, device, rows=rows, repeats=repeats)


def product_gflops(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: Sequence[int],
    repeats: int = 5,
) -> float:
    """GFLOP/s of matrix products with biases, one after another, on random data; the best as in `gemm_gflops`.

    Args:
        shapes: inputs and outputs of each product.
        dtype: of inputs, weights and outputs.
        device: where to measure.
        rows: values of M to try.
        repeats: measurements for each.
    """
    weights = [torch.randn(out, into, device=device).to(dtype) for into, out in shapes]
    biases = [torch.randn(out, device=device).to(dtype) for _, out in shapes]
    best = 0.0
    for M in rows:
        inputs = [torch.randn(M, into, device=device).to(dtype) for into, _ in shapes]

        def products(inputs: list[torch.Tensor] = inputs) -> None:
            for x, weight, bias in zip(inputs, weights, biases, strict=True):
                F.linear(x, weight, bias)

        with torch.inference_mode():
            seconds = best_seconds(products, device, repeats)
        flops = sum(2 * M * into * out for into, out in shapes)
        best = max(best, flops / seconds / 1e9)
    return best


def copy_gbytes_per_s(device: torch.device, *, size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Gigabytes a second, read plus written, of copying `size_bytes` from one buffer to another; best of `repeats`."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / best_seconds(lambda: target.copy_(source), device, repeats) / 1e9
