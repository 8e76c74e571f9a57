"""Tables: rounding to the nearest entry, and learning the entries by weighted k-means.

    minimise sum_i h_i (x_i - t[c_i])^2        over entries t and assignments c

On one axis every cluster is an interval of the sorted values. Dynamic programming finds the best
intervals among some places to cut (all, and so the optimum, for 64 values or fewer); Lloyd's
algorithm then moves the cuts between the places: a round is a search of the midpoints and
differences of running sums. From quantiles alone, Lloyd's algorithm was left with 12 % more error
than this at 16 entries on Gaussian rows of 4096 values, with half as much again on Student's t with
4 degrees of freedom.

h is diag(H) (as SqueezeLLM and Any-Precision weight by sensitivity); where values are divided by
their group's scale, h is multiplied by its square.
"""

from __future__ import annotations

import torch

from bitnest.formats import BlockFormat

ROUNDS = 30
ROWS = 64  # of which clusters are sought at once: 2 MB of intervals
PLACES = 32
TINY = 1e-30
SAMPLE = 1 << 20  # weights, about, that a table for a whole matrix is learned from
SMALL = 1e-300  # float64


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Entry of the table nearest to x (..., g, O). table: (..., L, O or 1), ascending.

    A tie goes to the lower entry. One table for all of x is searched, four times as fast as the
    comparison with each entry that tables of rows get.
    """
    count = table.shape[-2]
    if table.numel() == count:
        entries = table.flatten()
        place = torch.bucketize(x, (entries[1:] + entries[:-1]) / 2, out_int32=True)
        return entries.index_select(0, place.flatten()).view(x.shape)
    if table.shape[-1] == 1 and table.dim() == x.dim():
        return torch.stack([nearest(a, t) for a, t in zip(x, table, strict=True)])
    found = table[..., :1, :].expand_as(x).clone()
    for i in range(1, count):
        low, high = table[..., i - 1 : i, :], table[..., i : i + 1, :]
        found = torch.where(x > (low + high) / 2, high, found)
    return found


def table_codes(v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of each entry v (O, I) in its table: (L,) for all, or (O, L) for the rows."""
    per_row = table if table.dim() == 2 else table[None, :]
    code = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    for i in range(1, per_row.shape[1]):
        code += v > (per_row[:, i - 1 : i] + per_row[:, i : i + 1]) / 2
    return code


def learn_table(
    w: torch.Tensor, h: torch.Tensor | None, fmt: BlockFormat, half: torch.dtype
) -> torch.Tensor:
    """Entries for each row (B, L, O) without group scales, else for each matrix (B, L, 1), learned
    from about a million weights of evenly spread rows.

    w: (B, I, O). h: (B, I, 1) or None. Entries are as stored in 16 bit, ascending.
    """
    count = 1 << int(fmt.bits)
    if fmt.group is not None:
        w = w[..., :: max(1, w.shape[1] * w.shape[2] // SAMPLE)]  # rows that stand for all
    weight = torch.ones_like(w[..., :1]) if h is None else h.clamp_min(TINY)
    weight = weight.expand_as(w)
    if fmt.group is None:
        x, weight = w.transpose(1, 2), weight.transpose(1, 2)  # (B, O, I)
        return kmeans(x, weight, count).to(half).float().sort(-1).values.transpose(1, 2)
    g = fmt.group_size(w.shape[1])
    padded = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[1] % g)).unflatten(1, (-1, g))
    scale = padded.abs().amax(2, keepdim=True).clamp_min(TINY).expand_as(padded)
    scale = scale.flatten(1, 2)[:, : w.shape[1]]
    x, weight = (w / scale).flatten(1), (weight * scale.square()).flatten(1)
    return kmeans(x, weight, count).to(half).float().sort(-1).values[:, :, None]


def kmeans(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """`count` centres of each row of x (..., n) with weights of the same shape: (..., count)."""
    rows, weights = x.flatten(0, -2), weight.flatten(0, -2)
    parts = zip(rows.split(ROWS), weights.split(ROWS), strict=True)
    return torch.cat([_kmeans(*part, count) for part in parts]).view(*x.shape[:-1], count)


def _kmeans(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    x, order = x.sort(-1)
    weight = weight.gather(-1, order).double()
    mass, moment, power = (_running(weight * x.double() ** i) for i in range(3))
    edges = best_edges(_places(x), mass, moment, power, count)
    centres = x.gather(-1, edges[:, :-1].clamp_max(x.shape[-1] - 1))  # of clusters without mass
    for i in range(ROUNDS):
        if i:
            middles = (centres[:, 1:] + centres[:, :-1]) / 2
            edges[:, 1:-1] = torch.searchsorted(x, middles)
        inside = mass.gather(-1, edges).diff(dim=-1)
        total = moment.gather(-1, edges).diff(dim=-1)
        found = (total / torch.where(inside > 0, inside, 1)).to(x.dtype)
        centres = torch.where(inside > 0, found, centres).sort(-1).values
    return centres


def best_edges(
    places: torch.Tensor,
    mass: torch.Tensor,
    moment: torch.Tensor,
    power: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """Edges (R, count + 1) of the `count` intervals of least error, among `places` (R, P).

    mass, moment, power: running sums of h, h x and h x^2, (R, n + 1). An interval's error is
    power - moment^2 / mass; the best k intervals up to b are the best k - 1 up to some a, and one.
    """
    m, s, q = (t.gather(-1, places) for t in (mass, moment, power))
    m, s, q = (t[:, :, None] - t[:, None, :] for t in (m, s, q))  # of the interval from a to b
    error = (q - s.square() / torch.where(m > 0, m, 1)).clamp_min_(0)
    error = (error / error[:, -1:, :1].clamp_min(SMALL)).float()
    error += torch.full_like(error[0], torch.inf).triu(1)  # b before a
    least, taken = error[:, :, 0], []
    for _ in range(count - 1):
        least, at = (least[:, None, :] + error).min(-1)
        taken.append(at)
    edges = [torch.full_like(places[:, :1], places.shape[1] - 1)]
    for at in reversed(taken):
        edges.append(at.gather(-1, edges[-1]))
    edges.append(torch.zeros_like(edges[0]))
    return places.gather(-1, torch.cat(edges[::-1], dim=-1))


def _places(x: torch.Tensor) -> torch.Tensor:
    """Where clusters may begin in sorted x (R, n), ascending, 0 and n among them: (R, P).

    Everywhere, or at PLACES even shares of the values and as many even steps of their range.
    """
    n = x.shape[-1]
    every = torch.arange(n + 1, device=x.device)
    if n <= 2 * PLACES:
        return every.expand(len(x), -1)
    shares = every[: PLACES + 1] * n // PLACES
    steps = torch.arange(1, PLACES, device=x.device, dtype=x.dtype) / PLACES
    levels = x[:, :1] + (x[:, -1:] - x[:, :1]) * steps
    inside = torch.searchsorted(x, levels)
    return torch.cat([shares.expand(len(x), -1), inside], dim=-1).sort(-1).values


def _running(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))
