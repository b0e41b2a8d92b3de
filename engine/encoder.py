"""The ESM-2 encoder, run on packed sequences.

Architecture: Lin et al., Science 379:1123 (2023): pre-LayerNorm, rotary positions, exact GELU, token dropout.
Shapes: B sequences, T tokens, L residues of one sequence, D width, H heads, K head width, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.add_norm import Norm, add_norm
from ..kernels.bias_gelu import Move, bias_gelu
from ..kernels.linear import leaves_bias, linear, needs_widening
from ..kernels.product import Levels, Product
from ..kernels.product_shapes import is_compiled, rows_to_multiply
from ..kernels.rotary import rotary_table
from ..kernels.rotary_attention import RotaryTable, rotary_attention
from ..kernels.row_attention import row_attention
from .alphabet import MASK_ID, TOKENS
from .config import EncoderConfig
from .device import precision_name
from .packing import ChosenRows, PackedBatch, pack

# Share of tokens that were masked in ESM-2's training: 15 % chosen, 80 % of these shown as <mask>.
TRAINED_MASK_RATIO = 0.15 * 0.8


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """What a forward pass leaves.

    Attributes:
        hidden_TD: the last layer after the final LayerNorm.
        layers: (T, D) of each layer that was asked for, fp32 at least. 0 is the embedding, `config.layers` equals
            `hidden_TD`.
    """

    hidden_TD: torch.Tensor
    layers: dict[int, torch.Tensor] = field(default_factory=dict)


class Linear(nn.Linear):
    """A product of a layer, which may leave its bias to the pass over its rows that comes next.

    Attributes:
        move: how the inputs of this product are to be moved, where they are; only int8 products move theirs.
    """

    move: Move | None = None
    _widened: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def takes(self) -> torch.dtype:
        """The dtype of the rows that are multiplied: fp32 where the CPU would emulate bf16 (see `kernels.linear`)."""
        return torch.float32 if needs_widening(self.weight) else self.weight.dtype

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return linear(x_NI, self.weight, self.bias)

    def product(self, rows: torch.Tensor | Levels) -> Product:
        """The product of rows of dtype `takes`."""
        assert isinstance(rows, torch.Tensor)
        mixed = rows.dtype != self.weight.dtype
        weight_OI = self._widen() if mixed else self.weight
        bias_O = self.bias.to(rows.dtype) if mixed else self.bias
        if leaves_bias(rows, weight_OI):
            return Product(F.linear(rows, weight_OI), bias_O)
        return Product(linear(rows, weight_OI, bias_O))

    def refine(self, x_TD: torch.Tensor, given: Product, rows: torch.Tensor | Levels) -> torch.Tensor:
        """Adds to the stream what rounding the inputs lost; only int8 products round theirs."""
        return x_TD

    def _widen(self) -> torch.Tensor:
        """The weight in fp32; kept where it will not change, which costs memory and saves a pass in each batch."""
        weight_OI = self.weight
        if weight_OI.requires_grad or weight_OI.is_inference():
            return weight_OI.float()
        state = (weight_OI.data_ptr(), weight_OI._version)
        if self._widened is None or self._widened[0] != state:
            self._widened = (state, weight_OI.detach().float())
        return self._widened[1]


class LayerNorm(nn.LayerNorm):
    """Reads the residual stream in its own precision, and hands the result to products in the weights'."""

    @property
    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.unrounded(x_ND).to(self.weight.dtype)

    def unrounded(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The result in the stream's precision, for heads."""
        weight, bias = self.weight.to(x_ND.dtype), self.bias.to(x_ND.dtype)
        return F.layer_norm(x_ND, self.normalized_shape, weight, bias, self.eps)


class Layer(nn.Module):
    """One layer. In bf16, fp16 and int8 the residual stream `x_TD` stays fp32: rounding it in every layer costs more of
    the embedding's direction than all rounded products together (see benchmarks/README.md)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        D, eps = config.width, config.layer_norm_eps
        self.heads = config.heads
        self.attention_norm = LayerNorm(D, eps=eps)
        self.qkv = Linear(D, 3 * D)
        self.out = Linear(D, D)
        self.feedforward_norm = LayerNorm(D, eps=eps)
        self.fc1 = Linear(D, config.feedforward)
        self.fc2 = Linear(config.feedforward, D)

    def forward(
        self,
        x_TD: torch.Tensor,
        pending: Product | None,
        batch: PackedBatch,
        table: RotaryTable,
        chosen: ChosenRows | None = None,
    ) -> tuple[torch.Tensor, Product]:
        """The stream, and what is still to be added to it: the next layer's first pass over it does so.

        With `chosen`, the stream of these rows alone: beyond keys and values no other row takes part.
        """
        x_TD, rows = add_norm(x_TD, pending, self.attention_norm.norm, dtype=self.qkv.takes)
        assert rows is not None
        sequences = (table, batch.cu_seqlens, batch.lengths_B, self.heads)
        if chosen is None:
            attended_TD = rotary_attention(self.qkv.product(rows), *sequences)
        else:
            attended_TD = row_attention(self.qkv.product(rows), *sequences, chosen.index_R, chosen.counts_B)
            x_TD = x_TD[chosen.index_R]
        x_TD, rows = add_norm(x_TD, self.out.product(attended_TD), self.feedforward_norm.norm, dtype=self.fc1.takes)
        assert rows is not None
        inner = self.fc1.product(rows)
        rows = bias_gelu(inner, dtype=self.fc2.takes, move=self.fc2.move)
        return self.fc2.refine(x_TD, inner, rows), self.fc2.product(rows)


class LanguageModelHead(nn.Module):
    """Turns hidden states into logits over the alphabet; its last matrix is the token embedding."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(len(TOKENS)))

    def features(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """What the last product of the head multiplies: (N, D) in the precision of the hidden states."""
        weight_DD, bias_D, scale_D, shift_D = (
            tensor.to(hidden_ND.dtype)
            for tensor in (self.dense.weight, self.dense.bias, self.norm.weight, self.norm.bias)
        )
        hidden_ND = F.gelu(linear(hidden_ND, weight_DD, bias_D))
        return F.layer_norm(hidden_ND, scale_D.shape, scale_D, shift_D, self.norm.eps)

    def forward(self, hidden_ND: torch.Tensor, embedding_VD: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in the precision of the hidden states, whatever that of the weights."""
        dtype = hidden_ND.dtype
        return linear(self.features(hidden_ND), embedding_VD.to(dtype), self.bias.to(dtype))


class Encoder(nn.Module):
    """An ESM-2 encoder on packed batches.

    The answer for a sequence does not depend on its neighbours in the batch, beyond rounding.

    Args:
        config: the architecture.
        head: whether there is a language-model head.
        name: how messages call this model.
        fingerprint: hash of architecture and weights, where the weights came from a checkpoint.
    """

    family = "esm2"

    def __init__(
        self, config: EncoderConfig, *, head: bool = True, name: str = "encoder", fingerprint: str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.fingerprint = fingerprint
        # On the meta device torch's normal_ imports torch._dynamo, 2.3 s of every load; and nothing is drawn there.
        self.embed_tokens = nn.Embedding(len(TOKENS), config.width, _weight=torch.empty(len(TOKENS), config.width))
        if not self.embed_tokens.weight.is_meta:
            nn.init.normal_(self.embed_tokens.weight)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.head = LanguageModelHead(config) if head else None
        self._table: RotaryTable | None = None

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return self.config.width

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """Of what the layers' products multiply: the weights' dtype, or int8."""
        return self.dtype

    @property
    def precision(self) -> str:
        """Name of the precision in which the products run.

        Raises:
            ValueError: fp64, which has none.
        """
        return precision_name(self.product_dtype)

    def forward(self, batch: PackedBatch, *, layers: Collection[int] = ()) -> EncoderOutput:
        """Hidden states of every token of the batch.

        Args:
            batch: B packed sequences, T tokens; moved to the encoder's device.
            layers: which layers' hidden states to keep, from 0 (the embedding) to `config.layers`.

        Raises:
            ValueError: a layer does not exist.
        """
        deepest = self.config.layers
        if outside := sorted(layer for layer in layers if not 0 <= layer <= deepest):
            message = f"layers {outside} do not exist: {self.name} has 0 to {deepest}"
            raise ValueError(message)
        stream_TD, kept = self._run(batch, layers)
        hidden_TD = self.final_norm(stream_TD)
        if deepest in layers:
            kept[deepest] = hidden_TD
        return EncoderOutput(hidden_TD, kept)

    def hidden(self, batch: PackedBatch, layer: int) -> torch.Tensor:
        """Hidden states (T, D) of every token after one layer; those above it do not run.

        Args:
            batch: B packed sequences, T tokens; moved to the encoder's device.
            layer: 0 is the embedding, 1 and on the residual stream after that layer, fp32 at least; the last,
                `config.layers`, is `hidden_TD` of a whole pass, after the final LayerNorm. As fair-esm's
                `repr_layers` has them.

        Raises:
            ValueError: the layer does not exist.
        """
        deepest = self.config.layers
        if not 0 <= layer <= deepest:
            message = f"layer {layer} does not exist: {self.name} has 0 to {deepest}"
            raise ValueError(message)
        if layer == deepest:
            return self(batch).hidden_TD  # type: ignore[no-any-return]
        return self._run(batch, (), stop=layer)[0]

    def stream(self, batch: PackedBatch) -> torch.Tensor:
        """The residual stream after the last layer, before the final LayerNorm: (T, D), fp32 at least.

        A nesting chain normalises it itself, with the norm's affine part folded into its projection.
        """
        return self._run(batch, ())[0]

    def row_logits(self, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        """Logits of some tokens: (R, V), fp32 at least, whatever the precision of the layers.

        The last layer beyond its keys and values, the final norm and the head run for these tokens alone.

        Args:
            batch: B packed sequences; moved to the encoder's device.
            chosen: R of its tokens; moved likewise.

        Raises:
            ValueError: the checkpoint had no language-model head.
        """
        return self.logits(self.row_hidden(batch, chosen))

    def row_hidden(self, batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        """Hidden states of some tokens after the final LayerNorm: (R, D), fp32 at least; differentiable.

        Args:
            batch, chosen: as `row_logits` takes them.
        """
        return self.final_norm.unrounded(self._run(batch, (), chosen.to(self.device))[0])

    def _run(
        self,
        batch: PackedBatch,
        layers: Collection[int],
        chosen: ChosenRows | None = None,
        *,
        stop: int | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The stream after the last layer, or after layer `stop`, and copies of the stream after some `layers`."""
        deepest = self.config.layers
        batch = batch.to(self.device)
        T = len(batch.tokens_T)
        # Many rows: attention over whole sequences is the faster one.
        few = chosen if chosen is not None and 2 * len(chosen.index_R) < T else None
        if is_compiled(self.product_dtype, self.device):
            batch, few = _fill(batch, few)
        x_TD = self._embed(batch)
        # Passes over the stream write into it: what is kept is a copy.
        kept = {0: x_TD[:T].clone()} if 0 in layers else {}
        table = self._rotary_table(max(batch.lengths_B, default=0))
        pending: Product | None = None
        for depth, layer in enumerate(self.layers if stop is None else self.layers[:stop], start=1):
            x_TD, pending = layer(x_TD, pending, batch, table, few if depth == deepest else None)
            if depth in layers and depth != deepest:
                x_TD, pending = add_norm(x_TD, pending, None, dtype=x_TD.dtype)[0], None
                kept[depth] = x_TD[:T].clone()
        if pending is not None:
            x_TD = add_norm(x_TD, pending, None, dtype=x_TD.dtype)[0]
        if chosen is None:
            return x_TD[:T], kept
        return x_TD[: len(chosen.index_R)] if few is not None else x_TD[chosen.index_R], kept

    def tensors_at(self) -> tuple[int, int]:
        """Where the weights and the rotary table lie in memory: what is captured with others is stale."""
        table = self._table
        return self.embed_tokens.weight.data_ptr(), 0 if table is None else table.cos_PJ.data_ptr()

    def _rotary_table(self, longest: int) -> RotaryTable:
        """Kept from batch to batch, as many places as the longest sequence so far needed."""
        accurate = torch.float64 if self.dtype == torch.float64 else torch.float32
        table = self._table
        known = table is not None and table.cos_PJ.device == self.device and table.cos_PJ.dtype == accurate
        if table is None or not known or len(table.cos_PJ) < longest:
            # Whole powers of two: a library in order of length does not make a table for each batch.
            places_P = torch.arange(max(1 << 10, 1 << longest.bit_length()), device=self.device)
            cos, sin = rotary_table(places_P, self.config.head_width, accurate)
            table = self._table = RotaryTable(cos.squeeze(1), sin.squeeze(1))
        return table

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        x_TD: torch.Tensor = self.embed_tokens(batch.tokens_T)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if not self.config.token_dropout:
            return x_TD
        # Per sequence: r = masks / (L + 2), <cls> and <eos> counted. Masked rows become zero, all others are scaled by
        # (1 - 0.12) / (1 - r), also where nothing is masked. Sums of prefixes keep this free of a wait for the GPU.
        masked_T = batch.tokens_T == MASK_ID
        masks_before = F.pad(masked_T.cumsum(0), (1, 0))
        begins, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
        lengths = (ends - begins).clamp(min=1)
        # Counts divide to fp32 unless they are fp64 first, and 1 - r loses digits where nearly all is masked.
        ratio_B = (masks_before[ends] - masks_before[begins]).to(torch.float64) / lengths
        scale_B = (1 - TRAINED_MASK_RATIO) / (1 - ratio_B)
        scale_T = scale_B.repeat_interleave(ends - begins, output_size=x_TD.shape[0])
        return x_TD * scale_T.masked_fill(masked_T, 0.0).to(x_TD.dtype)[:, None]

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) over the alphabet for N rows of `hidden_TD`: all of them, or only those that matter.

        Raises:
            ValueError: the checkpoint had no language-model head.
        """
        if self.head is None:
            message = f"{self.name} has no language-model head: its checkpoint holds the encoder alone"
            raise ValueError(message)
        result: torch.Tensor = self.head(hidden_ND, self.embed_tokens.weight)
        return result

    @torch.inference_mode()
    def encode(self, sequences: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """The last layer after the final LayerNorm for each sequence: residues only, float32 (L, D).

        All sequences run as one batch; `Embedder` cuts many into batches.

        Raises:
            TypeError: `sequences` is a plain string.
            ValueError: a letter is outside the alphabet.
        """
        batch = pack(sequences)
        hidden_TD = self(batch).hidden_TD.float().cpu().numpy()
        ends = np.cumsum(batch.lengths_B)
        return [
            hidden_TD[end - length + 1 : end - 1] for end, length in zip(ends.tolist(), batch.lengths_B, strict=True)
        ]


def _fill(batch: PackedBatch, chosen: ChosenRows | None) -> tuple[PackedBatch, ChosenRows | None]:
    """Both with rows of nobody at their ends, so that few products are compiled."""
    T = len(batch.tokens_T)
    if chosen is None:
        return batch.filled(rows_to_multiply(T)), None
    R = len(chosen.index_R)
    missing = rows_to_multiply(R) - R
    tokens = rows_to_multiply(T + missing)
    of_nobody = torch.arange(T, T + missing, device=chosen.index_R.device)
    counts_B = chosen.counts_B + (1,) * missing + (0,) * (tokens - T - missing)
    return batch.filled(tokens), ChosenRows(torch.cat([chosen.index_R, of_nobody]), counts_B)
