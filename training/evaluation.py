"""A model judged on held-out proteins, and designed sequences judged beside natural ones.

Every figure has how many it rests on and a 95 % interval, and beside it what it has to be read with: perplexity that
of amino acids' frequencies, a calibration error the accuracy, hits those of the reference and of shuffled designs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..engine.errors import InputError
from .calibration import Calibration, calibration
from .composition import Composition, composition, letter_counts
from .diversity import Diversity, diversity
from .estimate import Estimate, ratio
from .folding import FOLDED, Folding, folding
from .follower import NOBODY, Follower
from .held_out import HeldOut, Read
from .hmm_hits import EVALUE, HmmHits, hmm_hits
from .identity import check_aligner
from .length_distance import LengthDistance, length_distance
from .novelty import NOVEL_BELOW, Novelty, novelty
from .perplexity import letter_perplexity, residue_perplexity, token_perplexity
from .prediction import Predictor
from .token_scores import Scored, TokenScores, score_tokens

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelJudgement:
    """How well one model predicts.

    Attributes:
        name: the model's.
        task: what it was asked for, see `Predictor`.
        vocabulary: how many tokens it chooses from: a uniform guess has this perplexity per token.
        sequences, tokens, residues: how many were asked for.
        token_perplexity, residue_perplexity: see `perplexity`.
        calibration: with accuracy beside it.
    """

    name: str
    task: str
    vocabulary: int
    sequences: int
    tokens: int
    residues: int
    token_perplexity: Estimate
    residue_perplexity: Estimate
    calibration: Calibration


@dataclass(frozen=True, kw_only=True)
class PredictionJudgement:
    """A model on held-out proteins.

    Attributes:
        model: itself.
        teacher: the teacher on the same tokens, None without one.
        divergence: mean KL(teacher || model) of a token at temperature 1, in nats, None without a teacher.
        letter_perplexity: per residue, under amino acids' frequencies alone.
        letters_from: whose frequencies: "training", or the "held-out" sequences' own, which flatters them.
    """

    model: ModelJudgement
    teacher: ModelJudgement | None
    divergence: Estimate | None
    letter_perplexity: Estimate
    letters_from: str


@dataclass(frozen=True, kw_only=True)
class DesignJudgement:
    """Designed sequences beside a reference.

    Attributes:
        found, rejected, masked: records of the designs' file, and of these left out or with X for other letters.
        designs, reference: how many sequences were judged, and how many they were held against.
        composition, lengths, diversity: see there.
        hmm: None without a profile.
        novelty: None without the sequences for training.
        folding: None without ESMFold.
    """

    found: int
    rejected: int
    masked: int
    designs: int
    reference: int
    composition: Composition
    lengths: LengthDistance
    diversity: Diversity
    hmm: HmmHits | None
    novelty: Novelty | None
    folding: Folding | None


@dataclass(frozen=True, kw_only=True)
class DesignQuestions:
    """What designs are held against.

    Attributes:
        reference: natural sequences.
        train: what the model was trained on, None for no novelty.
        profile: of `hmm_hits.read_profile` or `build_profile`, None for no hits.
        evalue: a hit is below it.
        esmfold: of `folding.load_esmfold`, None for no structures.
        folded: at most so many structures.
    """

    reference: tuple[str, ...]
    train: tuple[str, ...] | None = None
    profile: Any = None
    evalue: float = EVALUE
    esmfold: Any = None
    folded: int = FOLDED


def judge_predictions(
    predictor: Predictor,
    held_out: HeldOut,
    *,
    teacher: Predictor | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[PredictionJudgement, Scored]:
    """Judges a model on held-out proteins, and gives what of its predictions a picture needs.

    Args:
        predictor: the model.
        held_out: of `read_held_out`.
        teacher: of the same vocabulary, perhaps.
        samples, seed: of the bootstrap over sequences; model and teacher are drawn alike.

    Raises:
        InputError: as `score_tokens`.
    """
    scored = score_tokens(predictor, held_out.sequences, teacher=teacher)
    divergence = None
    if scored.divergence_N is not None:
        sums_B = scored.model.sums_B(scored.divergence_N)
        divergence = ratio(sums_B, scored.model.tokens_B, samples=samples, seed=seed)
    letters_A = held_out.train_letters_A
    judgement = PredictionJudgement(
        model=_judged(predictor, scored.model, samples=samples, seed=seed),
        teacher=None
        if teacher is None or scored.teacher is None
        else _judged(teacher, scored.teacher, samples=samples, seed=seed),
        divergence=divergence,
        letter_perplexity=letter_perplexity(letter_counts(held_out.sequences), letters_A, samples=samples, seed=seed),
        letters_from="held-out" if letters_A is None else "training",
    )
    return judgement, scored


def _judged(predictor: Predictor, scores: TokenScores, *, samples: int, seed: int) -> ModelJudgement:
    return ModelJudgement(
        name=predictor.name,
        task=predictor.task,
        vocabulary=len(predictor.vocabulary),
        sequences=scores.sequences,
        tokens=len(scores.nll_N),
        residues=int(scores.residues_N.sum()),
        token_perplexity=token_perplexity(scores, samples=samples, seed=seed),
        residue_perplexity=residue_perplexity(scores, samples=samples, seed=seed),
        calibration=calibration(scores, samples=samples, seed=seed),
    )


def judge_designs(
    designs: Read,
    questions: DesignQuestions,
    *,
    samples: int = 1000,
    seed: int = 0,
    follower: Follower = NOBODY,
) -> DesignJudgement:
    """Judges designed sequences beside natural ones.

    Args:
        designs: of `read_sequences`; repeats count as often as they come.
        questions: what they are held against.
        samples, seed: of the bootstrap over designs.
        follower: is told which part runs, and how far it is.

    Raises:
        InputError: parasail is not installed, or the reference or the sequences for training are empty.
    """
    check_aligner()
    if not questions.reference or questions.train == ():
        message = "designs are held against at least one reference sequence, and one for training: there is none"
        raise InputError(message)
    ours = designs.sequences
    hits = near = folded = None
    if questions.profile is not None:
        hits = hmm_hits(
            questions.profile,
            ours,
            reference=questions.reference,
            evalue=questions.evalue,
            seed=seed,
            follower=follower,
        )
    if questions.train is not None:
        near = novelty(ours, questions.train, samples=samples, seed=seed, follower=follower)
    if questions.esmfold is not None:
        folded = folding(questions.esmfold, ours, most=questions.folded, samples=samples, seed=seed, follower=follower)
    among = diversity(ours, samples=samples, seed=seed, follower=follower)
    return DesignJudgement(
        found=designs.found,
        rejected=designs.rejected,
        masked=designs.masked,
        designs=len(ours),
        reference=len(questions.reference),
        composition=composition(ours, questions.reference, samples=samples, seed=seed),
        lengths=length_distance(ours, questions.reference, samples=samples, seed=seed),
        diversity=among,
        hmm=hits,
        novelty=near,
        folding=folded,
    )


def as_report(
    *,
    held_out: HeldOut | None = None,
    prediction: PredictionJudgement | None = None,
    designs: DesignJudgement | None = None,
    **facts: object,
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "held_out": None if held_out is None else held_out.facts,
        "prediction": None if prediction is None else asdict(prediction),
        "designs": None if designs is None else asdict(designs),
    }


Row = tuple[str, str, Estimate, str]
"""Of what, the figure's name, itself, and what it has to be read beside."""


