"""Who generates: transformers' text-generation pipeline and `generate`, and ours, with the same weights and settings.

The pipeline is what was published: one sequence a call, its text given back. `generate` is transformers' own batch:
all sequences at once, with a cache, in inference mode, attention by torch's SDPA; its text is decoded in the time, too.
Ours is `Generator`, one sequence or a batch at a time.

All sample with a temperature of 1, top-k 950 and a repetition penalty of 1.2. All begin with `<|endoftext|>` and the
line break that ProtGPT2's training text has after it; the published benchmark left the line break out.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from protnest.benchmarks.ceiling import synchronise
from protnest.benchmarks.parity import ParityError
from protnest.engine.alphabet import RESIDUES
from protnest.engine.decoder import Decoder, pack_ids
from protnest.engine.device import PRECISIONS
from protnest.engine.generation import GenerationOptions, Generator
from protnest.engine.models import load_decoder
from protnest.engine.sampling import SamplingOptions
from protnest.engine.vocabulary import END_OF_TEXT

PIPELINE, GENERATE, OURS = "transformers pipeline", "transformers generate", "protnest"
PROMPT = f"{END_OF_TEXT}\n"
PROMPT_TOKENS = 2
TOP_K, REPETITION_PENALTY = 950, 1.2

ALLOWED = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5, "int8": 3.0}
"""Largest difference of a token's log-likelihood from transformers' in fp32, in nats."""
_CHECKED_SEQUENCES = 4


class Answer(NamedTuple):
    """What one pass gave.

    Attributes:
        seconds: from the call until the last sequence was there.
        first_seconds: until the first one was.
        cpu_seconds: of the process.
        tokens: that each sequence was given, the prompt not counted.
        residues: of each sequence; letters that are none are not counted.
    """

    seconds: float
    first_seconds: float
    cpu_seconds: float
    tokens: list[int]
    residues: list[int]

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / self.seconds

    @property
    def residues_per_s(self) -> float:
        return sum(self.residues) / self.seconds


class Engine(Protocol):
    """Generates with settings that it was made with.

    Attributes:
        name, precision: for rows.
        batch: sequences at a time.
    """

    name: str
    precision: str
    batch: int

    def generate(self, count: int, *, first: int = 0) -> Answer:
        """Generates and times so many sequences; `first` tells passes apart where random numbers are numbered."""
        ...


class _Clock:
    """Wall and CPU time since its making, and when the first sequence was there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronise(device)
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()
        self._first: float | None = None

    def sequence_done(self) -> None:
        if self._first is None:
            synchronise(self._device)
            self._first = time.perf_counter() - self._begin

    def answer(self, tokens: list[int], texts: Sequence[str]) -> Answer:
        """The clock stops here, before letters are counted."""
        synchronise(self._device)
        seconds, cpu_seconds = time.perf_counter() - self._begin, time.process_time() - self._cpu_begin
        assert self._first is not None
        return Answer(seconds, self._first, cpu_seconds, tokens, [count_residues(text) for text in texts])


def count_residues(text: str) -> int:
    """Letters that are residues, `<|endoftext|>` left out."""
    return sum(letter in RESIDUES for letter in text.replace(END_OF_TEXT, ""))


class TransformersModel:
    """transformers' `GPT2LMHeadModel` of a checkpoint, with its tokenizer; the pipeline and `generate` share it.

    Args:
        folder: of the checkpoint.
        precision: "fp32", "bf16" or "fp16".
        device: where it runs.

    Raises:
        RuntimeError: transformers is not installed.
    """

    def __init__(self, folder: Path, *, precision: str, device: torch.device) -> None:
        if importlib.util.find_spec("transformers") is None:
            message = "transformers is not installed, and generation is measured beside it (pip install transformers)"
            raise RuntimeError(message)
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
        from transformers.utils import logging

        # A bar on standard error for each load, and advice on arguments for each call.
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.precision, self.device = precision, device
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=PRECISIONS[precision], attn_implementation="sdpa")
        self.model: Any = model.to(device).eval().requires_grad_(False)
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        self.tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)

    def settings(self, tokens: int) -> dict[str, Any]:
        """What both ways of generating are given; `tokens` as of `Problem`."""
        end = self.tokenizer.eos_token_id
        return {
            "do_sample": True,
            "top_k": TOP_K,
            "repetition_penalty": REPETITION_PENALTY,
            "max_new_tokens": tokens - PROMPT_TOKENS,
            "eos_token_id": end,
            "pad_token_id": end,
            "use_cache": True,
        }

    @torch.inference_mode()
    def log_likelihoods(self, ids_BT: torch.Tensor) -> npt.NDArray[np.float64]:
        """log p of each token given those before it: float64 (B, T - 1)."""
        logits_BTV = self.model(ids_BT.to(self.device)).logits[:, :-1].double()
        picked_BT1 = logits_BTV.log_softmax(dim=-1).gather(2, ids_BT[:, 1:, None].to(self.device))
        found: npt.NDArray[np.float64] = picked_BT1[:, :, 0].cpu().numpy()
        return found

    @torch.inference_mode()
    def likeliest(self, tokens: int) -> str:
        """The text of always the likeliest token, with the same penalty."""
        settings = {name: value for name, value in self.settings(tokens).items() if name != "top_k"}
        ids = self.generate(settings | {"do_sample": False})
        return str(self.tokenizer.decode(ids[0, PROMPT_TOKENS:]))

    def generate(self, settings: dict[str, Any]) -> torch.Tensor:
        """Ids (B, T), prompt included."""
        ids_1T = self.start()
        # Said outright: where the end pads, too, it warns that it cannot tell padding from the prompt.
        found: torch.Tensor = self.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **settings)
        return found

    def start(self) -> torch.Tensor:
        """The prompt's ids, (1, 2)."""
        ids: torch.Tensor = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        return ids.to(self.device)


