"""Sizing: every byte of an artifact before it is made.

Packed and dense tensors, safetensors headers, config, index and copied files are computed as the
writer will write them. The manifest holds two values per site that are not known yet, its error
and its tokens: they are counted at their longest, so that the artifact
is never larger than said, and smaller by a few bytes per site at most. Formats whose size depends
on values (`fixed_size` false) are counted at their bound.

With a context length the bytes of the key-value cache are added, for one sequence, in 16 bits or
in the format that the recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from bitnest.artifact import COPIED, config_text, index_text, packed_file_name, shards
from bitnest.errors import UnsupportedModel
from bitnest.formats import AnyFormat, DenseFormat, refinement, widths
from bitnest.formats.kv import KVFormat, read_kv
from bitnest.manifest import SiteRecord, manifest_text
from bitnest.planes import join_streams, plane_file
from bitnest.quantize.compress import Job, artifact_config, dense_entries, draft_manifest
from bitnest.quantize.fates import Reducer
from bitnest.safetensors_io import DTYPES, Entry, header_text
from bitnest.sites import Site

LONGEST_ERROR = 1.23457e-05
LONGEST_SCALE = 1.23456789e-05
SHA = "0" * 64


@dataclass(frozen=True)
class Sizes:
    """Bytes. packed: codes and scales. dense: tensors kept as they are. headers: of
    safetensors files. manifest: bitnest.json. other: config, index, tokenizer and further copies.
    cache: of keys and values at the context asked for."""

    packed: int
    dense: int
    headers: int
    manifest: int
    other: int
    cache: int = 0

    @property
    def artifact(self) -> int:
        """All files."""
        return self.packed + self.dense + self.headers + self.manifest + self.other

    @property
    def total(self) -> int:
        """All files and the cache."""
        return self.artifact + self.cache


@dataclass(frozen=True)
class Assumed:
    """A calibration text that is not at hand yet: tokens, samples, their length, samples by
    label."""

    tokens: int
    samples: int
    length: int
    counts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As the manifest will say it."""
        return {
            "sha256": SHA, "samples": self.samples, "length": self.length, "sources": self.counts,
        }  # fmt: skip


def artifact_sizes(
    job: Job,
    formats: Mapping[str, AnyFormat],
    context: int = 0,
    assumed: Assumed | None = None,
    reducer: Reducer | None = None,
) -> Sizes:
    """Sizes of the artifact that `job` would become with other formats. assumed: the calibration
    text, where the job has none yet. reducer: of the job's model, if one is at hand.

    Raises:
        UnsupportedModel: a context is given and the family's cache is not known.
        RecipeError: fates that cannot be.
    """
    job = replace(job, formats=dict(formats))
    job = (reducer or Reducer(job)).reduce(job, None)
    tokens = None if job.calibration is None else job.calibration.tokens.numel()
    if assumed is not None:
        tokens = assumed.tokens
    packed, headers, files, records = _packed(job, tokens)
    entries = dense_entries(job)
    index: dict[str, str] = {}
    groups = list(shards(entries))
    for number, shard in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        size, data = _file_size([(e.name, e.dtype, e.shape) for e in shard])
        headers += size - data
        files[name] = {"bytes": size, "sha256": SHA}
        index.update({e.name: name for e in shard})
    dense = sum(e.nbytes for e in entries)
    texts = {
        "config.json": len(config_text(artifact_config(job)).encode()),
        "model.safetensors.index.json": len(index_text(index, dense).encode()),
        **_copied(job),
    }
    files.update({name: {"bytes": size, "sha256": SHA} for name, size in texts.items()})
    manifest = draft_manifest(job, SHA)
    if assumed is not None:
        manifest["calibration"] = assumed.to_json()
        manifest["fingerprint"] = {**manifest["fingerprint"], "calibration": SHA}
    text = manifest_text(manifest, (r.to_json() for r in records), files)
    kv = read_kv(job.recipe.kv or None)
    cache = cache_bytes(job.skeleton.model.config, context, kv=kv) if context else 0
    return Sizes(packed, dense, headers, len(text.encode()), sum(texts.values()), cache)


