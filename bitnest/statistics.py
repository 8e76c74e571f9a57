"""Statistics: what calibration measured, on disk, reopened by every later command.

    statistics.json          the header: source, data, options, sites, layers, probes, checksums
    block-00001.safetensors  per decoder block, sums with the dataset label as an axis

    inputs.<i>.<moment>          of the i-th input of the block, (L, ...)
    inputs.<i>.hessian, weight   (L, I, I) sums of x x^T over (L,) tokens, if they were kept
    experts.<i>.up|down.<moment> of what gate/up and down of each expert read, (L, E, ...)
    experts.<i>.hessian.up|down  (L, E, I, I) sums of w x x^T with weights experts.<i>.weight
    experts.<i>.norms|output|output2|weight|fitted|logits|logits2|margins     (L, ...)
    experts.<i>.trace            (tokens, k) experts chosen, samples in order
    experts.<i>.rows             (n, hidden) of the states that reached the layer, evenly spread
    fisher.<module or parameter> (L, ...) squared gradients per prediction (`calibrate/fisher.py`)
    sites.error (S, F), sites.loss (S, F, L), sites.output (S,)        sensitivity of S sites
    sites.peaks (S, 3), sites.energy (S,)                               of their weights
    columns.<site>               (I,) norms of the weight's columns

Nearly all are sums, so the statistics of two runs over the same model are added (`merge`), whatever
machine they ran on: those of two halves of the data are those of the whole, up to rounding. The
exceptions: absmax is a maximum, traces are joined, weights' own figures are the same in both, and
what comes out of a nonlinear solve (sites.error, sites.loss) is averaged by tokens, which is an
approximation and said so in the header. Parts must be of one model, one set of options and one
compute type, and no window of text may occur in two of them: it would count double. Windows are
compared by checksum, so text that was cut into other windows is not recognised. Length and seed may
differ; the merger's are null then.

`open` holds the header against SCHEMA, against itself and against the tensors' shapes, `verify`
every byte against its checksum; whatever computes new results from statistics (`merge`, `extend`,
`expect`) verifies them first.

Written as artifacts are (`workdir`): a killed run resumes, half a directory never looks whole. A
merger is cheap and starts again: one that fails leaves nothing.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import CheckpointError, StatisticsError
from bitnest.safetensors_io import Entry, TensorInfo, entry, read_header, read_tensor
from bitnest.sites import Site
from bitnest.workdir import (
    Workdir,
    in_the_way,
    is_empty,
    partial_directory,
    sha256_file,
    storage_error,
    write_text,
)

VERSION = 1
HEADER = "statistics.json"
SITE = {
    "name": str, "kind": str, "layer": int, "expert": (int,), "shape": [int], "module": str,
    "param": str, "rows": ([int],), "transposed": bool,
}  # fmt: skip
SCHEMA: dict[Any, Any] = {  # (x,): x or null; [x]: a list of x; {str: x}: x under any name
    "version": int, "bitnest": str, "model": str, "architecture": str,
    "source": {"sha256": str, "bytes": int, "parameters": int},
    "labels": [str], "tokens": int, "length": (int,), "seed": (int,), "seconds": float,
    "data": [{
        **dict.fromkeys(("label", "source", "sha256"), str),
        **dict.fromkeys(("documents", "duplicates", "conversations", "samples", "tokens",
                         "available", "windows", "replaced", "repeated"), int),
    }],
    "samples": [{"label": str, "length": int, "fitted": bool, "sha256": str}],
    "drawn": ({"way": str, "windows": int, "rounds": int, "tried": int},),
    "formats": [str], "hessian": str, "method": str, "min_tokens": (int,), "compute": str,
    "options": {"formats": [str], "importance": str, "keep_hessians": bool, "method": str,
                "damp": float, "weighting": str, "min_tokens": (int,), "clip": bool},
    "importance": ({"kind": str, "predictions": [int]},),
    "probes": [{"plan": [(int,)], "group": bool,
                "measured": [{"label": int, "kl": float, "error": float}]}],
    "layers": [{"layer": int, "file": str, "sites": [SITE],
                "inputs": [{"name": str, "readers": [str], "width": int}],
                "experts": [{"name": str, "experts": int, "top_k": int}]}],
    "files": {str: {"bytes": int, "sha256": str}},
    "fingerprint": {},
}  # fmt: skip
AGAIN = "copy the directory again, or repeat bitnest analyze"


@dataclass(frozen=True)
class Statistics:
    """A directory of statistics. header: as in statistics.json."""

    path: Path
    header: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Read and check the header, and that every file it names is there, whole in size, and has
        tensors of the shapes that follow from it.

        Raises:
            StatisticsError: not a directory of statistics, damaged, or of another version.
        """
        path = Path(path)
        header = _read_header(path)
        for name, record in header["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != record["bytes"]:
                raise StatisticsError(
                    f"'{name}' is missing or has another size than the header says",
                    where=str(path),
                    hint=AGAIN,
                )
        statistics = cls(path, header)
        statistics._check_shapes()
        return statistics

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            StatisticsError: one differs.
        """
        for name, record in self.header["files"].items():
            if sha256_file(self.path / name) != record["sha256"]:
                raise StatisticsError(
                    f"'{name}' differs from what was written",
                    where=str(self.path),
                    hint=AGAIN,
                )

    @property
    def labels(self) -> list[str]:
        """Dataset labels, in the order of every label axis."""
        return list(self.header["labels"])

    @property
    def formats(self) -> list[str]:
        """Names of the candidate formats whose sensitivity was measured."""
        return list(self.header["formats"])

    @cached_property
    def sites(self) -> list[Site]:
        """Every site, in the model's order."""
        return [
            Site(**{**item, "shape": tuple(item["shape"]), "rows": _pair(item["rows"])})
            for layer in self.layers
            for item in layer["sites"]
        ]

    def sites_of(self, layer: int) -> list[Site]:
        """Sites of one block."""
        return [site for site in self.sites if site.layer == layer]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Per block: inputs, experts, sites."""
        return list(self.header["layers"])

    def read(self, layer: int, name: str) -> torch.Tensor:
        """One tensor of one block.

        Raises:
            KeyError: it was not measured.
        """
        return read_tensor(self._files[layer][name])

    def has(self, layer: int, name: str) -> bool:
        """Whether `read` would find it."""
        return name in self._files[layer]

    def names(self, layer: int) -> list[str]:
        """Tensors of one block."""
        return list(self._files[layer])

    @cached_property
    def _files(self) -> list[dict[str, TensorInfo]]:
        try:
            return [read_header(self.path / layer["file"]) for layer in self.layers]
        except CheckpointError as error:
            raise StatisticsError(
                f"a block is damaged: {error.what}", where=error.where, hint=AGAIN
            ) from error

    def _check_shapes(self) -> None:
        for number, layer in enumerate(self.layers):
            for name, shape in self._shapes(number, layer).items():
                info = self._files[number].get(name)
                found = info.shape if info else None
                if found != shape:
                    raise StatisticsError(
                        f"'{HEADER}' or '{layer['file']}' is damaged: by the header, '{name}' has "
                        f"the shape {shape}, in the file {found}",
                        where=str(self.path),
                        hint=AGAIN,
                    )

    def _shapes(self, number: int, layer: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
        """Of one tensor at least for every axis that the header speaks of. None: not there."""
        labels, formats, sites = len(self.labels), len(self.formats), len(layer["sites"])
        shapes: dict[str, tuple[int, ...] | None] = {
            f"columns.{site['name']}": (site["shape"][1],) for site in layer["sites"]
        }
        for i in range(len(layer["inputs"])):
            shapes[f"inputs.{i}.tokens"] = (labels,)
        for i, item in enumerate(layer["experts"]):
            shapes[f"experts.{i}.up.tokens"] = (labels, item["experts"])
            shapes[f"experts.{i}.trace"] = (self.header["tokens"], item["top_k"])
        shapes[f"inputs.{len(layer['inputs'])}.tokens"] = None
        shapes[f"experts.{len(layer['experts'])}.trace"] = None
        if sites and formats:
            shapes |= {"sites.error": (sites, formats), "sites.output": (sites,)}
        if self.has(number, "sites.loss"):
            shapes["sites.loss"] = (sites, formats, labels)
        return shapes


class StatisticsWriter(Workdir):
    """Writes statistics block by block."""

    noun = "directory of statistics"

    def write_block(
        self, layer: int, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Store one block. record: its inputs, experts and sites."""
        name = f"block-{layer + 1:05d}.safetensors"
        entries: list[Entry] = [entry(key, value.contiguous()) for key, value in tensors.items()]
        self.save_block(layer, {**record, "file": name}, {name: entries})

    def finish(
        self, header: Mapping[str, Any], before: Callable[[Statistics], object] = lambda _: None
    ) -> Statistics:
        """Write the header and give the directory its name. before: called with the statistics
        where they lie until then; may add files, and nothing is published if it raises."""
        layers, files = [], {}
        for layer in range(self.blocks):
            content = self.saved_block(layer)
            files.update(content.pop("files"))
            layers.append(content)
        whole = {"version": VERSION, **header, "layers": layers, "files": files}
        write_text(self.work / HEADER, json.dumps(whole, indent=1) + "\n")
        before(Statistics.open(self.work))
        self.publish()
        return Statistics.open(self.out)

    def discard(self) -> None:
        """Close; of a run that did not finish, keep nothing."""
        if self._lock is not None:
            shutil.rmtree(self.state, ignore_errors=True)
        self.close()


def finished_statistics(out: Path, fingerprint: Mapping[str, Any]) -> Statistics | None:
    """The statistics already in `out` if they were made from exactly these inputs.

    Raises:
        ArtifactError: something else is there.
    """
    if is_empty(out):
        return None
    if (out / HEADER).is_file():
        found = Statistics.open(out)
        if found.header.get("fingerprint") == fingerprint:
            shutil.rmtree(partial_directory(out), ignore_errors=True)  # killed right after renaming
            return found
    raise in_the_way(out)


def is_statistics(path: Path) -> bool:
    """Whether the directory claims to hold statistics."""
    return (path / HEADER).is_file()


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
    try:
        writer.begin(fresh=True)
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
        writer.discard()


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
        if name in {"sites.error", "sites.output"}:
            return _average(tensors, [part.header["tokens"] for part in self.parts])
        if name == "sites.loss":
            return self._by_predictions(tensors, 2)
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
        **{k: v for k, v in first.items() if k not in {"version", "layers", "files"}},
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


def _read_header(path: Path) -> dict[str, Any]:
    file = path / HEADER
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        _check_types(header, {"version": int}, "header")
        version = header["version"]
        if version == VERSION:
            _check_types(header, SCHEMA, "header")
            _check_agreement(header)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StatisticsError(
            f"no statistics here: no {HEADER}",
            where=str(path),
            hint="bitnest analyze MODEL -o OUT makes them",
        ) from error
    except OSError as error:
        raise StatisticsError(f"cannot read: {error.strerror}", where=str(file)) from error
    except (ValueError, TypeError) as error:
        raise StatisticsError(
            f"the header is damaged: {error}", where=str(file), hint=AGAIN
        ) from error
    if version != VERSION:
        raise StatisticsError(
            f"statistics of version {version}, this bitnest reads {VERSION}",
            where=str(file),
            hint="analyze the model again",
        )
    assert isinstance(header, dict)
    return header


def _check_types(value: Any, schema: Any, name: str) -> None:
    """Raise ValueError naming what is missing or not of the type that `schema` says."""
    if isinstance(schema, tuple):
        if value is None:
            return
        (schema,) = schema
    kind = schema if isinstance(schema, type) else type(schema)
    if type(value) is not kind and (kind, type(value)) != (float, int):  # bool is no int here
        raise ValueError(f"'{name}' is no {kind.__name__}")
    if isinstance(schema, list):
        for i, item in enumerate(value):
            _check_types(item, schema[0], f"{name}[{i}]")
    elif isinstance(schema, dict):
        for key in value if str in schema else schema:
            if key not in value:
                raise ValueError(f"'{name}.{key}' is missing")
            _check_types(value[key], schema[str if str in schema else key], f"{name}.{key}")


def _check_agreement(header: Mapping[str, Any]) -> None:
    """Raise ValueError naming what contradicts the rest of a header of the right types."""
    labels, formats, options = header["labels"], header["formats"], header["options"]
    layers, files = header["layers"], header["files"]
    importance = header["importance"] or {"kind": "none", "predictions": labels}
    lengths = [sample["length"] for sample in header["samples"]]
    sites = sum(len(layer["sites"]) for layer in layers)
    agree = {
        "labels": 0 < len(labels) == len(set(labels)),
        "samples": {sample["label"] for sample in header["samples"]} == set(labels),
        "tokens": min(lengths, default=0) > 0 and sum(lengths) == header["tokens"],
        "formats": formats == options["formats"],
        "hessian": header["hessian"] in {"full", "diagonal"},
        "importance": importance["kind"] == options["importance"]
        and len(importance["predictions"]) == len(labels),
        "probes": all(_probe_fits(p, labels, len(formats), sites) for p in header["probes"]),
        "layers": all(_layer_fits(layer, number) for number, layer in enumerate(layers)),
        "files": sorted(files) == sorted(layer["file"] for layer in layers)
        and all(Path(name).name == name for name in files),  # none is followed elsewhere
    }
    for name, fine in agree.items():
        if not fine:
            raise ValueError(f"'{name}' and the rest contradict each other")


def _probe_fits(probe: Mapping[str, Any], labels: list[str], formats: int, sites: int) -> bool:
    own = probe.get("labels", labels)  # a merged part's
    return (
        len(probe["plan"]) == sites
        and all(f is None or 0 <= f < formats for f in probe["plan"])
        and set(own) <= set(labels)
        and all(0 <= item["label"] < len(own) for item in probe["measured"])
    )


def _layer_fits(layer: Mapping[str, Any], number: int) -> bool:
    experts = {item["name"]: item["experts"] for item in layer["experts"]}
    return layer["layer"] == number and all(
        site["layer"] == number
        and len(site["shape"]) == 2
        and (site["rows"] is None or len(site["rows"]) == 2)
        and (site["module"] not in experts or site["expert"] in range(experts[site["module"]]))
        for site in layer["sites"]
    )


def _pair(rows: Sequence[int] | None) -> tuple[int, int] | None:
    return None if rows is None else (rows[0], rows[1])
