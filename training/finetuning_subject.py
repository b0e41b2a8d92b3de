"""What is fine-tuned: a language model on its family, or a model with a head on labels. Both judge themselves.

Shapes: B sequences.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import nn

from ..engine.decoder import Decoder
from ..engine.encoder import Encoder
from .causal_task import CausalTask, causal_corpus
from .composition import letter_counts
from .corpus import Share
from .decoder_prediction import DecoderPredictor
from .estimate import exp, ratio
from .family_data import FamilyData, Shares
from .head_task import HeadTask, head_config, head_loss, judge_head, seen_targets
from .masked_task import MaskedTask
from .perplexity import letter_perplexity, residue_perplexity, token_perplexity
from .prediction import EncoderPredictor, Predictor
from .task_head import HeadedModel, TaskHead, outputs_of
from .token_scores import TokenScores, score_tokens
from .trainer import Task

Model = Encoder | Decoder


class Subject(Protocol):
    """What is fine-tuned.

    Attributes:
        name: of the task.
        task: for a trainer.
        model: what is trained, with a head where there is one.
        facts: on the data, for a report.
        judged_by: of validation and test share, hashes: part of what decides the result.
    """

    @property
    def name(self) -> str: ...

    @property
    def task(self) -> Task: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def judged_by(self) -> list[str]: ...

    def validation_loss(self) -> float:
        """Mean loss over the validation share: of the same rows in every call."""
        ...

    def score(self) -> dict[str, Any]:
        """What the test share says of the model as it is, as tensors and numbers: kept in a run's state."""
        ...

    def judge(self, before: dict[str, Any], *, seed: int) -> dict[str, Any]:
        """The report on the test share, as JSON.

        Args:
            before: what `score` gave before training.
            seed: of the bootstrap over sequences.
        """
        ...


class LanguageSubject:
    """An encoder that learns masked residues, or a decoder that learns next tokens (a `Subject`).

    Raises:
        InputError: an encoder without a language-model head, or a decoder that cannot read a sequence.
    """

    def __init__(self, model: Model, shares: Shares, *, seed: int) -> None:
        self.model: Model = model
        self._shares = shares
        self.facts: dict[str, Any]
        self.task: Task
        if isinstance(model, Encoder):
            self.name = "mlm"
            corpus = shares.train.corpus()
            self.task = MaskedTask(model, corpus, seed=seed)
            self.facts = {"cropped": int((corpus.lengths_B > model.config.max_residues + 2).sum())}
        else:
            self.name = "clm"
            pieces, cut = causal_corpus(shares.train, model.vocabulary, model.config.places)
            self.task = CausalTask(model, pieces)
            self.facts = {"cut_into_pieces": cut}
        self.judged_by = [share.corpus().fingerprint for share in (shares.validation, shares.test)]

    def _scores(self, share: Share) -> TokenScores:
        self.model.eval()
        predictor: Predictor
        if isinstance(self.model, Encoder):
            predictor = EncoderPredictor(self.model)
        else:
            predictor = DecoderPredictor(self.model)
        return score_tokens(predictor, share.sequences).model

    def validation_loss(self) -> float:
        return float(self._scores(self._shares.validation).nll_N.mean())

    def score(self) -> dict[str, Any]:
        scores = self._scores(self._shares.test)
        return {
            "nll_B": torch.from_numpy(scores.sums_B(scores.nll_N)),
            "residues_B": torch.from_numpy(scores.residues_B),
        }

    def judge(self, before: dict[str, Any], *, seed: int) -> dict[str, Any]:
        """`before`, `after` and `unigram`: perplexity per residue; `ratio`: after through before, of the same draws."""
        scores = self._scores(self._shares.test)
        nll_B, residues_B = scores.sums_B(scores.nll_N), scores.residues_B
        before_B = before["nll_B"].numpy()
        known_A = letter_counts(self._shares.train.sequences).sum(axis=0)
        return {
            "sequences": scores.sequences,
            "residues": int(residues_B.sum()),
            "before": asdict(ratio(before_B, residues_B, after=exp, seed=seed)),
            "after": asdict(residue_perplexity(scores, seed=seed)),
            "ratio": asdict(ratio(nll_B - before_B, residues_B, after=exp, seed=seed)),
            "unigram": asdict(letter_perplexity(letter_counts(self._shares.test.sequences), known_A, seed=seed)),
            "token_perplexity": asdict(token_perplexity(scores, seed=seed)),
        }


class HeadSubject:
    """A model with a head that learns labels (a `Subject`).

    Raises:
        InputError: the training share's labels teach nothing, or a head cannot read the model.
    """

    def __init__(self, backbone: Model, family: FamilyData, shares: Shares, *, task: str, pooling: str) -> None:
        assert family.labelled is not None
        self.name = task
        train, self._validation, self._test = (
            family.labelled.some(shares.places[name]) for name in ("train", "validation", "test")
        )
        head = TaskHead(head_config(task, pooling, backbone.dim, train, family.classes))
        self.model = HeadedModel(backbone, head)
        self.task: Task = HeadTask(self.model, train)
        self.facts: dict[str, Any] = {"pooling": pooling}
        self.judged_by = [self._validation.fingerprint, self._test.fingerprint]

    def validation_loss(self) -> float:
        self.model.eval()
        outputs_RO = torch.cat(outputs_of(self.model, self._validation.sequences))
        targets = [torch.from_numpy(each) for each in seen_targets(self.model, self._validation)]
        return float(head_loss(outputs_RO, torch.cat(targets), self.model.head.config).value)

    def score(self) -> dict[str, Any]:
        """Nothing: a head that has learnt nothing says the same of all proteins."""
        return {}

    def judge(self, before: dict[str, Any], *, seed: int) -> dict[str, Any]:
        self.model.eval()
        return {"sequences": len(self._test.ids), **judge_head(self.model, self._test, seed=seed)}

    def head_for(self, fingerprint: str | None) -> TaskHead:
        """The head, which knows the model that it belongs to."""
        head = self.model.head
        head.config = replace(head.config, model=fingerprint)
        return head
