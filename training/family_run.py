"""The family's stages trained one after another, and what is made of them: chain, figures, cards, what ships."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console

from ..engine.atomic import write_atomically
from ..engine.config import BUNDLED_CHAINS
from ..engine.decoder import Decoder
from ..engine.device import precision_name, resolve_device, resolve_precision
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.json_object import read_object
from ..engine.models import load_checkpoint
from ..kernels.kd_options import KDOptions
from .corpus import Share, read_shares
from .distillation import RANDOM, Callbacks, DistillConfig, distill
from .family import CHAIN, SOURCES, STAGES, FamilyStage
from .family_figures import FigureOptions, fit_family_chain, judge_members, rank_scans, read_scans
from .model_card import CardFacts, TrainedStage, model_card
from .trainer import TrainerConfig
from .training_folder import REPORT_FILE
from .training_progress import TrainingProgress

SCHEMA_VERSION = 1
FIGURES_FILE, CARD_FILE = "figures.json", "README.md"
MEMBERS = (*BUNDLED_CHAINS[CHAIN], "nano-gpt")
_SHIPPED = ("config.json", "model.safetensors", "vocab.txt", REPORT_FILE, CARD_FILE)
_FEWEST_STEPS = 2
_IS_TRACKED = ["ls-files", "--error-unmatch"]
_DESCRIBED = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]


def stage_config(stage: FamilyStage, out: Path, *, scale: float = 1.0, precision: str = "fp32") -> DistillConfig:
    """What `protnest distill` makes of a stage's options.

    Args:
        stage: of `STAGES`.
        out: where the stages before it lie.
        scale: times its steps and its warm-up; 2 steps at least.
        precision: of the matrix products.
    """
    steps = max(_FEWEST_STEPS, round(stage.steps * scale))
    return DistillConfig(
        student=stage.preset if stage.trained_on is None else str(out / stage.trained_on),
        init=RANDOM if stage.grown_from is None else str(out / stage.grown_from),
        trainer=TrainerConfig(
            steps=steps,
            batch_tokens=stage.batch_tokens,
            learning_rate=stage.learning_rate,
            warmup_steps=min(round(stage.warmup * scale), steps - 1),
            schedule=stage.schedule,
            seed=stage.seed,
            precision=precision,
        ),
        mask_share=stage.mask_share,
        # Neither regulariser helped encoders of this size: docs/results.md, "The controlled 2x2".
        options=KDOptions() if stage.teacher is None else KDOptions(uncertainty=False, smooth=False),
    )


class FamilyRun:
    """A folder with the family.

    Args:
        data: FASTA file.
        out: a folder for each stage, `nano.chain`, `figures.json`.
        device: where everything runs.
        console: is told how far it is.

    Raises:
        InputError: there is no such device.
    """

    def __init__(self, data: Path, out: Path, *, device: str = "auto", console: Console | None = None) -> None:
        # Absolute: a relative `nano-m` would be taken for the bundled one.
        self.data, self.out = data, out.absolute()
        self._device = resolve_device(device)
        self._console = console or Console(stderr=True, quiet=True)
        self._shares: tuple[Share, Share] | None = None

    def train(self, *, scale: float = 1.0) -> None:
        """Trains every stage that is not finished; a killed one goes on from its last checkpoint.

        Raises:
            InputError: as `distill`; a stage's folder holds a run of other settings.
        """
        precision = precision_name(resolve_precision("auto", self._device))
        for stage in STAGES:
            config = stage_config(stage, self.out, scale=scale, precision=precision)
            self._say(f"{stage.name}: {config.trainer.steps:,} steps")
            with TrainingProgress(self._console, stage.name) as progress:
                distill(
                    None if stage.teacher is None else self.out / stage.teacher,
                    self.data,
                    self.out / stage.name,
                    config,
                    device=str(self._device),
                    callbacks=Callbacks(on_start=progress.start, after_step=progress.stepped),
                )

    def figures(self, options: FigureOptions) -> dict[str, Any]:
        """Fits the chain and judges every member; `nano.chain` and `figures.json` get what was found.

        Figures of the same models, proteins and scans that lie there already are taken as they are.

        Raises:
            InputError: a member is missing or is none, or data or scans cannot be used.
        """
        models = self._members()
        scans = [] if options.dms is None else read_scans(options.dms)
        train, held_out = self._read()
        identity = {
            "members": {name: _hash(self.out / name / "model.safetensors") for name in MEMBERS},
            "data": [train.corpus().fingerprint, held_out.corpus().fingerprint],
            "scans": {scan.name: scan.fingerprint for scan in scans},
            **{name: getattr(options, name) for name in ("judged", "variants", "seed")},
        }
        encoders = [model for model in models.values() if isinstance(model, Encoder)]
        self._say("fitting the chain")
        chain = fit_family_chain(encoders, train, self.out, name=CHAIN, source=self.data.name, options=options)
        found = self._found(identity)
        if found is None:
            found = {"schema_version": SCHEMA_VERSION, "identity": identity, "commit": code_commit()}
            found["device"] = self._device.type
            found["perplexity"] = judge_members(models, train, held_out, options, say=self._say)
            found["spearman"] = rank_scans(models, scans, options, say=self._say) if scans else None
        found["chain"] = {
            "models": [model.name for model in chain.models],
            "widths": list(chain.widths),
            "regressor": chain.regressor,
            "proteins": chain.data["train_sequences"] + chain.data["held_out_sequences"],
            "longest_residues": chain.data["longest_residues"],
            "stages": list(chain.report),
        }
        self._write(self.out / FIGURES_FILE, json.dumps(found, indent=1, allow_nan=False) + "\n")
        return found

    def write_cards(self, figures: dict[str, Any]) -> None:
        """Writes README.md into each member's folder.

        Raises:
            InputError: a member has no training.json.
        """
        for name, model in self._members().items():
            facts = CardFacts(
                name=name,
                config=model.config,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                file_bytes=(self.out / name / "model.safetensors").stat().st_size,
                stages=self._lineage(name),
                source=SOURCES.get(self.data.name, f"The proteins of {self.data.name}"),
                figures=figures,
                commit=figures.get("commit"),
            )
            self._write(self.out / name / CARD_FILE, model_card(facts))

    def bundle(self, folder: Path) -> list[Path]:
        """Copies what ships into `folder`: of each member its model, recipe and card; and the chain.

        Returns:
            The files that were written.

        Raises:
            InputError: one is missing; then nothing is copied.
        """
        wanted = [f"{name}/{file}" for name in MEMBERS for file in _SHIPPED] + [f"{CHAIN}.chain"]
        if missing := [each for each in wanted if not (self.out / each).is_file()]:
            message = f"lacks {', '.join(missing)}: nothing was bundled"
            raise InputError(message, file=self.out)
        for each in wanted:
            source, target = self.out / each, folder / each
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.name == REPORT_FILE:
                self._write(target, json.dumps(_without_folders(read_object(source)), indent=1) + "\n")
            else:
                write_atomically(target, lambda temporary, source=source: shutil.copyfile(source, temporary))  # type: ignore[misc]
        return [folder / each for each in wanted]

    def _read(self) -> tuple[Share, Share]:
        if self._shares is None:
            self._shares = read_shares(self.data)
        return self._shares

    def _members(self) -> dict[str, Encoder | Decoder]:
        missing = [name for name in MEMBERS if not (self.out / name / "model.safetensors").is_file()]
        if missing:
            message = f"lacks {', '.join(missing)}: these are not trained yet"
            raise InputError(message, file=self.out)
        return {name: load_checkpoint(self.out / name, device=str(self._device), precision="fp32") for name in MEMBERS}

    def _found(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        path = self.out / FIGURES_FILE
        if not path.is_file():
            return None
        found = read_object(path)
        is_same = found.get("schema_version") == SCHEMA_VERSION and found.get("identity") == identity
        return found if is_same else None

    def _lineage(self, name: str) -> list[TrainedStage]:
        """The stages that led to one, first to last; seeds that are not there, as where models came from elsewhere,
        are left out."""
        by_name = {stage.name: stage for stage in STAGES}
        stage = by_name[name]
        before: list[TrainedStage] = []
        begun_as = stage.begun_as
        if begun_as is not None and (self.out / begun_as / REPORT_FILE).is_file():
            before = self._lineage(begun_as)
        else:
            begun_as = None
        own = TrainedStage(
            name=name,
            report=read_object(self.out / name / REPORT_FILE),
            begun_as=begun_as,
            is_grown=begun_as is not None and stage.grown_from is not None,
            teacher=stage.teacher,
        )
        return [*before, own]

    def _write(self, path: Path, text: str) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _say(self, words: str) -> None:
        self._console.print(words, markup=False, highlight=False)


def code_commit() -> str | None:
    """The commit of the checkout that this code lies in; None outside of one, `-dirty` where files were changed."""
    here = Path(__file__)
    said = ""
    # First whether this file is that repository's at all: an installed one may lie below somebody else's.
    for words in ([*_IS_TRACKED, here.name], _DESCRIBED):
        try:
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        said = done.stdout.strip()
    return said or None


def _hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _without_folders(report: dict[str, Any]) -> dict[str, Any]:
    """A report whose models are called by their names alone: folders are those of the machine that trained them."""
    plain = dict(report)
    for name in ("student", "teacher"):
        if plain.get(name) is not None:
            plain[name] = PurePath(str(plain[name])).name
    if isinstance(plain.get("recipe"), dict) and plain["recipe"].get("init") is not None:
        plain["recipe"] = {**plain["recipe"], "init": PurePath(str(plain["recipe"]["init"])).name}
    return plain
