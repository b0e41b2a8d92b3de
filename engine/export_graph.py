"""What is exported: encoders on padded tokens, and a chain's projection, as one module of plain operations.

The packed pass of `encoder.py` says what is computed; here the same stands in a form that other runtimes take: tokens
(B, L), each row from its first column on, filled up with `<pad>`. Positions count from each row's first column, padding
is never attended to, and the share of masks is that of a row's own tokens.

In fp16 every matrix product is fp16, which is all that some chips multiply; the residual stream, norms, softmax, GELU,
pooling and all outputs are fp32.

Shapes: B sequences, L tokens of the longest, H heads, K head width, D width, V vocabulary, X of the row so far, N
dimensions that a stage adds, W of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.rotary import rotary_table
from .alphabet import BOS_ID, EOS_ID, MASK_ID, PAD_ID
from .chain import Chain, Fold
from .encoder import TRAINED_MASK_RATIO, Encoder, Layer
from .family import Family
from .nesting import Nesting

OUTPUTS = ("logits", "residue", "mean", "nested")
"""What a graph can give: float32 (B, L, V), (B, L, D), (B, D) and (B, W). The first three are the largest model's."""


class ProductGraph(nn.Module):
    """A matrix product, with its bias where it has one: fp32 in, fp32 out, multiplied in `dtype`."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.detach().to(dtype), requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class LayerGraph(nn.Module):
    """One layer of an encoder."""

    def __init__(self, layer: Layer, head_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.head_width, self.dtype = layer.heads, head_width, dtype
        self.attention_norm, self.feedforward_norm = layer.attention_norm, layer.feedforward_norm
        self.qkv, self.out, self.fc1, self.fc2 = (
            ProductGraph(product.weight, product.bias, dtype)
            for product in (layer.qkv, layer.out, layer.fc1, layer.fc2)
        )

    def forward(
        self, x_BLD: torch.Tensor, cos_LHJ: torch.Tensor, sin_LHJ: torch.Tensor, mask_B11L: torch.Tensor
    ) -> torch.Tensor:
        x_BLD = x_BLD + self.out(self._attend(self.qkv(self.attention_norm(x_BLD)), cos_LHJ, sin_LHJ, mask_B11L))
        out_BLD: torch.Tensor = x_BLD + self.fc2(F.gelu(self.fc1(self.feedforward_norm(x_BLD))))
        return out_BLD

    def _attend(
        self, qkv: torch.Tensor, cos_LHJ: torch.Tensor, sin_LHJ: torch.Tensor, mask_B11L: torch.Tensor
    ) -> torch.Tensor:
        B, L = qkv.shape[0], qkv.shape[1]
        # What follows, up to the softmax's product with v, is what `onnx_attention` looks for.
        q, k, v = (part.view(B, L, self.heads, self.head_width) for part in qkv.chunk(3, dim=-1))
        # Scaled before the product: in fp16 the sum then stays sqrt(K) times farther from its largest number.
        q = _turn(q * self.head_width**-0.5, cos_LHJ, sin_LHJ).to(self.dtype)
        k = _turn(k, cos_LHJ, sin_LHJ).to(self.dtype)
        scores_BHLL = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() + mask_B11L
        attended_BHLK = scores_BHLL.softmax(dim=-1).to(self.dtype) @ v.to(self.dtype).transpose(1, 2)
        return attended_BHLK.float().transpose(1, 2).reshape(B, L, self.heads * self.head_width)


def _turn(x_BLHK: torch.Tensor, cos_LHJ: torch.Tensor, sin_LHJ: torch.Tensor) -> torch.Tensor:
    """Rotary positions, as `kernels.rotary` defines them."""
    first, second = x_BLHK.chunk(2, dim=-1)
    return torch.cat((first * cos_LHJ - second * sin_LHJ, second * cos_LHJ + first * sin_LHJ), dim=-1)


class EncoderGraph(nn.Module):
    """An encoder up to its residual stream before the final LayerNorm.

    Args:
        encoder: fp32, on the CPU.
        most_tokens: longest row that can be run; the rotary table is as long.
        dtype: of the products, fp32 or fp16.
    """

    cos_PJ: torch.Tensor
    sin_PJ: torch.Tensor

    def __init__(self, encoder: Encoder, most_tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = encoder.config
        self.embed_tokens = encoder.embed_tokens
        self.heads = config.heads
        self.token_dropout = config.token_dropout
        self.eps = config.layer_norm_eps
        self.final_norm = encoder.final_norm
        self.layers = nn.ModuleList(
            LayerGraph(cast("Layer", layer), config.head_width, dtype) for layer in encoder.layers
        )
        # A table, because cosines of large angles are not the same in every runtime.
        cos, sin = rotary_table(torch.arange(most_tokens), config.head_width, torch.float32)
        self.register_buffer("cos_PJ", cos.squeeze(1).contiguous())
        self.register_buffer("sin_PJ", sin.squeeze(1).contiguous())

    def forward(self, tokens_BL: torch.Tensor, padding_BL: torch.Tensor) -> torch.Tensor:
        L = tokens_BL.shape[1]
        x_BLD: torch.Tensor = self.embed_tokens(tokens_BL)
        if self.token_dropout:
            x_BLD = x_BLD * self._scale(tokens_BL, padding_BL)[..., None]
        # Added, not filled in: ONNX Runtime's Where takes four times as long as its Add over all scores. And not minus
        # infinity: a row of nothing but padding would become NaN.
        mask_BL = torch.zeros_like(x_BLD[..., 0]).masked_fill(padding_BL, torch.finfo(torch.float32).min)
        # For every head, and not by broadcast: in each of four products a layer that goes over K / 2 numbers at a time.
        cos_LHJ, sin_LHJ = (table_PJ[:L, None].expand(-1, self.heads, -1) for table_PJ in (self.cos_PJ, self.sin_PJ))
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos_LHJ, sin_LHJ, mask_BL[:, None, None, :])
        return x_BLD

    def _scale(self, tokens_BL: torch.Tensor, padding_BL: torch.Tensor) -> torch.Tensor:
        """What each token's embedding is multiplied by, see `Encoder`: 0.88 / (1 - masks / tokens), 0 for a mask.

        As 0.88 tokens / (tokens - masks): whole numbers, so fp32 loses nothing where nearly all is masked.
        """
        masked_BL = tokens_BL == MASK_ID
        tokens_B1 = (~padding_BL).float().sum(dim=1, keepdim=True)
        shown_B1 = (tokens_B1 - masked_BL.float().sum(dim=1, keepdim=True)).clamp(min=1.0)
        scale_B1 = (1 - TRAINED_MASK_RATIO) * tokens_B1 / shown_B1
        return scale_B1 * (~masked_BL).float()


class HeadGraph(nn.Module):
    """The language-model head on hidden states."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        assert encoder.head is not None
        self.dense = ProductGraph(encoder.head.dense.weight, encoder.head.dense.bias, dtype)
        self.norm = encoder.head.norm
        self.decoder = ProductGraph(encoder.embed_tokens.weight, encoder.head.bias, dtype)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        logits_BLV: torch.Tensor = self.decoder(self.norm(F.gelu(self.dense(hidden_BLD))))
        return logits_BLV


