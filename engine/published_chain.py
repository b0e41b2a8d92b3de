"""Chains from the published npz scalers of reverse distillation.

Keys of a file, one stage each (p width of the input, D of the new model, k components kept):

    regressor__coef_ (D, p), regressor__intercept_ (D,)                            linear and ridge
    regressor__coef_ (D, k), regressor__intercept_ (D,), regressor__input_mean_ (p,), regressor__output_mean_ (D,),
    regressor__input_components_ (p, p or fewer), regressor__n_significant_pcs_    pcr
    pca__mean_ (D,), pca__components_ (D - p, D)                                   all of these
    pca__mean_ (p + D,), pca__components_ (D, p + D)                               naive, without regressor__

They are applied as the published code applies them: every stage to the row so far. What they were fitted on is told by
the means that pcr files keep: a stage that was fitted on rows so far has the input mean of the stage before it in its
own input mean's first dimensions, and zeros after them, since residual components are centred.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .chain import Chain, ChainModel, Stage
from .config import PUBLISHED
from .errors import InputError

Floats = npt.NDArray[np.float64]

# Means were stored in fp32, and later stages' come from other passes over the data; raw means differ by whole units.
_SAME_MEAN = 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scaler:
    file: Path
    stage: Stage
    input_width: int
    output_width: int
    regressor: str
    input_mean: Floats | None
    output_mean: Floats | None


def read_published(files: Sequence[Path]) -> Chain:
    """Makes a chain of published scalers, one file a stage, given in any order.

    The models get the published ESM-2 names of their widths; a file holds nothing that would tell checkpoints apart.

    Raises:
        InputError: a file is unreadable or lacks keys, stages do not follow on each other, or kinds are mixed.
    """
    if not files:
        message = "no file: pass the scalers of a chain, one npz file a stage"
        raise InputError(message)
    scalers = sorted(map(_read, files), key=lambda scaler: scaler.input_width)
    for before, after in itertools.pairwise(scalers):
        if before.output_width != after.input_width:
            message = f"takes rows of {after.input_width}, but {before.file}, before it, gives {before.output_width}"
            raise InputError(message, file=after.file)
        if before.regressor != after.regressor:
            message = f"is {after.regressor}, but {before.file} is {before.regressor}"
            raise InputError(message, file=after.file)
    names = {config.width: name for name, config in PUBLISHED.items()}
    widths = [scalers[0].input_width, *(scaler.output_width for scaler in scalers)]
    fitted_on, because = _fitted_on(scalers)
    return Chain(
        models=tuple(
            ChainModel(
                name=names.get(width, f"model of width {width}"),
                width=width,
                max_residues=PUBLISHED[names[width]].max_residues if width in names else 1022,
            )
            for width in widths
        ),
        stages=tuple(scaler.stage for scaler in scalers),
        regressor=scalers[0].regressor,
        fitted_on=fitted_on,
        data={"imported": [scaler.file.name for scaler in scalers], "fitted_on": because},
    )


def _fitted_on(scalers: Sequence[_Scaler]) -> tuple[str, str]:
    if len(scalers) == 1:
        return "accumulated", "a first stage's input is the first model's embedding either way"
    verdicts = set()
    for before, after in itertools.pairwise(scalers):
        if before.input_mean is None or before.output_mean is None or after.input_mean is None:
            return "unknown", f"{before.regressor} files hold no means to tell by"
        p = before.input_width
        if _same(after.input_mean, np.concatenate((before.input_mean, np.zeros(after.input_width - p)))):
            verdicts.add("accumulated")
        elif _same(after.input_mean, before.output_mean):
            verdicts.add("raw")
        else:
            verdicts.add("unknown")
    verdict = verdicts.pop() if len(verdicts) == 1 else "unknown"
    return verdict, {
        "accumulated": "each stage's input mean is that of the row so far",
        "raw": "each stage's input mean is that of a raw embedding, though stages are applied to the row so far",
        "unknown": "the stages' input means are neither the rows' so far nor the raw embeddings'",
    }[verdict]


def _same(one: Floats, other: Floats) -> bool:
    scale = max(float(np.abs(one).max()), float(np.abs(other).max()), 1e-12)
    return float(np.abs(one - other).max()) <= _SAME_MEAN * scale


def _read(file: Path) -> _Scaler:
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            message = "is one array, not an npz file"
            raise InputError(message, file=file)
        with archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except InputError:
        raise
    except FileNotFoundError as error:
        message = "no such file"
        raise InputError(message, file=file) from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        message = f"not a readable npz file of plain arrays ({error})"
        raise InputError(message, file=file) from error
    try:
        return _scaler(file, _Arrays(arrays))
    except KeyError as error:
        message = f"lacks {error.args[0]}; it holds {', '.join(sorted(arrays)) or 'nothing'}"
        raise InputError(message, file=file) from error
    except ValueError as error:
        message = f"its arrays do not fit each other ({error})"
        raise InputError(message, file=file) from error


class _Arrays:
    """An archive's arrays, in fp64."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        self.names = set(arrays)
        self._arrays = arrays

    def __getitem__(self, name: str) -> Floats:
        return self._arrays[name].astype(np.float64)


def _scaler(file: Path, arrays: _Arrays) -> _Scaler:
    mean, components = arrays["pca__mean_"].ravel(), arrays["pca__components_"]
    if not any(name.startswith("regressor__") for name in arrays.names):
        D = components.shape[0]
        return _Scaler(
            file=file,
            stage=Stage(weight_XD=None, bias_D=None, mean=_tensor(mean), components=_tensor(components)),
            input_width=components.shape[1] - D,
            output_width=D,
            regressor="naive",
            input_mean=None,
            output_mean=None,
        )
    weight_XD, bias_D = arrays["regressor__coef_"].T, arrays["regressor__intercept_"].ravel()
    is_pcr = "regressor__input_components_" in arrays.names
    input_mean = output_mean = None
    if is_pcr:
        input_mean, output_mean = (arrays[f"regressor__{each}_mean_"].ravel() for each in ("input", "output"))
        kept = int(arrays["regressor__n_significant_pcs_"].ravel()[0])
        weight_XD = arrays["regressor__input_components_"][:, :kept] @ weight_XD
        bias_D = bias_D + output_mean - input_mean @ weight_XD
    return _Scaler(
        file=file,
        stage=Stage(
            weight_XD=_tensor(weight_XD), bias_D=_tensor(bias_D), mean=_tensor(mean), components=_tensor(components)
        ),
        input_width=weight_XD.shape[0],
        output_width=weight_XD.shape[1],
        # linear and ridge files look alike
        regressor="pcr" if is_pcr else "linear",
        input_mean=input_mean,
        output_mean=output_mean,
    )


def _tensor(array: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