class Pipeline:
    """transformers' text-generation pipeline, one sequence a call, as published.

    Args:
        theirs: model and tokenizer.
        tokens: of each sequence, the prompt's counted.
    """

    name = PIPELINE
    batch = 1

    def __init__(self, theirs: TransformersModel, *, tokens: int) -> None:
        from transformers import TextGenerationPipeline

        self.precision, self._device = theirs.precision, theirs.device
        self._settings = theirs.settings(tokens)
        self._pipeline: Any = TextGenerationPipeline(
            model=theirs.model, tokenizer=theirs.tokenizer, device=theirs.device
        )
        self._lengths: list[int] = []
        postprocess = self._pipeline.postprocess

        def counted(outputs: Any, *given: Any, **options: Any) -> Any:
            # Of its text tokens cannot be told: other byte pairs spell the same.
            self._lengths.append(int(outputs["generated_sequence"].shape[-1]) - PROMPT_TOKENS)
            return postprocess(outputs, *given, **options)

        self._pipeline.postprocess = counted

    @torch.inference_mode()
    def generate(self, count: int, *, first: int = 0) -> Answer:
        self._lengths.clear()
        clock, texts = _Clock(self._device), []
        for _ in range(count):
            texts.append(self._pipeline(PROMPT, num_return_sequences=1, **self._settings)[0]["generated_text"])
            clock.sequence_done()
        return clock.answer(list(self._lengths), texts)


class Batched:
    """transformers' `generate`, a batch of sequences a call.

    Args:
        theirs: model and tokenizer.
        tokens: of each sequence, the prompt's counted.
        batch: sequences a call.
    """

    name = GENERATE

    def __init__(self, theirs: TransformersModel, *, tokens: int, batch: int) -> None:
        self.precision, self.batch = theirs.precision, batch
        self._theirs, self._tokens = theirs, tokens

    @torch.inference_mode()
    def generate(self, count: int, *, first: int = 0) -> Answer:
        theirs = self._theirs
        clock, texts, lengths = _Clock(theirs.device), list[str](), list[int]()
        while len(texts) < count:
            some = min(self.batch, count - len(texts))
            settings = theirs.settings(self._tokens) | {"num_return_sequences": some}
            ids_BT = theirs.generate(settings)
            texts += theirs.tokenizer.batch_decode(ids_BT)
            lengths += [ids_BT.shape[1] - PROMPT_TOKENS] * some
            clock.sequence_done()
        return clock.answer(lengths, texts)


class Ours:
    """`Generator`, with a decoder of any precision.

    Args:
        decoder: whose places are as many as a sequence has tokens.
        batch: sequences at a time.
        seed: of the random numbers.
    """

    name = OURS

    def __init__(self, decoder: Decoder, *, batch: int, seed: int = 0) -> None:
        self.precision, self.batch = decoder.precision, batch
        self._device = decoder.device
        sampling = SamplingOptions(top_k=TOP_K, repetition_penalty=REPETITION_PENALTY)
        self._generator = Generator(decoder, GenerationOptions(batch=batch, seed=seed, sampling=sampling))

    def generate(self, count: int, *, first: int = 0) -> Answer:
        clock, designs = _Clock(self._device), []
        for design in self._generator.run(count, first=first):
            designs.append(design)
            clock.sequence_done()
        found = clock.answer([design.tokens for design in designs], [design.sequence for design in designs])
        # A letter that is no residue is an X here, and X counts as one.
        real = [count - design.strange for count, design in zip(found.residues, designs, strict=True)]
        return found._replace(residues=real)


def load_ours(folder: Path, *, precision: str, device: torch.device) -> Decoder:
    """The decoder of a checkpoint."""
    return load_decoder(folder, device=str(device), precision=precision)


def check_decoder(decoder: Decoder, theirs: TransformersModel, *, seed: int = 0) -> float:
    """Compares a decoder of ours with transformers' in fp32: every token's log-likelihood, and in fp32 what is
    generated when the likeliest token is always taken.

    Args:
        decoder: of any precision.
        theirs: fp32.
        seed: of the tokens that are compared.

    Returns:
        The largest difference in nats.

    Raises:
        ParityError: it is beyond what is allowed, or not a number; or the generated sequences differ.
    """
    config = decoder.config
    generator = np.random.default_rng(seed)
    ids_BT = generator.integers(config.vocabulary, size=(_CHECKED_SEQUENCES, min(config.places, 24)))
    expected_BT = theirs.log_likelihoods(torch.from_numpy(ids_BT))
    got_BT = np.stack(decoder.log_likelihoods(pack_ids(list(ids_BT))))
    difference = float(np.abs(got_BT - expected_BT).max())
    allowed = ALLOWED[decoder.precision]
    if not difference <= allowed:
        message = (
            f"ours {decoder.precision}: log-likelihoods differ from transformers' by up to {difference:.2g} nats, "
            f"allowed {allowed:g}; nothing is timed"
        )
        raise ParityError(message)
    if decoder.precision == "fp32":
        sampling = SamplingOptions(top_k=1, repetition_penalty=REPETITION_PENALTY)
        (design,) = Generator(decoder, GenerationOptions(batch=1, sampling=sampling)).run(1)
        text = "".join(theirs.likeliest(config.places).split())
        letters = "".join(letter if letter in RESIDUES else "X" for letter in text)
        if design.sequence != letters:
            message = (
                f"ours {decoder.precision}: the likeliest tokens spell {design.sequence[:40]}..., transformers' "
                f"{letters[:40]}...; nothing is timed"
            )
            raise ParityError(message)
    return difference