class StageGraph(nn.Module):
    """A stage of a chain on pooled rows: [x | n P + x G + c], or in a naive chain n P + x G + c alone."""

    offset_N: torch.Tensor

    def __init__(self, fold: Fold, *, naive: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.naive = naive
        self.of_new = ProductGraph(fold.projection_DN.T.contiguous(), None, dtype)
        self.of_row = ProductGraph(fold.base_XN.T.contiguous(), None, dtype)
        self.register_buffer("offset_N", fold.offset_N.float())

    def forward(self, row_BX: torch.Tensor, normalised_BD: torch.Tensor) -> torch.Tensor:
        appended_BN: torch.Tensor = self.of_new(normalised_BD) + self.of_row(row_BX) + self.offset_N
        return appended_BN if self.naive else torch.cat((row_BX, appended_BN), dim=-1)


class ExportGraph(nn.Module):
    """All that one exported file computes.

    Args:
        encoders: fp32, on the CPU, smallest first; several only with a chain, as an initial run of its models.
        outputs: of `OUTPUTS`, in the order in which they are returned.
        chain: needed for "nested".
        most_tokens: longest row, `<cls>` and `<eos>` counted.
        dtype: of the matrix products, fp32 or fp16.

    Raises:
        InputError: the encoders are not an initial run of the chain's models.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        outputs: Sequence[str],
        *,
        chain: Chain | None,
        most_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        # Smaller models run for the nested row alone.
        members = encoders if "nested" in self.outputs else encoders[-1:]
        self.encoders = nn.ModuleList(EncoderGraph(encoder, most_tokens, dtype) for encoder in members)
        self.head = HeadGraph(encoders[-1], dtype) if "logits" in self.outputs else None
        self.stages = nn.ModuleList()
        if chain is not None and "nested" in self.outputs:
            nesting = Nesting(chain, Family.of(encoders).members)
            self.stages.extend(StageGraph(fold, naive=chain.is_naive, dtype=dtype) for fold in nesting.folds)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, fp32, of int64 tokens (B, L). What stands at padded places of (B, L, ...) has no meaning."""
        padding_BL = tokens == PAD_ID
        blank_BL = padding_BL | (tokens == BOS_ID) | (tokens == EOS_ID)
        streams = [encoder(tokens, padding_BL) for encoder in self.encoders]
        last_BLD = cast("EncoderGraph", self.encoders[-1]).final_norm(streams[-1])
        found: dict[str, torch.Tensor] = {"residue": last_BLD}
        if self.head is not None:
            found["logits"] = self.head(last_BLD)
        if "mean" in self.outputs:
            found["mean"] = _mean(last_BLD, blank_BL)
        if "nested" in self.outputs:
            found["nested"] = self._nest(streams, blank_BL)
        return tuple(found[name] for name in self.outputs)

    def _nest(self, streams: Sequence[torch.Tensor], blank_BL: torch.Tensor) -> torch.Tensor:
        encoders = [cast("EncoderGraph", encoder) for encoder in self.encoders]
        row_BX = _mean(encoders[0].final_norm(streams[0]), blank_BL)
        for encoder, stage, stream_BLD in zip(encoders[1:], self.stages, streams[1:], strict=True):
            normalised_BLD = F.layer_norm(stream_BLD, stream_BLD.shape[-1:], eps=encoder.eps)
            row_BX = stage(row_BX, _mean(normalised_BLD, blank_BL))
        return row_BX


def _mean(x_BLD: torch.Tensor, blank_BL: torch.Tensor) -> torch.Tensor:
    """Over residues only: masks and unknown letters count, `<cls>`, `<eos>` and padding do not."""
    residues_B1 = (~blank_BL).float().sum(dim=1, keepdim=True).clamp(min=1.0)
    return x_BLD.masked_fill(blank_BL[..., None], 0.0).sum(dim=1) / residues_B1
