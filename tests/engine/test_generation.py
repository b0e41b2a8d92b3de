"""Generation: the same sequences in any batch, limits kept, prompts kept, likelihoods true; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protnest.engine import InputError, read_fasta
from protnest.engine.cli import app
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.decoder_checkpoint import save_decoder
from protnest.engine.decoder_config import DecoderConfig
from protnest.engine.generation import Design, GenerationOptions, Generator
from protnest.engine.quantise_decoder import quantised_decoder
from protnest.engine.sampling import SamplingOptions
from protnest.engine.vocabulary import ResidueVocabulary
from typer.testing import CliRunner

CONFIG = DecoderConfig(layers=2, width=32, heads=2, feedforward=64, vocabulary=33, places=96)
PLAIN = SamplingOptions(top_k=None, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG, ResidueVocabulary(), name="tiny")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return decoder.eval().requires_grad_(False)


def _run(decoder: Decoder, count: int = 12, *, first: int = 0, **given: Any) -> list[Design]:
    return list(Generator(decoder, GenerationOptions(**given)).run(count, first=first))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_batches_change_nothing(decoder: Decoder, precision: str) -> None:
    if precision == "int8":
        decoder = quantised_decoder(decoder)
    elif precision == "bf16":
        other = Decoder(CONFIG, ResidueVocabulary(), name="tiny")
        other.load_state_dict(decoder.state_dict())
        decoder = other.to(torch.bfloat16).requires_grad_(False)
    whole = _run(decoder, batch=64)
    assert [design.number for design in whole] == list(range(12))
    assert len({design.sequence for design in whole}) == 12
    for batch in (1, 5):
        again = _run(decoder, batch=batch)
        assert [design.sequence for design in again] == [design.sequence for design in whole]
    assert [design.sequence for design in _run(decoder, 3, first=7)] == [design.sequence for design in whole[7:10]]
    assert [design.sequence for design in _run(decoder, seed=1)] != [design.sequence for design in whole]


@pytest.mark.parametrize("prompt", ["", "MKT"])
@pytest.mark.parametrize("context", [(), ("ACDEF", "GHI")])
def test_likelihoods_are_those_of_the_whole(decoder: Decoder, prompt: str, context: tuple[str, ...]) -> None:
    """Token by token over the cache is what one packed pass says of the finished sequence."""
    vocabulary = decoder.vocabulary
    before = [vocabulary.encode(each) for each in context]
    for design in _run(decoder, 6, prompt=prompt, context=context, batch=4):
        ids = np.concatenate([*before, vocabulary.encode(design.sequence, whole=design.ended)])
        (terms,) = decoder.log_likelihoods(pack_ids([ids]))
        assert design.sequence.startswith(prompt)
        assert design.tokens == len(ids) - len(np.concatenate([*before, vocabulary.encode(prompt, whole=False)]))
        assert design.log_likelihood == pytest.approx(terms[-design.tokens :].sum(), abs=1e-3)
        assert design.perplexity == pytest.approx(np.exp(-terms[-design.tokens :].mean()), rel=1e-4)
        assert design.residue_perplexity == pytest.approx(np.exp(-design.log_likelihood / len(design.sequence)))


def test_the_likeliest_token_is_the_packed_passs(decoder: Decoder) -> None:
    """With one token left to choose from, each is the largest logit of what stands before it."""
    (design,) = _run(decoder, 1, sampling=SamplingOptions(top_k=1, repetition_penalty=1.0), max_residues=40)
    ids = decoder.vocabulary.encode(design.sequence, whole=design.ended)
    logits_TV = decoder.logits(decoder(pack_ids([ids])))
    never = [
        token for token in range(33) if not decoder.vocabulary.residues_V[token] and token != decoder.vocabulary.end
    ]
    logits_TV[:, never] = -torch.inf
    logits_TV[0, decoder.vocabulary.end] = -torch.inf
    inside = min(40, len(design.sequence))
    assert logits_TV.argmax(dim=1)[:inside].tolist() == ids[1 : inside + 1].tolist()


@pytest.mark.parametrize(("least", "most"), [(1, 5), (20, 20), (30, 50), (1, None), (90, None)])
def test_limits_are_kept(decoder: Decoder, least: int, most: int | None) -> None:
    designs = _run(decoder, 20, min_residues=least, max_residues=most, sampling=PLAIN)
    lengths = [len(design.sequence) for design in designs]
    assert min(lengths) >= least
    assert max(lengths) <= (most or CONFIG.places - 1)
    assert all(design.ended or len(design.sequence) == CONFIG.places - 1 for design in designs)
    assert all(design.strange == 0 for design in designs)
    if most is not None and most < 60:
        assert all(design.ended for design in designs)


class _Pieces(ResidueVocabulary):
    """Tokens of one to three letters: what each token of the alphabet stands for, once, twice or three times."""

    def decode(self, ids: Any) -> str:
        letters = (ResidueVocabulary.decode(self, np.array([token])) * (1 + token % 3) for token in ids.tolist())
        return "".join(letters)


def test_limits_are_met_with_tokens_of_several_letters(decoder: Decoder) -> None:
    """The last letters may need a shorter token: no length is missed, and every length can be met."""
    pieces = Decoder(CONFIG, _Pieces(), name="pieces")
    pieces.load_state_dict(decoder.state_dict())
    designs = _run(pieces, 30, min_residues=40, max_residues=40, sampling=PLAIN)
    assert {len(design.sequence) for design in designs} == {40}
    assert len({design.tokens for design in designs}) > 1
    last = {design.sequence[-3:] for design in designs}
    assert any(len(set(letters)) == 1 for letters in last), "a token of three letters may end at the limit"
    longer = _run(pieces, 30, max_residues=41, sampling=PLAIN)
    assert max(len(design.sequence) for design in longer) == 41


def test_sequences_that_no_limit_touches_are_the_same(decoder: Decoder) -> None:
    free = _run(decoder, 20, sampling=PLAIN)
    limited = _run(decoder, 20, sampling=PLAIN, max_residues=60)
    same = [(a.sequence, b.sequence) for a, b in zip(free, limited, strict=True) if len(a.sequence) < 60 and a.ended]
    assert same
    assert all(a == b for a, b in same)


def test_a_context_conditions(decoder: Decoder) -> None:
    alone, beside = _run(decoder, 8), _run(decoder, 8, context=("WWWWWWWW",))
    assert [design.sequence for design in alone] != [design.sequence for design in beside]
    assert not any(design.sequence.startswith("WWWWWWWW") for design in beside)


def test_sequences_come_in_order_as_soon_as_they_can(decoder: Decoder) -> None:
    steps: list[int] = []
    running = Generator(decoder, GenerationOptions(batch=2, max_residues=6)).run(50, after_step=steps.append)
    assert next(running).number == 0
    assert len(steps) < 12, "the first one is given before the last one is begun"
    assert [design.number for design in running] == list(range(1, 50))
    assert set(steps[:-8]) == {2}, "slots are taken as they become free"


def test_logits_that_are_no_numbers(decoder: Decoder) -> None:
    """A place whose embedding is NaN: the token that stands there is the last one that can be chosen."""
    broken = Decoder(CONFIG, ResidueVocabulary(), name="broken")
    broken.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        broken.embed_places.weight[7] = torch.nan
    given: dict[str, Any] = {"min_residues": 20, "prompt": "MK", "batch": 2}
    message = "broken gives logits that are no numbers at token 8 of sequence 3, in fp32"
    with pytest.raises(InputError, match=message):
        _run(broken.eval().requires_grad_(False), 2, first=3, **given)


def test_nothing_is_asked_for(decoder: Decoder) -> None:
    assert _run(decoder, 0) == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"prompt": "A" * 96}, "the prompt and its context take 97 tokens of the 96 that tiny has places for"),
        ({"context": ("A" * 100,)}, "the prompt and its context take 103 tokens"),
        ({"prompt": "MK1"}, "'1' at residue 3 is not a residue"),
        ({"min_residues": 9, "max_residues": 8}, "residues from 9 to 8: no length meets that"),
        ({"min_residues": 0}, "residues from 0 to None: no length meets that"),
        ({"min_residues": 96}, "96 residues do not fit into the 96 tokens of tiny, which stand for 95 at most"),
        ({"prompt": "MKTA", "max_residues": 3}, "the prompt has 4 residues already, more than the most, 3"),
    ],
)
def test_what_cannot_be(decoder: Decoder, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Generator(decoder, GenerationOptions(**given))


@pytest.fixture(scope="module")
def folder(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_decoder(decoder, folder)
    return folder


def _command(folder: Path, out: Path, *more: str) -> Any:
    words = ["generate", "--model", str(folder), "--out", str(out), "--precision", "fp32", *more]
    return CliRunner().invoke(app, words)


def test_command(decoder: Decoder, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "designs.fasta"
    done = _command(folder, out, "-n", "10", "--min-residues", "5", "--max-residues", "70", "--prompt", "MK", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    records = list(read_fasta(out))
    expected = _run(decoder, 10, min_residues=5, max_residues=70, prompt="MK")
    assert [record.sequence for record in records] == [design.sequence for design in expected]
    assert [record.id for record in records] == [f"design_{number}" for number in range(1, 11)]
    for record, design in zip(records, expected, strict=True):
        words = dict(word.split("=") for word in record.header.split()[1:])
        assert (int(words["residues"]), int(words["number"])) == (len(design.sequence), design.number)
        assert float(words["perplexity"]) == pytest.approx(design.perplexity, abs=1e-3)
    assert (facts["sequences"], facts["residues"]) == (10, sum(len(record.sequence) for record in records))
    assert max(len(line) for line in out.read_text().splitlines() if not line.startswith(">")) == 60


def test_duplicates_are_counted_and_dropped(folder: Path, tmp_path: Path) -> None:
    short = ["-n", "40", "--max-residues", "1", "--json"]
    kept = json.loads(_command(folder, tmp_path / "a.fasta", *short).stdout)
    assert kept["duplicates"] > 0
    assert kept["sequences"] == 40
    dropped = _command(folder, tmp_path / "b.fasta", "-n", "12", "--max-residues", "1", "--drop-duplicates", "--json")
    sequences = [record.sequence for record in read_fasta(tmp_path / "b.fasta")]
    assert (json.loads(dropped.stdout)["sequences"], len(set(sequences))) == (12, 12)


def test_a_model_that_repeats_itself_is_given_up(folder: Path, tmp_path: Path) -> None:
    words = ["-n", "30", "--max-residues", "1", "--top-k", "1", "--drop-duplicates"]
    done = _command(folder, tmp_path / "a.fasta", *words)
    assert done.exit_code == 1
    assert "the model gives little else" in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--top-k", "0"], "top_k is 0, expected at least 1"),
        (["--temperature", "0"], "temperature is 0.0, expected a number above 0"),
        (["--min-residues", "9", "--max-residues", "8"], "no length meets that"),
        (["--prompt", "A" * 200], "the prompt and its context take 201 tokens"),
    ],
)
def test_errors_of_the_command(folder: Path, tmp_path: Path, words: list[str], problem: str) -> None:
    done = _command(folder, tmp_path / "a.fasta", *words)
    assert done.exit_code == 1
    assert problem in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_cannot_generate(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "--model", "nano-xs", "--out", str(tmp_path / "a.fasta")])
    assert done.exit_code == 1
    assert "nano-xs is an encoder, which cannot generate" in " ".join(done.output.split())
