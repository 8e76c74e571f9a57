"""Merging: statistics of several parts of the data, or machines, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import StatisticsError
from bitnest.statistics import Statistics, StatisticsWriter
from bitnest.workdir import in_the_way, is_empty, storage_error


def merge(
    parts: Sequence[Statistics],
    out: Path,
    before: Callable[[Statistics], object] = lambda _: None,
) -> Statistics:
    """Add up statistics of the same model, into the directory `out`. before: see `finish`.

    Raises:
        StatisticsError: of different models, options, compute types or candidate formats, of
            windows in common, damaged, or with values that are not finite.
        ArtifactError: something is in the way.
    """
    _check_alike(parts)
    _check_apart(parts)
    if not is_empty(out):
        raise in_the_way(out)
    for part in parts:
        part.verify()
    labels = list(dict.fromkeys(label for part in parts for label in part.labels))
    writer = StatisticsWriter(out, {"merge": [str(p.path) for p in parts]}, len(parts[0].layers))
    own = False  # whether what lies there is this merger's
    try:
        writer.begin(fresh=False)
        own = True
        for layer, record in enumerate(parts[0].layers):
            names = dict.fromkeys(name for part in parts for name in part.names(layer))
            merger = _Merger(parts, labels, layer)
            tensors = {n: t for n in names if (t := merger.merged(n)) is not None}
            kept = {k: v for k, v in record.items() if k not in {"file", "files"}}
            writer.write_block(layer, kept, tensors)
        return writer.finish(_merged_header(parts, labels), before)
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        if own:
            writer.discard()
        else:
            writer.close()


class _Merger:
    """Tensors of one block, of several statistics whose labels may differ."""

    def __init__(self, parts: Sequence[Statistics], labels: Sequence[str], layer: int) -> None:
        self.parts, self.labels, self.layer = parts, labels, layer

    def merged(self, name: str) -> torch.Tensor | None:
        """None for what only some of the parts measured (Hessians, Fisher)."""
        if not all(part.has(self.layer, name) for part in self.parts):
            return None
        tensors = [self._read(part, name) for part in self.parts]
        group = name.partition(".")[0]
        if name.endswith((".trace", ".rows")):
            return torch.cat(tensors)
        if group == "columns" or name in {"sites.peaks", "sites.energy"}:
            return tensors[0]
        if name in {"sites.error", "sites.output", "sites.input_error"}:
            return _average(tensors, [part.header["tokens"] for part in self.parts])
        if name == "sites.loss":
            return self._by_predictions(tensors, 2)
        if name == "sites.input_loss":
            return self._by_predictions(tensors, 3)
        if group == "fisher":
            return self._by_predictions(tensors, 0)
        spread = [self._spread(t, part, 0) for t, part in zip(tensors, self.parts, strict=True)]
        stacked = torch.stack(spread)
        return stacked.amax(0) if name.endswith(".absmax") else stacked.sum(0, dtype=stacked.dtype)

    def _read(self, part: Statistics, name: str) -> torch.Tensor:
        tensor = part.read(self.layer, name)
        if not tensor.isfinite().all():
            raise StatisticsError(
                f"'{name}' of block {self.layer} has values that are not finite",
                where=str(part.path),
                hint="leave this part out, or analyze its text again with --compute float32",
            )
        return tensor

    def _by_predictions(self, tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """Per label the mean over the parts that have it, weighted by their predictions."""
        total: torch.Tensor | None = None
        weight = torch.zeros(len(self.labels), dtype=torch.float64)
        for tensor, part in zip(tensors, self.parts, strict=True):
            own = torch.tensor(part.header["importance"]["predictions"], dtype=torch.float64)
            values = tensor.double().movedim(axis, -1) * own
            spread = self._spread(values, part, values.dim() - 1)
            total = spread if total is None else total + spread
            weight += self._spread(own, part, 0)
        assert total is not None
        return (total / weight.clamp_min(1)).movedim(-1, axis).contiguous()

    def _spread(self, tensor: torch.Tensor, part: Statistics, axis: int) -> torch.Tensor:
        """With the label axis of all labels, zero where the part has none."""
        shape = list(tensor.shape)
        shape[axis] = len(self.labels)
        places = torch.tensor([self.labels.index(label) for label in part.labels])
        return torch.zeros(shape, dtype=tensor.dtype).index_copy_(axis, places, tensor)


def _average(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = sum(t.double() * w for t, w in zip(tensors, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    return (total / sum(weights)).to(tensors[0].dtype)


def _merged_header(parts: Sequence[Statistics], labels: Sequence[str]) -> dict[str, Any]:
    first = parts[0].header
    importance = None
    if all(part.header["importance"] is not None for part in parts):
        predictions = [
            sum(
                part.header["importance"]["predictions"][part.labels.index(label)]
                for part in parts
                if label in part.labels
            )
            for label in labels
        ]
        importance = {**first["importance"], "predictions": predictions}
    common = {
        key: first[key] if all(part.header[key] == first[key] for part in parts) else None
        for key in ("length", "seed")
    }
    return {
        **{k: v for k, v in first.items() if k not in {"version", "layers", "files", "fates"}},
        **common,
        "labels": list(labels),
        "importance": importance,
        "data": [item for part in parts for item in part.header["data"]],
        "samples": [item for part in parts for item in part.header["samples"]],
        "tokens": sum(part.header["tokens"] for part in parts),
        "probes": [
            {"labels": part.labels, **probe} for part in parts for probe in part.header["probes"]
        ],
        "seconds": sum(part.header["seconds"] for part in parts),
        "merged": sum(part.header.get("merged", 1) for part in parts),
        "approximate": ["sites.error", "sites.loss"],
        "drawn": _drawn([part.header["drawn"] for part in parts]),
        "fingerprint": {"merged": [part.header["fingerprint"] for part in parts]},
    }


def _drawn(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Windows that all parts drew for coverage; how many experts starve after it is not known."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    sums = {key: sum(part[key] for part in found) for key in ("windows", "rounds", "tried")}
    ways = dict.fromkeys(part["way"] for part in found)
    return {"way": ", ".join(ways), **sums, "starved": None}


def _check_alike(parts: Sequence[Statistics]) -> None:
    if len(parts) < 2:
        raise StatisticsError("nothing to merge", hint="name two directories or more")
    first = parts[0]
    same: dict[str, Callable[[Statistics], Any]] = {
        "models": lambda s: s.header["source"]["sha256"],
        "sites": lambda s: s.sites,
        "candidate formats": lambda s: s.formats,
        "options": lambda s: s.header["options"],
        "compute types": lambda s: s.header["compute"],
        "kinds of Hessian": lambda s: s.header["hessian"],
    }
    for part in parts[1:]:
        for what, key in same.items():
            if key(part) != key(first):
                raise StatisticsError(
                    f"statistics of different {what} cannot be added",
                    where=f"{first.path} and {part.path}",
                    hint="analyze the same model with the same options on each part of the data",
                )


def _check_apart(parts: Sequence[Statistics]) -> None:
    """Whether no window of text is in two parts; those that repeat within one counted there too."""
    paths = [part.path.resolve() for part in parts]
    if len(set(paths)) < len(paths):
        raise StatisticsError(
            "the same statistics are named twice",
            where=str(next(p for p in paths if paths.count(p) > 1)),
            hint="they would count double: leave one out",
        )
    windows = [{item["sha256"]: item["label"] for item in p.header["samples"]} for p in parts]
    times = Counter(window for own in windows for window in own)
    shared = {window for window, count in times.items() if count > 1}
    if shared:
        labels = dict.fromkeys(own[w] for own in windows for w in own if w in shared)
        raise StatisticsError(
            f"{len(shared)} of {len(times)} windows of text are in more than one part, "
            f"under {', '.join(labels)}",
            where=", ".join(
                str(p.path) for p, own in zip(parts, windows, strict=True) if shared & own.keys()
            ),
            hint="they would count double, and another --seed draws from the same text: analyze "
            "another text in each part, or split this one into files, a part each",
        )
