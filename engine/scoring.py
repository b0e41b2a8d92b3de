"""Scores of variants from a language-model head: higher means better tolerated, and the wild type scores 0.

With x the wild type, y the mutant and i the mutated sites,

    masked-marginal   sum_i  log p(y_i | x without i) - log p(x_i | x without i)       each site masked singly
    wt-marginal       sum_i  log p(y_i | x) - log p(x_i | x)                           nothing masked
    mutant-marginal   sum_i  log p(y_i | y) - log p(x_i | y)                           nothing masked
    pseudo-ll         PLL(y) - PLL(x),   PLL(z) = sum_j log p(z_j | z without j)       j over all residues
                      of a decoder LL(y) - LL(x), see `likelihoods`; it has no other method

p is the softmax over the whole alphabet; the marginals' differences do not depend on that. Only pseudo-ll is defined
for insertions and deletions. Meier et al., NeurIPS 2021, define the marginals; additivity over sites is theirs, too.

A protein beyond the length that the model was trained on is seen through a window of that length: for each site or
residue the one in whose middle it lies, as far as the protein's ends allow.

Shapes: L residues of a protein, P places of it (residues from 0), N variants, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from .decoder import Decoder
from .encoder import Encoder
from .errors import InputError
from .exported_encoder import AnyEncoder, ExportedEncoder
from .fasta import clean_sequence
from .likelihoods import LikelihoodRunner, check_decoder_method
from .packing import refuse_one_string
from .queries import Logits, Query, QueryRunner, token_ids
from .retry import DoesNotFit
from .variants import Variant, parse_variant, wild_type_variant
from .windows import centred_window

Floats = npt.NDArray[np.float64]
ScoreMethod = Literal["masked-marginal", "wt-marginal", "mutant-marginal", "pseudo-ll"]
Compat = Literal["fair-esm"]
Aggregate = Literal["mean", "median", "min", "max"]

METHODS: tuple[str, ...] = get_args(ScoreMethod)
SITE_METHODS = ("masked-marginal", "wt-marginal")
"""Methods whose scores follow from one row of logits for each touched site of the wild type."""


def check_method(method: str, compat: str | None = None) -> None:
    """Raises ValueError where there is no such method, or no such way of computing it."""
    if method not in METHODS:
        message = f"method is {method!r}; allowed: {', '.join(METHODS)}"
        raise ValueError(message)
    if compat is not None and (compat not in get_args(Compat) or method != "pseudo-ll"):
        message = f"compat is {compat!r} with {method}; it is None, or 'fair-esm' with pseudo-ll"
        raise ValueError(message)


def check_variant(variant: Variant, method: str) -> None:
    """Raises InputError where a method is not defined for a variant."""
    if variant.is_indel and method != "pseudo-ll":
        message = (
            f"variant {variant.name!r} inserts or deletes residues, and {method} is defined for substitutions alone; "
            "pseudo-ll takes both"
        )
        raise InputError(message)


def site_logits(runner: QueryRunner, wild_type: str, places: Sequence[int], *, masked: bool) -> Logits:
    """Logits at places of the wild type: float32 (P, V).

    Args:
        runner: of the model.
        wild_type: L residues.
        places: P residues, from 0.
        masked: each of them masked, singly; else nothing is.
    """
    limit = runner.encoder.config.max_residues
    windows = [centred_window(len(wild_type), place, limit) for place in places]
    groups = [[row] for row in range(len(places))] if masked else _same_windows(windows)
    tokens = {window: token_ids(wild_type[slice(*window)]) for window in set(windows)}
    queries = []
    for rows in groups:
        begin = windows[rows[0]][0]
        inside = tuple(places[row] - begin + 1 for row in rows)
        queries.append(Query(tokens[windows[rows[0]]], inside, inside[0] if masked else None))
    out: Logits = np.empty((len(places), 0), dtype=np.float32)

    def take(number: int, logits_RV: Logits) -> None:
        nonlocal out
        if not out.shape[1]:
            out = np.full((len(places), logits_RV.shape[1]), np.nan, dtype=np.float32)
        out[groups[number]] = logits_RV

    _run(runner, queries, take)
    return out


def marginals(
    variants: Sequence[Variant], wild_type: str, places: Sequence[int], logits_PV: Logits
) -> npt.NDArray[np.float32]:
    """Scores of substitutions, from logits at the wild type's places: float32 (N,).

    Args:
        variants: substitutions whose sites are all among `places`.
        wild_type: L residues.
        places, logits_PV: what `site_logits` was asked for, and what it gave.
    """
    row_of = np.full(len(wild_type), -1)
    row_of[list(places)] = np.arange(len(places))
    letters = token_ids(wild_type)[1:-1]
    counts = [len(variant.sites) for variant in variants]
    sites = np.array([site for variant in variants for site in variant.sites], dtype=np.int64)
    mutated = token_ids("".join(variant.sequence[site] for variant in variants for site in variant.sites))[1:-1]
    rows_S = logits_PV.astype(np.float64)[row_of[sites]]
    each = np.arange(len(sites))
    gains = rows_S[each, mutated] - rows_S[each, letters[sites]]
    owner = np.repeat(np.arange(len(variants)), counts)
    return np.bincount(owner, weights=gains, minlength=len(variants)).astype(np.float32)


def mutant_marginals(runner: QueryRunner, variants: Sequence[Variant], wild_type: str) -> Floats:
    """Scores of substitutions, each from the unmasked mutant: float64 (N,)."""
    limit = runner.encoder.config.max_residues
    letters = token_ids(wild_type)[1:-1]
    scores = np.zeros(len(variants))
    owners: list[tuple[int, list[int]]] = []

    def queries() -> Iterator[Query]:
        for number, variant in enumerate(variants):
            # A residue replaced by itself changes nothing and adds nothing.
            sites = [site for site in variant.sites if variant.sequence[site] != wild_type[site]]
            windows = [centred_window(len(wild_type), site, limit) for site in sites]
            for rows in _same_windows(windows):
                begin, end = windows[rows[0]]
                owners.append((number, [sites[row] for row in rows]))
                places = tuple(sites[row] - begin + 1 for row in rows)
                yield Query(token_ids(variant.sequence[begin:end]), places)

    def take(number: int, logits_RV: Logits) -> None:
        owner, sites = owners[number]
        mutated = token_ids("".join(variants[owner].sequence[site] for site in sites))[1:-1]
        rows = np.arange(len(sites))
        wide = logits_RV.astype(np.float64)
        scores[owner] += float((wide[rows, mutated] - wide[rows, letters[sites]]).sum())

    _run(runner, queries(), take)
    return scores


def pseudo_log_likelihoods(runner: QueryRunner, sequences: Sequence[str], *, compat: str | None = None) -> Floats:
    """PLL of each sequence in nats: float64 (N,).

    Args:
        runner: of the model.
        sequences: N proteins.
        compat: "fair-esm" repeats what that package's script and ProteinGym's compute for `pseudo-ppl`: residue j
            masked, but the letter of residue j + 1 looked up, for all but the last two residues. Kept to reproduce
            published numbers; it is no likelihood.
    """
    limit = runner.encoder.config.max_residues
    # A query's log-probability has a place of its own, so that the sum's order is not the batches'.
    begins = np.cumsum([0, *(_pll_terms(len(sequence), compat) for sequence in sequences)])
    terms = np.zeros(int(begins[-1]))
    letters: list[int] = []
    shift = 0 if compat is None else 1

    def queries() -> Iterator[Query]:
        for sequence in sequences:
            ids = token_ids(sequence)
            windows: dict[int, npt.NDArray[np.uint8]] = {}
            for place in range(_pll_terms(len(sequence), compat)):
                begin, end = centred_window(len(sequence), place, limit)
                if begin not in windows:
                    windows = {begin: token_ids(sequence[begin:end])}
                letters.append(int(ids[1 + place + shift]))
                inside = place - begin + 1
                yield Query(windows[begin], (inside,), inside)

    def take(number: int, logits_RV: Logits) -> None:
        row = logits_RV[0].astype(np.float64)
        most = row.max()
        terms[number] = row[letters[number]] - most - np.log(np.exp(row - most).sum())

    _run(runner, queries(), take)
    return np.array([terms[begin:end].sum() for begin, end in pairwise(begins.tolist())])


def _pll_terms(residues: int, compat: str | None) -> int:
    return residues if compat is None else max(0, residues - 2)


def _same_windows(windows: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows of equal windows, together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, window in enumerate(windows):
        groups.setdefault(window, []).append(row)
    return list(groups.values())


def _run(runner: QueryRunner, queries: Sequence[Query] | Iterator[Query], take: Callable[[int, Logits], None]) -> None:
    try:
        runner.run(queries, take)
    except DoesNotFit as error:
        raise InputError(error.reason) from error


def aggregate_scores(scores_MN: npt.NDArray[np.floating], aggregate: str = "mean") -> npt.NDArray[np.float32]:
    """One score a variant from those of M models: float32 (N,).

    Args:
        scores_MN: of M models.
        aggregate: "mean", "median", "min" or "max".

    Raises:
        ValueError: `aggregate` is unknown.
    """
    if aggregate not in get_args(Aggregate):
        message = f"aggregate is {aggregate!r}; allowed: {', '.join(get_args(Aggregate))}"
        raise ValueError(message)
    reduce: Callable[..., Floats] = getattr(np, aggregate)
    return reduce(np.asarray(scores_MN, dtype=np.float64), axis=0).astype(np.float32)


def score_variants(
    model: AnyEncoder | Decoder | Sequence[AnyEncoder | Decoder],
    wt: str,
    variants: Sequence[str | Variant],
    *,
    method: ScoreMethod = "masked-marginal",
    compat: Compat | None = None,
    offset: int = 0,
    aggregate: Aggregate = "mean",
    max_tokens: int | None = None,
    after_batch: Callable[[int], None] = lambda residues: None,
) -> npt.NDArray[np.float32]:
    """Scores variants of one protein; higher means better tolerated, the wild type scores 0.

    Touched sites and distinct mutants run once each, however often they are named.

    Args:
        model: an encoder with a language-model head, an exported file that gives logits, or a decoder; or several,
            whose scores are aggregated.
        wt: the wild type's residues.
        variants: N of them: `A24G`, several substitutions joined with colons, `WT`; or `Variant`s of this wild type, as
            `variant_of_sequence` makes them of mutated sequences.
        method: see this module; masked-marginal by default, which no decoder has.
        compat: "fair-esm" with pseudo-ll reproduces that package's `pseudo-ppl`: off by one, without the last two
            residues, and without subtracting the wild type's.
        offset: subtracted from each number in the variants' names.
        aggregate: of several models' scores: "mean", "median", "min" or "max".
        max_tokens: most tokens in a batch; by default 4,096 on a CPU and 65,536 on a GPU.
        after_batch: called with the number of residues that have just been run.

    Returns:
        float32 (N,), in the order of `variants`.

    Raises:
        TypeError: `variants` is a plain string.
        InputError: the wild type or a variant is not valid, the method is not defined for it or for a model, an
            encoder has no language-model head, or a protein has more tokens than a decoder places.
        ValueError: method, compat or aggregate is unknown.
    """
    refuse_one_string(variants)  # type: ignore[arg-type]
    check_method(method, compat)
    wild_type = clean_sequence(wt)
    parsed = [each if isinstance(each, Variant) else parse_variant(each, wild_type, offset=offset) for each in variants]
    for variant in parsed:
        check_variant(variant, method)
    models = [model] if isinstance(model, Encoder | ExportedEncoder | Decoder) else list(model)
    if not models:
        message = "no model is given"
        raise InputError(message)
    runners = list[QueryRunner | LikelihoodRunner]()
    for each in models:
        if isinstance(each, Decoder):
            check_decoder_method(each.name, method, compat)
            runners.append(LikelihoodRunner(each, max_tokens=max_tokens, after_batch=after_batch))
        else:
            runners.append(QueryRunner(each, max_tokens=max_tokens, after_batch=after_batch))
    scores = [_score(runner, wild_type, parsed, method, compat) for runner in runners]
    return aggregate_scores(np.stack(scores), aggregate)


def _score(
    runner: QueryRunner | LikelihoodRunner,
    wild_type: str,
    variants: Sequence[Variant],
    method: str,
    compat: str | None,
) -> npt.NDArray[np.float32]:
    if method in SITE_METHODS and isinstance(runner, QueryRunner):
        places = sorted({site for variant in variants for site in variant.sites})
        logits_PV = site_logits(runner, wild_type, places, masked=method == "masked-marginal")
        return marginals(variants, wild_type, places, logits_PV)
    distinct = {variant.sequence: variant for variant in variants}
    if method == "pseudo-ll" and compat is None:
        distinct.setdefault(wild_type, wild_type_variant(wild_type))
    if isinstance(runner, LikelihoodRunner):
        values = runner.run(list(distinct))
    elif method == "pseudo-ll":
        values = pseudo_log_likelihoods(runner, list(distinct), compat=compat)
    else:
        values = mutant_marginals(runner, list(distinct.values()), wild_type)
    value_of = dict(zip(distinct, values.tolist(), strict=True))
    base = value_of[wild_type] if method == "pseudo-ll" and compat is None else 0.0
    return np.array([value_of[variant.sequence] - base for variant in variants], dtype=np.float32)
