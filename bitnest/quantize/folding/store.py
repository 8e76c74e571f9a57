"""Folds on disk, beside an unfinished artifact: a run that was killed does not measure again.

folds.safetensors   every change's tensors, numbered
folds.json          what each number is, what was skipped, a checksum, and a key: of everything
                    the folds depend on. Written last, so folds count once it exists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnest.quantize.folding.changes import Change, from_parts, to_parts
from bitnest.safetensors_io import Entry, entry, read_header, read_tensor, write_file
from bitnest.workdir import sha256_file, write_text

TENSORS, RECORD = "folds.safetensors", "folds.json"


def save(
    folder: Path,
    key: str,
    changes: Mapping[str, Sequence[Change]],
    record: Mapping[str, Any],
) -> None:
    """Store changes by tensor, and what is said of them."""
    entries: list[Entry] = []
    listed: list[dict[str, Any]] = []
    for name in sorted(changes):
        for change in changes[name]:
            plain, tensors = to_parts(change)
            number = len(listed)
            listed.append({"tensor": name, **plain, "parts": sorted(tensors)})
            entries += [entry(f"{number}.{part}", tensors[part]) for part in sorted(tensors)]
    _, digest = write_file(folder / TENSORS, entries)
    text = {"key": key, "sha256": digest, "record": dict(record), "changes": listed}
    write_text(folder / RECORD, json.dumps(text))


def load(folder: Path, key: str) -> tuple[dict[str, tuple[Change, ...]], dict[str, Any]] | None:
    """What `save` stored under that key; None if it did not, or it was damaged since."""
    try:
        text = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if text["key"] != key or sha256_file(folder / TENSORS) != text["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    infos = read_header(folder / TENSORS)
    found: dict[str, list[Change]] = {}
    for number, plain in enumerate(text["changes"]):
        tensors = {part: read_tensor(infos[f"{number}.{part}"]) for part in plain["parts"]}
        found.setdefault(plain["tensor"], []).append(from_parts(plain, tensors))
    return {name: tuple(own) for name, own in found.items()}, text["record"]
