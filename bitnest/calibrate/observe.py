"""observe: everything one decoder block shows while samples of several datasets pass through it.

Linear layers that read the same tensor share one `Moments` (found as the collector does, by the
tensor's address). Experts are watched from inside their forward pass, so nothing is computed twice:

    tokens n_e, gate mass sum g, sum g^2, REAP's sum g |E(x)|, sum |E(x)|
    sum E(x) and sum E(x)^2 per channel
    Moments of what gate/up read and of what down reads
    router: sum and sum of squares of every logit, histogram of the k-th minus the (k+1)-th
    trace: the experts chosen for every token, in order

each with the dataset label as first dimension. Hessians are summed on request:

    H = sum_t w_t x_t x_t^T,  w_t = 1 for linear layers; 1, gate or gate^2 for experts

for all experts at once or, when memory says so, for some of them per pass: `Observer.experts` says
which. Only the first pass adds to anything else.

Router logits are x W^T + b of the matrix beside the experts with one row for each, in float32,
before softmax and before any correction that a family adds to choose by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bitnest.calibrate.collector import add_moment, dense_weights
from bitnest.calibrate.hooks import Hooked
from bitnest.calibrate.moments import Moments
from bitnest.kernels.experts import ExpertPass, experts_forward
from bitnest.kernels.moments import add_logits, add_outputs
from bitnest.sites import is_experts, is_linear

COVER = "cover"  # label of windows drawn for starved experts: kept out of usage figures
MARGIN_BINS = 40
MARGIN_WIDTH = 0.1  # logits; the last bin is open


@dataclass
class Input:
    """A tensor that one or more linear layers read.

    readers: their names. hessian: (L, I, I) float32 sums over `weight` (L,) tokens, upper part (see
    `add_moment`), or None.
    """

    readers: list[str]
    moments: Moments
    hessian: torch.Tensor | None
    weight: torch.Tensor


@dataclass
class ExpertSums:
    """One layer's fused experts; L labels, E experts. Sums as above, float64 unless said.

    norms: (L, E, 4): gates, gates^2, |E(x)|, gate * |E(x)|. output, output2: (L, E, hidden).
    logits, logits2: (L, E). margins: (L, bins) int64. The three are None without a router.
    full: whether Hessians are summed. hessians: expert -> (up (L, I, I), down (L, J, J)) float32
    sums with weights `weight` (L, E) over `fitted` (L, E) int64 tokens.
    trace: (tokens, k) int16 in the order of the samples.
    """

    top_k: int
    full: bool
    norms: torch.Tensor
    output: torch.Tensor
    output2: torch.Tensor
    up: Moments
    down: Moments
    weight: torch.Tensor
    fitted: torch.Tensor
    logits: torch.Tensor | None
    logits2: torch.Tensor | None
    margins: torch.Tensor | None
    trace: list[torch.Tensor] = field(default_factory=list)
    hessians: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens routed to each expert, (L, E) int64."""
        return self.up.tokens


