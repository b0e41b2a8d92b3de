"""What fits into a given memory: which model, how long a protein, how many tokens a batch. Nothing is loaded or run.

Held while embedding:

    bytes = fixed + weights + 1.25 T (8 D + rows + inner + 40)

T tokens of a batch, D width, F feed-forward width, e bytes of an activation: 4 in fp32, 2 in bf16 and fp16.

* 8 D: the residual stream stays fp32, and so does what the layer before left to be added to it.
* rows: normalised rows, attention's output, the last product: 3 e D, with int8 levels 6 D.
* inner: the feed-forward layer before its GELU and after, 2 e F. On a CPU fp32 results are written over the product,
  e F; in int8 there are sums of 4 bytes and levels, 5 F. Queries, keys and values are gone by then. Attention's L^2
  scores are never held whole: the kernels go through them in tiles.
* 40: token ids, lengths, orders.
* 1.25: what allocators keep beyond what is in use, since blocks of several sizes come and go (width 320, fp32, 16,160
  tokens: 36 D bytes a token in use at the peak, 44 D resident).
* weights: 4 bytes a parameter in fp32, 2 in bf16 and fp16; in int8 one for matrices of the layers, 4 for the rest.
* fixed: 400 MB for Python and torch, on a GPU 700 MB for CUDA and its libraries.

Not counted: results, which grow with the library and not with the batch; the checkpoint, which is read in fp32 before
it is rounded, on the host; operators that widen bf16 where the CPU has no units for it. Tests hold the part of T to
what a pass takes, within 30 % or 100 MB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .alphabet import TOKENS
from .config import BUNDLED, PUBLISHED, EncoderConfig, config_from_huggingface
from .decoder_config import BUNDLED_DECODERS
from .errors import InputError
from .json_object import read_object

SPECIAL_TOKENS = 2
"""`<cls>` and `<eos>` of each protein."""
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FIXED_BYTES = {"cpu": 400_000_000, "cuda": 700_000_000}
_BOOKKEEPING_BYTES = 40
_ALLOCATOR = 1.25
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model in one precision.

    Attributes:
        model: its name.
        precision: "fp32", "bf16", "fp16" or "int8".
        parameters: language-model head included.
        weights_bytes: of all of them.
        token_bytes: of a token of a batch, at the peak.
        most_tokens: that fit into a batch; 0 where not even the weights fit.
        longest_residues: longest protein that fits, alone in its batch.
        fits: whether a protein of the length that was asked for does.
    """

    model: str
    precision: str
    parameters: int
    weights_bytes: int
    token_bytes: int
    most_tokens: int
    longest_residues: int
    fits: bool


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GB, 512 MB or 7.5GiB: powers of 1,000, or with an i of 1,024.

    Raises:
        ValueError: it is not a size, or is none.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if not match or (match[3] and not unit):
        message = f"{text!r} is no size; expected a number and a unit, as 8GB, 512MB or 7.5GiB"
        raise ValueError(message)
    size = int(float(match[1]) * (_BINARY_UNITS if match[3] else _UNITS)[unit])
    if size < 1:
        message = f"{text!r} is no memory at all"
        raise ValueError(message)
    return size


def layer_matrix_parameters(config: EncoderConfig) -> int:
    """Numbers in the matrices of all layers: what int8 quantises."""
    D = config.width
    return config.layers * (4 * D * D + 2 * D * config.feedforward)


def parameters(config: EncoderConfig) -> int:
    """Numbers in an encoder and its language-model head, whose last matrix is the token embedding."""
    D, F, V = config.width, config.feedforward, len(TOKENS)
    # Biases of QKV, output and both feed-forward products, and two LayerNorms.
    vectors = config.layers * (4 * D + F + D + 4 * D)
    head = D * D + 3 * D + V
    return V * D + layer_matrix_parameters(config) + vectors + 2 * D + head


def weights_bytes(config: EncoderConfig, precision: str) -> int:
    """Bytes of all weights."""
    if precision == "int8":
        matrices = layer_matrix_parameters(config)
        return matrices + 4 * (parameters(config) - matrices)
    return _BYTES[precision] * parameters(config)


def token_bytes(config: EncoderConfig, precision: str, device: str) -> int:
    """Bytes of a token of a batch at a layer's peak, on "cpu" or "cuda"."""
    D, F = config.width, config.feedforward
    if precision == "int8":
        rows, inner = 6 * D, 5 * F
    else:
        each = _BYTES[precision]
        over = precision == "fp32" and device == "cpu"
        rows, inner = 3 * each * D, (1 if over else 2) * each * F
    return math.ceil(_ALLOCATOR * (8 * D + rows + inner + _BOOKKEEPING_BYTES))


def fit(name: str, config: EncoderConfig, precision: str, *, memory_bytes: int, device: str, residues: int) -> Fit:
    """Whether one model fits, and how much of it.

    Args:
        name: of the model.
        config: its architecture.
        precision: see `Fit`.
        memory_bytes: all that there is.
        device: "cpu" or "cuda".
        residues: the length that `Fit.fits` speaks of.
    """
    weights, each = weights_bytes(config, precision), token_bytes(config, precision, device)
    tokens = max(0, memory_bytes - _FIXED_BYTES[device] - weights) // each
    return Fit(
        model=name,
        precision=precision,
        parameters=parameters(config),
        weights_bytes=weights,
        token_bytes=each,
        most_tokens=tokens,
        longest_residues=max(0, tokens - SPECIAL_TOKENS),
        fits=tokens >= residues + SPECIAL_TOKENS,
    )


def known_config(model: str) -> EncoderConfig:
    """The architecture of a bundled or published name, or of a folder in Hugging Face layout; weights are not read.

    Raises:
        InputError: it is none of these.
    """
    found = BUNDLED.get(model) or PUBLISHED.get(model.removeprefix("facebook/"))
    if found is not None:
        return found
    if model in BUNDLED_DECODERS:
        message = f"{model} is a decoder; what is counted here is an encoder's memory"
        raise InputError(message)
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        message = (
            f"no model {model!r}: neither a name ({', '.join([*BUNDLED, *PUBLISHED])}) nor a folder with a config.json"
        )
        raise InputError(message)
    return config_from_huggingface(read_object(file), file=str(file))


def precisions(device: str) -> tuple[str, ...]:
    """Those that models run in on "cpu" or "cuda"."""
    return ("fp32", "bf16", "fp16" if device == "cuda" else "int8")


def find_fits(
    memory_bytes: int,
    *,
    models: Sequence[str] = (),
    precision: str | None = None,
    device: str = "cpu",
    residues: int = 1022,
) -> list[Fit]:
    """What fits, for every model and precision that is asked about.

    Args:
        memory_bytes: all that there is.
        models: names or folders; all bundled and published ones by default.
        precision: one; by default all that the device has.
        device: "cpu" or "cuda".
        residues: length of the proteins.

    Raises:
        InputError: there is no such model.
        ValueError: there is no such precision or device.
    """
    for what, value, allowed in (("precision", precision, (*_BYTES, "int8")), ("device", device, _FIXED_BYTES)):
        if value is not None and value not in allowed:
            message = f"{what} is {value!r}, expected one of {', '.join(allowed)}"
            raise ValueError(message)
    names = models or [*BUNDLED, *PUBLISHED]
    chosen = (precision,) if precision else precisions(device)
    return [
        fit(name, known_config(name), each, memory_bytes=memory_bytes, device=device, residues=residues)
        for name in names
        for each in chosen
    ]
