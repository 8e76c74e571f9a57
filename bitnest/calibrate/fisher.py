"""Fisher: how much the model's output distribution minds an error in each output row of each site.

Let y be a site's output at one token and p the model's next-token distributions. To second order,
an error dy at one token costs

    KL(p || p') = 1/2 dy^T F dy,  F = E_v[g g^T],  g = (d logits / d y)^T v
    E[v v^T] = diag(p) - p p^T

Of F its diagonal is kept, summed over the tokens that reach the site and divided by the number of
predictions N:

    f_r = 1/N sum_t g_tr^2          (per output row r, per dataset label)

so that a weight error dW costs about 1/2 sum_r f_r (dW H dW^T)_rr nats per token, H the mean of
x x^T over the site's tokens, an expert's weighted as its Hessian is (the diagonal of K-FAC's
Kronecker form: Martens and Grosse, 2015; gradients and inputs are taken as independent, tokens
too). Calibration on measured probes absorbs what that leaves out.

v is drawn, one backward pass for a window:

    kl      v = sqrt(p) * e - p (sqrt(p) . e),  e standard normal: the Hessian of the KL to itself.
            (Labels drawn from p have the same second moment and a much larger variance.)
    loss    v = p - onehot(next token): the empirical Fisher of the loss

The ends have rows too (`end_gradients`): f of every logit, and of every channel of the embedding.

The model is streamed: forward once with every block's inputs stored, then backwards, one block's
weights in memory at a time. Gate weights are part of the graph, the choice of experts is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bitnest.calibrate.collector import dense_weights, reference_experts
from bitnest.calibrate.end_gradients import HeadFisher, lookup_rows
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_tail
from bitnest.errors import UnsupportedModel
from bitnest.kernels.experts import ExpertPass, experts_forward, up_name
from bitnest.progress import Progress
from bitnest.sites import Site, is_experts, is_linear

IMPORTANCE = ("kl", "loss")


@dataclass
class Fisher:
    """rows: module path -> (labels, O) of a linear layer, parameter path -> (labels, E, O) of
    experts; f_r as above, float64; of the head (labels, V), of the embedding (labels, hidden), the
    latter per channel of its rows; experts module path + `.tokens` -> (labels, E), tokens that
    reached each expert per prediction. predictions: N per label, (labels,)."""

    rows: dict[str, torch.Tensor]
    predictions: torch.Tensor

    def of(self, site: Site) -> torch.Tensor | None:
        """f of one site's output rows, (L, O); None if no gradient ever reached it."""
        rows = self.rows.get(site.module if site.param == "weight" else site.path)
        if rows is None:
            return None
        if rows.dim() == 3:
            rows = rows[:, site.expert or 0]
        return rows if site.rows is None else rows[:, site.rows[0] : site.rows[1]]

    def experience(
        self, path: str, tokens: torch.Tensor, seen: torch.Tensor, prior: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What f of experts' parameter `path` becomes with all that is known of their use.

        tokens: that reached each expert in all windows, (L, E). seen: tokens of these windows (L,).
        prior: tokens that every expert is taken to have had on top, each as sensitive as the
        layer's are on average. Gives (L, E) factors of f, and (L, E) what is to be added per row,
        times what the solver's H says. With S the squared gradients of n tokens, s their mean over
        the layer's tokens and rows, and r = (tokens + prior) / (seen + E prior / k),

            f = r (S + prior s) / (n + prior)
        """
        rows, name = self.rows.get(path), path.rpartition(".")[0]
        if rows is None or rows.dim() != 3:
            return None
        count = self.predictions.clamp_min(1).double()[:, None]
        tokens = tokens.double()
        total = seen.double().clamp_min(1)[:, None]
        rate = tokens / total
        met = self.rows[f"{name}.tokens"].double() if f"{name}.tokens" in self.rows else rate
        met = met.to(tokens.device) * count
        top_k = (tokens.sum(1, keepdim=True) / total).clamp_min(1e-9)
        use = (tokens + prior) / (total + tokens.shape[1] * prior / top_k)
        mean = (
            rows.to(tokens.device).sum(1).mean(1)[:, None]
            * count
            / met.sum(1, keepdim=True).clamp_min(1)
        )
        known = (count > 1) & (met.sum(1, keepdim=True) > 0)
        factor = torch.where(known, use * count / (met + prior), torch.ones_like(use))
        extra = torch.where(known, use * prior * mean / (met + prior), torch.zeros_like(use))
        return factor, extra


def measure_fisher(
    stream: Stream,
    tokens: torch.Tensor,
    labels: Sequence[int],
    count: int,
    *,
    kind: str = "kl",
    seed: int = 0,
    progress: Progress,
) -> Fisher:
    """Send `tokens` (samples, length), just embedded by `stream`, forwards and backwards.

    labels: label number per sample, of `count`. kind: kl or loss, see above.

    Raises:
        UnsupportedModel: the model cannot be differentiated.
    """
    if kind not in IMPORTANCE:
        raise ValueError(f"'{kind}' is neither kl nor loss")
    skeleton = stream.skeleton
    inputs = _forward(stream, progress)
    head = HeadFisher(skeleton.model, count)
    grads = _tail_gradients(stream, tokens, kind, seed, head, labels)
    predictions = torch.zeros(count, dtype=torch.int64)
    for label in labels:
        predictions[label] += tokens.shape[1] - 1
    fisher = Fisher({}, predictions)
    for layer in reversed(range(len(skeleton.blocks))):
        prefix = f"{skeleton.prefix}.{layer}"
        skeleton.fill(prefix, dtype=stream.dtype, device=stream.device)
        _block(stream, layer, prefix, inputs.pop(), grads, labels, fisher.rows, count)
        stream.forget()
        skeleton.drop(prefix)
        progress.step()
    fisher.rows.update(_end_rows(stream, head, grads, labels, count))
    total = predictions.clamp_min(1).double()
    for rows in fisher.rows.values():
        rows /= total.view(-1, *[1] * (rows.dim() - 1))
    return fisher


def _end_rows(
    stream: Stream, head: HeadFisher, grads: torch.Tensor, labels: Sequence[int], count: int
) -> dict[str, torch.Tensor]:
    """Sums of the ends that are modules of the plain kind. grads: of the first block's input."""
    model, found = stream.skeleton.model, {}
    table = model.get_input_embeddings()
    if head.head is not None:
        found[stream.skeleton.path_of(head.head) or ""] = head.rows
    if isinstance(table, nn.Embedding) and table.weight.shape[1] == grads.shape[2]:
        found[stream.skeleton.path_of(table) or ""] = lookup_rows(stream, grads, labels, count)
    return found


def _forward(stream: Stream, progress: Progress) -> list[torch.Tensor]:
    """The states every block reads; `stream.hidden` ends as what the tail reads."""
    skeleton, inputs = stream.skeleton, []
    for layer, block in enumerate(skeleton.blocks):
        prefix = f"{skeleton.prefix}.{layer}"
        kept = stream.allocate(tuple(stream.hidden.shape))
        inputs.append(kept.copy_(stream.hidden))
        skeleton.fill(prefix, dtype=stream.dtype, device=stream.device)
        with reference_experts(m for m in block.modules() if is_experts(m)):
            stream.run(layer, keep=True)
        stream.forget()
        skeleton.drop(prefix)
        progress.step()
    return inputs


def _tail_gradients(
    stream: Stream,
    tokens: torch.Tensor,
    kind: str,
    seed: int,
    head: HeadFisher | None = None,
    labels: Sequence[int] = (),
) -> torch.Tensor:
    """(d logits / d states)^T v of the last block's outputs, shaped as they are. head: is told of
    every window's logits, with its label."""
    grads = stream.allocate(tuple(stream.hidden.shape))
    generator = torch.Generator(device=stream.device).manual_seed(seed)
    watching = nullcontext() if head is None else head.watching()
    with open_tail(stream) as tail, watching, torch.enable_grad():
        for i in range(len(tokens)):
            states = stream.hidden[i : i + 1].to(stream.device).requires_grad_()
            logits = tail(tokens[i : i + 1], states)[:-1]
            p = logits.detach().softmax(1)
            if kind == "kl":
                e = torch.randn(p.shape, generator=generator, device=p.device)
                root = p.sqrt()
                v = root * e - p * (root * e).sum(1, keepdim=True)
            else:
                v = p
                v[torch.arange(len(p)), tokens[i, 1:].to(p.device)] -= 1
            if head is not None:
                head.add(labels[i], logits, p * (1 - p) if kind == "kl" else v.square())
            (grad,) = torch.autograd.grad((logits * v).sum(), states)
            grads[i] = grad[0]
    return grads


def _block(
    stream: Stream,
    layer: int,
    prefix: str,
    inputs: torch.Tensor,
    grads: torch.Tensor,
    labels: Sequence[int],
    rows: dict[str, torch.Tensor],
    count: int,
) -> None:
    """Differentiate one block; `grads` goes in as of its outputs and comes out as of its inputs."""
    block = stream.skeleton.blocks[layer]
    watcher = _Watcher(rows, count)
    with watcher.hooks(block, prefix), torch.enable_grad():
        for part in stream.batches():
            watcher.label = labels[part.start]
            states = inputs[part].to(stream.device).requires_grad_()
            try:
                output = stream.forward(layer, states)
                (grad,) = torch.autograd.grad(output, states, grads[part].to(stream.device))
            except RuntimeError as error:
                raise UnsupportedModel(
                    f"block {layer} cannot be differentiated: {str(error).splitlines()[0]}",
                    where=type(stream.skeleton.model).__name__,
                    hint="--importance probes needs no gradients",
                ) from error
            grads[part] = grad


class _Watcher:
    """Adds squared gradients of outputs to `rows`. label: of the batch that is running."""

    def __init__(self, rows: dict[str, torch.Tensor], count: int) -> None:
        self.rows, self.count, self.label = rows, count, 0

    @contextmanager
    def hooks(self, block: nn.Module, prefix: str) -> Iterator[None]:
        """Watch every linear layer and expert of the block."""
        undo: list[Callable[[], None]] = []
        for name, module in block.named_modules(prefix=prefix):
            if is_linear(module):
                undo.append(module.register_forward_hook(partial(self._linear, name)).remove)
            elif is_experts(module):
                watch = partial(self._expert, name, module)
                module.forward = partial(  # type: ignore[method-assign]
                    experts_forward, module, dense_weights(module), watch=watch
                )
                undo.append(partial(delattr, module, "forward"))
        try:
            yield
        finally:
            for step in undo:
                step()

    def _linear(self, name: str, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, name, None, 0))

    def _expert(self, name: str, module: nn.Module, seen: ExpertPass) -> None:
        experts = int(module.num_experts)  # type: ignore[arg-type]
        shape = (self.count, experts)
        tokens = self.rows.setdefault(f"{name}.tokens", torch.zeros(shape, dtype=torch.float64))
        tokens[self.label, seen.expert] += len(seen.y)
        for param, tensor in ((up_name(module), seen.up), ("down_proj", seen.y)):
            hook = partial(self._add, f"{name}.{param}", seen.expert, experts)
            tensor.register_hook(hook)

    def _add(self, name: str, expert: int | None, experts: int, grad: torch.Tensor) -> None:
        g = grad.detach().reshape(-1, grad.shape[-1])
        if name not in self.rows:
            shape = (
                (self.count, g.shape[1]) if expert is None else (self.count, experts, g.shape[1])
            )
            self.rows[name] = torch.zeros(shape, dtype=torch.float64)
        place = self.rows[name][self.label]
        (place if expert is None else place[expert]).add_(g.square().sum(0).cpu())
