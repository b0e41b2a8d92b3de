"""What the machine could do at most: its rate at the model's own matrix products, and at copying memory.

Shapes: M rows (tokens), D width, F feed-forward width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from protnest.engine.config import EncoderConfig
from protnest.engine.device import PRECISIONS

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
    return product_gflops(_layer_shapes(config), dtype, device, rows=rows, repeats=repeats)


def _layer_shapes(config: EncoderConfig) -> tuple[tuple[int, int], ...]:
    D, inner = config.width, config.feedforward
    return ((D, 3 * D), (D, D), (D, inner), (inner, D))


def precision_gflops(
    config: EncoderConfig, precision: str, device: torch.device, *, rows: Sequence[int], repeats: int = 5
) -> float:
    """`gemm_gflops` of a precision by name; of "int8" see `int8_gflops`."""
    if precision == "int8":
        return int8_gflops(config, device, rows=rows, repeats=repeats)
    return gemm_gflops(config, PRECISIONS[precision], device, rows=rows, repeats=repeats)


def int8_gflops(config: EncoderConfig, device: torch.device, *, rows: Sequence[int], repeats: int = 5) -> float:
    """The same four products of 8-bit integers, in 10^9 multiplications and additions a second; the fastest way here.

    Tried are `torch._int_mm` and, on a CPU, oneDNN's quantised linear layer with bias and fp32 or bf16 results. The
    latter takes uint8 activations of zero point 0: for signed ones or another zero point it falls back to a reference
    implementation that is thousands of times slower.
    """
    return int8_product_gflops(_layer_shapes(config), device, rows=rows, repeats=repeats)


def int8_product_gflops(
    shapes: Sequence[tuple[int, int]], device: torch.device, *, rows: Sequence[int], repeats: int = 5
) -> float:
    """`int8_gflops` of products of any shapes: inputs and outputs of each."""
    weights = [torch.randint(-127, 128, (out, into), dtype=torch.int8, device=device) for into, out in shapes]
    best = 0.0
    for M in rows:
        flops = sum(2 * M * into * out for into, out in shapes)
        for products in _int8_products(weights, M, device):
            with torch.inference_mode():
                best = max(best, flops / best_seconds(products, device, repeats) / 1e9)
    return best


def _int8_products(weights: Sequence[torch.Tensor], M: int, device: torch.device) -> Iterator[Callable[[], object]]:
    signed = [torch.randint(-127, 128, (M, weight.shape[1]), dtype=torch.int8, device=device) for weight in weights]

    def int_mm() -> None:
        for x, weight in zip(signed, weights, strict=True):
            torch._int_mm(x, weight.T)

    yield int_mm
    if device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return
    unsigned = [x.abs().to(torch.uint8) for x in signed]
    packed = [torch.ops.onednn.qlinear_prepack(weight, [M, weight.shape[1]]) for weight in weights]
    rest = [(torch.ones(len(w)), torch.zeros(len(w), dtype=torch.int32), torch.randn(len(w))) for w in weights]
    for result in (torch.float32, torch.bfloat16):

        def quantised(result: torch.dtype = result) -> None:
            for x, weight, (scale, zero, bias) in zip(unsigned, packed, rest, strict=True):
                torch.ops.onednn.qlinear_pointwise(
                    *(x, 0.01, 0, weight, scale, zero, bias), *(1.0, 0, result, "none", [], "")
                )

        yield quantised


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


def read_gbytes_per_s(device: torch.device, *, size_bytes: int, repeats: int = 5) -> float:
    """Gigabytes a second of reading a fp32 matrix of that size for its product with a vector; best of `repeats`.

    A matrix that fits into the caches is read from there, as weights of that size would be.
    """
    width = 1024
    matrix = torch.randn(max(1, size_bytes // (4 * width)), width, device=device)
    vector = torch.randn(width, device=device)
    with torch.inference_mode():
        return 4 * matrix.numel() / best_seconds(lambda: matrix.mv(vector), device, repeats) / 1e9
