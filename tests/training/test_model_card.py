"""Model cards: what they say is what was passed in."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from protnest.engine.config import BUNDLED
from protnest.engine.decoder_config import BUNDLED_DECODERS
from protnest.training.model_card import CardFacts, TrainedStage, model_card, shown

PRETRAINED = {
    "preset": "nano-xs",
    "steps": 3600,
    "batch_tokens": 2048,
    "learning_rate": 0.002,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "seed": 0,
    "precision": "fp32",
    "device": "cpu",
    "torch": "2.13.0+cpu",
    "data": {"file": "proteins.fasta.gz", "train_sequences": 11111, "held_out_sequences": 222},
    "seconds": 4278.5,
}
RECIPE = {
    "steps": 1500,
    "batch_tokens": 1024,
    "accumulate": 3,
    "learning_rate": 0.0015,
    "warmup_steps": 60,
    "schedule": "cosine",
    "weight_decay": 0.02,
    "seed": 7,
    "precision": "bf16",
    "init": "random",
}
TAUGHT = {
    "student": "/home/somebody/family/seed-xs",
    "teacher": "nano-s",
    "recipe": {
        **RECIPE,
        "temperature": 2.0,
        "alpha": 0.25,
        "smoothing": 0.1,
        "uncertainty": False,
        "smooth": True,
        "weight_normalization": "count",
        "rows": "all",
    },
    "device": "cuda",
    "torch": "2.13.0",
    "seconds": 99.5,
    "data": {"file": "proteins.fasta.gz", "train_sequences": 33333, "held_out_sequences": 444},
}
STAGES = (
    TrainedStage(name="seed-xs", report=PRETRAINED),
    TrainedStage(name="nano-xs", report=TAUGHT, begun_as="seed-xs", teacher="nano-s"),
)


def _estimate(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None if value is None else value - 0.5, "high": value and value + 0.25, "n": 9}


FIGURES = {
    "perplexity": {
        "sequences": 1234,
        "unigram": _estimate(18.0625),
        "models": {"nano-xs": _estimate(12.125), "nano-gpt": _estimate(14.5)},
    },
    "spearman": {
        "variants": 1000,
        "scans": {
            "BLAT": {"found": 4997, "variants": 1000, "models": {"nano-xs": _estimate(0.25), "nano-gpt": None}},
            "GB1": {"found": 12, "variants": 12, "models": {"nano-xs": _estimate(None), "nano-gpt": _estimate(0.75)}},
        },
    },
    "chain": {
        "models": ["nano-xs", "nano-s"],
        "widths": [128, 192],
        "regressor": "pcr",
        "proteins": 3000,
        "longest_residues": 512,
        "stages": [{"model": "nano-s", "held_out_r2": 0.8125}],
    },
}
FACTS = CardFacts(
    name="nano-xs",
    config=BUNDLED["nano-xs"],
    parameters=1_234_567,
    file_bytes=2_433_106,
    stages=STAGES,
    source="Proteins that somebody made up",
    figures=FIGURES,
    commit="abc123",
)


def _section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def _rows(section: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_front_matter_comes_first() -> None:
    card = model_card(FACTS)
    front, title = card.split("---\n\n")[0:2]
    assert front.startswith("---\nlicense: mit\nlibrary_name: protnest\ntags:\n- protein\n")
    assert "- esm" in front
    assert title.startswith("# nano-xs\n\nA small protein language model: an encoder with ESM-2's")
    assert card.endswith("\n")
    assert not card.endswith("\n\n")


def test_architecture_and_data() -> None:
    card = model_card(FACTS)
    rows = _rows(_section(card, "Architecture"))
    expected = {"layers": "6", "width": "128", "heads": "4", "feed-forward width": "512", "parameters": "1,234,567"}
    expected |= {"weights, fp16": "2.4 MB", "longest protein, residues": "1022"}
    assert {name: rows[name] for name in expected} == {name: [value] for name, value in expected.items()}
    data = _section(card, "Data")
    assert data.strip().startswith("Proteins that somebody made up.")
    assert "33,333 to train on, 444 held out" in " ".join(data.split())


def test_recipe_has_every_stage_in_order() -> None:
    recipe = _section(model_card(FACTS), "Recipe")
    assert "Trained in 2 stages, from left to right.\n\n|  | seed-xs | nano-xs |\n" in recipe
    rows = _rows(recipe)
    expected = {
        "architecture": ["nano-xs", "as seed-xs"],
        "begins as": ["fresh weights", "seed-xs, trained on"],
        "teacher": ["none: labels alone", "nano-s"],
        "steps": ["3,600", "1,500"],
        "tokens a batch": ["2,048", "1,024"],
        "batches a step": ["1", "3"],
        "learning rate": ["0.002", "0.0015"],
        "schedule": ["linear", "cosine"],
        "warm-up, steps": ["200", "60"],
        "weight decay": ["0.01", "0.02"],
        "seed": ["0", "7"],
        "precision": ["fp32", "bf16"],
        "seconds": ["4278.5", "99.5"],
        "device": ["cpu", "cuda"],
        "torch": ["2.13.0+cpu", "2.13.0"],
    }
    assert {name: rows.get(name) for name in expected} == expected
    assert rows["distillation"] == [
        "-",
        "temperature 2, alpha 0.25, smoothing 0.1, uncertainty no, smooth yes, weight_normalization count, rows all",
    ]


def test_a_grown_stage() -> None:
    report = {"student": "nano-m", "teacher": None, "recipe": {**RECIPE, "init": "/home/somebody/seed-xs"}}
    stage = TrainedStage(name="nano-m", report=report, begun_as="seed-xs", is_grown=True)
    card = model_card(replace(FACTS, name="nano-m", config=BUNDLED["nano-m"], stages=(STAGES[0], stage)))
    rows = _rows(_section(card, "Recipe"))
    assert rows["architecture"] == ["nano-xs", "nano-m"]
    assert rows["begins as"] == ["fresh weights", "seed-xs, grown"]
    assert "--student nano-m --init family/seed-xs --steps 1500" in card
    alone = model_card(replace(FACTS, name="nano-m", stages=(replace(stage, begun_as=None, is_grown=False),)))
    assert "Trained in one stage." in alone
    assert "| begins as | seed-xs |" in alone
    assert "--init seed-xs" in alone


def test_figures() -> None:
    card = model_card(FACTS)
    perplexities = _section(card, "Perplexity")
    assert "the same 1,234 held-out proteins" in perplexities
    rows = _rows(perplexities)
    assert rows["**nano-xs**"] == ["12.125 (11.625 to 12.375)"]
    assert rows["nano-gpt"] == ["14.500 (14.000 to 14.750)"]
    assert rows["amino acids' frequencies alone"] == ["18.062 (17.562 to 18.312)"]
    rows = _rows(_section(card, "Variant effects"))
    assert rows["scan"] == ["variants", "**nano-xs**", "nano-gpt"]
    assert rows["BLAT"] == ["1,000 of 4,997", "0.250 (-0.250 to 0.500)", "-"]
    assert rows["GB1"] == ["12 of 12", "-", "0.750 (0.250 to 1.000)"]
    nested = _section(card, "Nested embedding")
    assert _rows(nested)["nano-s"] == ["0.8125"]
    assert "first 3,000 training proteins of at most 512 residues" in nested


@pytest.mark.parametrize("missing", ["perplexity", "spearman", "chain"])
def test_a_figure_that_is_not_known_is_left_out(missing: str) -> None:
    titles = {"perplexity": "Perplexity", "spearman": "Variant effects", "chain": "Nested embedding"}
    for nothing in ({**FIGURES, missing: None}, {name: each for name, each in FIGURES.items() if name != missing}):
        card = model_card(replace(FACTS, figures=nothing))
        assert f"## {titles[missing]}" not in card
        for name, title in titles.items():
            assert (f"## {title}" in card) == (name != missing)


def test_every_number_was_passed_in() -> None:
    """Of the numbers of a page without figures, all are in its facts or are 95 %'s."""
    bare = replace(FACTS, figures={}, commit=None)
    known = {
        *re.findall(r"\d+(?:[.,]\d+)*", repr(bare)),
        "2.4",
        "3,600",
        "1,500",
        "2,048",
        "1,024",
        "33,333",
        "1,234,567",
    }
    words = {"2", "4"}  # ESM-2, and what a hash has
    found = {*re.findall(r"\d+(?:[.,]\d+)*", model_card(bare))}
    assert found - known - words == set()


