"""Model cards: a page of Markdown for a bundled model, made of what is passed in and nothing else.

The page begins with the YAML that Hugging Face reads. A figure that is not known is left out, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from ..engine.config import EncoderConfig
from ..engine.decoder_config import DecoderConfig
from ..kernels.kd_options import KDOptions

LICENSE = "mit"
_NO_TEACHER = "none: labels alone"
_FOLDER = "family"
"""Where the commands of a card put what they train."""


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """One training that led to a model.

    Attributes:
        name: the stage's.
        report: its training.json, of `protnest distill` or `pretrain`.
        begun_as: the stage before it, whose weights it begins with; None where it begins with fresh ones, or where
            nothing more is known than what the report says.
        is_grown: those weights have grown; else they are trained on.
        teacher: the stage that taught it, None for labels alone.
    """

    name: str
    report: Mapping[str, Any]
    begun_as: str | None = None
    is_grown: bool = False
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        name: the model's.
        config: its architecture.
        parameters: how many numbers it has, head included.
        file_bytes: of its weights as they lie on the disk, fp16.
        stages: trainings that made it, first to last; the last one is its own.
        source: the training data, in words.
        figures: as `family_figures` leaves them: `perplexity`, `spearman`, `chain`; each may be missing.
        commit: of the code, None where it is not known.
    """

    name: str
    config: EncoderConfig | DecoderConfig
    parameters: int
    file_bytes: int
    stages: Sequence[TrainedStage]
    source: str
    figures: Mapping[str, Any]
    commit: str | None = None

    @property
    def is_encoder(self) -> bool:
        """Whether it embeds; else it generates."""
        return isinstance(self.config, EncoderConfig)


