"""What is said of the family: its chain, perplexities on the same held-out proteins, Spearman on mutational scans."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engine.atomic import write_atomically
from ..engine.bootstrap import bootstrap_spearman
from ..engine.chain import Chain
from ..engine.decoder import Decoder
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.fasta import read_fasta
from ..engine.likelihoods import Reach
from ..engine.ranking import spearman
from ..engine.scoring import score_variants
from ..engine.variants import Variant, read_scan
from .chain_fit import fit_chain
from .corpus import Share
from .estimate import Estimate, estimate
from .gram_pass import PassOptions, run_pass
from .student_judgement import judge


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """What figures rest on.

    Attributes:
        dms: folder of mutational scans; None: no Spearman.
        variants: most variants of a scan, drawn at random, the same ones for all models.
        judged: most held-out proteins.
        seed: of the draws.
        chain_proteins: the chain is fitted on so many training proteins, the first ones of the file, of at most
            `chain_residues` residues.
    """

    dms: Path | None = None
    variants: int = 1000
    judged: int = 1000
    seed: int = 0
    chain_proteins: int = 3000
    chain_residues: int = 512


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A mutational scan.

    Attributes:
        name: its id.
        wild_type: residues.
        variants, measured: as many as there are rows.
        fingerprint: hash of wild type and file.
    """

    name: str
    wild_type: str
    variants: Sequence[Variant]
    measured: Sequence[float]
    fingerprint: str


def read_scans(folder: Path) -> list[Scan]:
    """Scans of a folder: wt.fasta, and for each of its ids ID.csv.gz or ID.csv, as `read_scan` takes them.

    Raises:
        InputError: a file is missing or invalid.
    """
    scans = []
    for record in read_fasta(folder / "wt.fasta", quiet=True):
        files = [path for path in (folder / f"{record.id}.csv.gz", folder / f"{record.id}.csv") if path.is_file()]
        if not files:
            message = f"holds the wild type {record.id!r}, but there is no {record.id}.csv.gz beside it"
            raise InputError(message, file=folder / "wt.fasta")
        variants, measured = read_scan(files[0], record.sequence)
        digest = hashlib.blake2b(record.sequence.encode() + b"\n" + files[0].read_bytes(), digest_size=16)
        scans.append(
            Scan(
                name=record.id,
                wild_type=record.sequence,
                variants=variants,
                measured=measured,
                fingerprint=digest.hexdigest(),
            )
        )
    return scans


def fit_family_chain(
    encoders: Sequence[Encoder],
    train: Share,
    out: Path,
    *,
    name: str,
    source: str,
    options: FigureOptions,
) -> Chain:
    """Fits the chain as `protnest fit-chain` does, on training proteins alone, and writes it to `out`/`name`.chain.

    Args:
        encoders: of growing width, fp32.
        train: of whose proteins the first short ones are taken.
        out: also gets these proteins, and the sums of the pass over them, from which a killed pass goes on.
        name: of the chain.
        source: the file that they are of, for people.
        options: how many proteins, and how short.

    Raises:
        InputError: too few proteins, or the models are no chain's.
    """
    chosen = [each for each in train.sequences if len(each) <= options.chain_residues][: options.chain_proteins]
    text = "".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(chosen, start=1))
    # A pass is of its models and proteins alone: others get a file of their own.
    about = [*(encoder.fingerprint or "" for encoder in encoders), text]
    digest = hashlib.blake2b("\n".join(about).encode(), digest_size=8).hexdigest()
    fasta = out / f"{name}-proteins.fasta"
    write_atomically(fasta, lambda temporary: temporary.write_text(text, encoding="ascii"))
    pair = run_pass(encoders, fasta, out / f"{name}-{digest}.gram", PassOptions())
    fitted = fit_chain(pair)
    facts = {**fitted.data, "file": source, "longest_residues": options.chain_residues}
    chain = dataclasses.replace(fitted, data=facts)
    chain.save(out / f"{name}.chain")
    return chain


def judge_members(
    models: Mapping[str, Encoder | Decoder],
    train: Share,
    held_out: Share,
    options: FigureOptions,
    *,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Perplexity per residue of each model, and of the unigram, on the same held-out proteins; estimates as JSON."""
    found: dict[str, Any] = {"models": {}}
    for name, model in models.items():
        say(f"{name}: held-out proteins")
        judged = judge(model, None, train=train, held_out=held_out, sequences=options.judged, seed=options.seed)
        found |= {"sequences": judged["sequences"], "unigram": judged["unigram"]}
        found["models"][name] = judged["student"]["residue_perplexity"]
    return found


def rank_scans(
    models: Mapping[str, Encoder | Decoder],
    scans: Sequence[Scan],
    options: FigureOptions,
    *,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Spearman of each model's scores on each scan: masked marginals, of a decoder log-likelihoods.

    Returns:
        `variants`, the most of a scan; `scans`: for each `found`, `variants`, and by model an estimate as JSON, None
        where the protein is longer than a decoder reads.
    """
    found: dict[str, Any] = {"variants": options.variants, "seed": options.seed, "scans": {}}
    for scan in scans:
        say(f"{scan.name}: variants")
        chosen = np.random.default_rng(options.seed).permutation(len(scan.variants))[: options.variants]
        rows = np.sort(chosen).tolist()
        variants, measured_N = [scan.variants[row] for row in rows], np.array([scan.measured[row] for row in rows])
        by_model = {name: _rank(model, scan.wild_type, variants, measured_N) for name, model in models.items()}
        found["scans"][scan.name] = {"found": len(scan.variants), "variants": len(rows), "models": by_model}
    return found


def _rank(
    model: Encoder | Decoder, wild_type: str, variants: Sequence[Variant], measured_N: Any
) -> dict[str, Any] | None:
    if isinstance(model, Decoder) and not _reads(model, wild_type):
        return None
    method: Literal["pseudo-ll", "masked-marginal"]
    method = "pseudo-ll" if isinstance(model, Decoder) else "masked-marginal"
    score_N = score_variants(model, wild_type, variants, method=method).astype(np.float64)
    found: Estimate = estimate(spearman(score_N, measured_N), bootstrap_spearman(score_N, measured_N), len(measured_N))
    return asdict(found)


def _reads(decoder: Decoder, sequence: str) -> bool:
    try:
        Reach.of(decoder).check(sequence)
    except InputError:
        return False
    return True
