"""What statistics.json must hold: types by SCHEMA, and what has to agree with the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnest.errors import StatisticsError
from bitnest.kinds import ENDS

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
FATES: dict[Any, Any] = {  # only where fates of experts were measured
    "kinds": [str], "layers": [{"layer": int, "zero": [float]}],
}  # fmt: skip
INPUTS: dict[Any, Any] = {"formats": [str], "bases": [str]}  # only where inputs were measured
BLOCKS = [{"layer": int, "influence": float, "kl": ([(float,)],)}]  # earlier ones have none
AGAIN = "copy the directory again, or repeat bitnest analyze"


def open_header(path: Path) -> dict[str, Any]:
    """The header of the statistics in `path`, of the right types and free of contradictions.

    Raises:
        StatisticsError: none is there, or it is damaged or of another version.
    """
    file = path / HEADER
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        _check_types(header, {"version": int}, "header")
        version = header["version"]
        if version == VERSION:
            _check_types(header, SCHEMA, "header")
            _check_agreement(header)
            _check_fates(header)
            if header.get("inputs") is not None:
                _check_types(header["inputs"], INPUTS, "header.inputs")
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
        "source": _adapters_fit(header["source"].get("merged", [])),
        "layers": all(_layer_fits(layer, number) for number, layer in enumerate(layers)),
        "files": sorted(files) == sorted(layer["file"] for layer in layers)
        and all(Path(name).name == name for name in files),  # none is followed elsewhere
    }
    for name, fine in agree.items():
        if not fine:
            raise ValueError(f"'{name}' and the rest contradict each other")


def _check_fates(header: Mapping[str, Any]) -> None:
    """Raise ValueError if what fates cost is not told of every expert."""
    found = header.get("fates")
    if found is None:
        return
    _check_types(found, FATES, "header.fates")
    experts = {
        layer["layer"]: item["experts"] for layer in header["layers"] for item in layer["experts"]
    }
    for layer in found["layers"]:
        count = experts.get(layer["layer"])
        columns = ["zero", *found["kinds"], *(["partner"] if "merge" in found["kinds"] else [])]
        for name in columns:
            own = layer.get(name)
            if not isinstance(own, list) or len(own) != count:
                raise ValueError(f"'fates' of block {layer['layer']} lack '{name}' of its experts")
            _check_types(own, [(int if name == "partner" else float,)], f"header.fates.{name}")
    blocks = found.get("blocks", [])
    _check_types(blocks, BLOCKS, "header.fates.blocks")
    inner = {i["layer"] for i in header["layers"] if any(s["kind"] not in ENDS for s in i["sites"])}
    if any(item["kl"] is not None and item["layer"] not in inner for item in blocks):
        raise ValueError("'fates' are of a block that is not there")
    tried = [item["kl"] for item in blocks if item["kl"] is not None]
    if any(len(kl) != len(header["labels"]) or not any(v is not None for v in kl) for kl in tried):
        raise ValueError("'fates' of blocks lack a KL of each text")


def _probe_fits(probe: Mapping[str, Any], labels: list[str], formats: int, sites: int) -> bool:
    own = probe.get("labels", labels)  # a merged part's
    return (
        len(probe["plan"]) == sites
        and all(f is None or 0 <= f < formats for f in probe["plan"])
        and set(own) <= set(labels)
        and all(0 <= item["label"] < len(own) for item in probe["measured"])
    )


def _adapters_fit(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(item, dict) and {"adapter", "sha256", "scale"} <= item.keys() for item in found
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
