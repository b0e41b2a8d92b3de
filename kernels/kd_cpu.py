"""The distillation loss by the C++ extension, for fp32 rows; see csrc/kd_loss.cpp. 16-bit rows are widened in blocks.

The functions have the arguments of those in `kd_chunked`.

Shapes: N rows, V vocabulary, S numbers kept a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from .extension import load
from .kd_options import KDOptions
from .kd_rows import RowResults, RowScalars, not_finite

# 16-bit logits that are widened at a time: 8 MB in fp32.
_WIDENED_ELEMENTS = 1 << 21


def _extension() -> ModuleType:
    module = load()
    assert module is not None  # `choose_impl` asked
    return module


def _blocks(*tables_NV: torch.Tensor) -> Iterator[slice]:
    """All rows at once where they can be read as they are, else blocks that are widened."""
    N, V = tables_NV[0].shape
    rows = max(1, N if all(map(_is_plain, tables_NV)) else _WIDENED_ELEMENTS // V)
    return (slice(begin, min(begin + rows, N)) for begin in range(0, N, rows))


def _is_plain(table_NV: torch.Tensor) -> bool:
    return table_NV.dtype == torch.float32 and table_NV.stride(1) == 1


def _plain(table_CV: torch.Tensor) -> Any:
    return (table_CV if _is_plain(table_CV) else table_CV.float().contiguous()).detach().numpy()


def losses(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    soft_N: torch.Tensor,
    hard_N: torch.Tensor,
    options: KDOptions,
    results: RowResults,
    row_numbers: torch.Tensor | None = None,
) -> None:
    """See `kd_chunked.losses`."""
    smoothing = options.smoothing if options.smooth else 0.0
    settings = (options.temperature, smoothing, options.uncertainty, torch.get_num_threads())
    for own in _blocks(student_NV, teacher_NV):
        block = RowResults.of_rows(own.stop - own.start, torch.float32, student_NV.device)
        rows = [values_N[own].contiguous().numpy() for values_N in (labels_N.long(), soft_N, hard_N)]
        bad_student, bad_teacher = _extension().kd_loss_forward(
            _plain(student_NV[own]), _plain(teacher_NV[own]), *rows, *settings, *(values.numpy() for values in block)
        )
        for name, bad in (("student_logits", bad_student), ("teacher_logits", bad_teacher)):
            if bad >= 0:
                raise not_finite(name, own.start + bad, row_numbers)
        into = results.of_block(own)
        # The weights are not the extension's to write.
        into.kept_SN[:-1] = block.kept_SN[:-1]
        into.soft_loss_N.copy_(block.soft_loss_N)
        into.hard_loss_N.copy_(block.hard_loss_N)
        if options.uncertainty:
            into.entropy_N.copy_(block.entropy_N)


def entropies(
    teacher_NV: torch.Tensor, used_N: torch.Tensor, entropy_N: torch.Tensor, row_numbers: torch.Tensor | None = None
) -> None:
    """See `kd_chunked.entropies`."""
    for own in _blocks(teacher_NV):
        used = used_N[own].contiguous().numpy()
        threads = torch.get_num_threads()
        bad = _extension().entropies(_plain(teacher_NV[own]), used, threads, entropy_N[own].numpy())
        if bad >= 0:
            name = "teacher_logits"
            raise not_finite(name, own.start + bad, row_numbers)


def gradient(
    out_NV: torch.Tensor,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    hard_N: torch.Tensor,
    kept_SN: torch.Tensor,
    scales: torch.Tensor,
    temperature: float,
) -> None:
    """See `kd_chunked.gradient`."""
    soft_N, hard_scale_N = RowScalars(*kept_SN).weight * scales[0], hard_N * scales[1]
    for own in _blocks(student_NV, teacher_NV, out_NV):
        out_CV = out_NV[own] if _is_plain(out_NV) else torch.empty(student_NV[own].shape)
        _extension().kd_loss_gradient(
            out_CV.detach().numpy(),
            _plain(student_NV[own]),
            _plain(teacher_NV[own]),
            labels_N[own].long().contiguous().numpy(),
            kept_SN[:, own].contiguous().numpy(),
            soft_N[own].numpy(),
            hard_scale_N[own].numpy(),
            temperature,
            torch.get_num_threads(),
        )
        if out_CV.data_ptr() != out_NV[own].data_ptr():
            out_NV[own] = out_CV
