"""Probes: random plans whose KL is measured, so that predictions can be held against the truth.

A probe is a choice of one candidate format for every site. All probes pass through the model
together with the base, block by block: while a block's sites are solved in every format, the
weights that some probe chose are kept (`Probes.offer`), then each probe's own hidden states go
through the block with its choice (`Probes.advance`). At the end KL(base || probe) is measured on
the probes' windows, per dataset.

How probes are drawn [ours]: the mean width of the experts' sites (of every other kind's, likewise)
is spread evenly over the candidates, so that plans of every budget are among the probes, uniform
ones of the coarsest and finest nearly; the mix around the mean is narrow or wide. In half of the
probes all kinds have one mean, in the others each its own: attention can be fine where experts are
coarse. Embedding and head have one site each, which gets the width nearest its mean; in half of the
probes they stay as they are, as in most plans. `zero` is no width and is never drawn.

A probe with another embedding has states of its own from the first block on, one with another head
is measured with that. Both are kept as they would be stored and decoded when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bitnest.calibrate.collector import reference_experts
from bitnest.calibrate.end_weights import EndWeights
from bitnest.calibrate.spill import Spill
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import Tail
from bitnest.formats import PackedFormat, code_bits
from bitnest.safetensors_io import Entry
from bitnest.sites import ENDS, Site, is_experts

DIRICHLET = 0.5
PROBES_OF_ENDS = (1, 2)  # of every four: one with means of its own, one where all kinds have one
TYPICAL = (1024, 1024)  # matrix that widths are compared on
ROWS = 256  # predictions whose logits are compared at once


@dataclass(frozen=True)
class Measured:
    """One probe on one dataset. kl: mean nats per prediction. error: its standard error, from the
    spread of the windows' means; 0 for one window."""

    label: int
    kl: float
    error: float


def draw_plans(
    sites: Sequence[Site], formats: Sequence[PackedFormat], count: int, seed: int
) -> list[dict[str, int]]:
    """`count` random plans: site name -> format number; sites left out stay as they are."""
    random = np.random.default_rng(seed)
    order = widths(formats)
    if not order:
        return []
    last = len(order) - 1
    inner = [site for site in sites if site.kind not in ENDS]
    kinds = sorted({site.kind for site in inner})
    ends = [site for site in sites if site.kind in ENDS]
    strata = {kind: random.permutation(count) for kind in [*kinds, *(s.kind for s in ends)]}
    plans = []
    for number in range(count):
        places: dict[str, tuple[list[int], np.ndarray]] = {}
        for kind in kinds:
            own = number % 2 and kind != kinds[-1]
            stratum = strata[kind if own else kinds[-1]][number]
            mean = last * (stratum + random.random()) / count
            near = max(0.5, random.random() * len(order) / 2)
            mixed = [i for i in range(last + 1) if abs(i - mean) <= near]
            places[kind] = ([order[i] for i in mixed], random.dirichlet([DIRICHLET] * len(mixed)))
        plan = {s.name: int(random.choice(places[s.kind][0], p=places[s.kind][1])) for s in inner}
        for site in ends:
            stratum = strata[site.kind if number % 2 else kinds[-1]][number]
            if number % 4 in PROBES_OF_ENDS:
                plan[site.name] = order[round(last * (stratum + random.random()) / count)]
        plans.append(plan)
    return plans


def widths(formats: Sequence[PackedFormat]) -> list[int]:
    """Numbers of the formats that are widths, by the bits of a matrix' codes: all but `zero`."""
    numbers = [i for i, fmt in enumerate(formats) if fmt.bits]
    return sorted(numbers, key=lambda i: code_bits(formats[i], TYPICAL))


def group_plans(sites: Sequence[Site], number: int) -> list[dict[str, int]]:
    """One plan for every layer and kind: its sites in format `number`, all others untouched."""
    groups: dict[tuple[int, str], dict[str, int]] = {}
    for site in sites:
        groups.setdefault((site.layer, site.kind), {})[site.name] = number
    return list(groups.values())


