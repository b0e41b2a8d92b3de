"""The command line: `protnest`.

Commands of the engine live here. Those of other packages are found by the entry-point group `protnest.commands` and
mounted without importing anything before they are asked for, so the engine never imports training or benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from .allocator import keep_memory
from .convert_command import convert
from .cpus import limit_threads
from .embed_command import embed
from .errors import InputError
from .export_command import export, print_facts
from .generate_command import generate
from .merge_command import merge
from .score_command import score
from .search_command import search
from .verify_command import verify

_ENTRY_POINTS = "protnest.commands"
_FAILED = 1
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM

_console = Console(stderr=True, soft_wrap=True)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers ask a process to stop: it stops as for Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


class _LazyGroup(TyperGroup):
    """Adds the commands of other packages, and turns failures that a user can mend into a message and exit code 1."""

    # typer moved click inside itself: `Any` is what its contexts and commands have in common over its releases.
    def list_commands(self, ctx: Any) -> list[str]:
        mounted = {entry.name for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS)}
        return sorted({*super().list_commands(ctx), *mounted})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        found = importlib.metadata.entry_points(group=_ENTRY_POINTS, name=cmd_name)
        if own is not None or not found:
            return own
        (entry,) = found
        app = typer.Typer(add_completion=False)
        app.command(name=cmd_name)(entry.load())
        return typer.main.get_command(app)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
        except MemoryError:
            _fail("out of memory: try a smaller --max-tokens")
        except RuntimeError as error:
            # torch's class is looked up only if torch runs already: importing it costs seconds.
            torch = sys.modules.get("torch")
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            _fail(f"out of GPU memory: try a smaller --max-tokens ({str(error).splitlines()[0]})")
        except KeyboardInterrupt as error:
            _console.print("stopped; the same command goes on from what is finished", style="yellow")
            raise typer.Exit(_TERMINATED if isinstance(error, _Terminated) else _INTERRUPTED) from error


def _fail(message: str) -> None:
    _console.print("[bold red]error:[/]", end=" ")
    _console.print(message, markup=False, highlight=False)
    raise typer.Exit(_FAILED)


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Families of protein language models run as one nested model.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"protnest {importlib.metadata.version('protnest')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from rich.logging import RichHandler

    limit_threads()
    keep_memory()
    handler = RichHandler(console=_console, show_time=False, show_path=False, show_level=False)
    logger = logging.getLogger("protnest")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    # Which kernel runs is told by `protnest info`; only trouble is worth a line in every run.
    logging.getLogger("protnest.kernels").setLevel(logging.WARNING)


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]


@app.command("import-chain")
def import_chain(
    files: Annotated[list[Path], typer.Argument(help="Published scalers: one npz file a stage, in any order.")],
    out: Annotated[Path, typer.Option(help="The chain file.")],
    json_output: Json = False,
) -> None:
    """Make a chain file of published npz scalers."""
    from .published_chain import read_published

    chain = read_published(files)
    chain.save(out)
    names = [model.name for model in chain.models]
    report = {
        "out": str(out),
        "models": names,
        "widths": list(chain.widths),
        "regressor": chain.regressor,
        "fitted_on": chain.fitted_on,
    }
    if json_output:
        typer.echo(json.dumps(report))
        return
    _console.print(f"{out}: {' -> '.join(names)}, {chain.regressor}", markup=False, highlight=False)
    _console.print(f"fitted on {chain.fitted_on} embeddings: {chain.data['fitted_on']}", markup=False, highlight=False)


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="Instead: what an exported file says of itself.", metavar="[FILE]")
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option(help="Instead: which models, lengths and batches fit into so much memory, as 8GB or 7.5GiB."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --fits: names or folders, joined by commas.", show_default="all names")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"] | None, typer.Option(help="With --fits.", show_default="all")
    ] = None,
    length: Annotated[int, typer.Option(help="With --fits: residues of the longest protein.", min=1)] = 1022,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="With --fits: whose memory it is.")] = "cuda",
    json_output: Json = False,
) -> None:
    """Say what runs on this machine, and why; or what fits into a memory, or what an exported file holds."""
    if file is not None:
        from .onnx_model import read_facts
        from .tensorrt_sidecar import is_engine, read_sidecar

        held = read_sidecar(file) if is_engine(file) else read_facts(file)
        typer.echo(json.dumps(held)) if json_output else print_facts(held)
        return
    if fits is not None:
        _print_fits(fits, model, precision, length, device, json_output)
        return
    from .info import describe

    facts = describe()
    if json_output:
        typer.echo(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for section, values in facts.items():
        for name, value in values.items():
            table.add_row(section, name, str(value))
            section = ""
    Console(soft_wrap=True).print(table)


def _print_fits(
    size: str, model: str | None, precision: str | None, length: int, device: str, json_output: bool
) -> None:
    from dataclasses import asdict

    from .fits import find_fits, parse_size

    try:
        memory_bytes = parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--fits") from error
    names = model.split(",") if model else ()
    found = find_fits(memory_bytes, models=names, precision=precision, device=device, residues=length)
    if json_output:
        about = {"memory_bytes": memory_bytes, "device": device, "residues": length}
        typer.echo(json.dumps(about | {"models": [asdict(each) for each in found]}))
        return
    table = Table(title=f"{memory_bytes / 1e9:,.2f} GB on {device}, proteins of {length:,} residues")
    for column in ("model", "precision"):
        table.add_column(column, no_wrap=True)
    for column in ("weights", "tokens a batch", "longest protein", "fits"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            each.model,
            each.precision,
            f"{each.weights_bytes / 1e6:,.0f} MB",
            f"{each.most_tokens:,}",
            f"{each.longest_residues:,}",
            "yes" if each.fits else "no",
        )
    Console(soft_wrap=True).print(table)


app.command()(embed)
app.command()(score)
app.command()(generate)
app.command()(export)
app.command()(search)
app.command()(verify)
app.command()(merge)
app.command()(convert)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="protnest")


if __name__ == "__main__":
    main()
