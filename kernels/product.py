"""What lies between two matrix products of a layer: rows as one leaves them, and rows as the next one takes them.

A product may leave its bias, and the scales of its integers, to whoever reads it next and passes over the rows anyway.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether gradients are asked for with respect to any of them: kernels without any leave the work to torch."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class Levels(NamedTuple):
    """Rows in eight bits: `scale_N level + shift_N` is what a level from -128 to 127 stands for.

    Attributes:
        values_NI: int8 (N, I).
        scale_N, shift_N: fp32 (N,).
    """

    values_NI: torch.Tensor
    scale_N: torch.Tensor
    shift_N: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """What the levels stand for, fp32 (N, I)."""
        return self.scale_N[:, None] * self.values_NI.float() + self.shift_N[:, None]


class Scales(NamedTuple):
    """What turns an int8 product's sums into numbers: `scale_N (steps_O sum) + (shift_N sums_O + bias_O)`.

    Attributes:
        steps_O: fp32 (O,), of each row of the weight.
        sums_O: fp32 (O,), of that row's numbers.
        scale_N, shift_N: fp32 (N,), of the levels that were multiplied.
    """

    steps_O: torch.Tensor
    sums_O: torch.Tensor
    scale_N: torch.Tensor
    shift_N: torch.Tensor


class Product(NamedTuple):
    """The results of a linear layer, perhaps with something still to be done.

    Attributes:
        values_NO: (N, O): numbers of a floating dtype, or with `scales` the int32 sums of products of levels.
        bias_O: still to be added, where it is not None; of the numbers' dtype, fp32 beside integers.
        scales: of integers.
    """

    values_NO: torch.Tensor
    bias_O: torch.Tensor | None = None
    scales: Scales | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return torch.float32 if self.scales is not None else self.values_NO.dtype

    def numbers(self) -> torch.Tensor:
        """What the values stand for, (N, O) of `dtype`; differentiable."""
        if self.scales is None:
            return self.values_NO if self.bias_O is None else self.values_NO + self.bias_O
        assert self.bias_O is not None
        steps_O, sums_O, scale_N, shift_N = self.scales
        shifts_NO = shift_N[:, None] * sums_O + self.bias_O
        return scale_N[:, None] * (steps_O * self.values_NO.float()) + shifts_NO

    def tensors(self) -> list[torch.Tensor]:
        """Values, then the bias where there is one, then the four of `scales` where there are."""
        return [self.values_NO, *([] if self.bias_O is None else [self.bias_O]), *(self.scales or ())]

    @staticmethod
    def of(tensors: list[torch.Tensor]) -> Product:
        """The product whose `tensors` these are."""
        values_NO, *rest = tensors
        return Product(values_NO, rest[0] if rest else None, Scales(*rest[1:]) if len(rest) > 1 else None)

    def rows(self, index_R: torch.Tensor) -> Product:
        """Some of its rows, by number."""
        scales = self.scales
        if scales is not None:
            scales = scales._replace(scale_N=scales.scale_N[index_R], shift_N=scales.shift_N[index_R])
        return self._replace(values_NO=self.values_NO[index_R], scales=scales)

    def requires_grad(self) -> bool:
        """Whether gradients are asked for."""
        return wants_gradients(*self.tensors())


def check_product(product: Product, columns: int) -> None:
    """Raises ValueError where shapes or dtypes of a product with O = `columns` disagree."""
    values_NO, bias_O, scales = product
    if values_NO.dim() != 2 or values_NO.shape[1] != columns:
        message = f"the product has shape {tuple(values_NO.shape)}, expected (N, {columns})"
        raise ValueError(message)
    if scales is None:
        right = values_NO.is_floating_point() and (bias_O is None or bias_O.dtype == values_NO.dtype)
    else:
        right = values_NO.dtype == torch.int32 and bias_O is not None and bias_O.dtype == torch.float32
        right = right and all(part.dtype == torch.float32 for part in scales)
    N = values_NO.shape[0]
    shapes = [tuple(tensor.shape) for tensor in product.tensors()[1:]]
    if not right or shapes != [(columns,), (columns,), (columns,), (N,), (N,)][: len(shapes)]:
        dtypes = [str(tensor.dtype) for tensor in product.tensors()]
        message = (
            f"a product is floating, with a bias (O,) of its dtype or none, or int32 with fp32 bias, steps and sums "
            f"(O,) and scale and shift (N,); got {dtypes} of shapes {[tuple(values_NO.shape), *shapes]}"
        )
        raise ValueError(message)