def _packed(job: Job, tokens: int | None) -> tuple[int, int, dict[str, Any], list[SiteRecord]]:
    """Bytes of packed tensors and of headers, the files, and the records."""
    kept = {s.module for s in job.sites if _stored(job.formats[s.name], s)}
    half = torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16
    total, headers, files, records = 0, 0, {}, []
    files_in_all = job.units if job.packed_ends else len(job.skeleton.blocks)
    for layer in range(job.units):
        tensors: dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
        name = packed_file_name(layer, files_in_all)
        for site in job.block_sites(layer):
            fmt = job.formats[site.name]
            parts = {} if site.module not in kept else fmt.parts(site.shape)
            for part, spec in parts.items():
                dtype = half if spec.dtype == "HALF" else DTYPES[spec.dtype]
                own = tensors.setdefault(plane_file(name, refinement(fmt, part)), [])
                own.append((f"{site.name}.{part}", dtype, spec.shape))
            file = name if parts else ""
            error = 0.0 if isinstance(fmt, DenseFormat) else LONGEST_ERROR
            narrower = (LONGEST_ERROR,) * (len(widths(fmt)) - 1)
            records.append(
                SiteRecord(
                    site,
                    fmt.name,
                    fmt.nbytes(site.shape),
                    error,
                    tokens,
                    file,
                    narrower,
                    (LONGEST_ERROR,) * len(job.slopes(site)),
                    *_inputs(job, site),
                )
            )
        for file, own in tensors.items():
            own = own if file == name else joined_streams(own)
            size, data = _file_size(own)
            total, headers = total + data, headers + size - data
            files[file] = {"bytes": size, "sha256": SHA}
    return total, headers, files, records


def _inputs(job: Job, site: Site) -> tuple[str, float | None]:
    """What a record will say of a site's inputs."""
    inputs = job.inputs.get(site.name)
    if inputs is None:
        return "", None
    return inputs.name, LONGEST_SCALE if inputs.has_static else None


def joined_streams(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What `planes.join_streams` makes of them."""
    own = [Entry(name, dtype, shape, lambda: torch.empty(0)) for name, dtype, shape in tensors]
    return [(e.name, e.dtype, e.shape) for e in join_streams(own)]


def _stored(fmt: AnyFormat, site: Site) -> bool:
    """Whether a site has codes in a packed file."""
    return not isinstance(fmt, DenseFormat) and bool(fmt.parts(site.shape))


def _file_size(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[int, int]:
    """Bytes of a safetensors file and of its data."""
    data = sum(dtype.itemsize * prod(shape) for _, dtype, shape in tensors)
    return 8 + len(header_text(tensors)) + data, data


def _copied(job: Job) -> dict[str, int]:
    found = {}
    for pattern in COPIED:
        for file in job.checkpoint.path.glob(pattern):
            if file.is_file():
                found[file.name] = file.stat().st_size
    return found


def cache_bytes(config: Any, context: int, itemsize: int = 2, kv: KVFormat | None = None) -> int:
    """Keys and values of one sequence of `context` tokens, over all layers. kv: their format, with
    itemsize bytes a value in its window.

    Layers with a sliding window keep its length. Multi-head latent attention is counted as
    transformers keeps it: with keys and values of every head.

    Raises:
        UnsupportedModel: the config does not say how many heads of what size are kept.
    """
    inner = config.get_text_config()
    heads = getattr(inner, "num_attention_heads", None)
    layers = getattr(inner, "num_hidden_layers", None)
    if not heads or not layers:
        raise UnsupportedModel(
            "the size of this family's key-value cache is not known",
            where=type(config).__name__,
            hint="leave out --context",
        )
    kept, size = getattr(inner, "num_key_value_heads", None) or heads, 0
    if getattr(inner, "kv_lora_rank", None):
        width = heads * (inner.qk_nope_head_dim + inner.qk_rope_head_dim + inner.v_head_dim)
    else:
        size = getattr(inner, "head_dim", None) or inner.hidden_size // heads
        width = 2 * kept * size
    window = getattr(inner, "sliding_window", None)
    kinds = getattr(inner, "layer_types", None) or ["full_attention"] * layers
    total = 0
    for kind in kinds:
        sliding = kind == "sliding_attention" and window is not None
        if kv is not None:
            span = int(window or 0) if sliding else None
            total += kv.nbytes(context, kept, size, size, sliding=span, itemsize=itemsize)
            continue
        total += width * itemsize * (min(context, int(window or 0)) if sliding else context)
    return int(total)