class Probes:
    """Hidden states and, for the block at hand, weights of every probe.

    states: number of a plan -> what its samples have become, from the first block it changes on;
    a plan that changes nothing but the head has none. ends: those that plans change.

    plans: as `draw_plans` gives. samples: numbers of the stream's samples that are measured.
    parameter: gives a site's model parameter. limit: bytes of weights in memory, None for all;
    more go to a file.
    """

    def __init__(
        self,
        stream: Stream,
        plans: Sequence[dict[str, int]],
        samples: Sequence[int],
        parameter: Callable[[Site], torch.Tensor],
        limit: int | None = None,
        ends: EndWeights | None = None,
    ) -> None:
        self.ends = ends or EndWeights(())
        self.stream, self.plans, self.samples = stream, list(plans), list(samples)
        self.parameter = parameter
        self.states: dict[int, torch.Tensor] = {}
        self._wanted = {choice for plan in self.plans for choice in plan.items()}
        self._sites: dict[str, Site] = {}
        self._weights = Spill(limit)

    def begin(self, tokens: torch.Tensor) -> None:
        """Give probes with another embedding their own first states. tokens: of all samples."""
        table = self.ends.site("embedding")
        if table is None:
            return
        groups: dict[int, list[int]] = {}
        for number, plan in enumerate(self.plans):
            if table.name in plan:
                groups.setdefault(plan[table.name], []).append(number)
        for choice, numbers in groups.items():

            def change(choice: int = choice) -> None:
                parameter = self.stream.skeleton.model.get_parameter(table.path)
                self.ends.decode_into(parameter.data, table, choice)

            states = self.stream.embed(tokens[self.samples], change)
            for number in numbers:
                self.restore(number, states)

    def offer(self, site: Site, number: int, weight: torch.Tensor) -> None:
        """A site's weight in format `number`, (O, I), was computed."""
        if (site.name, number) in self._wanted:
            self._sites[site.name] = site
            self._weights.put((site.name, number), weight.to(self.parameter(site).dtype))

    def advance(self, layer: int) -> None:
        """Send every probe through block `layer`, which holds its own weights before and after; the
        stream's samples must not have passed it yet."""
        for number, plan in enumerate(self.plans):
            chosen = [site for name, site in self._sites.items() if name in plan]
            if chosen or number in self.states:
                if number not in self.states:
                    self.restore(number, self.stream.hidden[self.samples])
                self._advance(layer, self.states[number], plan, chosen)
                self.stream.forget()
        self._sites.clear()
        self._weights.clear()

    def restore(self, number: int, states: torch.Tensor) -> None:
        """Take `states` (samples, length, hidden_size) for those of a probe."""
        self.states[number] = self.stream.allocate(tuple(states.shape)).copy_(states)

    def entries(self) -> list[Entry]:
        """The states, to be written one after the other."""

        def values(states: torch.Tensor) -> torch.Tensor:
            self.stream.forget()  # those before it
            return states

        return [
            Entry(str(number), states.dtype, tuple(states.shape), partial(values, states))
            for number, states in self.states.items()
        ]

    def _advance(
        self, layer: int, states: torch.Tensor, plan: dict[str, int], chosen: Sequence[Site]
    ) -> None:
        stream, block = self.stream, self.stream.skeleton.blocks[layer]
        own: dict[str, torch.Tensor] = {}
        try:
            for site in chosen:
                parameter = stream.skeleton.model.get_parameter(site.path)
                if site.path not in own:
                    own[site.path] = parameter.data
                    parameter.data = parameter.data.clone()
                weight = torch.empty(site.shape, dtype=parameter.dtype)
                self._weights.copy_to((site.name, plan[site.name]), weight)
                site.view(parameter.data).copy_(weight)
            with torch.no_grad(), reference_experts(m for m in block.modules() if is_experts(m)):
                for i in range(len(states)):
                    states[i : i + 1] = stream.forward(layer, states[i : i + 1].to(stream.device))
        finally:
            for path, data in own.items():
                stream.skeleton.model.get_parameter(path).data = data

    def measure(
        self,
        tail: Tail,
        tokens: torch.Tensor,
        labels: Sequence[int],
        step: Callable[[], None] = lambda: None,
    ) -> list[list[Measured]]:
        """KL of every probe on every dataset. tokens, labels: of all the stream's samples, which
        must have passed through all blocks. step: called after every window, `rounds` times."""
        device = self.stream.device
        values = torch.zeros(len(self.plans), len(self.samples), dtype=torch.float64)
        for choice, numbers in self._by_head().items():
            head = self._head(choice)
            for j, sample in enumerate(self.samples):
                window = tokens[sample : sample + 1]
                own = self.stream.hidden[sample : sample + 1]
                with torch.no_grad():
                    base = tail(window, own.to(device))[:-1].log_softmax(1)
                    for i in numbers:
                        states = self.states[i][j : j + 1] if i in self.states else own
                        with self._in_place(head):
                            other = tail(window, states.to(device))[:-1]
                        values[i, j] = mean_kl(base, other)
                self.stream.forget()
                step()
        own = torch.tensor([labels[sample] for sample in self.samples])
        return [[_summary(int(d), row[own == d]) for d in own.unique()] for row in values]

    @property
    def rounds(self) -> int:
        """Windows that `measure` goes through, each head anew."""
        return len(self.samples) * len(self._by_head())

    def _by_head(self) -> dict[int | None, list[int]]:
        """Format number of the head, None for the model's own -> plans."""
        site = self.ends.head
        found: dict[int | None, list[int]] = {}
        for number, plan in enumerate(self.plans):
            found.setdefault(None if site is None else plan.get(site.name), []).append(number)
        return found

    def _head(self, choice: int | None) -> torch.Tensor | None:
        """The head's weight in format `choice`, as the model computes with it."""
        site = self.ends.head
        if choice is None or site is None:
            return None
        own = self.stream.skeleton.model.get_output_embeddings().weight
        return self.ends.decode_into(torch.empty_like(own), site, choice)

    @contextmanager
    def _in_place(self, head: torch.Tensor | None) -> Iterator[None]:
        """The model's head with another weight, if there is one."""
        if head is None:
            yield
            return
        own = self.stream.skeleton.model.get_output_embeddings().weight
        before = own.data
        own.data = head
        try:
            yield
        finally:
            own.data = before


def mean_kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over rows of KL(p || q) in nats. base: log p; other: logits of q; (rows, vocabulary).

    sum p (log p - log q) loses digits when the two are close; sum p (r - log(1 + r)) of
    r = q / p - 1 does not, and no term is negative.
    """
    total = 0.0
    for start in range(0, len(base), ROWS):
        p = base[start : start + ROWS]
        d = other[start : start + ROWS].log_softmax(1) - p
        total += float((p.exp() * (d.expm1() - d)).sum(dtype=torch.float64))
    return total / len(base)


def _summary(label: int, values: torch.Tensor) -> Measured:
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Measured(label, float(values.mean()), error)
