"""Sites: the address of every 2-D weight that can be packed, read off the model's structure.

A site is one matrix (out, in) that can get a format of its own: a linear layer's weight, or one
expert's projection. Fused 3-D expert parameters are seen as their per-expert matrices; where the
checkpoint keeps gate and up apart, so do the sites. Names are those of the checkpoint
(`model.layers.3.mlp.experts.7.down_proj`); a slice of a tensor that is fused on disk too is named
after the tensor with the expert's number put in.

What decides the kind is structure and place, not the family: modules with transformers' experts
interface or ModuleLists of equal experts hold experts, matrices beside them with one row per expert
are routers, matrices under a `shared_expert` are shared experts, then attention and mlp by path.
Routers and everything that is not a matrix stay as they are.

The ends of the model are sites too: the token embedding and the output head, (vocabulary, hidden)
both. They live after the last block. A head tied to the embedding is one site with it, of kind
`embedding`, which serves both uses. They stay dense unless a rule names them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from bitnest.errors import UnsupportedModel
from bitnest.expert_axes import is_experts
from bitnest.kinds import ENDS, KINDS, UNNAMED_DENSE
from bitnest.resized import router_rows
from bitnest.skeleton import Skeleton, Source

__all__ = [
    "ENDS", "KINDS", "UNNAMED_DENSE", "Site", "find_sites", "is_experts", "is_linear", "is_tied",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One matrix of a model and where it lives.

    name: dotted name in the checkpoint, without `.weight`. kind: one of KINDS. layer: block number;
    the number of blocks for the ends.
    expert: number within its layer, or None. shape: (out, in) as the matrix is applied, y = W x.
    module, param: where the model keeps it. rows: range of output rows within that parameter, or
    None for all. transposed: the parameter is stored (in, out).
    """

    name: str
    kind: str
    layer: int
    expert: int | None
    shape: tuple[int, int]
    module: str
    param: str
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def path(self) -> str:
        """Dotted name of the model parameter that holds the matrix."""
        return f"{self.module}.{self.param}"

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The (out, in) matrix as a view into its model parameter, 2-D or 3-D."""
        matrix = parameter[self.expert] if parameter.dim() == 3 else parameter
        if self.transposed:
            matrix = matrix.T
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]


def find_sites(skeleton: Skeleton) -> list[Site]:
    """Every site: those of the decoder blocks in block order, then the ends.

    Raises:
        UnsupportedModel: a block keeps experts in a way that cannot be addressed, or has no
            matrices at all.
    """
    sites: list[Site] = []
    for layer, block in enumerate(skeleton.blocks):
        prefix = f"{skeleton.prefix}.{layer}"
        covered: set[str] = set()
        for name, module in block.named_modules(prefix=prefix):
            if is_experts(module):
                found = _expert_sites(skeleton, name, module, layer)
            elif is_linear(module):
                found = _linear_site(skeleton, name, module, layer)
            else:
                continue
            covered.update(site.path for site in found)
            sites.extend(found)
        _refuse_unknown_experts(block, prefix, covered)
    if not sites:
        raise UnsupportedModel(f"no matrices found under {skeleton.prefix}")
    return [*sites, *_end_sites(skeleton)]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain matrix product: nn.Linear or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _end_sites(skeleton: Skeleton) -> list[Site]:
    """Embedding and head where they are plain: a lookup and a product, as wide as the model."""
    model = skeleton.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    found = []
    if isinstance(table, nn.Embedding) and table.max_norm is None:
        found.append(_end_site(skeleton, "embedding", table, width))
    if isinstance(head, nn.Linear) and not is_tied(skeleton):
        found.append(_end_site(skeleton, "head", head, width))
    elif not isinstance(head, nn.Linear) and is_tied(skeleton):
        return []  # one matrix, and a use of it that cannot be packed
    return [site for site in found if site is not None]


def is_tied(skeleton: Skeleton) -> bool:
    """Whether the head reads the embedding's matrix."""
    head = skeleton.model.get_output_embeddings()
    name = skeleton.path_of(head)
    return name is not None and f"{name}.weight" in skeleton.tied()


