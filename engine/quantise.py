"""An encoder whose products run in int8: four a layer, all else as it was, in fp32.

Plain int8 keeps a protein model's embeddings but not its order of variants: a channel of a LayerNorm's output that is
always near 8, or a spike of a feed-forward channel, takes the levels that all others need. So the input x of each
product is centred and scaled by channel first (SmoothQuant, Xiao et al., ICML 2023, with Outlier Suppression+'s shift,
Wei et al., EMNLP 2023),

    x' = (x - mu) / s,   W' = W diag(s),   b' = b + W mu,   s_i = std_i^a / rms(W_:i)^(1 - a)

which changes nothing before rounding, and costs nothing at run time where it can be folded: for qkv and fc1 into the
LayerNorm before (gamma / s, (beta - mu) / s), for out into the rows of qkv that make the values (attention's weights
add up to one, so a shift passes through it), for fc2 as one multiply-add after GELU. Subtracting the mean also keeps
the weights' rounding from moving every protein the same way. a = 1/2, for fc2 1/4: there, more makes new spikes.

Spikes that no calibration foresees remain: in one token in a hundred a feed-forward channel is so large that rounding
drowns the others, and what that token then tells the rest decides the worst proteins. So fc2's rows with a scale beyond
three times the usual are rounded twice: what the first rounding left is rounded again and multiplied in a second, small
product. Over 110 proteins that lifts the first percentile of residues' cosine from 0.990 to 0.998.

mu, std and the usual scale are those of a fixed set of made-up proteins (`calibration_proteins`), run through the fp32
model when it is quantised: they follow from the weights, never from what a run has seen. s is rounded to a power of
two, so that folding it is exact.

Shapes: T tokens, D width, N rows, R wide ones, I inputs and O outputs of a product.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.bias_gelu import Move, bias_gelu
from ..kernels.product import Levels, Product, Scales
from ..kernels.quantise_rows import quantise_rows
from ..kernels.quantised_linear import QuantisedWeight, quantise_weight, quantised_linear
from ..kernels.rotary_attention import RotaryTable, rotary_attention
from .encoder import Encoder
from .errors import InputError
from .packing import PackedBatch, pack

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEME = 1
"""Version of the arithmetic: models quantised by another one need not agree bit for bit."""

# 512 tokens, since large models take seconds for them. Ten times as many changed no figure.
_CALIBRATION_PROTEINS = 4
_CALIBRATION_RESIDUES = 126
# Swiss-Prot's composition, per mille.
_COMPOSITION = dict(
    zip(
        "ALGVESIKRDTPNQFYMHCW",
        (83, 97, 71, 69, 67, 66, 59, 58, 55, 55, 54, 47, 41, 39, 39, 29, 24, 23, 14, 11),
        strict=True,
    )
)
_MIGRATION = {"qkv": 0.5, "out": 0.5, "fc1": 0.5, "fc2": 0.25}
"""How much of a channel's spread goes over to the weights: `a` of the equation."""
# A channel that the made-up proteins hardly move may move with real ones: it is not blown up beyond this.
_MOST_SCALE = 8.0
# Times the median scale of fc2's rows. Of real proteins' rows 0 to 3 % a layer are beyond; at 2 up to 7 %, no better.
_REFINED = 3.0


