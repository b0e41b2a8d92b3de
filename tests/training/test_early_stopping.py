"""When to stop, and weights that go to the disk and come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from protnest.engine import InputError
from protnest.engine import atomic as atomic_module
from protnest.training.early_stopping import BEST_FILE, Progress, load_best, save_best


def _after(*losses: float, patience: int = 2) -> Progress:
    progress = Progress(patience=patience)
    for loss in losses:
        progress = progress.after(loss)
    return progress


@pytest.mark.parametrize(
    ("losses", "best", "improved", "stops"),
    [
        ((3.0,), 0, True, False),
        ((3.0, 2.0), 1, True, False),
        ((3.0, 2.0, 2.0), 1, False, False),
        ((3.0, 2.0, 2.5, 2.1), 1, False, True),
        ((3.0, 2.0, 2.5, 1.9), 3, True, False),
        ((3.0, 3.1, 3.2), 0, False, True),
    ],
)
def test_progress(losses: tuple[float, ...], best: int, improved: bool, stops: bool) -> None:
    progress = _after(*losses)
    assert (progress.best_epoch, progress.improved, progress.should_stop) == (best, improved, stops)
    assert Progress.of(progress.state()) == progress


def test_nothing_stops_before_it_began() -> None:
    assert not Progress(patience=1).should_stop


def test_best_weights(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    save_best(model, tmp_path)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    load_best(model, tmp_path)
    assert torch.equal(model.weight, weight)
    # What is not trained is not touched.
    assert not model.bias.any()
    assert bias.any()


def test_best_weights_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the best weights cannot be read"):
        load_best(torch.nn.Linear(3, 2), tmp_path)
    save_best(torch.nn.Linear(3, 2), tmp_path)
    with pytest.raises(InputError, match="holds the weights of another model: bias"):
        load_best(torch.nn.Linear(3, 2, bias=False), tmp_path)
    kept = (tmp_path / BEST_FILE).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_module.os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device\); the last checkpoint of the run is kept"):
        save_best(torch.nn.Linear(3, 2), tmp_path)
    assert (tmp_path / BEST_FILE).read_bytes() == kept
