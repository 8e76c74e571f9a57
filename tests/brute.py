"""Brute force: what a model's matrices read and give, by plain hooks and loops over single tokens.

transformers runs the model, one sample at a time; nothing of bitnest computes anything here. An
expert is applied to a token by its definition, written out once more, and `expert_layers` checks
that the sum over the chosen experts is what the model's own experts gave. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILIES, VOCAB, Family, build

LENGTH = 20
LABELS = [0, 0, 0, 0, 0, 1, 1, 1, 2, 0]  # odd numbers of samples, and a label that comes back
NAMES = ["books", "code", "wiki"]
BLOCKS = (16, 32, 128)

EXTRA = {  # logits that are scaled after the head
    "cohere": replace(FAMILIES["llama"], config="CohereConfig", name="cohere"),
    "granite": replace(FAMILIES["llama"], config="GraniteConfig", name="granite"),
}


def spec(family: str) -> Family:
    """A family of `tiny`, or one of those above."""
    return FAMILIES.get(family) or EXTRA[family]


def checkpoint(root: Path, family: str, variant: str = "", **options: Any) -> Path:
    """A pico checkpoint whose norms let some channels stand out, so that there are outliers.

    options: `tweak`, a function of the model, and whatever else its config takes.
    """
    path = root / f"{family}-{variant}"
    if not path.exists():
        tweak = options.pop("tweak", None)
        model = build(spec(family), **options)
        for name, p in model.named_parameters():
            if ("norm" in name or "ln_" in name) and p.shape[-1] >= 32:
                p.data[3], p.data[11] = 4.0, 0.2
        if tweak is not None:
            tweak(model)
        model.save_pretrained(path)
    return path


def text(samples: int = len(LABELS), length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Random tokens (samples, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (samples, length), generator=generator)


def load(path: Path, implementation: str = "eager", dtype: torch.dtype | None = None) -> Any:
    """The checkpoint as transformers loads it; in float64, which grouped_mm does not know."""
    dtype = dtype or (torch.float64 if implementation == "eager" else torch.float32)
    options = {"dtype": dtype, "experts_implementation": implementation}
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def is_linear(module: Any) -> bool:
    return type(module).__name__ in {"Linear", "Conv1D"}


def is_experts(module: Any) -> bool:
    return getattr(module, "down_proj", None) is not None and hasattr(module, "num_experts")


@dataclass
class Routed:
    """One call of an experts module, arrays float64: hidden and output (T, H), index, gates (T, k).

    tensor: its output in the graph.
    """

    hidden: np.ndarray
    index: np.ndarray
    gates: np.ndarray
    output: np.ndarray
    tensor: torch.Tensor


@dataclass
class Recorded:
    """One pass of every sample. inputs: linear layer -> (T, I) per sample, calls in one. outputs:
    its outputs in the graph. routed: experts module -> per sample. logits: (T, V) per sample."""

    model: Any
    inputs: dict[str, list[np.ndarray]] = field(default_factory=dict)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    routed: dict[str, list[Routed]] = field(default_factory=dict)
    logits: list[torch.Tensor] = field(default_factory=list)

    def linear(self, name: str, _m: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.inputs.setdefault(name, []).append(numpy(args[0].reshape(-1, args[0].shape[-1])))
        self.outputs.setdefault(name, []).append(output)

    def experts(
        self, name: str, _m: Any, args: tuple[Any, ...], kwargs: Any, output: torch.Tensor
    ) -> None:
        hidden, index, gates = (*args, *kwargs.values())[:3]
        rows = [numpy(t.reshape(-1, t.shape[-1])) for t in (hidden, index, gates, output)]
        rows[1] = rows[1].astype(int)
        self.routed.setdefault(name, []).append(Routed(*rows, output))


def record(model: Any, tokens: torch.Tensor, *, graph: bool = False) -> Recorded:
    """Run every sample alone. graph: keep what a backward pass needs."""
    seen, undo = Recorded(model), []
    for name, module in model.named_modules():
        if is_linear(module):
            undo.append(module.register_forward_hook(partial(seen.linear, name)))
        elif is_experts(module):
            hook = partial(seen.experts, name)
            undo.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.set_grad_enabled(graph):
        for sample in tokens:
            seen.logits.append(model(sample[None], use_cache=False).logits[0])
    for handle in undo:
        handle.remove()
    return seen


def numpy(tensor: torch.Tensor) -> np.ndarray:
    """Its values in float64."""
    return tensor.detach().double().numpy().copy()


@dataclass
class Rows:
    """Sums over single rows, L labels: what `Moments` and a Hessian hold, with weights w."""

    tokens: np.ndarray
    absmax: np.ndarray
    abs: np.ndarray
    square: np.ndarray
    over_six: np.ndarray
    peaks: np.ndarray
    hessian: np.ndarray
    weight: np.ndarray

    @classmethod
    def zeros(cls, labels: int, width: int) -> Rows:
        wide = [np.zeros((labels, width)) for _ in range(3)]
        return cls(
            np.zeros(labels, int), *wide, np.zeros(labels, int), np.zeros((labels, len(BLOCKS))),
            np.zeros((labels, width, width)), np.zeros(labels),
        )  # fmt: skip

    def add(self, label: int, x: np.ndarray, w: float = 1.0) -> None:
        """One row x (width,)."""
        self.tokens[label] += 1
        self.absmax[label] = np.maximum(self.absmax[label], np.abs(x))
        self.abs[label] += np.abs(x)
        self.square[label] += x * x
        self.over_six[label] += int((np.abs(x) >= 6).sum())
        for i, block in enumerate(BLOCKS):
            for start in range(0, len(x), block):
                part = x[start : start + block]
                self.peaks[label, i] += len(part) * np.abs(part).max() ** 2
        self.hessian[label] += w * np.outer(x, x)
        self.weight[label] += w


def linear_rows(seen: Recorded, name: str, labels: list[int]) -> Rows:
    """What a linear layer read."""
    rows = Rows.zeros(len(NAMES), seen.inputs[name][0].shape[1])
    for label, sample in zip(labels, seen.inputs[name], strict=True):
        for x in sample:
            rows.add(label, x)
    return rows


@dataclass
class Pass:
    """One expert on one token. sample, token, slot: where. up: what the first projection gave."""

    sample: int
    token: int
    slot: int
    expert: int
    gate: float
    x: np.ndarray
    up: np.ndarray
    inner: np.ndarray
    y: np.ndarray


def expert_parts(module: Any, expert: int) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Matrices (out, in) of the first projection and of down, and their biases or 0."""
    up, down = numpy(module.gate_up_proj[expert]), numpy(module.down_proj[expert])
    if "GptOss" in type(module).__name__:
        biases = (numpy(module.gate_up_proj_bias[expert]), numpy(module.down_proj_bias[expert]))
        return up.T, down.T, *biases
    return up, down, 0.0, 0.0


