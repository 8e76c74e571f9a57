"""What of a model grows with its number of experts.

Found by building the model a second time, on the meta device, with twice as many: what changed in
its decoder blocks is what holds one thing per expert. So no family is known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitnest.errors import UnsupportedModel


@dataclass(frozen=True)
class ExpertAxes:
    """What of a model grows with its number of experts, within its decoder blocks.

    key: of the configuration. count: experts of every layer. modules: block -> experts module.
    tensors: parameter or buffer -> dimensions of that length. numbers: by module and attribute.
    """

    key: str
    count: int
    modules: Mapping[int, str]
    tensors: Mapping[str, tuple[int, ...]]
    numbers: Mapping[tuple[str, str], int]

    def of_experts(self, block: int, name: str) -> bool:
        """Whether the tensor or module `name` is of the block's experts, not of its router."""
        return f"{name}.".startswith(f"{self.modules[block]}.")


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a set of fused experts behind transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def expert_axes(model: Any, prefix: str) -> ExpertAxes:
    """What grows with the experts of `model`, whose blocks lie in the ModuleList at `prefix`.

    Raises:
        UnsupportedModel: no experts behind transformers' interface, or no one key that counts them.
    """
    blocks = model.get_submodule(prefix)
    modules: dict[int, str] = {}
    for number, block in enumerate(blocks):
        own = [n for n, m in block.named_modules(prefix=f"{prefix}.{number}") if is_experts(m)]
        if len(own) > 1:
            raise UnsupportedModel("a block with several sets of experts", where=own[1])
        if own:
            modules[number] = own[0]
    counts = {int(model.get_submodule(name).num_experts) for name in modules.values()}
    if len(counts) != 1:
        raise UnsupportedModel(
            "the number of experts differs from layer to layer already" if counts
            else "the model keeps no experts behind transformers' experts interface",
            where=type(model).__name__,
            hint="start from the model it was made of" if counts else "nothing to reduce",
        )  # fmt: skip
    count, text = counts.pop(), model.config.get_text_config()
    for key, value in vars(text).items():
        if "expert" in key and value == count and not isinstance(value, bool):
            wider = _rebuilt(model, key, 2 * count)
            experts = [getattr(_module(wider, n), "num_experts", 0) for n in modules.values()]
            if wider is not None and set(experts) == {2 * count}:
                return ExpertAxes(key, count, modules, *_growth(model, wider, prefix, count))
    raise UnsupportedModel(
        f"no key of the configuration counts the {count} experts",
        where=type(text).__name__,
        hint="this family's number of experts cannot be changed",
    )


def _rebuilt(model: Any, key: str, value: int) -> Any:
    """The model on the meta device with another value of a key, None where that does not build."""
    from accelerate import init_empty_weights

    config = deepcopy(model.config)
    setattr(config.get_text_config(), key, value)
    try:
        with init_empty_weights(include_buffers=False):
            return type(model)(config)
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return None


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _growth(
    model: Any, wider: Any, prefix: str, count: int
) -> tuple[dict[str, tuple[int, ...]], dict[tuple[str, str], int]]:
    tensors: dict[str, tuple[int, ...]] = {}
    numbers: dict[tuple[str, str], int] = {}
    others = dict(wider.named_modules())
    for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        other = others[path]
        for name, value in vars(module).items():
            if type(value) is int and vars(other).get(name) == 2 * value and value:
                numbers[path, name] = value
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            grown = getattr(other, name)
            if own is None or own.shape == grown.shape:
                continue
            pairs = zip(own.shape, grown.shape, strict=True)
            dims = tuple(i for i, (a, b) in enumerate(pairs) if a != b)
            if any(own.shape[i] != count or grown.shape[i] != 2 * count for i in dims):
                raise UnsupportedModel(
                    f"a tensor of shape {tuple(own.shape)} for {count} experts",
                    where=f"{path}.{name}",
                    hint="this family's number of experts cannot be changed",
                )
            tensors[f"{path}.{name}"] = dims
    return tensors, numbers
