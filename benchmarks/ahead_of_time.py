"""Compiles every Triton kernel for GPUs that are not here, and shows whether it fits: no GPU, no driver needed.

    python benchmarks/ahead_of_time.py                      # the whole matrix, as a table
    python benchmarks/ahead_of_time.py --chips sm_86,sm_120

Exit code 1 where a kernel asks for more shared memory than a block of the chip may have, or spills registers to memory.
Shared memory is what Triton allocates; registers and the stack (local memory: spills and indexed arrays) come from
`cuobjdump`, which Triton's package brings along.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from protnest.kernels.hardware import is_interpreting
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHARED_LIMIT_BYTES = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
"""Most shared memory of a block, opt-in (CUDA programming guide, technical specifications by compute capability)."""

KERNEL_FILES = ("add_norm", "gelu", "kd_loss", "nested_embed", "rotary_attention")
"""Files of `protnest.kernels.gpu` that have `launches()`."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One configuration on one chip.

    Attributes:
        kernel: file and configuration.
        chip: such as "sm_86".
        shared_bytes: shared memory of a block.
        registers: of a thread.
        stack_bytes: local memory of a thread; more than zero means that registers spill.
    """

    kernel: str
    chip: str
    shared_bytes: int
    registers: int
    stack_bytes: int

    @property
    def faults(self) -> list[str]:
        """What keeps it from running well on the chip; empty where nothing does."""
        limit = SHARED_LIMIT_BYTES[self.chip]
        faults = []
        if self.shared_bytes > limit:
            faults.append(f"{self.shared_bytes} bytes of shared memory, {limit} allowed")
        if self.stack_bytes:
            faults.append(f"{self.stack_bytes} bytes of registers spilt")
        return faults


def find_launches() -> dict[str, Any]:
    """Name -> `Launch` of every configuration of every kernel."""
    found: dict[str, Any] = {}
    for file in KERNEL_FILES:
        module = importlib.import_module(f"protnest.kernels.gpu.{file}")
        found |= {f"{file}: {launch.name}": launch for launch in module.launches()}
    return found


def compile_launch(name: str, launch: Any, chip: str) -> Compiled:
    """Compiles one configuration for one chip.

    Args:
        name: of the configuration.
        launch: a `protnest.kernels.gpu.launch.Launch`.
        chip: a key of `SHARED_LIMIT_BYTES`.

    Raises:
        RuntimeError: this process runs Triton's interpreter, which cannot compile.
    """
    if is_interpreting():
        message = "TRITON_INTERPRET=1 is set: Triton interprets in this process and cannot compile"
        raise RuntimeError(message)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # As at run time: pointers and strides that 16 divides.
    pointers = [index for index, kind in enumerate(launch.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        launch.kernel,
        signature=launch.signature,
        constexprs=launch.constexprs,
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    return Compiled(name, chip, compiled.metadata.shared, registers, stack_bytes)


@functools.cache
def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(cubin)
        stream.flush()
        done = subprocess.run([_cuobjdump(), "-res-usage", stream.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if usage is None:
        message = f"cuobjdump tells no registers: {done.stdout!r}"
        raise RuntimeError(message)
    return int(usage[1]), int(usage[2])


def compile_all(
    chips: Sequence[str], *, watch: Callable[[list[tuple[str, str]]], Iterator[tuple[str, str]]] = iter
) -> list[Compiled]:
    """Every configuration on each of the chips."""
    launches = find_launches()
    pairs = list(itertools.product(launches, chips))
    return [compile_launch(name, launches[name], chip) for name, chip in watch(pairs)]


def _table(rows: Sequence[Compiled]) -> Table:
    table = Table(title="Kernels compiled ahead of time")
    for column in ("kernel", "chip", "shared bytes", "registers", "spilt bytes", ""):
        table.add_column(column, justify="left" if column in ("kernel", "chip", "") else "right")
    for row in rows:
        numbers = (f"{row.shared_bytes:,}", str(row.registers), str(row.stack_bytes))
        table.add_row(row.kernel, row.chip, *numbers, "; ".join(row.faults))
    return table


def main(
    chips: Annotated[str, typer.Option(help="With commas between.")] = ",".join(SHARED_LIMIT_BYTES),
) -> None:
    """Compile every Triton kernel for each chip, and show what it needs."""
    wanted = chips.split(",")
    if unknown := [chip for chip in wanted if chip not in SHARED_LIMIT_BYTES]:
        message = f"--chips: no {', '.join(unknown)}; allowed are {', '.join(SHARED_LIMIT_BYTES)}"
        raise typer.BadParameter(message)
    console = Console(stderr=True)

    def watch(pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        return iter(track(pairs, "compiling", console=console, disable=not console.is_terminal, transient=True))

    rows = compile_all(wanted, watch=watch)
    Console(width=None if console.is_terminal else 140).print(_table(rows))
    faulty = [row for row in rows if row.faults]
    print(f"{len(rows)} compiled, {len(faulty)} do not fit")
    raise typer.Exit(1 if faulty else 0)


if __name__ == "__main__":
    typer.run(main)
