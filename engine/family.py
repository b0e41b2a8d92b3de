"""The models that an embedder runs, smallest first: all resident, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .config import EncoderConfig
from .encoder import Encoder
from .errors import InputError
from .exported_encoder import AnyEncoder, ExportedEncoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """What is known of a model whether it is resident or not.

    Attributes:
        name, fingerprint, config: as of `Encoder`.
        device, dtype: where it runs, and what its products multiply.
        norm: weight and bias (D,) of its final LayerNorm, on the CPU; None of an exported file, which no chain takes.
    """

    name: str
    fingerprint: str | None
    config: EncoderConfig
    device: torch.device
    dtype: torch.dtype
    norm: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return self.config.width


def _member(encoder: AnyEncoder) -> Member:
    norm = None
    if isinstance(encoder, Encoder):
        norm = (encoder.final_norm.weight.detach().cpu(), encoder.final_norm.bias.detach().cpu())
    return Member(
        name=encoder.name,
        fingerprint=encoder.fingerprint,
        config=encoder.config,
        device=encoder.device,
        dtype=encoder.product_dtype,
        norm=norm,
    )


def listed(model: AnyEncoder | Sequence[AnyEncoder]) -> list[AnyEncoder]:
    """One encoder or several as a list."""
    return [model] if isinstance(model, Encoder | ExportedEncoder) else list(model)


class Family:
    """Models that run as one.

    Args:
        load: gives the encoder at a place, from 0.
        count: how many there are. Each is loaded once here, to learn what it is.
        resident: keep all in memory; False lets go of one before the next is loaded.

    Attributes:
        members: what is known of each.

    Raises:
        InputError: there is no model, or they run on different devices or in different precisions.
    """

    def __init__(self, load: Callable[[int], AnyEncoder], count: int, *, resident: bool = True) -> None:
        self.resident = resident
        self._load = load
        self._held: dict[int, AnyEncoder] = {}
        self.members = tuple(_member(self[place]) for place in range(count))
        if not self.members:
            message = "no model: pass one encoder, or the models of a chain"
            raise InputError(message)
        first = self.members[0]
        for member in self.members[1:]:
            if (member.device, member.dtype) != (first.device, first.dtype):
                message = (
                    f"models must run alike: {first.name} is {first.dtype} on {first.device}, "
                    f"{member.name} {member.dtype} on {member.device}"
                )
                raise InputError(message)

    @classmethod
    def of(cls, encoders: Sequence[AnyEncoder]) -> Family:
        """Encoders that are in memory already."""
        return cls(encoders.__getitem__, len(encoders))

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, place: int) -> AnyEncoder:
        """The encoder at a place, from 0. Where one is held at a time, the one before it is let go of first."""
        if place not in self._held:
            if not self.resident:
                self._held.clear()
            self._held[place] = self._load(place)
        return self._held[place]

    def release(self) -> None:
        """Lets go of the encoders that are held; whoever asks for one again has it loaded again."""
        self._held.clear()
