"""How sure ESMFold is of designed sequences' structures: mean pLDDT, from weights that are at hand.

pLDDT is the model's own guess of how well its structure is right, from 0 to 100; above 70 a backbone is usually right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.errors import InputError
from .estimate import Estimate, mean, share
from .follower import NOBODY, Follower

FOLDED = 50
CONFIDENT = 70.0
_ALPHA_CARBON = 1
_OWN = ("trunk.", "lddt_head.", "esm_s_mlp.", "esm_s_combine")
"""What ESMFold has beyond its encoder."""


@dataclass(frozen=True, kw_only=True)
class Folding:
    """pLDDT of designs.

    Attributes:
        plddt: mean over designs of the mean over their residues' alpha carbons.
        confident: share of designs above 70.
    """

    plddt: Estimate
    confident: Estimate


def load_esmfold(folder: Path, *, device: str = "cpu") -> Any:
    """Loads ESMFold from a folder in Hugging Face layout; nothing is fetched.

    Raises:
        InputError: transformers is not installed, or the folder holds no such weights.
    """
    if importlib.util.find_spec("transformers") is None:
        message = "ESMFold needs transformers: pip install transformers"
        raise InputError(message)
    if not (folder / "config.json").is_file():
        message = "there is no config.json: ESMFold's weights are a folder in Hugging Face layout (esmfold_v1)"
        raise InputError(message, file=folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        message = "holds no weights (*.safetensors or pytorch_model*.bin)"
        raise InputError(message, file=folder)
    from safetensors import SafetensorError
    from transformers import EsmForProteinFolding

    try:
        model, told = EsmForProteinFolding.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        message = f"is no ESMFold: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise InputError(message, file=folder) from error
    # transformers draws at random what a checkpoint lacks: an encoder without a trunk would fold, and mean nothing.
    if missing := sorted(name for name in told["missing_keys"] if name.startswith(_OWN)):
        message = f"is no ESMFold: {len(missing)} of its tensors are missing, {missing[0]} first"
        raise InputError(message, file=folder)
    # The published stem is stored in fp16, which CPUs multiply slowly or not at all.
    return (model.float() if device == "cpu" else model).eval().to(device)


@torch.inference_mode()
def folding(
    model: Any,
    generated: Sequence[str],
    *,
    most: int = FOLDED,
    samples: int = 1000,
    seed: int = 0,
    follower: Follower = NOBODY,
) -> Folding:
    """Folds designs one by one, at most so many, drawn at random.

    Args:
        model: of `load_esmfold`.
        generated: designs.
        most: how many are folded.
        samples, seed: of the bootstrap, and of the draw.
        follower: is told how far it is.
    """
    chosen = np.sort(np.random.default_rng((seed, 4)).permutation(len(generated))[:most]).tolist()
    follower.stage(f"folding {len(chosen):,} designs", sum(len(generated[place]) for place in chosen))
    found = []
    for place in chosen:
        plddt_L = model.infer([generated[place]])["plddt"][0, :, _ALPHA_CARBON].float()
        found.append(100 * float(plddt_L.mean()))
        follower.advance(len(generated[place]))
    values = np.array(found)
    return Folding(
        plddt=mean(values, samples=samples, seed=seed),
        confident=share(int((values > CONFIDENT).sum()), len(values)),
    )
