"""Beginning a wide encoder as a narrow one that is trained already.

Where every hidden state of the wide model is n copies of the narrow one's, side by side, LayerNorm keeps the copies as
they are, and a matrix whose n blocks of columns add up to the narrow matrix maps them as it did. So the wide model
begins by saying what the narrow one says, and what training it adds is added on top of that (Chen et al. 2016,
arXiv 1511.05641; for transformers Chen et al. 2022, arXiv 2110.07143). Blocks differ by noise that adds up to nothing:
with equal ones, copies would get equal gradients and stay copies for ever.

Shapes: O outputs and I inputs of a matrix, n copies.
"""

from __future__ import annotations

import torch

from ..engine.encoder import Encoder
from ..engine.errors import InputError
from .streams import Stream, torch_seed

_NOISE = 0.5
"""Of a block's own size: large enough that copies part in a few steps."""


@torch.no_grad()
def widen(narrow: Encoder, wide: Encoder, *, seed: int) -> int:
    """Lets an encoder with a language-model head begin with the answers of a narrower one.

    Args:
        narrow: what it is to say.
        wide: gets new weights; as many layers, heads as wide, and n times as many of them.
        seed: of the noise.

    Returns:
        n, at least 2.

    Raises:
        InputError: the shapes do not allow it, or the narrow model has no head.
    """
    copies = _copies(narrow, wide)
    generator = torch.Generator().manual_seed(torch_seed(seed, Stream.WEIGHTS))
    source = narrow.state_dict()
    for name, tensor in wide.state_dict().items():
        given = source[name].float()
        if name == "embed_tokens.weight":
            found = given.repeat(1, copies)
        elif given.dim() == 2:
            # Queries, keys and values lie one under another, each with all heads.
            parts = given.chunk(3) if name.endswith("qkv.weight") else (given,)
            found = torch.cat([_spread(part, copies, generator) for part in parts])
        elif name.endswith("qkv.bias"):
            found = torch.cat([part.repeat(copies) for part in given.chunk(3)])
        elif name == "head.bias":
            found = given
        else:
            found = given.repeat(copies)
        if name.startswith("head.norm"):
            # The head's last product, with the embedding, adds the copies up.
            found = found / copies
        tensor.copy_(found)
    return copies


def _spread(weight_OI: torch.Tensor, copies: int, generator: torch.Generator) -> torch.Tensor:
    """(n O, n I): each block of rows maps n copies of an input as the weight maps one."""
    outputs, inputs = weight_OI.shape
    share_OI = weight_OI / copies
    noise_nOnI = torch.randn((copies, outputs, copies, inputs), generator=generator)
    noise_nOnI *= _NOISE * share_OI.std(correction=0)
    noise_nOnI -= noise_nOnI.mean(dim=2, keepdim=True)
    return (share_OI[None, :, None, :] + noise_nOnI).reshape(copies * outputs, copies * inputs)


def _copies(narrow: Encoder, wide: Encoder) -> int:
    if narrow.head is None or wide.head is None:
        message = f"{narrow.name} has no language-model head: nothing to begin {wide.name} with"
        raise InputError(message)
    ours, theirs = wide.config, narrow.config
    copies = ours.width // theirs.width
    wanted = {
        "width": copies * theirs.width,
        "heads": copies * theirs.heads,
        "feedforward": copies * theirs.feedforward,
        "layers": theirs.layers,
        "layer_norm_eps": theirs.layer_norm_eps,
    }
    differs = [f"{name} {getattr(ours, name)}" for name, value in wanted.items() if getattr(ours, name) != value]
    if copies < 2 or differs:
        message = (
            f"{wide.name} cannot begin as {narrow.name} ({theirs.layers} layers, {theirs.width} wide, {theirs.heads} "
            f"heads, {theirs.feedforward} in its feed-forward): it needs the same layers, and 2, 3, ... times the "
            f"others; it has {ours.layers} layers, {ours.width} wide, {ours.heads} heads, {ours.feedforward}"
        )
        raise InputError(message)
    return copies
