"""Decoders' tokens: against the tokenizer itself and a literal reading of each token, and files that are none.

Shapes: V tokens.
"""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protnest.engine.alphabet import BOS_ID, EOS_ID, RESIDUES, TOKEN_IDS, TOKENS
from protnest.engine.errors import InputError
from protnest.engine.vocabulary import BytePairVocabulary, ResidueVocabulary, Vocabulary, read_vocabulary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support.gpt2_models import END_OF_TEXT, byte_pairs, example_proteins, fasta_text

LENGTHS = (0, 1, 59, 60, 61, 119, 120, 121, 300)
SOURCE = "".join(example_proteins())


def _across_lines() -> Any:
    """Byte pairs that are not cut at line breaks: some tokens have one inside, as some of ProtGPT2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Of equal lines: pairs of a residue with a line break are then frequent.
    texts = [fasta_text(protein) for protein in example_proteins()] + [fasta_text("MKV" * 80)] * 9
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


ACROSS = _across_lines()


@pytest.fixture(params=["pairs", "across lines"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_pairs()._tokenizer if request.param == "pairs" else ACROSS


def _bytes(token: str) -> bytes:
    """What a byte-level token stands for; OpenAI's table of GPT-2, written down from its description.

    Bytes that print stand for themselves, the others for the letters from U+0100 on, in their order.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    table = {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}
    return bytes(table[letter] for letter in token)


# Byte pairs


@pytest.mark.parametrize("length", LENGTHS)
def test_round_trip(tokenizer: Any, length: int) -> None:
    vocabulary, sequence = BytePairVocabulary(tokenizer), SOURCE[7 : 7 + length]
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = vocabulary.encode(sequence)
    assert ids.dtype == np.int64
    assert vocabulary.decode(ids) == sequence
    assert (ids[0], ids[-1], vocabulary.start, vocabulary.end) == (end, end, end, end)
    if length:
        text = b"".join(_bytes(tokenizer.id_to_token(token)) for token in ids[1:-1].tolist()).decode()
        assert text == fasta_text(sequence)
        assert ids[1:-1].tolist() == tokenizer.encode(fasta_text(sequence), add_special_tokens=False).ids
    assert int(vocabulary.residues_V[ids].sum()) == length


@pytest.mark.parametrize("length", LENGTHS)
def test_begun_proteins_have_no_end(tokenizer: Any, length: int) -> None:
    vocabulary, sequence = BytePairVocabulary(tokenizer), SOURCE[7 : 7 + length]
    ids = vocabulary.encode(sequence, whole=False)
    text = b"".join(_bytes(tokenizer.id_to_token(token)) for token in ids[1:].tolist()).decode()
    assert ids[0] == vocabulary.start
    assert text == "\n" + "\n".join(re.findall(".{1,60}", sequence))
    assert vocabulary.decode(ids) == sequence


def test_residues_and_plain_token_by_token(tokenizer: Any) -> None:
    vocabulary = BytePairVocabulary(tokenizer)
    residues_V, plain_V = vocabulary.residues_V, vocabulary.plain_V
    assert (residues_V.dtype, plain_V.dtype) == (np.int64, np.bool_)
    assert residues_V.shape == plain_V.shape == (vocabulary.size,)
    breaks = 0
    for token in range(vocabulary.size):
        spelt = tokenizer.id_to_token(token)
        if token == vocabulary.end:
            assert (residues_V[token], plain_V[token]) == (0, False)
            continue
        if spelt == "<pad>":
            assert not plain_V[token]
            continue
        text = _bytes(spelt).decode("latin-1")
        assert residues_V[token] == sum(letter in RESIDUES for letter in text), text
        assert plain_V[token] == all(letter in RESIDUES + "\n" for letter in text), text
        breaks += "\n" in text and len(text) > 1
    assert plain_V[tokenizer.token_to_id("Ċ")]
    assert residues_V[tokenizer.token_to_id("Ċ")] == 0
    assert (breaks > 0) == (tokenizer is ACROSS)
    assert residues_V.max() > 1


