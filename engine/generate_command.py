"""`protnest generate`, which the command line mounts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .generation import Design, Generator

# A model that gives little else than what is dropped is given up.
_MOST_TRIES = 10


def generate(
    out: Annotated[Path, typer.Option(help="FASTA file; each header holds length and perplexity.")],
    model: Annotated[
        str, typer.Option(help="A decoder: bundled name, folder in Hugging Face layout, or nferruz/ProtGPT2.")
    ] = "nano-gpt",
    count: Annotated[int, typer.Option("-n", "--count", help="Sequences.", min=1)] = 100,
    min_residues: Annotated[int, typer.Option(help="Least residues of each.", min=1)] = 1,
    max_residues: Annotated[
        int | None, typer.Option(help="Most residues of each.", min=1, show_default="what the model has places for")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Residues that each begins with.", show_default="none")] = "",
    context: Annotated[
        Path | None,
        typer.Option(help="FASTA file of whole proteins to condition on; no part of the output.", show_default="none"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Below 1 sharpens.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only so many likeliest tokens stay.")] = 950,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest of this share.", show_default="all")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what is there already.")] = 1.2,
    seed: Annotated[int, typer.Option(help="With a sequence's number it decides the sequence.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Most sequences that run at a time.", min=1)] = 64,
    drop_strange: Annotated[
        bool, typer.Option("--drop-strange", help="Leave out sequences with letters that are no residues.")
    ] = False,
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Keep the first of equal ones.")] = False,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"],
        typer.Option(
            help="auto: bf16 where the hardware has it, else fp32. fp16 runs on GPUs only, int8 on CPUs only."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")
    ] = False,
) -> None:
    """Generate proteins with a decoder, of the length you ask for, each with its perplexity."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .atomic import replacing
    from .fasta import read_fasta
    from .generation import GenerationOptions, Generator
    from .models import load_decoder
    from .sampling import SamplingOptions

    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    before = () if context is None else tuple(record.sequence for record in read_fasta(context))
    options = GenerationOptions(
        min_residues=min_residues,
        max_residues=max_residues,
        prompt=prompt,
        context=before,
        seed=seed,
        batch=batch,
        sampling=sampling,
    )
    generator = Generator(load_decoder(model, device=device, precision=precision), options)
    out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tally = Tally(drop_strange=drop_strange, drop_duplicates=drop_duplicates)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        replacing(out) as temporary,
        temporary.open("w", encoding="ascii") as file,
    ):
        task = bar.add_task("", total=count)
        for kept, design in enumerate(_kept(generator, count, tally, lambda: bar.advance(task))):
            _write(file, design, kept, seed)
    facts = tally.facts(out, generator)
    if json_output:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int | float) else str(value))
    Console(soft_wrap=True).print(table)


@dataclass(eq=False)
class Tally:
    """What came out, and what was dropped of it."""

    drop_strange: bool
    drop_duplicates: bool
    kept: int = 0
    residues: int = 0
    tokens: int = 0
    strange: int = 0
    duplicates: int = 0
    cut: int = 0
    seconds: float = 0.0

    def facts(self, out: Path, generator: Generator) -> dict[str, Any]:
        """For people and machines."""
        decoder = generator.decoder
        rate = self.residues / self.seconds if self.seconds else 0.0
        return {
            "out": str(out),
            "model": decoder.name,
            "precision": decoder.precision,
            "device": str(decoder.device),
            "sequences": self.kept,
            "residues": self.residues,
            "with_strange_letters": self.strange,
            "duplicates": self.duplicates,
            "out_of_places": self.cut,
            "residues_per_s": round(rate, 1),
        }


def _kept(generator: Generator, count: int, tally: Tally, after: Callable[[], None]) -> Iterator[Design]:
    """Sequences until so many are kept; what is dropped is replaced by the next numbers."""
    import time

    from .errors import InputError

    seen: set[str] = set()
    started, first = time.perf_counter(), 0
    while tally.kept < count:
        if first >= _MOST_TRIES * count:
            message = (
                f"of {first:,} sequences {first - tally.kept:,} were dropped ({tally.strange:,} with letters that are "
                f"no residues, {tally.duplicates:,} duplicates): the model gives little else"
            )
            raise InputError(message)
        wanted = count - tally.kept
        for design in generator.run(wanted, first=first):
            again = design.sequence in seen
            seen.add(design.sequence)
            tally.strange += bool(design.strange)
            tally.duplicates += again
            if (design.strange and tally.drop_strange) or (again and tally.drop_duplicates):
                continue
            tally.kept += 1
            tally.residues += len(design.sequence)
            tally.cut += not design.ended
            tally.seconds = time.perf_counter() - started
            after()
            yield design
        first += wanted


def _write(file: TextIO, design: Design, kept: int, seed: int) -> None:
    facts = {
        "residues": len(design.sequence),
        "tokens": design.tokens,
        "perplexity": f"{design.perplexity:.3f}",
        "residue_perplexity": f"{design.residue_perplexity:.3f}",
        "seed": seed,
        "number": design.number,
        **({"strange": design.strange} if design.strange else {}),
        **({} if design.ended else {"cut": "out_of_places"}),
    }
    words = " ".join(f"{name}={value}" for name, value in facts.items())
    lines = [design.sequence[begin : begin + 60] for begin in range(0, len(design.sequence), 60)]
    file.write("\n".join([f">design_{kept + 1} {words}", *lines, ""]))