class QuantisedLinear(nn.Module):
    """A product of a layer in int8; see `encoder.Linear`, whose place it takes.

    Attributes:
        values_OI, scale_O, sum_O: the weight, see `QuantisedWeight`; `weight` is the three together.
        bias_O: fp32 (O,).
        times_I, minus_I: fp32 (I,), or None: the input becomes `x * times_I - minus_I` before it is rounded; `move` is
            the two together. For all products but fc2 that is folded into what comes before.
        refine_above: rows whose scale is larger are rounded twice; infinity for all products but fc2.
    """

    takes = torch.int8
    values_OI: torch.Tensor
    scale_O: torch.Tensor
    sum_O: torch.Tensor
    bias_O: torch.Tensor
    times_I: torch.Tensor | None
    minus_I: torch.Tensor | None

    def __init__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor,
        *,
        move: Move | None = None,
        refine_above: float = math.inf,
    ) -> None:
        super().__init__()
        weight = quantise_weight(weight_OI)
        self.register_buffer("values_OI", weight.values_OI)
        self.register_buffer("scale_O", weight.scale_O)
        self.register_buffer("sum_O", weight.sum_O)
        self.register_buffer("bias_O", bias_O.detach().float())
        self.register_buffer("times_I", None if move is None else move.times_F.detach().float())
        self.register_buffer("minus_I", None if move is None else move.minus_F.detach().float())
        self.refine_above = refine_above

    @property
    def weight(self) -> QuantisedWeight:
        return QuantisedWeight(self.values_OI, self.scale_O, self.sum_O)

    @property
    def move(self) -> Move | None:
        return None if self.times_I is None or self.minus_I is None else Move(self.times_I, self.minus_I)

    def product(self, rows: torch.Tensor | Levels) -> Product:
        """The product of rows, which are rounded where they are not yet."""
        return self._multiply(rows if isinstance(rows, Levels) else quantise_rows(rows), self.bias_O)

    def refine(self, x_TD: torch.Tensor, given: Product, rows: torch.Tensor | Levels) -> torch.Tensor:
        """Adds to the stream what the rounding of wide rows lost.

        Args:
            x_TD: the stream; it is written into.
            given: the product before the GELU, whose `rows` these are.
            rows: the levels that `product` takes.
        """
        assert isinstance(rows, Levels)
        wide_R = (rows.scale_N > self.refine_above).nonzero()[:, 0]
        if not wide_R.numel():
            return x_TD
        exact_RI = bias_gelu(given.rows(wide_R), dtype=torch.float32, move=self.move)
        assert isinstance(exact_RI, torch.Tensor)
        rounded_RI = Levels(*(part[wide_R] for part in rows)).numbers()
        left = self._multiply(quantise_rows(exact_RI - rounded_RI), torch.zeros_like(self.bias_O))
        return x_TD.index_add_(0, wide_R, left.numbers())

    def _multiply(self, levels: Levels, bias_O: torch.Tensor) -> Product:
        sums_NO = quantised_linear(levels.values_NI, self.weight)
        return Product(sums_NO, bias_O, Scales(self.scale_O, self.sum_O, levels.scale_N, levels.shift_N))


class Int8Model(nn.Module):
    """What models with int8 products share: they stay on the CPU, in fp32 beside, and are not trained."""

    name: str

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.int8

    def train(self, mode: bool = True) -> Self:
        if mode:
            message = f"{self.name} runs in int8, which is not trained; load it with precision 'fp32' or 'bf16'"
            raise InputError(message)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Every `.to`, `.cuda`, `.half` comes through here, and would turn scales to bf16 without a word.
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            message = (
                f"{self.name} runs in int8, on the CPU and with fp32 beside, and cannot become {moved.dtype} on "
                f"{moved.device}; load it anew with another precision or device"
            )
            raise InputError(message)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantisedEncoder(Int8Model, Encoder):
    """An encoder made by `quantised`: int8 products, for inference on a CPU."""


@torch.no_grad()
def quantised(encoder: Encoder) -> QuantisedEncoder:
    """The same encoder with its products in int8; the given one is left as it is.

    Takes one pass of the fp32 model over 512 tokens. The token embedding, the final norm and the head are copies of
    the given ones, in fp32; the fingerprint stays, since it names the fp32 weights.

    Args:
        encoder: fp32, on the CPU.

    Raises:
        InputError: it is on another device, in another precision, or its weights are not finite.
    """
    if isinstance(encoder, QuantisedEncoder) or encoder.dtype != torch.float32 or encoder.device.type != "cpu":
        message = f"{encoder.name} is {encoder.precision} on {encoder.device}: int8 is made of an fp32 model on the CPU"
        raise InputError(message)
    with torch.device("meta"):
        result = QuantisedEncoder(
            encoder.config, head=encoder.head is not None, name=encoder.name, fingerprint=encoder.fingerprint
        )
    result.embed_tokens = copy.deepcopy(encoder.embed_tokens)
    result.final_norm = copy.deepcopy(encoder.final_norm)
    result.head = copy.deepcopy(encoder.head)
    batch = pack(calibration_proteins())
    x_TD = encoder._embed(batch)
    table = encoder._rotary_table(max(batch.lengths_B))
    for given, own in zip(encoder.layers, result.layers, strict=True):
        inputs, x_TD = _run_layer(given, x_TD, batch, table)
        try:
            fill_layer(own, given, inputs)
        except ValueError as error:
            message = f"{encoder.name} cannot run in int8: {error}"
            raise InputError(message) from error
    result.requires_grad_(False)
    return result.eval()