def gated(module: Any, up: np.ndarray) -> np.ndarray:
    """What down reads: SwiGLU, gate first, or GPT-OSS's clamped and interleaved one."""
    if "GptOss" in type(module).__name__:
        gate, linear = np.minimum(up[..., ::2], 7.0), np.clip(up[..., 1::2], -7.0, 7.0)
        return (linear + 1) * gate / (1 + np.exp(-1.702 * gate))
    half = up.shape[-1] // 2
    gate, linear = up[..., :half], up[..., half:]
    return gate / (1 + np.exp(-gate)) * linear


def passes(seen: Recorded, name: str) -> Iterator[Pass]:
    """Every (token, chosen expert) of an experts module, in order; checked against its output."""
    module = seen.model.get_submodule(name)
    parts = [expert_parts(module, e) for e in range(module.num_experts)]
    for sample, call in enumerate(seen.routed[name]):
        for token, x in enumerate(call.hidden):
            total = np.zeros_like(call.output[token])
            for slot, expert in enumerate(call.index[token]):
                w_up, w_down, b_up, b_down = parts[expert]
                up = w_up @ x + b_up
                inner = gated(module, up)
                y = w_down @ inner + b_down
                gate = call.gates[token, slot]
                total += gate * y
                yield Pass(sample, token, slot, int(expert), gate, x, up, inner, y)
            assert close(total, call.output[token])


