"""Probe: one layer of experts on a sample of its tokens, for every question of the kind "what if".

Calibration samples pass through the model block by block. Of every layer of experts an even sample
of tokens is kept, x (n, hidden), with

    E_e(x)      of all experts, chosen or not, (E, n, hidden)
    choices     indices and gates (n, k) of its router; of any subset of its rows too, by running
                the family's own layer with the others cut out
    scale       |h|^2 of the residual stream after the block, (n,)

so what the layer gives without some experts, or with others in their place, is computed on that
sample and not guessed. Errors are relative to the residual stream [ours]:

    error = mean_t |y'_t - y_t|^2 / |h_t|^2

because the norm in front of every later block divides by |h_t|: without it a few tokens of huge
activation decide. The mean is over datasets first, so a small one counts as much as a large one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import dense_weights
from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.stream import Stream
from bitnest.errors import UnsupportedModel
from bitnest.expert_axes import ExpertAxes, expert_axes
from bitnest.kernels.experts import expert_output
from bitnest.progress import Progress
from bitnest.reduced_config import GROUPS, first_of
from bitnest.skeleton import Skeleton

ROWS = 16384  # tokens kept of a layer, at most
OUTPUTS = 1 << 30  # bytes that all experts' outputs on them may take
TINY = 1e-30
FORBIDDEN = -1e9  # of a router's bias


@dataclass
class LayerProbe:
    """One layer, while its block is in memory; see above.

    block: its number. name: of the experts module. module: it. parent: what holds it and its
    router. axes: of the model. x: (n, hidden), as `parent` read them. label: (n,) dataset numbers.
    scale: (n,). groups: that its router chooses among, of as many experts each. outputs:
    (E, n, hidden) float32, before gates, after post norms. index, gates: (n, k). target:
    (n, hidden), what the experts give together.
    """

    block: int
    name: str
    module: Any
    parent: nn.Module
    axes: ExpertAxes
    x: torch.Tensor
    label: torch.Tensor
    scale: torch.Tensor
    groups: int = 1
    outputs: torch.Tensor = field(init=False)
    index: torch.Tensor = field(init=False)
    gates: torch.Tensor = field(init=False)
    target: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._other_router = False
        self.read = self._read()
        self.index, self.gates = self.choices(range(self.experts))
        self.outputs = self._outputs()
        self.target = self.mix(self.index, self.gates)
        share = torch.bincount(self.label).float().clamp_min(1)
        self.weight = 1.0 / (self.scale * share[self.label] * int((share > 1).sum() or 1))

    @property
    def experts(self) -> int:
        """How many there are."""
        return int(self.module.num_experts)

    @property
    def top_k(self) -> int:
        """Choices of a token."""
        return int(self.index.shape[1])

    def choices(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the router chooses with `rows` of its rows alone: places in `rows` (n, k), and gates
        (n, k) float32.

        Routers with a bias for each expert (all of those that choose among groups) are given one
        that forbids the others; of the rest the rows are cut out.
        """
        rows = list(rows)
        if self._other_router:  # it has no more rows than are asked for
            return self._run()[:2]
        biases = [
            (name, old) for name, _, old in self.router_tensors() if old.numel() == self.experts
        ]
        if biases and rows != list(range(self.experts)):
            with self._silenced(rows, biases):
                index, gates, _ = self._run()
            place = torch.full((self.experts,), -1, device=index.device)
            place[rows] = torch.arange(len(rows), device=index.device)
            if bool((place[index] < 0).any()):
                raise _unreachable(self.name, "its router chooses what its bias forbids")
            return place[index], gates
        with self._cut(rows):
            index, gates, _ = self._run()
        return index, gates

    def mix(
        self, index: torch.Tensor, gates: torch.Tensor, outputs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of the chosen outputs (E, n, hidden) by their gates, (n, hidden)."""
        outputs = self.outputs if outputs is None else outputs
        place = torch.arange(len(index), device=index.device)
        total = torch.zeros_like(outputs[0])
        for j in range(index.shape[1]):
            total += gates[:, j, None] * outputs[index[:, j], place]
        return total

    def error(self, output: torch.Tensor) -> float:
        """Relative error of another output (n, hidden); see above."""
        return float(((output - self.target).square().sum(1) * self.weight).sum())

    def without(self, kept: Sequence[int]) -> float:
        """The error where only the experts `kept` and their router rows are left."""
        index, gates = self.choices(kept)
        return self.error(self.mix(torch.as_tensor(list(kept))[index], gates))

    def replaced(self, fates: dict[int, torch.Tensor]) -> float:
        """The error where the router stays and experts give something else. fates: expert ->
        (n, hidden) or (hidden,), instead of its output."""
        return self.error(self.target + self.change(fates))

    def change(self, fates: dict[int, torch.Tensor]) -> torch.Tensor:
        """By how much that changes the layer's output, (n, hidden)."""
        total = torch.zeros_like(self.target)
        for expert, instead in fates.items():
            gate = self.gate(expert)
            total += gate[:, None] * (instead - self.outputs[expert])
        return total

    def gate(self, expert: int) -> torch.Tensor:
        """Its gate, 0 where it is not chosen, (n,)."""
        return (self.gates * (self.index == expert)).sum(1)

    def _outputs(self) -> torch.Tensor:
        weights = dense_weights(self.module)
        rows = self.read.to(next(self.module.parameters()).dtype)
        return torch.stack(
            [expert_output(self.module, weights, e, rows).float() for e in range(self.experts)]
        )

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choices, gates and what the experts are given, with the experts themselves left out."""
        seen: list[torch.Tensor] = []

        def recorder(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> Any:
            seen.extend((index.long(), gates.float(), hidden))
            return torch.zeros_like(hidden)

        self.module.forward = recorder
        try:
            dtype = next(self.module.parameters()).dtype
            self.parent(self.x.to(dtype)[None])
        except (TypeError, RuntimeError, ValueError) as error:
            raise _unreachable(self.name, str(error)) from error
        finally:
            del self.module.forward
        if len(seen) != 3 or seen[0].shape != seen[1].shape or len(seen[0]) != len(self.x):
            raise _unreachable(self.name, "they are not called with one gate per choice")
        return seen[0], seen[1], seen[2]

    def _read(self) -> torch.Tensor:
        """What the experts are given: for some families not what their parent is."""
        return self._run()[2].detach()

    def router_tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
        """The router's tensors that have something for each expert: name, along which dimensions,
        the tensor as it is now."""
        path = self.name.rpartition(".")[0]
        modules = dict(self.parent.named_modules(prefix=path))
        for name, dims in self.axes.tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in modules and not self.axes.of_experts(self.block, name):
                yield name, dims, getattr(modules[owner], leaf)

    def _resize(self, modules: Mapping[str, nn.Module], rows: int) -> list[tuple[Any, str, int]]:
        """Tell the layer's modules how many rows there are; what they said before."""
        numbers: list[tuple[Any, str, int]] = []
        for (path, attribute), value in self.axes.numbers.items():
            if path in modules:
                own, rest = divmod(value * rows, self.axes.count)
                numbers.append((modules[path], attribute, value))
                setattr(modules[path], attribute, value if rest else own)
        return numbers

    @contextmanager
    def router(self, tensors: Mapping[str, torch.Tensor], rows: int) -> Iterator[None]:
        """The layer with another router, of fewer `rows`. tensors: by the model's names."""
        modules = dict(self.parent.named_modules(prefix=self.name.rpartition(".")[0]))
        saved = []
        for name, values in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = modules[path]
            table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
            saved.append((table, leaf, table[leaf]))
            new = values.to(table[leaf])
            table[leaf] = (
                nn.Parameter(new, requires_grad=False) if table is owner._parameters else new
            )
        numbers = self._resize(modules, rows)
        self._other_router = True
        try:
            yield
        finally:
            self._other_router = False
            for table, leaf, old in saved:
                table[leaf] = old
            for owner, attribute, value in numbers:
                setattr(owner, attribute, value)

    @contextmanager
    def _silenced(self, rows: list[int], biases: list[tuple[str, torch.Tensor]]) -> Iterator[None]:
        """The router with a bias that keeps it from choosing other rows than these."""
        off = [e for e in range(self.experts) if e not in set(rows)]
        saved = [tensor.detach().clone() for _, tensor in biases]
        for _, tensor in biases:
            tensor.data.view(-1)[off] = FORBIDDEN
        try:
            yield
        finally:
            for (_, tensor), old in zip(biases, saved, strict=True):
                tensor.data.copy_(old)

    @contextmanager
    def _cut(self, rows: list[int]) -> Iterator[None]:
        """The router with some of its rows."""
        if rows == list(range(self.experts)):
            yield
            return
        at = torch.as_tensor(rows)
        modules = dict(self.parent.named_modules(prefix=self.name.rpartition(".")[0]))
        undo = []
        for name, dims, old in self.router_tensors():
            path, _, leaf = name.rpartition(".")
            table = modules[path]._parameters if isinstance(old, nn.Parameter) else None
            table = modules[path]._buffers if table is None else table  # type: ignore[assignment]
            new: torch.Tensor = old
            for dim in dims:
                new = new.index_select(dim, at.to(old.device))
            new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            table[leaf] = new  # type: ignore[index, assignment]
            undo.append((table, leaf, old))
        numbers = self._resize(modules, len(rows))
        try:
            yield
        finally:
            for table, leaf, old in undo:
                table[leaf] = old  # type: ignore[index, assignment]
            for owner, attribute, value in numbers:
                setattr(owner, attribute, value)


def _unreachable(name: str, said: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"experts cannot be tried without each other: {said.strip().splitlines()[0][:120]}",
        where=name,
        hint="this family's layers of experts need more than hidden states",
    )


def probe_layers(
    skeleton: Skeleton,
    calibration: CalibrationSet,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    rows: int = ROWS,
) -> Iterator[LayerProbe]:
    """Send the samples through the model and stop at every layer of experts, its block filled.

    Raises:
        UnsupportedModel: no experts behind transformers' interface, or a layer that cannot be run
            alone.
    """
    axes = expert_axes(skeleton.model, skeleton.prefix)
    labels = list(calibration.counts)
    numbers = torch.tensor([labels.index(label) for label in calibration.labels])
    stream = Stream(skeleton, calibration.tokens, dtype=dtype, device=device)
    length = calibration.tokens.shape[1]
    width = int(skeleton.model.config.get_text_config().hidden_size)
    limit = max(64, min(rows, OUTPUTS // (4 * axes.count * width)))
    total = calibration.tokens.numel()
    chosen = torch.linspace(0, total - 1, min(total, limit), dtype=torch.float64).long()
    last = max(axes.modules)
    groups = first_of(skeleton.model.config.get_text_config(), GROUPS, 1)
    progress.phase("probing experts", last + 1)
    for layer in range(last + 1):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=dtype, device=device)
        try:
            name = axes.modules.get(layer)
            read = _Reader(chosen)
            parent = skeleton.model.get_submodule((name or prefix).rpartition(".")[0])
            if name is not None and parent is skeleton.blocks[layer]:
                raise _unreachable(name, "they lie in the block itself")
            with read.watching(parent if name is not None else None):
                stream.run(layer, keep=True)
            if name is not None:
                if read.seen != total:
                    raise _unreachable(name, f"they are given {read.seen} of {total} tokens")
                x = torch.cat(read.rows)
                state = stream.hidden.flatten(0, 1)[chosen].float()
                yield LayerProbe(
                    layer, name, skeleton.model.get_submodule(name), parent, axes,
                    x.float().to(device), numbers[chosen // length].to(device),
                    state.square().sum(1).clamp_min(TINY).to(device), groups,
                )  # fmt: skip
        finally:
            skeleton.drop(prefix)
        progress.step()


class _Reader:
    """Keeps some of the tokens that pass a module. chosen: their numbers, ascending."""

    def __init__(self, chosen: torch.Tensor) -> None:
        self.chosen, self.seen = chosen, 0
        self.rows: list[torch.Tensor] = []

    @contextmanager
    def watching(self, module: nn.Module | None) -> Iterator[None]:
        if module is None:
            yield
            return
        handle = module.register_forward_pre_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        here = (self.chosen >= self.seen) & (self.chosen < self.seen + len(flat))
        self.rows.append(flat[(self.chosen[here] - self.seen).to(flat.device)].cpu())
        self.seen += len(flat)