def calibration_proteins() -> list[str]:
    """The made-up proteins by which channels are centred and scaled: always the same ones."""
    generator = random.Random(SCHEME)
    letters, shares = "".join(_COMPOSITION), list(_COMPOSITION.values())
    return ["".join(generator.choices(letters, shares, k=_CALIBRATION_RESIDUES)) for _ in range(_CALIBRATION_PROTEINS)]


def _run_layer(
    layer: Any, x_TD: torch.Tensor, batch: PackedBatch, table: RotaryTable
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One layer in plain fp32: the input of each product, and the layer's output."""
    inputs = {"qkv": layer.attention_norm(x_TD)}
    qkv_TC = layer.qkv(inputs["qkv"])
    inputs["out"] = rotary_attention(qkv_TC, table, batch.cu_seqlens, batch.lengths_B, layer.heads)
    x_TD = x_TD + layer.out(inputs["out"])
    inputs["fc1"] = layer.feedforward_norm(x_TD)
    inputs["fc2"] = F.gelu(layer.fc1(inputs["fc1"]))
    return inputs, x_TD + layer.fc2(inputs["fc2"])


def channel_scales(weight_OI: torch.Tensor, std_I: torch.Tensor, migration: float) -> torch.Tensor:
    """`s` of the equation, powers of two, fp32 (I,), the median channel's one."""
    rms_I = weight_OI.square().mean(dim=0).sqrt()
    tiny = torch.finfo(torch.float32).tiny
    log_I = migration * std_I.clamp(min=tiny).log2() - (1 - migration) * rms_I.clamp(min=tiny).log2()
    most = math.log2(_MOST_SCALE)
    return torch.exp2((log_I - log_I.median()).clamp(-most, most).round())


def fill_layer(own: Any, given: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Puts quantised products and folded norms in place of a layer's.

    Args:
        own: the layer to be filled.
        given: the fp32 layer.
        inputs: of its products `qkv`, `out`, `fc1` and `fc2`, on the made-up proteins.
    """
    weights, biases, means, scales = {}, {}, {}, {}
    for name, migration in _MIGRATION.items():
        weights[name], biases[name] = getattr(given, name).weight, getattr(given, name).bias
        std_I, means[name] = torch.std_mean(inputs[name], dim=0)
        scales[name] = channel_scales(weights[name], std_I, migration)
        biases[name] = biases[name] + weights[name] @ means[name]
        weights[name] = weights[name] * scales[name]
    # The values that qkv makes are `out`'s input, since attention only mixes them: centred and scaled at their source.
    D = scales["out"].numel()
    weights["qkv"][2 * D :] /= scales["out"][:, None]
    biases["qkv"][2 * D :] = (biases["qkv"][2 * D :] - means["out"]) / scales["out"]
    own.attention_norm = _folded_norm(given.attention_norm, means["qkv"], scales["qkv"])
    own.feedforward_norm = _folded_norm(given.feedforward_norm, means["fc1"], scales["fc1"])
    for name in ("qkv", "out", "fc1"):
        setattr(own, name, QuantisedLinear(weights[name], biases[name]))
    move = Move(1 / scales["fc2"], means["fc2"] / scales["fc2"])
    usual = quantise_rows(inputs["fc2"] * move.times_F - move.minus_F).scale_N.median().item()
    own.fc2 = QuantisedLinear(weights["fc2"], biases["fc2"], move=move, refine_above=_REFINED * usual)


def _folded_norm(norm: nn.LayerNorm, mean_I: torch.Tensor, scale_I: torch.Tensor) -> nn.LayerNorm:
    folded = copy.deepcopy(norm)
    folded.weight = nn.Parameter(norm.weight / scale_I)
    folded.bias = nn.Parameter((norm.bias - mean_I) / scale_I)
    return folded
