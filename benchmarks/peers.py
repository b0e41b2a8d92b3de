"""The engines that are compared: one small class each, the same weights and one interface for all.

fair-esm runs as its extract script does: its own planner, converter and forward, logits included, fp32. transformers
runs `EsmModel` with SDPA and without a pooler, on padded batches sorted by length; its tokens come from a table instead
of its slower tokenizer. protnest runs `Embedder`. esm-cpp has a file of its own, `esm_cpp.py`. All pool the mean over
residues.

Shapes: B sequences, L tokens of the longest one in a padded batch, D width. Budgets are tokens a batch, padding
counted; a budget of 1 runs one sequence at a time.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from protnest.benchmarks.esm_cpp import ESM_CPP, EsmCpp
from protnest.benchmarks.esm_cpp import PRECISIONS as ESM_CPP_PRECISIONS
from protnest.engine import Embedder, Encoder, from_fair_esm, from_transformers
from protnest.engine.alphabet import BOS_ID, EOS_ID, PAD_ID, RESIDUE_TABLE
from protnest.engine.config import EncoderConfig, config_to_huggingface
from protnest.engine.device import PRECISIONS, precision_name, resolve_precision
from protnest.engine.packing import pack
from protnest.engine.quantise import quantised
from torch import nn

Vectors = npt.NDArray[np.float32]

FAIR_ESM, TRANSFORMERS, PROTNEST = "fair-esm", "transformers", "protnest"
PEER_MODULES = {FAIR_ESM: "esm", TRANSFORMERS: "transformers"}
INT8 = "int8"
# What fair-esm and transformers hold beyond the encoder that is compared, or compute by themselves.
_NOT_COMPARED = ("contact_head.", "lm_head.", "rotary_embeddings.", "rot_emb.", "position_ids")


class Engine(Protocol):
    """What is timed.

    Attributes:
        name: the package.
        precision: "fp32", "bf16", "fp16" or "int8".
    """

    name: str
    precision: str

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        """Mean over residues of the last layer after the final LayerNorm: float32 (B, D), in the order given."""
        ...


def at_precision(encoder: Encoder, precision: str, device: torch.device) -> Encoder:
    """A copy of an fp32 encoder in another precision.

    Raises:
        InputError: int8 is wanted elsewhere than on a CPU.
    """
    own = copy.deepcopy(encoder)
    if precision == INT8:
        return quantised(own.to(device))
    return own.to(device=device, dtype=PRECISIONS[precision]).requires_grad_(False)


class Protnest:
    """`protnest.engine.Embedder`, packed batches."""

    name = PROTNEST

    def __init__(self, encoder: Encoder, *, precision: str, device: torch.device) -> None:
        self.precision = precision
        self.encoder = at_precision(encoder, precision, device)
        # Kept, as users keep theirs: an embedder captures graphs once, and remembers what fits into memory.
        self._embedders: dict[int, Embedder] = {}

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        if budget not in self._embedders:
            self._embedders[budget] = Embedder(self.encoder, pool="mean", max_tokens=budget)
        vectors = self._embedders[budget].embed(sequences)
        assert isinstance(vectors, np.ndarray)
        return vectors


class Transformers:
    """`transformers.EsmModel` with SDPA, padded batches sorted by length, attention mask given."""

    name = TRANSFORMERS

    def __init__(self, model: nn.Module, *, precision: str, device: torch.device) -> None:
        self.precision = precision
        self._device = device
        self._model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        # Parameters alone: `.to(dtype)` would round the rotary frequencies, too, and cost it its accuracy.
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(PRECISIONS[precision])

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        order: list[int] = []
        rows: list[torch.Tensor] = []
        for batch in sorted_batches([len(sequence) + 2 for sequence in sequences], budget):
            tokens_BL, weights_BL = _pad([sequences[index] for index in batch])
            tokens = torch.from_numpy(tokens_BL).to(self._device)
            with torch.inference_mode():
                hidden_BLD = self._model(input_ids=tokens, attention_mask=(tokens != PAD_ID).long()).last_hidden_state
                weights = torch.from_numpy(weights_BL).to(self._device)
                rows.append(torch.einsum("bl,bld->bd", weights, hidden_BLD.float()))
            order += batch
        pooled = torch.cat(rows).cpu().numpy()
        result = np.empty_like(pooled)
        result[order] = pooled
        return result


class FairEsm:
    """`esm.model.esm2.ESM2`, planned and converted by its own code, fp32 only."""

    name = FAIR_ESM
    precision = "fp32"

    def __init__(self, model: nn.Module, *, device: torch.device) -> None:
        self._device = device
        self._model: Any = copy.deepcopy(model).to(device).eval().requires_grad_(False)

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        from esm.data import FastaBatchedDataset

        dataset = FastaBatchedDataset([str(index) for index in range(len(sequences))], sequences)
        convert = self._model.alphabet.get_batch_converter()
        deepest = self._model.num_layers
        result = np.empty((len(sequences), self._model.embed_dim), dtype=np.float32)
        for batch in dataset.get_batch_indices(budget, extra_toks_per_seq=1):
            _, strings, tokens = convert([dataset[index] for index in batch])
            with torch.inference_mode():
                hidden_BLD = self._model(tokens.to(self._device), repr_layers=[deepest])["representations"][deepest]
                means = [hidden_BLD[row, 1 : len(string) + 1].mean(0) for row, string in enumerate(strings)]
                result[batch] = torch.stack(means).cpu().numpy()
        return result


class MeanLogits:
    """Means over residues of our fp32 logits (B, V): what engines are held to where logits are all that they give."""

    name = "mean logits"
    precision = "fp32"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def embed(self, sequences: Sequence[str], budget: int) -> Vectors:
        """One sequence at a time, whatever the budget; float32 (B, V)."""
        rows = []
        with torch.inference_mode():
            for sequence in sequences:
                hidden_TD = self._encoder(pack([sequence])).hidden_TD
                rows.append(self._encoder.logits(hidden_TD[1:-1]).mean(0).numpy())
        return np.stack(rows)


def sorted_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by rising length, cut so that no padded batch exceeds `budget` tokens, unless it holds one sequence."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _pad(sequences: Sequence[str]) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Token ids (B, L) and weights (B, L) whose weighted sum is the mean over residues."""
    longest = max(map(len, sequences)) + 2
    tokens_BL = np.full((len(sequences), longest), PAD_ID, dtype=np.int64)
    weights_BL = np.zeros((len(sequences), longest), dtype=np.float32)
    tokens_BL[:, 0] = BOS_ID
    for row, sequence in enumerate(sequences):
        end = len(sequence) + 1
        tokens_BL[row, 1:end] = RESIDUE_TABLE[np.frombuffer(sequence.encode("ascii"), dtype=np.uint8)]
        tokens_BL[row, end] = EOS_ID
        weights_BL[row, 1:end] = 1 / len(sequence)
    return tokens_BL, weights_BL


