"""Adapting a model to a family, or to labels, from few sequences: from a FASTA file to a checkpoint.

    mlm                 an encoder learns the family's masked residues
    clm                 a decoder learns the family's next tokens, the end of each protein among them
    regression          either learns numbers, with a head on its hidden states
    classification      either learns classes

Proteins are split by clusters, so that none is judged whose homologue was trained on. After each epoch the validation
share is judged; training stops where that has not improved for some epochs, and the best weights, kept on disk, are
what is saved.

Shapes: B sequences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.checkpoint import encoder_fingerprint, save_checkpoint, tensors_fingerprint
from ..engine.decoder import Decoder
from ..engine.decoder_checkpoint import save_decoder
from ..engine.device import resolve_device, resolve_precision
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.models import load_checkpoint
from .clusters import BACKENDS, Backend
from .early_stopping import Progress, load_best, save_best
from .family_data import FamilyData, LabelSource, Shares, read_family, split_family
from .finetuning_subject import HeadSubject, LanguageSubject, Subject
from .lora import ADAPTER_FOLDER, Adapters, check_peft
from .order import BatchOrder
from .schedule import SCHEDULES
from .task_head import POOLINGS, save_head
from .teacher import model_fingerprint
from .trainer import StepReport, Trainer, TrainerConfig
from .training_folder import TrainingFolder

TASKS = ("mlm", "clm", "regression", "classification")
METHODS = ("full", "lora")
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides the weights, beside model and data.

    Attributes:
        task: see the top of the file; None: "mlm" for an encoder, "clm" for a decoder.
        method: "full" trains all weights, "lora" low-rank adapters, which are merged at the end.
        rank, lora_alpha: of the adapters; None: twice the rank.
        pooling: what a head reads: "mean" over residues, or each "residue".
        n: proteins to train on, the first of the training share's order; None for all.
        epochs, patience: most epochs, and epochs without improvement after which training stops.
        learning_rate: its peak; None for one by the model's size, see `default_learning_rate`.
        batch_tokens: most tokens in a batch.
        warmup_share: of all steps, those until the peak.
        schedule: after it, see `schedule`.
        validation_share, test_share, identity, clusters_by, seed: see `splits.split`; the seed is of the rest too.
        precision: of matrix products: "fp32" or "bf16".
        judged: most proteins of validation and test share, each.

    Raises:
        InputError: a word or number is not allowed.
    """

    task: str | None = None
    method: str = "full"
    rank: int = 8
    lora_alpha: float | None = None
    pooling: str = "mean"
    n: int | None = None
    epochs: int = 20
    patience: int = 3
    learning_rate: float | None = None
    batch_tokens: int = 1024
    warmup_share: float = 0.1
    schedule: str = "cosine"
    validation_share: float = 0.1
    test_share: float = 0.1
    identity: float = 0.5
    clusters_by: Backend = "auto"
    seed: int = 0
    precision: str = "fp32"
    judged: int = 1000

    def __post_init__(self) -> None:
        words = {"method": METHODS, "pooling": POOLINGS, "schedule": SCHEDULES, "clusters_by": BACKENDS}
        for name, allowed in {"task": (None, *TASKS), **words}.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join(word for word in allowed if word is not None)
                message = f"{name} is {getattr(self, name)!r}; allowed: {shown}"
                raise InputError(message)
        for name in ("rank", "n", "epochs", "patience", "judged"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                message = f"{name} is {value!r}, expected a whole number of at least 1"
                raise InputError(message)
        for name in ("learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                message = f"{name} must be positive, got {value}"
                raise InputError(message)
        if not 0 <= self.warmup_share < 1:
            message = f"warmup_share is {self.warmup_share}, expected 0 to less than 1"
            raise InputError(message)

    @property
    def is_language(self) -> bool:
        return self.task in (None, "mlm", "clm")

    @property
    def alpha(self) -> float:
        """Of the adapters."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a caller is told of on the way.

    Attributes:
        on_start: steps in all, and steps that an earlier run took.
        after_step: what is known of a step.
        after_epoch: where early stopping stands.
    """

    on_start: Callable[[int, int], None] = lambda steps, done: None
    after_step: Callable[[StepReport], None] = lambda report: None
    after_epoch: Callable[[Progress], None] = lambda progress: None


def default_learning_rate(parameters: int, method: str) -> float:
    """The peak for a model of so many parameters.

    The published fine-tuning took 2e-4 for 39M parameters, 1e-4 for 82M, 5e-5 for 204M and 2e-5 for 774M (Wijaya 2026):
    close to 2e-4 (39M / parameters)^0.77. Kept within 2e-5 and 1e-3; adapters take five times as much.
    """
    full = min(1e-3, max(2e-5, 2e-4 * math.pow(39e6 / parameters, 0.77)))
    return 5 * full if method == "lora" else full


def finetune(
    model: str | Path,
    data: Path,
    out: Path,
    config: FinetuneConfig,
    *,
    labels: LabelSource | None = None,
    device: str = "auto",
    overwrite: bool = False,
    save_every_s: float = 120.0,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Fine-tunes a model on a FASTA file and writes it to `out`; goes on where a killed run of these settings stopped.

    `out` gets the best weights in Hugging Face layout (fp32), `training.json`, the three shares as train.fasta,
    validation.fasta and test.fasta, a head where one was trained, `adapter/` with "lora", and what `TrainingFolder`
    keeps.

    Args:
        model: as `load_model` takes it.
        data: FASTA; of equal sequences without labels one is kept.
        out: a folder.
        config: what is trained, and how.
        labels: for regression and classification.
        device: where.
        overwrite: throw away a run of other settings in `out`: its own files alone.
        save_every_s: seconds between checkpoints within an epoch.
        callbacks: what to tell of.

    Returns:
        What `training.json` holds.

    Raises:
        InputError: data, labels, model or settings cannot be used together, peft is missing, `out` holds something
            else, the loss is not finite, or a disk is full.
    """
    callbacks = callbacks or Callbacks()
    if config.method == "lora":
        check_peft()
    resolved = resolve_device(device)
    resolve_precision(config.precision, resolved)
    if config.is_language == (labels is not None):
        message = f"task {config.task or 'of a language model'}: "
        message += "it takes no labels" if config.is_language else "it needs --labels"
        raise InputError(message)
    backbone = load_checkpoint(model, device="cpu", precision="fp32")
    _check_kind(backbone, config)
    family = read_family(data, labels, task=config.task, pooling=config.pooling)
    shares = split_family(
        family,
        n=config.n,
        judged=config.judged,
        validation=config.validation_share,
        test=config.test_share,
        identity=config.identity,
        seed=config.seed,
        backend=config.clusters_by,
    )
    initial = model_fingerprint(backbone)
    parameters = sum(each.numel() for each in backbone.parameters())
    subject = _subject(backbone, family, shares, config)
    adapters = None
    if config.method == "lora":
        adapters = Adapters(backbone, rank=config.rank, alpha=config.alpha, seed=config.seed)
    else:
        backbone.requires_grad_(True)
    trainer = Trainer(subject.task, _trainer_config(subject, parameters, config), device=resolved)
    identity = {
        **trainer.identity(),
        **_identity(config),
        "initial": initial,
        "judged_by": subject.judged_by,
    }
    with TrainingFolder(out, identity, overwrite=overwrite) as folder:
        if folder.report is not None:
            return folder.report
        shares.write(out)
        run = _Run(folder, trainer, subject, config, callbacks)
        seconds = run.train(save_every_s=save_every_s)
        load_best(subject.model, out)
        if adapters is not None:
            adapters.save(out / ADAPTER_FOLDER)
            adapters.merge()
        _save(subject, backbone, out)
        report = {
            "model": backbone.name,
            "task": subject.name,
            "method": config.method,
            "parameters": parameters,
            "trained_parameters": run.trained,
            "recipe": {**asdict(trainer.config), "betas": list(trainer.config.betas), **_identity(config)},
            "device": resolved.type,
            "torch": torch.__version__,
            "data": {"file": data.name, **family.facts, **shares.facts, **subject.facts},
            "epochs": len(run.progress.losses) - 1,
            "best_epoch": run.progress.best_epoch,
            "stopped_early": run.progress.should_stop,
            "validation_losses": list(run.progress.losses),
            "seconds": round(seconds, 1),
            "test": subject.judge(trainer.extra["before"], seed=config.seed),
        }
        folder.finish(report)
        return report


def _check_kind(model: Encoder | Decoder, config: FinetuneConfig) -> None:
    kind = "mlm" if isinstance(model, Encoder) else "clm"
    if config.task in ("mlm", "clm") and config.task != kind:
        what = "an encoder" if isinstance(model, Encoder) else "a decoder"
        message = f"task is {config.task!r}, and {model.name} is {what}: it learns {kind!r}, or takes a head"
        raise InputError(message)


def _subject(
    backbone: Encoder | Decoder, family: FamilyData, shares: Shares, config: FinetuneConfig
) -> LanguageSubject | HeadSubject:
    if config.is_language:
        return LanguageSubject(backbone, shares, seed=config.seed)
    assert config.task is not None
    return HeadSubject(backbone, family, shares, task=config.task, pooling=config.pooling)


def _identity(config: FinetuneConfig) -> dict[str, Any]:
    """What of the settings is not in the trainer's."""
    kept = ("method", "n", "epochs", "patience", "warmup_share", "identity", "validation_share", "test_share")
    found = {name: getattr(config, name) for name in kept}
    return {**found, "rank": config.rank, "lora_alpha": config.alpha} if config.method == "lora" else found


def _trainer_config(subject: Subject, parameters: int, config: FinetuneConfig) -> TrainerConfig:
    order = BatchOrder(subject.task.lengths_B, config.batch_tokens, seed=config.seed)
    steps = order.steps_of(config.epochs, batches_a_step=1)
    rate = default_learning_rate(parameters, config.method) if config.learning_rate is None else config.learning_rate
    return TrainerConfig(
        steps=steps,
        batch_tokens=config.batch_tokens,
        learning_rate=rate,
        # In proportion: fifty sequences make few steps, and a fixed number would be most of them.
        warmup_steps=round(config.warmup_share * steps),
        schedule=config.schedule,
        weight_decay=_WEIGHT_DECAY,
        seed=config.seed,
        precision=config.precision,
    )


class _Enough(Exception):
    """Ends a run between two steps."""


class _Run:
    """Training with a judgement after each epoch."""

    def __init__(
        self, folder: TrainingFolder, trainer: Trainer, subject: Subject, config: FinetuneConfig, callbacks: Callbacks
    ) -> None:
        self._folder, self._trainer, self._subject = folder, trainer, subject
        self._config, self._callbacks = config, callbacks
        order = BatchOrder(subject.task.lengths_B, config.batch_tokens, seed=config.seed)
        self._ends = {order.steps_of(epoch, batches_a_step=1) for epoch in range(1, config.epochs + 1)}
        self.progress = Progress(patience=config.patience)
        self.trained = sum(each.numel() for each in subject.model.parameters() if each.requires_grad)
        self._started, self._before_s = time.monotonic(), 0.0

    def train(self, *, save_every_s: float) -> float:
        """Seconds of training and judging, those of earlier runs up to their checkpoint included."""
        trainer = self._trainer
        if self._folder.resume(trainer):
            self.progress = Progress.of(trainer.extra["progress"])
            self._before_s = trainer.extra["seconds"]
            # The state may be that of an epoch's last step, before the judgement that comes after it.
            if sum(end <= trainer.step for end in self._ends) > len(self.progress.losses) - 1:
                self._judge()
        else:
            trainer.extra["before"] = self._subject.score()
            self._judge()
        self._callbacks.on_start(trainer.config.steps, trainer.step)
        if not (self.progress.should_stop or trainer.step >= trainer.config.steps):
            try:
                self._folder.train(trainer, save_every_s=save_every_s, after_step=self._after_step)
            except _Enough:
                pass
        return self._seconds()

    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def _after_step(self, report: StepReport) -> None:
        self._trainer.extra["seconds"] = self._seconds()
        self._callbacks.after_step(report)
        if report.step in self._ends:
            self._judge()
            self._folder.save(self._trainer)
            if self.progress.should_stop:
                raise _Enough

    def _judge(self) -> None:
        loss = self._subject.validation_loss()
        if not math.isfinite(loss):
            message = (
                f"the validation loss is {loss} after epoch {len(self.progress.losses)}: try a lower learning rate"
            )
            raise InputError(message)
        self.progress = self.progress.after(loss)
        if self.progress.improved:
            save_best(self._subject.model, self._folder.folder)
        self._trainer.extra |= {"progress": self.progress.state(), "seconds": self._seconds()}
        self._callbacks.after_epoch(self.progress)


def _save(subject: LanguageSubject | HeadSubject, model: Encoder | Decoder, out: Path) -> None:
    try:
        if isinstance(model, Encoder):
            save_checkpoint(model, out)
            fingerprint = encoder_fingerprint(model)
        else:
            save_decoder(model, out)
            fingerprint = tensors_fingerprint(model.config, model.state_dict())
        if isinstance(subject, HeadSubject):
            save_head(subject.head_for(fingerprint), out)
    except (OSError, RuntimeError) as error:
        message = f"the model cannot be written ({error}); the last checkpoint of the training is kept"
        raise InputError(message, file=out) from error
