"""Bytes of a model's weights on disk, and the parameters they stand for.

    bits per weight = 8 * bytes of the weight files / parameters of the base

Weight files are counted whole: headers, scales and the embedding included.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bitnest.artifact import Artifact, is_artifact
from bitnest.planes import plane_width
from bitnest.safetensors_io import read_header


def weight_bytes(path: Path, bits: int | None = None) -> int:
    """Bytes of the safetensors files that make up the model in `path`; of an artifact as the
    manifest says, also of planes that are not there. bits: of a nested artifact read at that width,
    without the planes beyond."""
    if is_artifact(path):
        files = Artifact.open(path).manifest["files"]
        weights = [name for name in files if name.endswith(".safetensors")]
        wanted = [n for n in weights if bits is None or (plane_width(n) or 0) <= bits]
        return sum(int(files[name]["bytes"]) for name in wanted)
    return sum(file.stat().st_size for file in _weight_files(path))


def count_parameters(path: Path) -> int | None:
    """Weights of the checkpoint in `path`, or of the one its artifact was made from.

    A matrix shared by embedding and head counts once. None: quantised by another tool.
    """
    if is_artifact(path):
        return int(Artifact.open(path).manifest["source"]["parameters"])
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        return None  # the shapes of packed tensors are not those of the weights
    shapes = {
        name: info.shape for file in _weight_files(path) for name, info in read_header(file).items()
    }
    if _tied(config) and any(name.endswith("embed_tokens.weight") for name in shapes):
        shapes.pop("lm_head.weight", None)  # some tools store the shared matrix a second time
    return sum(math.prod(shape) for shape in shapes.values())


def _tied(config: dict[str, Any]) -> bool:
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _weight_files(path: Path) -> list[Path]:
    if is_artifact(path):
        files = Artifact.open(path).manifest["files"]
        return [path / name for name in sorted(files) if name.endswith(".safetensors")]
    index = path / "model.safetensors.index.json"
    if index.exists():  # some repositories keep the same weights in a second layout beside
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    return sorted(path.glob("*.safetensors"))
