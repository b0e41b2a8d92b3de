"""Low-rank adapters in an encoder or a decoder, by peft: put in, kept on disk, merged into the weights.

A layer's products here are more than `nn.Linear`: they leave their bias to the next pass over the rows. peft's own
layer would hide that, so it is told (by its mapping of custom modules) to use one that passes it on. What is trained
and how it is merged stays peft's.

Source: Hu et al., ICLR 2022 (LoRA).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engine.atomic import write_atomically
from ..engine.decoder import Decoder
from ..engine.encoder import Encoder, Linear
from ..engine.errors import InputError
from ..kernels.product import Levels, Product

ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
_TENSORS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_TARGETS = r"layers\.\d+\.(qkv|out|fc1|fc2)"
_PREFIX = "base_model.model."
"""What peft calls the model that the adapters are in, in files."""

Model = Encoder | Decoder


def check_peft() -> None:
    """What can be known before anything is computed.

    Raises:
        InputError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        message = "adapters need peft: pip install 'protnest[train]', or fine-tune with --method full"
        raise InputError(message)


@functools.cache
def _layer_class() -> Any:
    """peft's layer with what a product here has beside `forward`. Made on first use: peft takes seconds to import."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    class AdaptedLinear(LoraLinear):  # type: ignore[misc]
        """A product with adapters beside it."""

        @property
        def takes(self) -> Any:
            return self.get_base_layer().takes

        @property
        def move(self) -> Any:
            return self.get_base_layer().move

        def product(self, rows: Any) -> Product:
            found: Product = self.get_base_layer().product(rows)
            if self.merged or self.disable_adapters:
                return found
            values_NO = found.values_NO
            for name in self.active_adapters:
                down, up = self.lora_A[name], self.lora_B[name]
                added_NO = up(down(self.lora_dropout[name](self._cast_input_dtype(rows, down.weight.dtype))))
                values_NO = values_NO + (added_NO * self.scaling[name]).to(values_NO.dtype)
            return found._replace(values_NO=values_NO)

        def refine(self, x_TD: Any, given: Product, rows: Any | Levels) -> Any:
            return self.get_base_layer().refine(x_TD, given, rows)

    return AdaptedLinear


def _config(rank: int, alpha: float) -> Any:
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_TARGETS, lora_dropout=0.0, bias="none")
    config._register_custom_module({Linear: _layer_class()})
    return config


class Adapters:
    """Adapters on the four products of every layer of a model, whose own weights are frozen.

    Args:
        model: fp32; it is changed in place. Its answers stay what they were until the adapters are trained.
        rank: of each adapter.
        alpha: what adapters add is multiplied by alpha / rank.
        seed: of their first weights.

    Raises:
        InputError: peft is not installed, or rank or alpha is not positive.
    """

    def __init__(self, model: Model, *, rank: int, alpha: float, seed: int = 0) -> None:
        check_peft()
        if rank < 1 or not alpha > 0:
            message = f"adapters have a rank of at least 1 and a positive alpha, got {rank} and {alpha}"
            raise InputError(message)
        import torch
        from peft.tuners.lora import LoraModel

        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._tuner: Any = LoraModel(model, {ADAPTER: _config(rank, alpha)}, ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        for name, tensor in self.model.state_dict().items():
            if "lora_" in name:
                yield _PREFIX + name.replace(f".{ADAPTER}.", "."), tensor.detach().cpu().contiguous()

    def save(self, folder: Path) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json` as peft does."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tuner.peft_config[ADAPTER].save_pretrained(str(folder))
        tensors = dict(self._tensors())
        write_atomically(folder / _TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    def merge(self) -> Model:
        """Adds the adapters to the weights and takes them out: the model is an ordinary one again.

        Raises:
            InputError: a merged weight is not finite.
        """
        try:
            self._tuner.merge_and_unload(safe_merge=True)
        except ValueError as error:
            message = f"{self.model.name} with its adapters: {error}"
            raise InputError(message) from error
        return self.model.requires_grad_(False)


def load_adapters(model: Model, folder: Path) -> Adapters:
    """Puts kept adapters into the model that they were trained with.

    Raises:
        InputError: peft is not installed, a file is missing or unreadable, or the adapters are another model's.
    """
    check_peft()
    from peft import LoraConfig

    try:
        settings = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / _TENSORS)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        message = f"holds no readable adapters ({str(error).splitlines()[0]})"
        raise InputError(message, file=folder) from error
    found = Adapters(model, rank=settings.r, alpha=settings.lora_alpha)
    wanted = dict(found._tensors())
    shapes = [{name: tuple(each.shape) for name, each in some.items()} for some in (wanted, tensors)]
    if shapes[0] != shapes[1]:
        wrong = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        found._tuner.unload()
        message = f"adapters of another model than {model.name}: {wrong[0]} and {len(wrong) - 1} more do not fit"
        raise InputError(message, file=folder / _TENSORS)
    state = model.state_dict()
    for name in state:
        if "lora_" in name:
            state[name].copy_(tensors[_PREFIX + name.replace(f".{ADAPTER}.", ".")])
    return found