@dataclass
class ExpertLayer:
    """Sums of one experts module: `norms`, `output`, `output2` as ExpertSums has them; up, down:
    expert -> Rows; logits (L, E), logits2, margins: of the router; trace: (tokens, k)."""

    norms: np.ndarray
    output: np.ndarray
    output2: np.ndarray
    up: list[Rows]
    down: list[Rows]
    logits: np.ndarray
    logits2: np.ndarray
    margins: np.ndarray
    trace: np.ndarray


def expert_layer(
    seen: Recorded, name: str, labels: list[int], weighting: str = "gate"
) -> ExpertLayer:
    """All sums of one experts module."""
    module = seen.model.get_submodule(name)
    count, calls = module.num_experts, seen.routed[name]
    hidden, inner = expert_parts(module, 0)[1].shape
    lead = (len(NAMES), count)
    layer = ExpertLayer(
        np.zeros((*lead, 4)), np.zeros((*lead, hidden)), np.zeros((*lead, hidden)),
        [Rows.zeros(len(NAMES), hidden) for _ in range(count)],
        [Rows.zeros(len(NAMES), inner) for _ in range(count)],
        np.zeros(lead), np.zeros(lead), np.zeros((len(NAMES), 40), int),
        np.concatenate([call.index for call in calls]),
    )  # fmt: skip
    for p in passes(seen, name):
        d, e = labels[p.sample], p.expert
        norm = np.sqrt((p.y**2).sum())
        layer.norms[d, e] += (p.gate, p.gate**2, norm, p.gate * norm)
        layer.output[d, e] += p.y
        layer.output2[d, e] += p.y**2
        w = {"none": 1.0, "gate": p.gate, "gate2": p.gate**2}[weighting]
        layer.up[e].add(d, p.x, w)
        layer.down[e].add(d, p.inner, w)
    router_sums(seen, name, labels, layer)
    return layer


def router_sums(seen: Recorded, name: str, labels: list[int], layer: ExpertLayer) -> None:
    """Logits of every token from the matrix called `gate` or `router` beside the experts."""
    parent = seen.model.get_submodule(name.rpartition(".")[0])
    router = parent.router if hasattr(parent, "router") else parent.gate
    weight, bias = numpy(router.weight), getattr(router, "bias", None)
    for label, call in zip(labels, seen.routed[name], strict=True):
        for x in call.hidden:
            logits = weight @ x + (0 if bias is None else numpy(bias))
            layer.logits[label] += logits
            layer.logits2[label] += logits**2
            k, ordered = call.index.shape[1], np.sort(logits)[::-1]
            if len(ordered) > k:
                margin = ordered[k - 1] - ordered[k]
                layer.margins[label, min(int(margin / 0.1), 39)] += 1


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Whether two arrays differ by at most `tolerance` times the largest value of b."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return bool(np.abs(a - b).max(initial=0.0) <= tolerance * np.abs(b).max(initial=0.0))


def kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over rows of KL(softmax(base) || softmax(other)) in float64."""
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def whole(total: torch.Tensor) -> np.ndarray:
    """A sum whose lower left quarter was left out, made symmetric: (..., I, I)."""
    full = numpy(total)
    half = full.shape[-1] // 2
    full[..., half:, :half] = np.swapaxes(full[..., :half, half:], -1, -2)
    return full
