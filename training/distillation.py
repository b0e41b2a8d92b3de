"""Distilling a teacher into a student, from a FASTA file to a checkpoint; or training on labels alone.

    encoder from encoder        masked residues
    decoder from decoder        next tokens
    no teacher                  plain cross-entropy of the same rows

Vocabularies must be the same. An encoder sees a crop of what is longer than the shorter model's context, another one
with other masks; a decoder's sequences are split (see `causal_corpus`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.decoder import Decoder
from ..engine.device import precision_name, resolve_device, resolve_precision
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.models import load_checkpoint
from ..kernels.kd_options import KDOptions
from .causal_task import CausalTask, causal_corpus
from .corpus import Share, read_shares
from .distributed import ALONE, Processes, own_device
from .growth import grow
from .masked_task import ROWS, MaskedTask, check_mask_share
from .masking import ASKED
from .order import BatchOrder
from .row_task import RowTask
from .student_judgement import judge
from .students import build_student, copy_layers, save_student
from .teacher import LiveTeacher, model_fingerprint
from .teacher_cache import TeacherCache
from .trainer import StepReport, Trainer, TrainerConfig
from .training_folder import TrainingFolder

RANDOM, LAYERS = "random", "layers"
_CACHED_MASKS = 4


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides the student, beside teacher and data.

    Attributes:
        student: a preset of `students`, or a folder in Hugging Face layout.
        vocabulary: of a decoder preset without a teacher: "residues", or a decoder's folder.
        init: "random": fresh weights; "layers": every n-th of the teacher's layers; else a narrower encoder, as
            `load_model` takes it, with whose answers the student begins (see `growth`).
        epochs: passes over the data, where `trainer.steps` is not to count.
        trainer: how it is trained.
        options: of the distillation loss.
        rows: an encoder's: "masked" or "all", see `MaskedTask`.
        mask_epochs: an encoder's masks come again after so many epochs, 0: never; by default never, with a cache 4.
        mask_share: of an encoder's residues that are asked for, on average.
        cache_top_k: logits that a cache keeps of a row, where the vocabulary has more than 64 tokens.
        held_out: most proteins that the student is judged on.

    Raises:
        InputError: a word or number is not allowed.
    """

    student: str
    vocabulary: str | None = None
    init: str = RANDOM
    epochs: int | None = None
    trainer: TrainerConfig
    options: KDOptions = dataclasses.field(default_factory=KDOptions)
    rows: str = "masked"
    mask_epochs: int | None = None
    mask_share: float = ASKED
    cache_top_k: int = 64
    held_out: int = 1000

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            message = f"rows is {self.rows!r}; allowed: {', '.join(ROWS)}"
            raise InputError(message)
        check_mask_share(self.mask_share)
        for name, least in (("epochs", 1), ("mask_epochs", 0), ("cache_top_k", 1), ("held_out", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                message = f"{name} is {value!r}, expected a whole number of at least {least}"
                raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a caller is told of on the way.

    Attributes:
        on_start: steps in all, and steps that an earlier run took.
        after_step: what is known of a step.
        after_shard: of the teacher's cache: how many are done, of how many.
    """

    on_start: Callable[[int, int], None] = lambda steps, done: None
    after_step: Callable[[StepReport], None] = lambda report: None
    after_shard: Callable[[int, int], None] = lambda done, of: None


def distill(
    teacher: str | Path | None,
    data: Path,
    out: Path,
    config: DistillConfig,
    *,
    device: str = "auto",
    cache: Path | None = None,
    overwrite: bool = False,
    save_every_s: float = 120.0,
    callbacks: Callbacks | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Trains a student on a FASTA file and writes it to `out`; goes on where a killed run of the same settings stopped.

    Args:
        teacher: as `load_model` takes it; None for labels alone.
        data: FASTA; one sequence in twenty, by its hash, is held out to judge by.
        out: gets the student in Hugging Face layout (fp16), `training.json`, and what `TrainingFolder` keeps.
        config: what is trained, and how.
        device: where.
        cache: folder for the teacher's answers; None: it is asked anew in every step.
        overwrite: throw away a run of other settings in `out`: its own files alone.
        save_every_s: seconds between checkpoints.
        callbacks: what to tell of.
        processes: who trains together; all call this with the same arguments.

    Returns:
        What `training.json` holds; without perplexities in processes other than the first.

    Raises:
        InputError: data, models or settings cannot be used, vocabularies differ, `out` or `cache` hold something else,
            the loss is not finite, or a disk is full.
    """
    callbacks = callbacks if callbacks is not None and processes.is_first else Callbacks()
    resolved = own_device(resolve_device(device))
    precision = precision_name(resolve_precision(config.trainer.precision, resolved))
    taught_by = None if teacher is None else load_checkpoint(teacher, device=str(resolved), precision=precision)
    train, held_out = read_shares(data)
    student = _student(config, taught_by)
    plan = _plan(student, taught_by, train, config, cache, processes)
    trainer = Trainer(plan.task, plan.trainer, device=resolved, processes=processes)
    identity = {**trainer.identity(), "student": config.student, "init": config.init, "initial": plan.initial}
    with TrainingFolder(out, identity, overwrite=overwrite, processes=processes) as folder:
        if folder.report is not None:
            return folder.report
        if plan.cache is not None:
            if processes.is_first:
                used = trainer.order.used(plan.trainer.steps, batches_a_step=trainer.batches_a_step)
                plan.cache.fill(used, after_shard=callbacks.after_shard)
            processes.wait()
            plan.cache.look_again()
        folder.resume(trainer)
        callbacks.on_start(plan.trainer.steps, trainer.step)
        seconds = folder.train(trainer, save_every_s=save_every_s, after_step=callbacks.after_step)
        report = {
            "student": config.student,
            "teacher": None if taught_by is None else taught_by.name,
            "teacher_fingerprint": identity["teacher"],
            "recipe": _recipe(config, plan, taught_by),
            "processes": processes.world,
            "device": resolved.type,
            "torch": torch.__version__,
            "data": {
                "file": data.name,
                "train_sequences": len(train),
                "held_out_sequences": len(held_out),
                "fingerprint": plan.task.corpus.fingerprint,
                **plan.facts,
            },
            "epochs": trainer.position.epoch + 1,
            "seconds": round(seconds, 1),
        }
        trained = trainer.whole_model()
        assert isinstance(trained, Encoder | Decoder)
        if processes.is_first:
            seed, most = config.trainer.seed, config.held_out
            report["perplexity"] = judge(trained, taught_by, train=train, held_out=held_out, sequences=most, seed=seed)
            save_student(trained, out)
            folder.finish(report)
        processes.wait()
        return report


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a run is made of.

    Attributes:
        task: what is learnt.
        trainer: how; its steps counted.
        cache: of the teacher's answers.
        facts: on the data, for the report.
        initial: hash of the weights that it begins with.
    """

    task: RowTask
    trainer: TrainerConfig
    cache: TeacherCache | None
    facts: dict[str, int]
    initial: str


def _student(config: DistillConfig, teacher: Encoder | Decoder | None) -> Encoder | Decoder:
    vocabulary = config.vocabulary
    if isinstance(teacher, Decoder) and vocabulary is None:
        student = build_student(config.student, vocabulary=teacher.vocabulary, seed=config.trainer.seed)
    else:
        student = build_student(config.student, vocabulary=vocabulary, seed=config.trainer.seed)
    if teacher is not None:
        check_pair(student, teacher)
    if config.init == LAYERS:
        if teacher is None:
            message = "init is 'layers', but there is no teacher to copy them from"
            raise InputError(message)
        copy_layers(student, teacher)
    elif config.init != RANDOM:
        begun_as = load_checkpoint(config.init, device="cpu", precision="fp32")
        if not isinstance(student, Encoder) or not isinstance(begun_as, Encoder):
            message = f"{student.name} cannot begin as {begun_as.name}: only encoders grow"
            raise InputError(message)
        grow(begun_as, student)
    return student


def check_pair(student: Encoder | Decoder, teacher: Encoder | Decoder) -> None:
    """A student learns from a teacher of its own kind, over the same tokens.

    Raises:
        InputError: kinds or vocabularies differ, or an encoder has no language-model head.
    """
    kinds = ["encoder" if isinstance(model, Encoder) else "decoder" for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        message = f"{teacher.name} is an {kinds[1]}" if kinds[1] == "encoder" else f"{teacher.name} is a {kinds[1]}"
        message += f", {student.name} is {'an' if kinds[0] == 'encoder' else 'a'} {kinds[0]}: they predict other things"
        raise InputError(message)
    if isinstance(teacher, Encoder):
        if teacher.head is None:
            message = f"{teacher.name} has no language-model head: its checkpoint holds the encoder alone"
            raise InputError(message)
        return
    assert isinstance(student, Decoder)
    ours, theirs = student.vocabulary.tokens, teacher.vocabulary.tokens
    if ours != theirs:
        message = f"the vocabularies differ: {teacher.name} has {len(theirs):,} tokens, {student.name} {len(ours):,}"
        if len(ours) == len(theirs):
            token = next(place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            message += f", of which token {token} is {theirs[token]!r} there and {ours[token]!r} here"
        raise InputError(message)


def _plan(
    student: Encoder | Decoder,
    teacher: Encoder | Decoder | None,
    train: Share,
    config: DistillConfig,
    cache: Path | None,
    processes: Processes,
) -> _Plan:
    live = None if teacher is None else LiveTeacher(teacher)
    if cache is not None and live is None:
        message = "a cache holds a teacher's answers, and there is no teacher"
        raise InputError(message)
    task, facts = _task(student, teacher, train, config, masks_again=cache is not None)
    task.teacher = live
    kept = None
    if cache is not None and live is not None:
        kept = TeacherCache(cache, live, task, temperature=config.options.temperature, top_k=config.cache_top_k)
        task.teacher = kept
    trainer = config.trainer
    if config.epochs is not None:
        order = BatchOrder(task.lengths_B, trainer.batch_tokens, seed=trainer.seed)
        batches_a_step = trainer.accumulate * processes.world
        trainer = dataclasses.replace(trainer, steps=order.steps_of(config.epochs, batches_a_step=batches_a_step))
    return _Plan(task, trainer, kept, facts, model_fingerprint(student))


def _task(
    student: Encoder | Decoder,
    teacher: Encoder | Decoder | None,
    train: Share,
    config: DistillConfig,
    *,
    masks_again: bool,
) -> tuple[RowTask, dict[str, int]]:
    if isinstance(student, Decoder):
        models = [model for model in (student, teacher) if isinstance(model, Decoder)]
        places = min(model.config.places for model in models)
        pieces, split = causal_corpus(train, student.vocabulary, places)
        facts = {"context": places, "split_sequences": split, "pieces": len(pieces)}
        return CausalTask(student, pieces, options=config.options), facts
    encoders = [model for model in (student, teacher) if isinstance(model, Encoder)]
    context = min(model.config.max_residues for model in encoders)
    corpus = train.corpus()
    masked = MaskedTask(
        student,
        corpus,
        seed=config.trainer.seed,
        options=config.options,
        rows=config.rows,
        mask_epochs=(_CACHED_MASKS if masks_again else 0) if config.mask_epochs is None else config.mask_epochs,
        max_residues=context,
        mask_share=config.mask_share,
    )
    return masked, {"context": context, "cropped_sequences": int((corpus.lengths_B > context + 2).sum())}


def _recipe(config: DistillConfig, plan: _Plan, teacher: Encoder | Decoder | None) -> dict[str, Any]:
    """Of the settings those that took effect, as JSON."""
    trainer = dataclasses.asdict(plan.trainer)
    recipe = {**trainer, "betas": list(plan.trainer.betas), "init": config.init, "epochs": config.epochs}
    if isinstance(plan.task, MaskedTask):
        recipe["mask_share"] = config.mask_share
    if teacher is not None:
        recipe |= {**dataclasses.asdict(config.options), "rows": config.rows}
    return recipe