class Observer(Hooked):
    """Hooks on one block; a context manager around forward passes.

    inputs: leader's name -> Input. fused: experts module name -> ExpertSums. rows: experts module
    name -> an even sample of the states that reached it, (n, hidden).
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        *,
        labels: int,
        full: bool,
        weighting: str = "gate",
        experts: Callable[[int], bool] = lambda _: True,
        sample: torch.Tensor | None = None,
    ) -> None:
        """labels: how many. full: sum Hessians, of the experts that `experts` accepts. weighting:
        of tokens in an expert's Hessian. sample: ascending token numbers to keep in `rows`."""
        super().__init__()
        self.inputs: dict[str, Input] = {}
        self.fused: dict[str, ExpertSums] = {}
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.experts = experts
        self.first_pass = True
        self._modules = list(block.named_modules(prefix=prefix))
        self.labels, self._full, self._weighting = labels, full, weighting
        self._sample = sample
        self._leaders: dict[str, str] = {}
        self._alive: dict[tuple[int, int, int], tuple[str, torch.Tensor]] = {}
        self._learning = True
        self._label, self._start, self._fit = 0, 0, True

    def __enter__(self) -> Observer:
        for name, module in self._modules:
            if is_experts(module):
                forward = partial(self._experts_forward, name, module, self._router(name, module))
                module.forward = forward  # type: ignore[method-assign]
                self._undo.append(partial(delattr, module, "forward"))
            elif is_linear(module):
                self._undo.append(
                    module.register_forward_pre_hook(partial(self._read, name)).remove
                )
        return self

    def before_batch(self, label: int, start: int, *, fit: bool = True) -> None:
        """The next batch holds samples of dataset `label`; its first token has number `start`.

        fit: whether Hessians see it.
        """
        self._label, self._start, self._fit = label, start, fit

    def after_batch(self) -> None:
        """A batch is through: who shares whose input is known after the first."""
        self._learning = False
        self._alive.clear()

    def _read(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.first_pass:
            return
        x = args[0].detach()
        if self._learning and x.numel():
            key = (x.data_ptr(), x.numel(), x.shape[-1])
            leader = self._alive.setdefault(key, (name, x))[0]
            self._leaders[name] = leader
            if leader != name:
                self.inputs[leader].readers.append(name)
        if self._leaders.setdefault(name, name) != name:
            return
        if name not in self.inputs:
            self.inputs[name] = self._new_input(name, x.shape[-1], x.device)
        own = self.inputs[name]
        rows = x.reshape(-1, x.shape[-1]).float()
        own.moments.add((self._label,), rows)
        if own.hessian is not None and self._fit:
            add_moment(own.hessian[self._label], rows)
            own.weight[self._label] += len(rows)

    def _new_input(self, name: str, width: int, device: torch.device) -> Input:
        hessian = torch.zeros(self.labels, width, width, device=device) if self._full else None
        weight = torch.zeros(self.labels, dtype=torch.float64)
        return Input([name], Moments.zeros((self.labels,), width), hessian, weight)

    def _router(self, name: str, module: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of the matrix beside the experts with one row for each; None also where
        rows are not experts (see `resized`), whose logits would count for the wrong ones."""
        if hasattr(module, "expert_rows"):
            return None
        modules = dict(self._modules)
        parent = modules.get(name.rpartition(".")[0])
        for other in parent.children() if parent is not None else ():
            weight, bias = getattr(other, "weight", None), getattr(other, "bias", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or other is module:
                continue
            if weight.shape[0] == module.num_experts:
                return weight, bias if isinstance(bias, torch.Tensor) else None
        return None

    def _experts_forward(
        self,
        name: str,
        module: Any,
        router: tuple[torch.Tensor, torch.Tensor | None] | None,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        fits = router is not None and router[0].shape[1] == hidden.shape[-1]
        sums = self.fused.get(name)
        if sums is None:
            sums = self.fused[name] = self._new_sums(module, hidden, top_k_index.shape[-1], fits)
        if self.first_pass:
            sums.trace.append(top_k_index.detach().to(torch.int16).cpu())
            if router is not None and fits:
                self._logits(sums, router, hidden)
            self._keep_rows(name, hidden)
        weights = dense_weights(module)
        watch = partial(self._expert, sums)
        return experts_forward(module, weights, hidden, top_k_index, top_k_weights, watch)

    def _new_sums(self, module: Any, hidden: torch.Tensor, top_k: int, router: bool) -> ExpertSums:
        count, width = int(module.num_experts), hidden.shape[-1]
        inner = dense_weights(module)(0, "down_proj").shape[1]
        lead = (self.labels, count)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return ExpertSums(
            top_k=top_k,
            full=self._full,
            norms=zeros(*lead, 4),
            output=zeros(*lead, width),
            output2=zeros(*lead, width),
            up=Moments.zeros(lead, width),
            down=Moments.zeros(lead, inner),
            weight=zeros(*lead),
            fitted=torch.zeros(lead, dtype=torch.int64),
            logits=zeros(*lead) if router else None,
            logits2=zeros(*lead) if router else None,
            margins=torch.zeros(self.labels, MARGIN_BINS, dtype=torch.int64) if router else None,
        )

    def _logits(
        self, sums: ExpertSums, router: tuple[torch.Tensor, torch.Tensor | None], x: torch.Tensor
    ) -> None:
        weight, bias = router
        logits = nn.functional.linear(
            x.float(), weight.float(), None if bias is None else bias.float()
        )
        assert sums.logits is not None and sums.logits2 is not None and sums.margins is not None
        own = (t[self._label] for t in (sums.logits, sums.logits2, sums.margins))
        add_logits(logits, sums.top_k, MARGIN_WIDTH, *own)

    def _keep_rows(self, name: str, hidden: torch.Tensor) -> None:
        if self._sample is None:
            return
        first, last = self._start, self._start + len(hidden)
        inside = self._sample[(self._sample >= first) & (self._sample < last)] - first
        self.rows.setdefault(name, []).append(hidden[inside.to(hidden.device)].detach().cpu())

    def _expert(self, sums: ExpertSums, seen: ExpertPass) -> None:
        place = (self._label, seen.expert)
        x, inner, gates = seen.x.float(), seen.inner.float(), seen.gates.float()
        if self.first_pass:
            outputs = (sums.output[place], sums.output2[place], sums.norms[place])
            add_outputs(seen.y.float(), gates, *outputs)
            sums.up.add(place, x)
            sums.down.add(place, inner)
        if self._full and self._fit and self.experts(seen.expert):
            self._hessians(sums, seen.expert, x, inner, gates)

    def _hessians(
        self,
        sums: ExpertSums,
        expert: int,
        x: torch.Tensor,
        inner: torch.Tensor,
        gates: torch.Tensor,
    ) -> None:
        if expert not in sums.hessians:
            up, down = (
                torch.zeros(self.labels, t.shape[1], t.shape[1], device=t.device)
                for t in (x, inner)
            )
            sums.hessians[expert] = (up, down)
        w = None if self._weighting == "none" else gates
        if self._weighting == "gate2":
            w = gates.square()
        up, down = sums.hessians[expert]
        add_moment(up[self._label], x, w)
        add_moment(down[self._label], inner, w)
        total = float(len(x)) if w is None else float(w.double().sum())
        sums.weight[self._label, expert] += total
        sums.fitted[self._label, expert] += len(x)
