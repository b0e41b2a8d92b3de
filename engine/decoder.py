"""The GPT-2 decoder, run on packed sequences and, with a cache, token by token.

Architecture: Radford et al. 2019, as ProtGPT2 uses it: pre-LayerNorm, learned positions, GELU by tanh, tied head.
Shapes: B sequences, T tokens, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.add_norm import add_norm
from ..kernels.linear import needs_widening
from ..kernels.product import Product
from ..kernels.product_shapes import is_compiled, rows_to_multiply
from ..kernels.varlen_attention import varlen_attention
from .decoder_config import DecoderConfig
from .device import precision_name
from .encoder import LayerNorm, Linear
from .packing import PackedBatch
from .transfer import to_device
from .vocabulary import Vocabulary

Attend = Callable[[int, Product], torch.Tensor]
"""What a layer's attention does with its product (N, 3 H K), queries, then keys, then values: (N, H K)."""


class DecoderLayer(nn.Module):
    """One layer. The residual stream `x_ND` stays fp32 in every precision, as the encoder's does."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, eps = config.width, config.layer_norm_eps
        self.attention_norm = LayerNorm(D, eps=eps)
        self.qkv = Linear(D, 3 * D)
        self.out = Linear(D, D)
        self.feedforward_norm = LayerNorm(D, eps=eps)
        self.fc1 = Linear(D, config.feedforward)
        self.fc2 = Linear(config.feedforward, D)

    def forward(
        self, x_ND: torch.Tensor, pending: Product | None, attend: Callable[[Product], torch.Tensor]
    ) -> tuple[torch.Tensor, Product]:
        """The stream, and what is still to be added to it."""
        x_ND, rows = add_norm(x_ND, pending, self.attention_norm.norm, dtype=self.qkv.takes)
        assert rows is not None
        attended_ND = attend(self.qkv.product(rows))
        x_ND, rows = add_norm(x_ND, self.out.product(attended_ND), self.feedforward_norm.norm, dtype=self.fc1.takes)
        assert rows is not None
        inner_NF = F.gelu(self.fc1.product(rows).numbers(), approximate="tanh")
        if self.fc2.move is not None:
            inner_NF = inner_NF * self.fc2.move.times_F - self.fc2.move.minus_F
        return x_ND, self.fc2.product(inner_NF)


class Decoder(nn.Module):
    """A GPT-2 decoder.

    Args:
        config: the architecture.
        vocabulary: its tokens.
        name: how messages call this model.
        fingerprint: hash of architecture and weights, where the weights came from a checkpoint.
    """

    family = "gpt2"

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        *,
        name: str = "decoder",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.name = name
        self.fingerprint = fingerprint
        V, D = config.vocabulary, config.width
        # Given tensors: torch's own initialisation imports its compiler on the meta device, seconds of every load.
        self.embed_tokens = nn.Embedding(V, D, _weight=torch.empty(V, D))
        self.embed_places = nn.Embedding(config.places, D, _weight=torch.empty(config.places, D))
        if not self.embed_tokens.weight.is_meta:
            nn.init.normal_(self.embed_tokens.weight, std=0.02)
            nn.init.normal_(self.embed_places.weight, std=0.01)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.final_norm = LayerNorm(D, eps=config.layer_norm_eps)
        self._wide_head: tuple[tuple[int, int], torch.Tensor] | None = None

    @property
    def dim(self) -> int:
        """D, the width of the hidden states."""
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
        """Name of the precision in which the products run."""
        return precision_name(self.product_dtype)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states of every token after the final LayerNorm: (T, D), fp32 at least.

        Args:
            batch: B packed sequences of ids, `<|endoftext|>` or the like included; moved to the decoder's device.

        Raises:
            ValueError: a sequence is longer than the learned positions.
        """
        batch = batch.to(self.device)
        longest = max(batch.lengths_B, default=0)
        if longest > self.config.places:
            message = f"a sequence has {longest} tokens; {self.name} has positions for {self.config.places}"
            raise ValueError(message)
        rows = batch.tokens_T.shape[0]
        if is_compiled(self.product_dtype, self.device):
            batch = batch.filled(rows_to_multiply(rows))
        ends = batch.cu_seqlens.long()
        T = batch.tokens_T.shape[0]
        begins_T = ends[:-1].repeat_interleave(ends.diff(), output_size=T)
        places_T = torch.arange(T, device=self.device) - begins_T

        def attend(layer: int, qkv: Product) -> torch.Tensor:
            qkv_THK = qkv.numbers().view(T, 3 * self.config.heads, self.config.head_width)
            q, k, v = qkv_THK.chunk(3, dim=1)
            return varlen_attention(q, k, v, batch.cu_seqlens, batch.lengths_B, causal=True).flatten(1)

        return self.run(batch.tokens_T, places_T, attend)[:rows]

    def run(self, tokens_N: torch.Tensor, places_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states (N, D) of tokens at places of their sequences, with the attention that is given."""
        x_ND = self.embed_tokens(tokens_N) + self.embed_places(places_N)
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        pending: Product | None = None
        for number, layer in enumerate(self.layers):
            x_ND, pending = layer(x_ND, pending, lambda qkv, number=number: attend(number, qkv))
        x_ND = add_norm(x_ND, pending, None, dtype=x_ND.dtype)[0]
        return self.final_norm.unrounded(x_ND)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) for N rows of hidden states, fp32 at least; the weight is the token embedding's."""
        weight_VD = self.embed_tokens.weight
        if not needs_widening(weight_VD):
            return F.linear(hidden_ND.to(weight_VD.dtype), weight_VD).to(hidden_ND.dtype)
        # Kept in fp32 as well, as the layers' weights are.
        state = (weight_VD.data_ptr(), weight_VD._version)
        if self._wide_head is None or self._wide_head[0] != state:
            self._wide_head = (state, weight_VD.detach().float())
        return F.linear(hidden_ND, self._wide_head[1].to(hidden_ND.dtype))

    def head_product(self, hidden_ND: torch.Tensor) -> Product:
        """The logits as the head's product leaves them, for whoever passes over them anyway."""
        return Product(self.logits(hidden_ND))

    @torch.inference_mode()
    def log_likelihoods(self, batch: PackedBatch, *, rows_at_once: int = 1024) -> list[npt.NDArray[np.float64]]:
        """log p of each token given those before it: for each sequence float64 (tokens - 1,).

        Args:
            batch: B packed sequences of ids.
            rows_at_once: logits of so many tokens exist at a time.
        """
        if not batch.lengths_B:
            return []
        hidden_TD = self(batch)
        tokens_T = to_device(batch.tokens_T, self.device).long()
        ends = np.cumsum(batch.lengths_B)
        predicts = np.ones(len(hidden_TD), dtype=bool)
        predicts[ends - 1] = False
        rows = np.flatnonzero(predicts)
        if is_compiled(self.product_dtype, self.device):
            # The first row again, for nobody.
            rows = np.pad(rows, (0, rows_to_multiply(len(rows)) - len(rows)))
        rows_N = torch.from_numpy(rows).to(self.device)
        parts = []
        for some in torch.split(rows_N, rows_at_once):
            logits_NV = self.logits(hidden_TD[some]).double()
            picked_N = logits_NV.gather(1, tokens_T[some + 1, None])[:, 0]
            parts.append((picked_N - logits_NV.logsumexp(dim=1)).cpu().numpy())
        values = np.concatenate([np.empty(0), *parts])[: np.count_nonzero(predicts)]
        return np.split(values, np.cumsum(np.array(batch.lengths_B) - 1)[:-1])


def pack_ids(sequences: Sequence[npt.NDArray[np.int64]]) -> PackedBatch:
    """Packs sequences of ids into one batch on the CPU."""
    lengths = [len(ids) for ids in sequences]
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *sequences]).astype(np.int32)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths_B=tuple(lengths),
        index_B=np.arange(len(lengths), dtype=np.int64),
    )