def scatter_weights(model: nn.Module, *, seed: int) -> None:
    """Fills a model with random weights that hide nothing: biases and LayerNorms differ from channel to channel.

    A linear layer's outputs have about its inputs' scale, so attention is far from uniform and every layer counts.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, 1 / math.sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.weight.normal_(1, 0.2, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 1, generator=generator)


def is_installed(peer: str) -> bool:
    """Whether a peer's package is here."""
    return importlib.util.find_spec(PEER_MODULES[peer]) is not None


def random_encoder(config: EncoderConfig, *, seed: int) -> Encoder:
    """An fp32 encoder on the CPU with the weights of `scatter_weights`, language-model head included."""
    encoder = Encoder(config, name="random").eval()
    scatter_weights(encoder, seed=seed)
    return encoder.requires_grad_(False)


def _with_head(encoder: Encoder, *, seed: int) -> Encoder:
    """A copy with a random language-model head in place of its own, if it has one."""
    whole = random_encoder(encoder.config, seed=seed)
    body = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("head.")}
    whole.load_state_dict(body, strict=False)
    return whole


def _random_transformers(config: EncoderConfig, *, seed: int) -> nn.Module:
    from transformers import EsmConfig, EsmModel

    settings = EsmConfig(**config_to_huggingface(config, dtype="float32"), attn_implementation="sdpa")
    model: nn.Module = EsmModel(settings, add_pooling_layer=False)
    scatter_weights(model, seed=seed)
    return model.eval()


def fair_esm_model(config: EncoderConfig) -> nn.Module:
    """A fair-esm `ESM2` of these sizes, its weights not yet set."""
    from esm.model.esm2 import ESM2

    model: nn.Module = ESM2(num_layers=config.layers, embed_dim=config.width, attention_heads=config.heads)
    return model.eval()


def fair_esm_names(layers: int) -> Iterator[tuple[str, str]]:
    """Each tensor of the encoder by fair-esm's name and by transformers'."""
    yield "embed_tokens.weight", "embeddings.word_embeddings.weight"
    parts = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "LayerNorm",
    }
    for kind in ("weight", "bias"):
        yield f"emb_layer_norm_after.{kind}", f"encoder.emb_layer_norm_after.{kind}"
        for layer in range(layers):
            for fair, other in parts.items():
                yield f"layers.{layer}.{fair}.{kind}", f"encoder.layer.{layer}.{other}.{kind}"


def _copy_to_fair_esm(source: nn.Module, target: nn.Module, layers: int) -> None:
    tensors = source.state_dict()
    renamed = {fair: tensors[name] for fair, name in fair_esm_names(layers)}
    outcome = target.load_state_dict(renamed, strict=False)
    left = [name for name in outcome.missing_keys if not any(part in name for part in _NOT_COMPARED)]
    if left or outcome.unexpected_keys:
        message = f"weights did not reach fair-esm: missing {left}, unexpected {outcome.unexpected_keys}"
        raise RuntimeError(message)