def test_how_to_make_it_again() -> None:
    again = _section(model_card(FACTS), "Making it again")
    pretrained = (
        "protnest pretrain proteins.fasta.gz --out family/seed-xs --preset nano-xs --steps 3600 --batch-tokens 2048"
    )
    assert f"{pretrained} --learning-rate 0.002 --warmup-steps 200 --seed 0 --precision fp32\n" in again
    taught = "protnest distill --data proteins.fasta.gz --out family/nano-xs --student family/seed-xs"
    taught += " --teacher family/nano-s"
    assert f"{taught} --steps 1500 --batch-tokens 1024 --accumulate 3 --learning-rate 0.0015 --warmup 60" in again
    assert (
        "--schedule cosine --weight-decay 0.02 --seed 7 --precision bf16 --alpha 0.25 --rows all --no-uncert" in again
    )
    assert "--no-smoothing" not in again
    assert "at commit abc123." in again
    assert "commit" not in model_card(replace(FACTS, commit=None))


def test_nothing_tells_of_the_machine() -> None:
    assert "/home" not in model_card(FACTS)
    assert "somebody/" not in model_card(FACTS)


def test_a_decoder() -> None:
    report = {"student": "nano-gpt", "teacher": None, "recipe": RECIPE}
    stages = (TrainedStage(name="nano-gpt", report=report),)
    card = model_card(replace(FACTS, name="nano-gpt", config=BUNDLED_DECODERS["nano-gpt"], stages=stages))
    assert "a decoder with GPT-2's architecture over residues" in card
    assert _rows(_section(card, "Architecture"))["places, tokens"] == ["1024"]
    assert "protnest generate --model nano-gpt" in card
    assert "- gpt2" in card
    assert "Nested embedding" not in card, "it is no part of the chain"
    assert "**nano-gpt**" in card


def test_estimates() -> None:
    assert shown({"value": 1.0, "low": None, "high": None, "n": 1}) == "1.000"
    assert shown(None) == "-"
