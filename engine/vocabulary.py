"""A decoder's tokens: proteins to ids and back, as the decoder met them in training.

ProtGPT2 was trained on FASTA text whose headers were replaced: `<|endoftext|>`, a line break, the residues in lines of
60, a line break, and the next `<|endoftext|>`. Its byte pairs stand for about four residues each, some with a line
break inside. A decoder over the amino-acid alphabet reads `<cls>`, one token a residue, `<eos>`.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .alphabet import BOS_ID, EOS_ID, RESIDUES, TOKEN_IDS, TOKENS
from .errors import InputError

END_OF_TEXT = "<|endoftext|>"
LINE_RESIDUES = 60
"""Residues of a line of the text that ProtGPT2 was trained on."""

Ids = npt.NDArray[np.int64]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def most_tokens(residues: int) -> int:
    """Most tokens that any vocabulary spells a whole protein with: a letter or a line break each, start and end."""
    return residues + -(-residues // LINE_RESIDUES) + 3


class Vocabulary(Protocol):
    """Tokens of a decoder.

    Attributes:
        size: V, how many there are.
        start: id that every sequence begins with.
        end: id that every whole sequence ends with.
        tokens: V spellings by id, no two alike: whether two models share a vocabulary is read from them.
        residues_V: int64 (V,), residues that each token stands for; 0 for line breaks and special tokens.
        letters_V: int64 (V,), letters that each token stands for in `decode`, those that are no residues counted.
        plain_V: bool (V,), tokens that are made of residues and line breaks alone.
        fingerprint: hash of all that decides how proteins are spelt; the tokens alone do not.
    """

    size: int
    start: int
    end: int

    @property
    def tokens(self) -> tuple[str, ...]: ...

    @property
    def residues_V(self) -> Ids: ...

    @property
    def letters_V(self) -> Ids: ...

    @property
    def plain_V(self) -> npt.NDArray[np.bool_]: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, sequence: str, *, whole: bool = True) -> Ids:
        """Ids of a protein with its start, and with its end where it is whole."""
        ...

    def decode(self, ids: Ids) -> str:
        """Residues that ids stand for, line breaks and special tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the files by which `read_vocabulary` knows it."""
        ...


class ResidueVocabulary:
    """ESM-2's alphabet: one token a residue between `<cls>` and `<eos>`."""

    size = len(TOKENS)
    start = BOS_ID
    end = EOS_ID
    tokens = TOKENS
    fingerprint = _hash(" ".join(TOKENS))

    @cached_property
    def residues_V(self) -> Ids:
        return np.array([token in RESIDUES for token in TOKENS], dtype=np.int64)

    @cached_property
    def letters_V(self) -> Ids:
        return np.array([len(self.decode(np.array([token]))) for token in range(self.size)], dtype=np.int64)

    @property
    def plain_V(self) -> npt.NDArray[np.bool_]:
        return self.residues_V > 0

    def encode(self, sequence: str, *, whole: bool = True) -> Ids:
        end = [self.end] if whole else []
        return np.array([self.start, *(TOKEN_IDS[letter] for letter in sequence), *end], dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        return "".join(TOKENS[token] for token in ids.tolist() if self.residues_V[token])

    def save(self, folder: Path) -> None:
        (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")


class BytePairVocabulary:
    """Byte pairs of a Hugging Face tokenizer, over FASTA text.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        file: what messages call it.

    Raises:
        InputError: it has no `<|endoftext|>`, or an id is left out.
    """

    def __init__(self, tokenizer: object, *, file: Path | None = None) -> None:
        from tokenizers import Tokenizer

        assert isinstance(tokenizer, Tokenizer)
        self._tokenizer = tokenizer
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            message = f"the tokenizer has no token {END_OF_TEXT}"
            raise InputError(message, file=file)
        self.size: int = tokenizer.get_vocab_size()
        self.start: int = end
        self.end: int = end
        spelt = {token: text for text, token in tokenizer.get_vocab().items()}
        if sorted(spelt) != list(range(self.size)):
            message = f"the tokenizer's {self.size:,} ids are not 0 to {self.size - 1:,}, each once"
            raise InputError(message, file=file)
        self.tokens: tuple[str, ...] = tuple(spelt[token] for token in range(self.size))

    @cached_property
    def _texts(self) -> list[str]:
        texts: list[str] = self._tokenizer.decode_batch(
            [[token] for token in range(self.size)], skip_special_tokens=False
        )
        texts[self.start] = texts[self.end] = ""
        return texts

    @cached_property
    def residues_V(self) -> Ids:
        return np.array([sum(letter in RESIDUES for letter in text) for text in self._texts], dtype=np.int64)

    @cached_property
    def letters_V(self) -> Ids:
        return np.array([len("".join(text.split())) for text in self._texts], dtype=np.int64)

    @cached_property
    def plain_V(self) -> npt.NDArray[np.bool_]:
        return np.array([bool(text) and not text.strip("\n" + RESIDUES) for text in self._texts])

    @cached_property
    def fingerprint(self) -> str:
        return _hash(self._tokenizer.to_str())

    def encode(self, sequence: str, *, whole: bool = True) -> Ids:
        lines = [sequence[begin : begin + LINE_RESIDUES] for begin in range(0, len(sequence), LINE_RESIDUES)]
        text = "\n" + "\n".join(lines) + ("\n" if whole else "")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array([self.start, *ids, *([self.end] if whole else [])], dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        text = "".join(self._texts[token] for token in ids.tolist())
        return "".join(letter for letter in text if not letter.isspace())

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / "tokenizer.json"))


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a decoder's checkpoint: `tokenizer.json`, or `vocab.json` with `merges.txt`, or `vocab.txt`.

    Args:
        folder: of the checkpoint.
        size: tokens that the model has.

    Raises:
        InputError: there is none, it cannot be read, or it has another number of tokens than the model; or the package
            `tokenizers` is missing.
    """
    found = _read(folder)
    if found.size != size:
        message = f"the tokenizer has {found.size:,} tokens, the model {size:,}: they do not belong together"
        raise InputError(message, file=folder)
    return found


def _read(folder: Path) -> Vocabulary:
    whole, vocab, merges, letters = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    )
    if not whole.is_file() and not vocab.is_file():
        if letters.is_file() and letters.read_text(encoding="utf-8", errors="replace").split() == list(TOKENS):
            return ResidueVocabulary()
        message = "holds no vocabulary: neither tokenizer.json, nor vocab.json with merges.txt, nor ESM-2's vocab.txt"
        raise InputError(message, file=folder)
    try:
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    except ImportError as error:
        message = "a decoder over byte pairs needs the package tokenizers: pip install 'protnest[decoder]'"
        raise InputError(message, file=folder) from error
    try:
        if whole.is_file():
            return BytePairVocabulary(Tokenizer.from_file(str(whole)), file=whole)
        pairs = ByteLevelBPETokenizer(str(vocab), str(merges))
        if END_OF_TEXT in json.loads(vocab.read_text(encoding="utf-8")):
            pairs.add_special_tokens([END_OF_TEXT])
        return BytePairVocabulary(pairs._tokenizer, file=vocab)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific.
        message = f"not a readable tokenizer ({error})"
        raise InputError(message, file=whole if whole.is_file() else vocab) from error