def _check_letters(vocabulary: Vocabulary) -> None:
    letters_V = vocabulary.letters_V
    assert (letters_V.dtype, letters_V.shape) == (np.int64, (vocabulary.size,))
    assert letters_V.tolist() == [len(vocabulary.decode(np.array([token]))) for token in range(vocabulary.size)]
    assert bool((letters_V >= vocabulary.residues_V).all())
    assert letters_V[vocabulary.end] == letters_V[vocabulary.start] == 0


def test_letters_are_those_of_decode(tokenizer: Any) -> None:
    """Letters that are no residues are counted, line breaks are not."""
    vocabulary = BytePairVocabulary(tokenizer)
    _check_letters(vocabulary)
    assert vocabulary.letters_V[tokenizer.token_to_id("Ċ")] == 0
    assert vocabulary.letters_V[tokenizer.token_to_id("a")] == 1
    assert vocabulary.residues_V[tokenizer.token_to_id("a")] == 0


def test_letters_of_residues() -> None:
    _check_letters(ResidueVocabulary())
    assert ResidueVocabulary().letters_V.tolist() == [int(token in RESIDUES) for token in TOKENS]


def test_no_letter_is_lost_or_added(tokenizer: Any) -> None:
    """Every letter of the alphabet has tokens, the rare ones too."""
    vocabulary = BytePairVocabulary(tokenizer)
    ids = vocabulary.encode(RESIDUES * 3)
    assert vocabulary.decode(ids) == RESIDUES * 3
    assert vocabulary.plain_V[ids[1:-1]].all()


def test_decode_leaves_out_ends_and_breaks(tokenizer: Any) -> None:
    vocabulary = BytePairVocabulary(tokenizer)
    one, other = vocabulary.encode(SOURCE[:100]), vocabulary.encode(SOURCE[200:280])
    assert vocabulary.decode(np.concatenate([one, other])) == SOURCE[:100] + SOURCE[200:280]
    assert vocabulary.decode(np.empty(0, dtype=np.int64)) == ""


def test_spellings_tell_tokenizers_apart() -> None:
    one, other = BytePairVocabulary(byte_pairs()._tokenizer), BytePairVocabulary(byte_pairs(skip=24)._tokenizer)
    assert len(one.tokens) == len(set(one.tokens)) == one.size == other.size == 400
    assert [byte_pairs().token_to_id(token) for token in one.tokens] == list(range(400))
    assert one.tokens != other.tokens
    assert sorted(one.tokens[:257]) == sorted(other.tokens[:257])


def test_no_end_of_text(tmp_path: Path) -> None:
    content = json.loads(ACROSS.to_str().replace(END_OF_TEXT, "<other>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the tokenizer has no token <\|endoftext\|>") as caught:
        read_vocabulary(tmp_path, 420)
    assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_ids_that_are_left_out(tmp_path: Path) -> None:
    content = json.loads(byte_pairs()._tokenizer.to_str())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="the tokenizer's 400 ids are not 0 to 399, each once"):
        read_vocabulary(tmp_path, 400)


# Files


def _same(one: Vocabulary, other: Vocabulary) -> None:
    assert (one.size, one.start, one.end, one.tokens) == (other.size, other.start, other.end, other.tokens)
    for sequence in (SOURCE[:130], SOURCE[500:505]):
        assert one.encode(sequence).tolist() == other.encode(sequence).tolist()


@pytest.mark.parametrize("kind", ["pairs", "across lines", "residues"])
def test_saved_and_read(tmp_path: Path, kind: str) -> None:
    given: Vocabulary = ResidueVocabulary()
    if kind != "residues":
        given = BytePairVocabulary(byte_pairs()._tokenizer if kind == "pairs" else ACROSS)
    given.save(tmp_path)
    found = read_vocabulary(tmp_path, given.size)
    assert type(found) is type(given)
    _same(found, given)
    assert len(list(tmp_path.iterdir())) == 1