def model_card(facts: CardFacts) -> str:
    """The page, ending with a newline."""
    kind = (
        "an encoder with ESM-2's architecture"
        if facts.is_encoder
        else "a decoder with GPT-2's architecture over residues"
    )
    title = f"# {facts.name}\n\nA small protein language model: {kind}, bundled with protnest."
    parts = [_front_matter(facts), title]
    parts += [_purpose(facts), _architecture(facts), _recipe(facts), _data(facts)]
    parts += [part for part in (_perplexities(facts), _spearman(facts), _chain(facts)) if part]
    parts.append(_again(facts))
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    tags = ["protein", "protein-language-model", "biology", "esm" if facts.is_encoder else "gpt2"]
    lines = [f"license: {LICENSE}", "library_name: protnest", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _purpose(facts: CardFacts) -> str:
    if facts.is_encoder:
        good = (
            "trying embedding, variant scores, nesting and fine-tuning out in seconds on any computer; tests and "
            "teaching; a stage of the nested embedding that the family makes together; a start for fine-tuning or a "
            "teacher for something smaller"
        )
        use = (
            f'from protnest.engine import Embedder, load_model\n\nEmbedder(load_model("{facts.name}"))'
            '.embed(["MKTAYIAKQR"])'
        )
    else:
        good = (
            "trying generation, log-likelihoods of proteins and fine-tuning out in seconds on any computer; tests and "
            "teaching; a start for fine-tuning on a family, or a teacher for something smaller"
        )
        use = f"protnest generate --model {facts.name} -n 5 --max-residues 120 --out designs.fasta"
    language = "python" if facts.is_encoder else "sh"
    bad = (
        "conclusions about a protein where a larger published model can be asked; clinical decisions; anything that "
        "takes what it says for measured. It is small, saw its data for a short time, and the figures below are all "
        "that is known of it."
    )
    return f"## What for\n\n**Good for** {good}.\n\n**Not for** {bad}\n\n```{language}\n{use}\n```"


def _architecture(facts: CardFacts) -> str:
    config = facts.config
    longest = ("longest protein, residues", config.max_residues) if isinstance(config, EncoderConfig) else None
    rows: list[tuple[str, object]] = [
        ("layers", config.layers),
        ("width", config.width),
        ("heads", config.heads),
        ("feed-forward width", config.feedforward),
        longest or ("places, tokens", config.places),  # type: ignore[union-attr]
        ("parameters", f"{facts.parameters:,}"),
        ("weights, fp16", f"{facts.file_bytes / 1e6:.1f} MB"),
    ]
    return "## Architecture\n\n" + _table(("", facts.name), rows)


def _recipe(facts: CardFacts) -> str:
    columns = [_stage_rows(stage) for stage in facts.stages]
    rows = [
        (name, *(column.get(name, "-") for column in columns)) for name in dict.fromkeys(k for c in columns for k in c)
    ]
    words = "Trained in one stage" if len(columns) == 1 else f"Trained in {len(columns)} stages, from left to right"
    return f"## Recipe\n\n{words}.\n\n" + _table(("", *(stage.name for stage in facts.stages)), rows)


def _stage_rows(stage: TrainedStage) -> dict[str, object]:
    report, recipe = stage.report, _recipe_of(stage.report)
    preset = _plain(report.get("student", report.get("preset")))
    is_trained_on = stage.begun_as is not None and not stage.is_grown
    rows: dict[str, object] = {
        "architecture": f"as {stage.begun_as}" if is_trained_on else preset,
        "begins as": _beginning(stage),
        "teacher": stage.teacher or _plain(report.get("teacher")) or _NO_TEACHER,
    }
    for title, key in (
        ("steps", "steps"),
        ("tokens a batch", "batch_tokens"),
        ("batches a step", "accumulate"),
        ("learning rate", "learning_rate"),
        ("schedule", "schedule"),
        ("warm-up, steps", "warmup_steps"),
        ("weight decay", "weight_decay"),
        ("residues asked for", "mask_share"),
        ("seed", "seed"),
        ("precision", "precision"),
    ):
        if key in recipe:
            rows[title] = _number(recipe[key])
    if rows["teacher"] != _NO_TEACHER:
        wanted = ("temperature", "alpha", "smoothing", "uncertainty", "smooth", "weight_normalization", "rows")
        rows["distillation"] = ", ".join(f"{key} {_number(recipe[key])}" for key in wanted if key in recipe)
    for title, key in (("seconds", "seconds"), ("device", "device"), ("torch", "torch")):
        if key in report:
            rows[title] = _number(report[key])
    return rows


def _recipe_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """`pretrain` has its settings in the report itself, and one schedule."""
    found = report.get("recipe")
    return found if isinstance(found, Mapping) else {"schedule": "linear", "accumulate": 1, **report}


def _beginning(stage: TrainedStage) -> str:
    if stage.begun_as is not None:
        return f"{stage.begun_as}, grown" if stage.is_grown else f"{stage.begun_as}, trained on"
    init = _plain(_recipe_of(stage.report).get("init", "random"))
    return "fresh weights" if init == "random" else str(init)


def _plain(name: object) -> str | None:
    """A model's name without the folders of the machine where it lay."""
    return None if name is None else PurePath(str(name)).name


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def _data(facts: CardFacts) -> str:
    data = facts.stages[-1].report.get("data", {})
    words = f"## Data\n\n{facts.source}."
    if "train_sequences" in data:
        words += (
            f" One sequence in twenty, by a hash of its letters, was held out: {data['train_sequences']:,} to train "
            f"on, {data['held_out_sequences']:,} held out. Homologues of these may be among those trained on."
        )
    return words


def _perplexities(facts: CardFacts) -> str:
    found = facts.figures.get("perplexity")
    if not found:
        return ""
    rows = [(_own(facts, name), shown(each)) for name, each in found["models"].items()]
    rows.append(("amino acids' frequencies alone", shown(found["unigram"])))
    return (
        f"## Perplexity\n\nPer residue, on the same {found['sequences']:,} held-out proteins, with a 95 % interval by "
        "bootstrap over proteins. An encoder is asked for masked residues and sees both sides; a decoder for each next "
        "one and sees those before it: they are not asked the same.\n\n" + _table(("model", "perplexity (95 %)"), rows)
    )


def _spearman(facts: CardFacts) -> str:
    found = facts.figures.get("spearman")
    if not found:
        return ""
    models = list(dict.fromkeys(name for scan in found["scans"].values() for name in scan["models"]))
    rows = []
    for scan, each in found["scans"].items():
        cells = [shown(each["models"].get(name)) for name in models]
        rows.append((scan, f"{each['variants']:,} of {each['found']:,}", *cells))
    return (
        "## Variant effects\n\nSpearman between scores and measurements of deep mutational scans, without any training "
        "on them, with a 95 % interval by bootstrap over variants: masked marginals of encoders, log-likelihoods of "
        f"decoders. Of a large scan {found['variants']:,} variants are drawn at random, the same for all models. A "
        "dash: the protein is longer than the model reads, or nothing varies.\n\n"
        + _table(("scan", "variants", *(_own(facts, name) for name in models)), rows)
    )


def _chain(facts: CardFacts) -> str:
    found = facts.figures.get("chain")
    if not found or facts.name not in found["models"]:
        return ""
    rows = [(each["model"], _number(each["held_out_r2"])) for each in found["stages"]]
    return (
        f"## Nested embedding\n\n`nano.chain` makes one row of {', '.join(found['models'])} ({found['regressor']}), of "
        f"widths {', '.join(map(str, found['widths']))}. It was fitted on residues of the first "
        f"{found['proteins']:,} training proteins of at most {found['longest_residues']:,} residues. How much of a "
        "model's embedding the row before it predicts, on those of them that were held out of the fit:\n\n"
        + _table(("model", "held-out R²"), rows)
    )


def _again(facts: CardFacts) -> str:
    lines = [_command(stage) for stage in facts.stages]
    commit = f" The figures were computed with the code at commit {facts.commit}." if facts.commit else ""
    return (
        "## Making it again\n\n`make family` trains the whole family, and `protnest train-family DATA --out "
        f"{_FOLDER}` does so from another file. Its stages that led here, one by one:\n\n```sh\n"
        + "\n".join(lines)
        + f"\n```\n\nA killed training goes on from its last checkpoint.{commit}"
    )


def _command(stage: TrainedStage) -> str:
    report, recipe = stage.report, _recipe_of(stage.report)
    data = report.get("data", {}).get("file", "DATA")
    out = f"{_FOLDER}/{stage.name}"
    if "recipe" not in report:
        words = [f"protnest pretrain {data} --out {out} --preset {report.get('preset')}"]
        options = {"steps": "steps", "batch_tokens": "batch-tokens", "learning_rate": "learning-rate"}
        options |= {"warmup_steps": "warmup-steps", "seed": "seed", "precision": "precision"}
    else:
        student = _plain(report.get("student"))
        if stage.begun_as is not None and not stage.is_grown:
            student = f"{_FOLDER}/{stage.begun_as}"
        words = [f"protnest distill --data {data} --out {out} --student {student}"]
        init = _plain(recipe.get("init", "random"))
        if stage.begun_as is not None and stage.is_grown:
            init = f"{_FOLDER}/{stage.begun_as}"
        if init != "random":
            words.append(f"--init {init}")
        if stage.teacher or report.get("teacher"):
            teacher = f"{_FOLDER}/{stage.teacher}" if stage.teacher else _plain(report.get("teacher"))
            words.append(f"--teacher {teacher}")
        options = {"steps": "steps", "batch_tokens": "batch-tokens", "accumulate": "accumulate"}
        options |= {"learning_rate": "learning-rate", "warmup_steps": "warmup", "schedule": "schedule"}
        options |= {
            "weight_decay": "weight-decay",
            "mask_share": "mask-share",
            "seed": "seed",
            "precision": "precision",
        }
    words += [f"--{option} {recipe[key]}" for key, option in options.items() if key in recipe]
    return " ".join([*words, *_loss_options(recipe)])


def _loss_options(recipe: Mapping[str, Any]) -> Iterable[str]:
    """Of the distillation loss what is not as by default."""
    usual = {**asdict(KDOptions()), "rows": "masked"}
    for key in ("temperature", "alpha", "smoothing", "weight_normalization", "rows"):
        if recipe.get(key, usual[key]) != usual[key]:
            yield f"--{key.replace('_', '-')} {recipe[key]}"
    for key, option in (("uncertainty", "--no-uncertainty"), ("smooth", "--no-smoothing")):
        if recipe.get(key, True) is False:
            yield option


def _own(facts: CardFacts, name: str) -> str:
    return f"**{name}**" if name == facts.name else name


def shown(found: Mapping[str, Any] | None) -> str:
    """An estimate; a dash for what is not defined."""
    if found is None or found["value"] is None:
        return "-"
    value = f"{found['value']:.3f}"
    if found.get("low") is None or not math.isfinite(found["low"]):
        return value
    return f"{value} ({found['low']:.3f} to {found['high']:.3f})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