Peer = Transformers | FairEsm | EsmCpp


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """The engines of one model shape; their weights are the same, bit for bit in fp32.

    Attributes:
        ours: protnest in each precision.
        peers: the others in each precision that they have.
        reference: an fp32 engine, a peer's where one is installed; all must agree with it.
        default_precision: which one `--precision auto` is here.
        logits_reference: for passes that give logits; None where no engine does.
    """

    ours: list[Protnest]
    peers: list[Peer]
    reference: Engine
    default_precision: str
    logits_reference: Engine | None = None

    @property
    def engines(self) -> list[Protnest | Peer]:
        return [*self.ours, *self.peers]

    def rivals(self, peer: Engine) -> list[Protnest]:
        """Ours in the peer's precision and, where the peer does not come in it, in bf16 and in what is default here.

        So like meets like, and what a user gets by default from one meets what they get from the other.
        """
        of_peer = {other.precision for other in self.peers if other.name == peer.name}
        wanted = {peer.precision, *({self.default_precision, "bf16"} - of_peer)}
        return [engine for engine in self.ours if engine.precision in wanted] or self.ours[:1]

    def close(self) -> None:
        """Ends the processes that some engines have."""
        for engine in self.peers:
            if isinstance(engine, EsmCpp):
                engine.close()


def build_lineup(
    config: EncoderConfig,
    *,
    seed: int,
    precisions: Sequence[str],
    device: torch.device,
    peers: Sequence[str] = (FAIR_ESM, TRANSFORMERS),
    esm_cpp_python: Path | None = None,
) -> Lineup:
    """Builds every engine that is installed, from one set of random weights.

    Protnest adopts each peer's model through its public functions; that all adopted encoders have one fingerprint
    proves that the weights are the same.

    Args:
        config: the architecture.
        seed: of the weights.
        precisions: "fp32", "bf16", "fp16" or "int8", of ours and, but for int8, of transformers; fair-esm comes in fp32
            and esm-cpp in fp32 and int8, whatever they are.
        device: where all run.
        peers: which packages to compare with; those that are not installed are left out.
        esm_cpp_python: of the environment that has esm-cpp, see `esm_cpp.find_python`; it runs on CPUs only.

    Raises:
        RuntimeError: the weights of two engines differ, or one of ours or esm-cpp's could not be made.
    """
    wanted = [name for name in peers if name in PEER_MODULES and is_installed(name)]
    adopted: list[Encoder] = []
    others: list[Peer] = []
    reference: Engine | None = None
    theirs: nn.Module | None = None
    if TRANSFORMERS in wanted:
        theirs = _random_transformers(config, seed=seed)
        adopted.append(from_transformers(theirs))
        theirs_in = [precision for precision in precisions if precision != INT8] or ["fp32"]
        others += [Transformers(theirs, precision=precision, device=device) for precision in theirs_in]
    if FAIR_ESM in wanted:
        model: Any = fair_esm_model(config)
        if theirs is None:
            scatter_weights(model, seed=seed)
        else:
            _copy_to_fair_esm(theirs, model, config.layers)
        adopted.append(from_fair_esm(model, model.alphabet))
        reference = FairEsm(model, device=device)
        others.append(reference)
    if not adopted:
        adopted.append(random_encoder(config, seed=seed))
    if len({encoder.fingerprint for encoder in adopted}) != 1:
        message = f"the engines' weights differ: {[encoder.fingerprint for encoder in adopted]}"
        raise RuntimeError(message)
    # At 650M and beyond a copy that nobody needs is gigabytes.
    del adopted[1:]
    ours = [Protnest(adopted[0], precision=precision, device=device) for precision in precisions]
    if reference is None:
        if theirs is not None:
            in_fp32 = [peer for peer in others if peer.precision == "fp32"]
            reference = in_fp32[0] if in_fp32 else Transformers(theirs, precision="fp32", device=device)
        else:
            reference = Protnest(adopted[0], precision="fp32", device=device)
    logits_reference: Engine | None = None
    if ESM_CPP in peers and esm_cpp_python is not None and device.type == "cpu":
        whole = _with_head(adopted[0], seed=seed + 1)
        logits_reference = MeanLogits(whole)
        threads = torch.get_num_threads()
        others += [
            EsmCpp(whole, precision=precision, python=esm_cpp_python, threads=threads)
            for precision in ESM_CPP_PRECISIONS
        ]
    return Lineup(
        ours=ours,
        peers=others,
        reference=reference,
        default_precision=precision_name(resolve_precision("auto", device)),
        logits_reference=logits_reference,
    )