def _end_site(skeleton: Skeleton, kind: str, module: nn.Module, width: int | None) -> Site | None:
    """The site of an end; None if its matrix is of another width or not one plain tensor on disk.

    A matrix that config.json ties but the checkpoint holds twice is left alone: whether the two
    are one is only known by reading them.
    """
    name, weight = skeleton.path_of(module), module.weight
    source = skeleton.sources.get(f"{name}.weight")
    assert isinstance(weight, torch.Tensor)
    if name is None or source is None or source.converter is not None or weight.shape[1] != width:
        return None
    if kind == "embedding" and any(other in skeleton.sources for other in skeleton.tied()):
        return None
    key, shape = source.names[0].removesuffix(".weight"), (weight.shape[0], weight.shape[1])
    return Site(key, kind, len(skeleton.blocks), None, shape, name, "weight")


def _linear_site(skeleton: Skeleton, name: str, module: nn.Module, layer: int) -> list[Site]:
    transposed = not isinstance(module, nn.Linear)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    shape = (columns, rows) if transposed else (rows, columns)
    source = skeleton.sources[f"{name}.weight"]
    key = source.names[0] if source.converter is None else f"{name}.weight"
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return [
        Site(
            name=key.removesuffix(".weight"),
            kind=_kind(skeleton, name, shape),
            layer=layer,
            expert=int(expert[1]) if expert else None,
            shape=shape,
            module=name,
            param="weight",
            transposed=transposed,
        )
    ]


def _kind(skeleton: Skeleton, name: str, shape: tuple[int, int]) -> str:
    if re.search(r"\.experts\.\d+\.", name):
        return "expert"
    parent = skeleton.model.get_submodule(name.rpartition(".")[0])
    if hasattr(parent, "experts") or "router" in name.rpartition(".")[2]:
        experts = _router_rows(getattr(parent, "experts", None))
        if shape[0] in {1, experts}:  # a router, or the one-row gate of a shared expert
            return "router"
    if "shared" in name:
        return "shared_expert"
    return "attention" if re.search(r"attn|attention", name) else "mlp"


def _router_rows(module: nn.Module | None) -> int:
    if isinstance(module, nn.ModuleList):
        return len(module)
    return router_rows(module)


def _expert_sites(skeleton: Skeleton, name: str, module: nn.Module, layer: int) -> list[Site]:
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    sites: list[Site] = []
    for param in (up, "down_proj"):
        weight = getattr(module, param, None)
        if weight is None or weight.dim() != 3:
            raise UnsupportedModel(
                f"experts without a 3-D '{param}'",
                where=name,
                hint="this family keeps its experts in a way bitnest does not read yet",
            )
        parts = _per_expert_names(skeleton, f"{name}.{param}", weight.shape[0])
        for expert in range(weight.shape[0]):
            sites.extend(_slices(parts, name, param, module, weight, layer, expert))
    return sorted(sites, key=lambda site: site.expert or 0)  # one expert's matrices together


def _slices(
    parts: list[list[str]] | None,
    name: str,
    param: str,
    module: nn.Module,
    weight: torch.Tensor,
    layer: int,
    expert: int,
) -> list[Site]:
    transposed = bool(module.is_transposed)
    out, inner = weight.shape[1:] if not transposed else weight.shape[1:][::-1]
    names = [f"{name}.{expert}.{param}"] if parts is None else [p[expert] for p in parts]
    height = out // len(names)
    return [
        Site(
            name=site_name,
            kind="expert",
            layer=layer,
            expert=expert,
            shape=(height, inner),
            module=name,
            param=param,
            rows=None if len(names) == 1 else (i * height, (i + 1) * height),
            transposed=transposed,
        )
        for i, site_name in enumerate(names)
    ]


def _per_expert_names(skeleton: Skeleton, path: str, experts: int) -> list[list[str]] | None:
    """Checkpoint names by [part][expert] when disk holds one matrix per expert and part.

    Understood from the conversion: each pattern's matrices are stacked over experts, then the
    patterns' stacks are concatenated along the output rows. Anything else is a slice by number.
    """
    source: Source = skeleton.sources[path]
    if source.converter is None:
        return None
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in source.converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    parts: dict[str, list[str]] = {p: [] for p in source.converter.source_patterns}
    for pattern, key in source.keys:
        parts[pattern].append(key.removesuffix(".weight"))
    lengths = {len(keys) for keys in parts.values()}
    return list(parts.values()) if lengths == {experts} else None


def _refuse_unknown_experts(block: nn.Module, prefix: str, covered: set[str]) -> None:
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.dim() == 3 and name not in covered and "expert" in name.lower():
            if "bias" in name or "conv" in name:
                continue
            raise UnsupportedModel(
                f"experts kept in '{name}' {tuple(parameter.shape)} without transformers' experts "
                "interface",
                where=type(block).__name__,
                hint="bitnest cannot run this family's experts packed; nothing was written",
            )
