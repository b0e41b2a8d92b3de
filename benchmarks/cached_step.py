"""Attention of a decoder's step on a CPU: ours beside torch's SDPA, padded with a mask and one sequence at a time.

All three put the new keys and values into the same kind of cache and attend. torch is spared the copy that slots in any
order would cost: its sequences lie in the cache's first slots in order, so that it reads the cache where it is.

Shapes: B sequences, H heads, K head width, P places.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from protnest.benchmarks.ceiling import copy_gbytes_per_s
from protnest.benchmarks.course import spread
from protnest.benchmarks.rows import Row
from protnest.kernels.cached_attention import KeyValueCache, cached_attention

SHAPES = {"4x64": (4, 64), "4x128": (4, 128), "8x64": (8, 64), "8x96": (8, 96), "16x64": (16, 64), "20x64": (20, 64)}
"""Heads and head width of decoders: ProtGPT2's students of 16M, 39M and 82M are 4x64, 4x128 and 8x96, that of 204M is
16x64, and itself 20x64."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {"fp32": 1e-5, "bf16": 0.01}
"""Norm of the difference over the norm."""

# A measurement repeats its step until it lasts this long.
_LEAST_SECONDS = 0.002


def _seconds(step: Callable[[], torch.Tensor], times: int) -> float:
    """CPU seconds of one step."""
    begin = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - begin) / times


def _torch_steps(
    qkv_BC: torch.Tensor, cache: KeyValueCache, lengths_B: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    B, H, _, K = cache.keys_SHPK.shape
    slots_B, dtype = torch.arange(B), cache.keys_SHPK.dtype
    lengths = lengths_B.tolist()
    longest = max(lengths) + 1
    known_B11P = (torch.arange(longest) <= lengths_B[:, None])[:, None, None]

    def write() -> torch.Tensor:
        q_BHK, k_BHK, v_BHK = qkv_BC.to(dtype).view(B, 3, H, K).unbind(1)
        cache.keys_SHPK[slots_B, :, lengths_B], cache.values_SHPK[slots_B, :, lengths_B] = k_BHK, v_BHK
        return q_BHK[:, :, None]

    def padded() -> torch.Tensor:
        keys, values = (part[:, :, :longest] for part in cache)
        mask = None if len(set(lengths)) == 1 else known_B11P
        return F.scaled_dot_product_attention(write(), keys, values, attn_mask=mask).flatten(1)

    def each() -> torch.Tensor:
        outputs = []
        for b, (q_HLK, length) in enumerate(zip(write(), lengths, strict=True)):
            keys, values = (part[b : b + 1, :, : length + 1] for part in cache)
            outputs.append(F.scaled_dot_product_attention(q_HLK[None], keys, values).flatten(1))
        return torch.cat(outputs)

    return {"padded": padded, "each": each}


def measure_step(shape: str, precision: str, *, sequences: int, length: int, mixed: bool, pairs: int, seed: int) -> Row:
    """One shape: `sequences` tokens attend to `length` each, or to half as much to half as much again where `mixed`.

    Raises:
        RuntimeError: ours and torch's differ by more than `ALLOWED`, or C++ cannot run.
    """
    (H, K), B, dtype = SHAPES[shape], sequences, DTYPES[precision]
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.full((B,), length - 1)
    if mixed:
        lengths_B = torch.linspace(length / 2, length * 3 / 2, B).long()[torch.randperm(B, generator=generator)] - 1
    cache = KeyValueCache.empty(B, H, int(lengths_B.max()) + 1, K, dtype=dtype)
    for part in cache:
        part.copy_(torch.randn(part.shape, generator=generator))
    qkv_BC = torch.randn((B, 3 * H * K), generator=generator)
    slots_B = torch.arange(B)
    with torch.inference_mode():
        steps = _torch_steps(qkv_BC, cache, lengths_B)
        steps["ours"] = lambda: cached_attention(qkv_BC, cache, slots_B, lengths_B, impl="cpu")
        outputs = {name: step().float() for name, step in steps.items()}
        for name in ("padded", "each"):
            error = float((outputs[name] - outputs["ours"]).norm() / outputs["ours"].norm())
            if not error <= ALLOWED[precision]:
                message = (
                    f"{shape}, {precision}, {B} x {length}: off {name} by {error:.2g} of the norm, allowed is "
                    f"{ALLOWED[precision]:g}"
                )
                raise RuntimeError(message)
        times = {name: max(1, round(_LEAST_SECONDS / max(_seconds(step, 5), 1e-6))) for name, step in steps.items()}
        turns = [{name: _seconds(step, times[name]) for name, step in steps.items()} for _ in range(pairs)]
    seconds = spread([turn["ours"] for turn in turns]).median
    read_bytes = 2 * H * K * dtype.itemsize * (int(lengths_B.sum()) + B)
    row: Row = {
        "suite": "cached attention",
        "shape": shape,
        "heads": H,
        "head_width": K,
        "precision": precision,
        "sequences": B,
        "length": length,
        "mixed": mixed,
        "pairs": pairs,
        "cpu_us_median": 1e6 * seconds,
        "read_bytes": read_bytes,
        "read_gbytes_per_s": read_bytes / seconds / 1e9,
        "copy_gbytes_per_s": copy_gbytes_per_s(torch.device("cpu"), size_bytes=1 << 26, repeats=5),
    }
    for name in ("padded", "each"):
        faster = spread([turn[name] / turn["ours"] for turn in turns])
        row |= {
            f"times_{name}_median": faster.median,
            f"times_{name}_min": faster.low,
            f"times_{name}_max": faster.high,
        }
    return row
