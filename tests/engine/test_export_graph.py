"""The graph that is exported says what the packed pass says, before any other runtime comes in."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import Embedder, Encoder
from protnest.engine.alphabet import MASK_ID, PAD_ID
from protnest.engine.config import EncoderConfig
from protnest.engine.export_graph import ExportGraph
from protnest.engine.onnx_model import pad_tokens
from protnest.engine.packing import PackedBatch, pack

from support.families import random_chain, tiny_family
from support.source_mutants import load_mutant
from support.tiny import random_proteins

FAMILY = tiny_family((16, 24))
CHAIN = random_chain(FAMILY)
ALL = ("logits", "residue", "mean", "nested")
PROTEINS = ["A", "MKTAYIAKQRGSHMXWLV", *random_proteins(4, longest=18), "WW"]
MASKED = {(1, 3), (1, 4), (1, 9), (6, 1), (6, 2)}
"""Row and token of masks; all residues of the last protein are masked."""


def _graph(module: Any = None, **options: Any) -> Any:
    made = ExportGraph if module is None else module.ExportGraph
    given = {"chain": CHAIN, "most_tokens": 40, "dtype": torch.float32} | options
    return made(FAMILY, ALL, **given).eval()


def _masked_batches() -> tuple[torch.Tensor, PackedBatch]:
    """The same proteins with the same masks, padded and packed."""
    tokens_BL, packed = torch.from_numpy(pad_tokens(PROTEINS)), pack(PROTEINS)
    begins = packed.cu_seqlens.tolist()
    for row, place in MASKED:
        tokens_BL[row, place] = MASK_ID
        packed.tokens_T[begins[row] + place] = MASK_ID
    return tokens_BL, packed


def _pooled(hidden_TD: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    spans = itertools.pairwise(packed.cu_seqlens.tolist())
    return torch.stack([hidden_TD[begin + 1 : end - 1].mean(dim=0) for begin, end in spans])


def _expected(packed: PackedBatch) -> dict[str, torch.Tensor]:
    """What the graph must give, in fp64, by the packed pass and the chain as it was fitted."""
    small, large = (copy.deepcopy(encoder).double() for encoder in FAMILY)
    hidden_TD = large(packed).hidden_TD
    row_BX, mean_BD = _pooled(small(packed).hidden_TD, packed), _pooled(hidden_TD, packed)
    stage = CHAIN.stages[0]
    assert stage.weight_XD is not None
    assert stage.bias_D is not None
    rest_BD = mean_BD - row_BX @ stage.weight_XD.double() - stage.bias_D.double() - stage.mean.double()
    nested_BW = torch.cat((row_BX, rest_BD @ stage.components.double().T), dim=1)
    return {"logits": large.logits(hidden_TD), "residue": hidden_TD, "mean": mean_BD, "nested": nested_BW}


def _worst_error(graph: Any) -> float:
    """Largest deviation, relative to the largest number of each output."""
    tokens_BL, packed = _masked_batches()
    expected, given = _expected(packed), graph(tokens_BL)
    worst = 0.0
    for name, found in zip(ALL, given, strict=True):
        assert found.dtype == torch.float32
        rows = found if found.dim() == 2 else found[tokens_BL != PAD_ID]
        difference = (rows.double() - expected[name]).abs().max() / expected[name].abs().max()
        worst = max(worst, float(difference.nan_to_num(torch.inf)))
    return worst


def test_equals_the_packed_pass() -> None:
    assert _worst_error(_graph()) < 3e-6


def test_fp16_products_stay_near() -> None:
    graph = _graph(dtype=torch.float16)
    assert 1e-5 < _worst_error(graph) < 2e-2  # not fp32 by mistake, and not half as good as fp16 can be
    tokens_BL, packed = _masked_batches()
    for name, found in zip(ALL, graph(tokens_BL), strict=True):
        rows = found if found.dim() == 2 else found[tokens_BL != PAD_ID]
        assert torch.cosine_similarity(rows.double(), _expected(packed)[name], dim=-1).min() > 0.9999, name


MUTANTS = {
    "padding attended to": {"masked_fill(padding_BL, torch.finfo(torch.float32).min)": "masked_fill(padding_BL, 1.0)"},
    "padding mask left out": {".float() + mask_B11L": ".float()"},
    "rescale left out": {"if self.token_dropout:": "if False:"},
    "rescale only where masks are": {"return scale_B1 *": "return torch.where(shown_B1 == tokens_B1, 1.0, scale_B1) *"},
    "masks not blanked": {" * (~masked_BL).float()": " * torch.ones_like(masked_BL).float()"},
    "padding counted as tokens": {"(~padding_BL).float().sum": "torch.ones_like(padding_BL).float().sum"},
    "one ratio for the whole batch": {
        "(~padding_BL).float().sum(dim=1, keepdim=True)": "(~padding_BL).float().sum()",
        "masked_BL.float().sum(dim=1, keepdim=True)": "masked_BL.float().sum()",
    },
    "positions all alike": {"table_PJ[:L, None]": "table_PJ[:1, None]"},
    "positions counted backwards": {"(self.cos_PJ, self.sin_PJ)": "(self.cos_PJ, -self.sin_PJ)"},
    "only queries turned": {"k = _turn(k, cos_LHJ, sin_LHJ)": "k = k"},
    "pairs turned the wrong way": {"first * cos_LHJ - second * sin_LHJ": "first * cos_LHJ + second * sin_LHJ"},
    "scores not scaled": {"q * self.head_width**-0.5": "q"},
    "<cls> and <eos> pooled": {" | (tokens == BOS_ID) | (tokens == EOS_ID)": ""},
    "padding pooled": {"blank_BL = padding_BL |": "blank_BL ="},
    "row divided by the batch's length": {".sum(dim=1) / residues_B1": ".mean(dim=1)"},
    "masks not pooled": {"blank_BL = padding_BL |": "blank_BL = padding_BL | (tokens == MASK_ID) |"},
    "final norm's affine part applied twice": {
        "F.layer_norm(stream_BLD, stream_BLD.shape[-1:], eps=encoder.eps)": "encoder.final_norm(stream_BLD)"
    },
    "offset left out": {" + self.of_row(row_BX) + self.offset_N": " + self.of_row(row_BX)"},
    "residues before the final norm": {'{"residue": last_BLD}': '{"residue": streams[-1]}'},
    "GELU by tanh": {"(self.feedforward_norm(x_BLD)))": '(self.feedforward_norm(x_BLD)), approximate="tanh")'},
}


@pytest.mark.parametrize("name", MUTANTS)
def test_broken_graphs_are_caught(name: str, tmp_path: Path) -> None:
    module = load_mutant("engine.export_graph", MUTANTS[name], tmp_path)
    assert _worst_error(_graph(module)) > 3e-6, name


def test_naive_chain_equals_embedder() -> None:
    chain = random_chain(FAMILY, naive=True)
    (nested_BW,) = ExportGraph(FAMILY, ("nested",), chain=chain, most_tokens=40, dtype=torch.float32)(
        torch.from_numpy(pad_tokens(PROTEINS))
    )
    assert np.allclose(nested_BW, Embedder(FAMILY, chain=chain).embed(PROTEINS), rtol=0, atol=1e-5)


def test_without_token_dropout() -> None:
    encoder = Encoder(EncoderConfig(layers=1, width=16, heads=2, feedforward=32, token_dropout=False)).eval()
    encoder.requires_grad_(False)
    tokens_BL, packed = _masked_batches()
    (found,) = ExportGraph([encoder], ("residue",), chain=None, most_tokens=40, dtype=torch.float32)(tokens_BL)
    assert torch.allclose(found[tokens_BL != PAD_ID], encoder(packed).hidden_TD, rtol=0, atol=1e-5)


def test_a_row_of_padding_harms_nothing() -> None:
    tokens_BL = torch.from_numpy(pad_tokens(PROTEINS))
    more = torch.cat((tokens_BL, torch.full_like(tokens_BL[:1], PAD_ID)))
    for alone, beside in zip(_graph()(tokens_BL), _graph()(more), strict=True):
        assert torch.isfinite(beside).all()
        assert torch.allclose(alone, beside[:-1], rtol=0, atol=1e-5)
