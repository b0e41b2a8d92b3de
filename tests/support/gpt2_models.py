"""GPT-2 models of transformers with hostile random weights, and byte pairs learnt from the examples' proteins.

Hostile: LayerNorm weights of both signs and not one, biases with a mean, token embeddings whose rows differ a
hundredfold in scale, and queries and keys large enough for attention to be far from uniform.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protnest.engine.alphabet import TOKENS
from protnest.engine.decoder import Decoder
from protnest.engine.decoder_checkpoint import read_decoder
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "proteins.fasta"


def example_proteins() -> list[str]:
    """The sequences of the examples, read without the package's own reader."""
    records = re.split(r"^>.*$", EXAMPLES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return ["".join(record.split()) for record in records if record.strip()]


def fasta_text(sequence: str) -> str:
    """What ProtGPT2 reads between two `<|endoftext|>`."""
    return "\n" + "".join(f"{line}\n" for line in re.findall(".{1,60}", sequence))


@functools.cache
def byte_pairs(size: int = 400, *, skip: int = 0) -> Any:
    """A byte-level tokenizer of `size` tokens, learnt from the examples; without the first `skip`, it is another."""
    pairs = ByteLevelBPETokenizer()
    texts = [fasta_text(protein) for protein in example_proteins()[skip:]]
    pairs.train_from_iterator(texts, vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False)
    assert pairs.get_vocab_size() == size
    return pairs


def hostile_gpt2(
    vocabulary: int, *, layers: int = 2, width: int = 48, heads: int = 3, places: int = 96, seed: int = 0, **sizes: int
) -> Any:
    """A GPT2LMHeadModel of these sizes with hostile weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    # Eager attention takes its softmax in the model's own dtype, fp64 too.
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=places,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
            **sizes,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if "ln_" in name and name.endswith("weight"):
                signs = torch.where(uniform(*shape) < 0.3, -1.0, 1.0)
                parameter.copy_(signs * (0.3 + 1.7 * uniform(*shape)))
            elif name.endswith("bias"):
                parameter.copy_(0.2 + 0.5 * normal(*shape))
            elif "wte" in name:
                parameter.copy_(0.2 + normal(*shape) * 10 ** (2 * uniform(shape[0], 1) - 1))
            elif "wpe" in name:
                parameter.copy_(0.1 + normal(*shape))
            else:
                parameter.copy_(normal(*shape) / shape[0] ** 0.5)
                if "c_attn" in name:
                    parameter[:, : 2 * width] *= 1.5
    return model


def save_gpt2(folder: Path, *, pairs: Any = None, **sizes: int) -> Any:
    """Saves a hostile model over byte pairs as transformers does, and gives it."""
    pairs = byte_pairs() if pairs is None else pairs
    model = hostile_gpt2(pairs.get_vocab_size(), **sizes)
    model.save_pretrained(folder)
    pairs.save(str(folder / "tokenizer.json"))
    return model


def save_residue_gpt2(folder: Path, **sizes: int) -> Any:
    """The same over ESM-2's alphabet, which `vocab.txt` lists."""
    model = hostile_gpt2(len(TOKENS), **sizes)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    return model


def load_pair(folder: Path, *, residues: bool = False, **sizes: int) -> tuple[Any, Decoder]:
    """A hostile model of transformers, and this package's reading of its folder: fp32 on the CPU."""
    theirs = (save_residue_gpt2 if residues else save_gpt2)(folder, **sizes)
    return theirs, read_decoder(folder)[0].requires_grad_(False)


def gentle_pair(folder: Path, *, residues: bool = False, seed: int = 0, **sizes: int) -> tuple[Any, Decoder]:
    """A hostile model whose logits are as large as a trained one's, and this package's reading of it."""
    theirs = (save_residue_gpt2 if residues else save_gpt2)(folder, seed=seed, **sizes)
    with torch.no_grad():
        theirs.transformer.ln_f.weight.mul_(0.02)
        theirs.transformer.ln_f.bias.mul_(0.02)
    theirs.save_pretrained(folder)
    return theirs, read_decoder(folder)[0].requires_grad_(False)


def gpt2_logits(model: Any, sequences: Sequence[Any]) -> torch.Tensor:
    """What transformers says, one sequence of ids at a time, packed like our batches: (T, V)."""
    with torch.no_grad():
        return torch.cat([model(torch.as_tensor(ids)[None].long()).logits[0] for ids in sequences])
