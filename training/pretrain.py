"""Training an ESM-2 encoder from sequences alone, as a masked language model.

A run is a function of its configuration: batches, crops and masks are drawn from (seed, step), so that a killed run
goes on from its last checkpoint to the same weights as an uninterrupted one: bit for bit on one CPU with fixed threads.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ..engine.atomic import write_atomically
from ..engine.checkpoint import save_checkpoint
from ..engine.config import BUNDLED
from ..engine.device import precision_name, resolve_device, resolve_precision
from ..engine.encoder import Encoder
from ..engine.errors import InputError
from ..engine.packing import PackedBatch, pack_tokens
from .corpus import Corpus, crop, iterate_batches, read_corpus
from .masking import mask_tokens
from .perplexity import held_out_perplexity, unigram_perplexity

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides the weights.

    Attributes:
        preset: architecture, by its name in `BUNDLED`.
        steps: optimiser steps, each of one packed batch.
        batch_tokens: most tokens in a batch.
        learning_rate: its peak, reached after `warmup_steps`, then falling linearly to zero.
        weight_decay: on matrices alone, not on biases or norms.
        seed: of weights, order, crops and masks.
        precision: of the matrix products: "fp32" or "bf16"; weights and optimiser stay fp32.
    """

    preset: str
    steps: int
    batch_tokens: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.preset not in BUNDLED:
            message = f"preset is {self.preset!r}; allowed: {', '.join(BUNDLED)}"
            raise InputError(message)
        for name in ("steps", "batch_tokens", "warmup_steps", "seed"):
            if type(getattr(self, name)) is not int:
                message = f"{name} must be a whole number, got {getattr(self, name)!r}"
                raise InputError(message)
        for name in ("steps", "batch_tokens", "learning_rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                message = f"{name} must be positive, got {getattr(self, name)}"
                raise InputError(message)
        for name in ("warmup_steps", "weight_decay", "seed"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                message = f"{name} must not be negative, got {getattr(self, name)}"
                raise InputError(message)
        if self.precision not in ("fp32", "bf16"):
            message = f"precision is {self.precision!r}; training runs in fp32 or bf16"
            raise InputError(message)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero at `steps`."""
        rising = (step + 1) / max(1, self.warmup_steps)
        falling = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * min(1.0, rising, falling)


def initialise(encoder: Encoder, seed: int) -> None:
    """Fresh weights: normal with variance 1 / fan-in, branches into the residual stream shrunk by sqrt(2 x layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if parameter.dim() == 2:
            std = parameter.shape[1] ** -0.5
            if name.endswith((".out.weight", ".fc2.weight")):
                std /= math.sqrt(2 * encoder.config.layers)
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.zeros_(parameter)


def training_batch(
    corpus: Corpus, index_B: npt.NDArray[np.int64], *, max_residues: int, rng: np.random.Generator
) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
    """A masked batch, the rows asked for (R,) and the token ids that they hide (R,), both int64."""
    pieces = [crop(corpus[index], max_residues, rng) for index in index_B.tolist()]
    tokens_T = np.concatenate(pieces)
    shown_T, rows = mask_tokens(tokens_T, rng)
    cu_seqlens = np.cumsum([0, *(piece.size for piece in pieces)])
    return (
        pack_tokens(shown_T, cu_seqlens, index_B),
        torch.from_numpy(rows),
        torch.from_numpy(tokens_T[rows].astype(np.int64)),
    )


class Pretraining:
    """One run: a model, its optimiser, and where it stands.

    Args:
        config: what to train.
        corpus: the training share.
        device: where to train.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, *, device: torch.device) -> None:
        self.config = config
        self.corpus = corpus
        self.device = device
        self.step = 0
        self.encoder = Encoder(BUNDLED[config.preset], name=config.preset)
        initialise(self.encoder, config.seed)
        self.encoder.to(device)
        matrices = [p for p in self.encoder.parameters() if p.dim() == 2]
        others = [p for p in self.encoder.parameters() if p.dim() != 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )

    def run(self, *, after_step: Callable[[int, float], None], until: int | None = None) -> None:
        """Trains from `self.step` to `until` (all steps by default), calling `after_step(step, loss)` after each.

        Raises:
            InputError: loss or gradient is no longer finite; neither weights nor the last checkpoint are touched.
        """
        until = self.config.steps if until is None else until
        lengths = np.minimum(self.corpus.lengths_B, self.encoder.config.max_residues + 2)
        batches = iterate_batches(lengths, self.config.batch_tokens, seed=self.config.seed, first_step=self.step)
        self.encoder.train()
        while self.step < until:
            loss = self._step(next(batches))
            self.step += 1
            after_step(self.step, loss)

    def _step(self, index_B: npt.NDArray[np.int64]) -> float:
        rng = np.random.default_rng((self.config.seed, 1, self.step))
        batch, rows, labels = training_batch(
            self.corpus, index_B, max_residues=self.encoder.config.max_residues, rng=rng
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            hidden_TD = self.encoder(batch).hidden_TD
            logits_RV = self.encoder.logits(hidden_TD[rows.to(self.device)])
        loss = F.cross_entropy(logits_RV.float(), labels.to(self.device))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        for name, value in (("loss", loss.item()), ("gradient's norm", norm.item())):
            if not math.isfinite(value):
                message = (
                    f"the {name} is {value} at step {self.step}: try a learning rate below {self.config.learning_rate}"
                )
                raise InputError(message)
        self.optimiser.step()
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes the state so that a crash leaves either the old file or the new one."""
        state = {
            "version": STATE_VERSION,
            "config": self._identity(),
            "step": self.step,
            "encoder": self.encoder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def _identity(self) -> dict[str, Any]:
        return {**asdict(self.config), "architecture": asdict(self.encoder.config), "data": self.corpus.fingerprint}

    def load(self, path: Path) -> None:
        """Goes on from a saved state.

        Raises:
            InputError: the state is unreadable, or of another configuration, corpus or schema version.
        """
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            version, theirs = state["version"], state["config"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            message = f"not a readable training state ({str(error).splitlines()[0] if str(error) else 'it is empty'})"
            raise InputError(message, file=path) from error
        if version != STATE_VERSION:
            message = f"state has schema version {version}, this release reads {STATE_VERSION}"
            raise InputError(message, file=path)
        ours = self._identity()
        if changed := [f"{key} {theirs.get(key)} -> {ours[key]}" for key in ours if theirs.get(key) != ours[key]]:
            message = f"the run there has other settings: {', '.join(changed)}"
            raise InputError(message, file=path)
        self.encoder.load_state_dict(state["encoder"], strict=True)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


def _rounded(value: float) -> float | None:
    """Three decimals; None for what JSON cannot hold."""
    return round(value, 3) if math.isfinite(value) else None


def pretrain(
    fasta: Path,
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "auto",
    save_every_s: float = 120.0,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Trains a preset on a FASTA file and writes `out` in Hugging Face layout; goes on where a killed run stopped.

    `out` gets `model.safetensors` (fp16), `config.json`, `vocab.txt`, `training.json` (recipe, data, perplexities),
    `log.csv` (step, seconds, loss) and `state.pt`, from which a killed run goes on.

    Returns:
        What `training.json` holds.

    Raises:
        InputError: the FASTA is invalid or too small, `out` holds a run of other settings, or the loss diverged.
    """
    train, held_out = read_corpus(fasta)
    resolved = resolve_device(device)
    resolve_precision(config.precision, resolved)
    run = Pretraining(config, train, device=resolved)
    out.mkdir(parents=True, exist_ok=True)
    state, log = out / "state.pt", out / "log.csv"
    if state.exists():
        run.load(state)
    kept = log.read_text().splitlines()[1 : run.step + 1] if log.exists() else []
    seconds = float(kept[-1].split(",")[1]) if kept else 0.0
    text = "\n".join(["step,seconds,loss", *kept]) + "\n"
    write_atomically(log, lambda temporary: temporary.write_text(text))

    started = last_saved = time.monotonic()
    with log.open("a", buffering=1) as lines:

        def keep(step: int, loss: float) -> None:
            nonlocal last_saved
            now = time.monotonic()
            lines.write(f"{step},{seconds + now - started:.2f},{loss:.4f}\n")
            if now - last_saved >= save_every_s:
                run.save(state)
                last_saved = now
            after_step(step, loss)

        run.run(after_step=keep)
    run.save(state)

    encoder = run.encoder.eval()
    report = {
        **asdict(config),
        "precision": precision_name(resolve_precision(config.precision, resolved)),
        "device": resolved.type,
        "torch": torch.__version__,
        "data": {"file": fasta.name, "train_sequences": len(train), "held_out_sequences": len(held_out)},
        "seconds": round(seconds + time.monotonic() - started, 1),
        "held_out_perplexity": _rounded(held_out_perplexity(encoder, held_out, sequences=1000)),
        "unigram_perplexity": round(unigram_perplexity(train, held_out), 3),
    }
    save_checkpoint(encoder, out, dtype=torch.float16)
    report_text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomically(out / "training.json", lambda temporary: temporary.write_text(report_text))
    return report