def figures(prediction: PredictionJudgement | None, designs: DesignJudgement | None) -> list[Row]:
    """Every figure of a judgement, for a table."""
    rows = list[Row]()
    if prediction is not None:
        model, teacher = prediction.model, prediction.teacher
        rows += _model_figures(model)
        if teacher is not None and prediction.divergence is not None:
            rows += _model_figures(teacher)
            rows.append((model.name, "KL of teacher, nats", prediction.divergence, f"a token; from {teacher.name}"))
        note = f"of the {prediction.letters_from} sequences"
        rows.append(("frequencies alone", "perplexity per residue", prediction.letter_perplexity, note))
    if designs is not None:
        rows += [("designs", *row) for row in _design_figures(designs)]
    return rows


def _model_figures(model: ModelJudgement) -> list[Row]:
    found, name = model.calibration, model.name
    right = f"accuracy {found.accuracy.value:.3f}"
    asked = f"{model.tokens:,} {model.task}; a uniform guess {model.vocabulary:,}"
    rows = [
        (name, "perplexity per token", model.token_perplexity, asked),
        (name, "perplexity per residue", model.residue_perplexity, ""),
        (name, "accuracy", found.accuracy, f"mean confidence {found.confidence.value:.3f}"),
    ]
    for words, binned in (("equal width", found.equal_width), ("equal mass", found.equal_mass)):
        rows.append((name, f"ECE, {words}", binned.ece, f"{right}; calibrated exactly {binned.by_chance:.4f}"))
        rows.append((name, f"MCE, {words}", binned.mce, right))
    return rows


def _design_figures(designs: DesignJudgement) -> list[tuple[str, Estimate, str]]:
    of, lengths, among = designs.composition, designs.lengths, designs.diversity
    means = f"means {lengths.generated:.0f} and {lengths.reference:.0f}"
    rows = [
        ("composition KL, nats", of.kl, f"by chance to {of.by_chance:.4f}; {of.other_residues:,} other residues"),
        ("length distance, residues", lengths.wasserstein, f"by chance to {lengths.by_chance:.1f}; {means}"),
        ("diversity", among.distance, f"{among.pairs:,} pairs; {among.duplicates:,} duplicates"),
    ]
    if (hits := designs.hmm) is not None:
        natural = "" if hits.reference is None else f"reference {hits.reference.value:.3f}, "
        rows.append(("profile's hits", hits.hits, f"{hits.profile}; {natural}shuffled {hits.shuffled.value:.3f}"))
    if (near := designs.novelty) is not None:
        against = f"{near.train_sequences:,} for training, aligned: {near.aligned}"
        rows.append(("nearest identity", near.identity, against))
        rows.append(("novel", near.novel, f"below {NOVEL_BELOW}; {near.copies:,} copies"))
    if (folded := designs.folding) is not None:
        rows.append(("pLDDT", folded.plddt, ""))
        rows.append(("pLDDT above 70", folded.confident, ""))
    return rows
