"""The skeleton: a model without weights, and where in the checkpoint each of its weights lies.

The model is built on the meta device, so it costs no memory. `Skeleton.fill` gives single modules
(one decoder block at a time) their weights and `drop` takes them back.

Checkpoints and models name weights differently: transformers 5 keeps a layer's experts as one 3-D
parameter while most checkpoints store one matrix per expert, and some families are renamed. The
library's own conversion mapping says how; it is followed here key by key, so no family is known by
name. Blocks are found by structure: the ModuleList of `num_hidden_layers` modules that holds most
of the parameters.

Left out: encoder-decoder models, and remote code unless the user allows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitnest.checkpoint import Checkpoint, read_config
from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.resized import config_experts, resize_experts


@dataclass
class Source:
    """How one model parameter comes from the checkpoint.

    keys: checkpoint tensors in the order the conversion takes them, each with the pattern that
    matched it. converter: transformers' conversion of them, or None for a plain rename.
    """

    converter: Any = None
    keys: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The checkpoint tensors' names."""
        return [key for _, key in self.keys]


@dataclass
class Skeleton:
    """A model on the meta device with its map into the checkpoint.

    model: the causal language model. prefix: dotted path of the ModuleList of decoder blocks.
    sources: parameter or buffer name -> where it comes from. leftover: checkpoint tensors that the
    model does not use.
    """

    checkpoint: Checkpoint
    model: Any
    prefix: str
    sources: dict[str, Source]
    leftover: list[str]

    @classmethod
    def build(cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
        """The skeleton of `checkpoint`'s model.

        Raises:
            UnsupportedModel: unknown architecture, or no single list of decoder blocks.
            CheckpointError: the checkpoint lacks weights that the model needs.
        """
        model = _meta_model(checkpoint, trust_remote_code)
        prefix = find_blocks(model)
        resize_experts(model, prefix, config_experts(model.config))
        sources, leftover = _map_sources(model, checkpoint)
        skeleton = cls(checkpoint, model, prefix, sources, leftover)
        skeleton._check_complete()
        skeleton._check_shapes()
        return skeleton

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        blocks = self.model.get_submodule(self.prefix)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The model parameter or buffer `name`, converted from the checkpoint's tensors.

        dtype: cast floating-point tensors as they are read.
        """
        return self._convert(name, [self._read(key, dtype) for key in self.sources[name].names])

    def _convert(self, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The parameter `name` made of its checkpoint tensors; takes the list's references."""
        source = self.sources[name]
        if source.converter is None:
            return tensors[0]
        converter = deepcopy(source.converter)
        for (pattern, key), tensor in zip(source.keys, tensors, strict=True):
            converter.add_tensor(name, key, pattern, tensor)
        tensors.clear()
        result = converter.convert(name, model=self.model, config=self.model.config)[name]
        return result[0] if isinstance(result, list) else result

    def _read(self, key: str, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self.checkpoint.read(key)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def fill(
        self,
        prefix: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        skip: str | None = None,
        leave: Collection[str] = (),
    ) -> None:
        """Give every parameter and stored buffer under `prefix` its values.

        prefix: dotted module path, `""` for the whole model. skip: leave out this subtree. leave:
        and these parameters.
        """
        for name in self._names(prefix, skip):
            if name in self.sources and name not in leave:
                _assign(self.model, name, self.read(name, dtype).to(device))

    def drop(self, prefix: str) -> None:
        """Return every parameter under `prefix` to the meta device and so free its memory."""
        for name, _ in list(self.model.get_submodule(prefix).named_parameters()):
            self.drop_parameter(f"{prefix}.{name}")

    def drop_parameter(self, name: str) -> None:
        """Return one parameter to the meta device."""
        _assign(self.model, name, self.model.get_parameter(name).detach().to("meta"))

    def _names(self, prefix: str, skip: str | None) -> Iterator[str]:
        start = f"{prefix}." if prefix else ""
        for name in self.model.state_dict():
            if name.startswith(start) and not (skip and name.startswith(f"{skip}.")):
                yield name

    def path_of(self, module: nn.Module | None) -> str | None:
        """Dotted name of a module of the model, None if it has none."""
        return next((name for name, own in self.model.named_modules() if own is module), None)

    def tied(self) -> set[str]:
        """Names of parameters that share another parameter's values (a tied head)."""
        return set(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _check_complete(self) -> None:
        missing = [
            name
            for name, _ in self.model.named_parameters()
            if name not in self.sources and name not in self.tied()
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} weights the model needs, such as "
                f"'{missing[0]}'",
                where=str(self.checkpoint.path),
                hint="a shard or the index may be of another model, or config.json does not "
                "belong to these weights",
            )

    def _check_shapes(self) -> None:
        """Refuse weights of other shapes than the model's, converting empty tensors to see it."""
        wanted = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        for name, source in self.sources.items():
            shapes = {pattern: self.checkpoint.tensors[key].shape for pattern, key in source.keys}
            odd = [k for p, k in source.keys if self.checkpoint.tensors[k].shape != shapes[p]]
            if not odd and self._convert(name, self._empty(source)).shape == wanted[name]:
                continue
            key = (odd or source.names)[0]
            info = self.checkpoint.tensors[key]
            raise CheckpointError(
                f"tensor '{key}' has shape {info.shape}, which does not fit the model's '{name}' "
                f"of shape {tuple(wanted[name])}",
                where=str(info.file),
                hint="config.json and the weights are of different models, or a shard is",
            )

    def _empty(self, source: Source) -> list[torch.Tensor]:
        infos = (self.checkpoint.tensors[key] for key in source.names)
        return [torch.empty(info.shape, device="meta") for info in infos]


def _meta_model(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    where = str(checkpoint.path / "config.json")
    if "auto_map" in checkpoint.config and not trust_remote_code:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if checkpoint.config.get("model_type") not in CONFIG_MAPPING:
            raise UnsupportedModel(
                "the model brings its own Python code",
                where=where,
                hint="read that code, then allow it with --trust-remote-code",
            )
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        if checkpoint.config != read_config(checkpoint.path):  # a view of what lies there
            config = type(config).from_dict(deepcopy(checkpoint.config))
            config.name_or_path = str(checkpoint.path)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (
        ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
        ZeroDivisionError, AssertionError, StrictDataclassError,
    ) as error:  # fmt: skip
        kind = checkpoint.config.get("model_type", "unknown")
        raise UnsupportedModel(
            f"transformers cannot build a causal language model of type '{kind}': "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            where=where,
            hint="check model_type in config.json, or upgrade transformers",
        ) from error
    return model.eval()


def find_blocks(model: Any) -> str:
    """Dotted path of the ModuleList of decoder blocks.

    Raises:
        UnsupportedModel: there is none.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    }
    if not found:
        raise UnsupportedModel(
            f"no list of {layers} decoder blocks in {type(model).__name__}",
            hint="bitnest streams models whose blocks sit in one ModuleList of num_hidden_layers",
        )
    return max(found, key=lambda name: found[name])


def _map_sources(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Source], list[str]]:
    """Follow transformers' conversion mapping for every checkpoint tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {p: item for item in converters for p in item.source_patterns}
    base, state = model.base_model_prefix, model.state_dict()
    sources: dict[str, Source] = {}
    leftover: list[str] = []
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name not in state:
            leftover.append(key)
        elif pattern is None:
            sources[name] = Source(None, [(key, key)])
        else:
            source = sources.setdefault(name, Source(by_pattern[pattern]))
            source.keys.append((pattern, key))
    for name, source in list(sources.items()):
        for other in _siblings(name, source, state):
            sources.setdefault(other, source)
    return sources, leftover


def _siblings(name: str, source: Source, state: dict[str, Any]) -> list[str]:
    """Further parameters that a one-to-many conversion fills (one tensor split into several)."""
    targets = source.converter.target_patterns if source.converter is not None else []
    if len(targets) < 2 or targets[0] not in name:
        return []
    others = [name.replace(targets[0], target) for target in targets[1:]]
    return [other for other in others if other in state]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