def test_vocab_and_merges(tmp_path: Path) -> None:
    """The two files of older checkpoints, alone and beside a tokenizer.json, which comes first."""
    byte_pairs().save_model(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    _same(read_vocabulary(tmp_path, 400), BytePairVocabulary(byte_pairs()._tokenizer))
    ACROSS.save(str(tmp_path / "tokenizer.json"))
    _same(read_vocabulary(tmp_path, 420), BytePairVocabulary(ACROSS))


def test_vocab_without_end_of_text(tmp_path: Path) -> None:
    byte_pairs().save_model(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<other>"] = vocab.pop(END_OF_TEXT)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"no token <\|endoftext\|>") as caught:
        read_vocabulary(tmp_path, 400)
    assert caught.value.file == str(tmp_path / "vocab.json")


@pytest.mark.parametrize("size", [399, 401, 50257])
def test_another_models_size(tmp_path: Path, size: int) -> None:
    byte_pairs().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError) as caught:
        read_vocabulary(tmp_path, size)
    assert caught.value.file == str(tmp_path)
    assert caught.value.problem == (f"the tokenizer has 400 tokens, the model {size:,}: they do not belong together")


def test_residues_of_another_size(tmp_path: Path) -> None:
    ResidueVocabulary().save(tmp_path)
    with pytest.raises(InputError, match="the tokenizer has 33 tokens, the model 32"):
        read_vocabulary(tmp_path, 32)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"model": 3}', "\xff\xfe"], ids=repr)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_broken_file(tmp_path: Path, name: str, content: str) -> None:
    byte_pairs().save_model(str(tmp_path))
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_vocabulary(tmp_path, 400)
    assert caught.value.file == str(tmp_path / name)


def test_merges_missing(tmp_path: Path) -> None:
    byte_pairs().save_model(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(InputError, match="not a readable tokenizer") as caught:
        read_vocabulary(tmp_path, 400)
    assert caught.value.file == str(tmp_path / "vocab.json")


@pytest.mark.parametrize(
    "letters", [None, "", "A\nC\n", "\n".join(TOKENS[:-1]), "\n".join(TOKENS[::-1]), "\xff"], ids=repr
)
def test_no_vocabulary_at_all(tmp_path: Path, letters: str | None) -> None:
    if letters is not None:
        (tmp_path / "vocab.txt").write_bytes(letters.encode("latin-1"))
    with pytest.raises(InputError, match=r"holds no vocabulary: neither tokenizer\.json, nor vocab\.json") as caught:
        read_vocabulary(tmp_path, 33)
    assert caught.value.file == str(tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte pairs say what to install; residues do without."""
    byte_pairs().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "residues").mkdir()
    ResidueVocabulary().save(tmp_path / "residues")
    import_it = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "tokenizers":
            raise ImportError(name)
        return import_it(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert read_vocabulary(tmp_path / "residues", 33).size == 33
    with pytest.raises(InputError, match=r"needs the package tokenizers: pip install 'protnest\[decoder\]'") as caught:
        read_vocabulary(tmp_path, 400)
    assert caught.value.file == str(tmp_path)


# Residues


@pytest.mark.parametrize("length", LENGTHS)
def test_residues_round_trip(length: int) -> None:
    vocabulary, sequence = ResidueVocabulary(), SOURCE[7 : 7 + length]
    letters = [TOKEN_IDS[letter] for letter in sequence]
    assert vocabulary.encode(sequence).tolist() == [BOS_ID, *letters, EOS_ID]
    assert vocabulary.encode(sequence, whole=False).tolist() == [BOS_ID, *letters]
    assert vocabulary.decode(vocabulary.encode(sequence)) == sequence


def test_residues_token_by_token() -> None:
    vocabulary = ResidueVocabulary()
    assert (vocabulary.size, vocabulary.tokens) == (33, TOKENS)
    assert (vocabulary.residues_V.dtype, vocabulary.plain_V.dtype) == (np.int64, np.bool_)
    for token, text in enumerate(TOKENS):
        is_residue = len(text) == 1
        assert (vocabulary.residues_V[token], vocabulary.plain_V[token]) == (int(is_residue), is_residue), text
