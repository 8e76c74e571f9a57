"""A checkpoint: a read-only model on disk, opened tensor by tensor and never all in memory.

`resolve_model` turns what the user typed (a directory, `demo`, or a hub id) into a directory.
`Checkpoint.open` indexes its safetensors files and checks that every one is whole before any work
starts; `read` fetches single tensors; `scan` reads everything once, for its hash and to find NaN.

Left out on purpose: pickle files (`pytorch_model.bin`), which execute code when they are read, and
checkpoints that are already quantised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitnest.errors import CheckpointError
from bitnest.safetensors_io import (
    CHUNK,
    DTYPES,
    TensorInfo,
    byte_view,
    read_header,
    read_range,
    read_tensor,
)

if TYPE_CHECKING:
    from bitnest.sites import Site

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CONFIG_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
_INTEGERS = {"BOOL", "U8", "I8", "I16", "I32", "I64"}


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of one model directory.

    path: the directory. config: its config.json. tensors: name -> place on disk.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Index the model in `model` (see `resolve_model`) and check that its files are whole.

        Raises:
            CheckpointError: a missing or truncated file, a wrong type, a quantised checkpoint.
        """
        path = resolve_model(model, revision=revision)
        config = read_config(path)
        tensors: dict[str, TensorInfo] = {}
        for file, names in _shards(path).items():
            header = read_header(file)
            for name in names if names is not None else header:
                if name not in header:
                    raise CheckpointError(
                        f"the index promises tensor '{name}', the file does not hold it",
                        where=str(file),
                        hint="the shard and the index are of different models: fetch both again",
                    )
                tensors[name] = header[name]
        _check_types(path, config, tensors)
        return cls(path, config, tensors)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored type, on the CPU."""
        return read_tensor(self.tensors[name])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type most of the weight bytes are stored in."""
        found = main_dtype(self.tensors.values())
        assert found is not None  # `open` refuses a checkpoint without floats
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def origin(self) -> dict[str, Any]:
        """What a manifest says of this source besides its name, size and hash."""
        return {}

    def check_sites(self, found: Sequence[Site]) -> None:
        """Refuse sites that cannot be those of this source; a plain checkpoint takes all."""

    def scan(self, progress: Callable[[int], None] | None = None) -> str:
        """Read every tensor once: refuse NaN and infinity, return the sha256 of the weights.

        The hash covers names, types, shapes and values in name order, so re-sharding keeps it.
        progress is called with the bytes of each tensor read. A second call gives the same answer
        without reading.

        Raises:
            CheckpointError: a tensor holds NaN or infinite values.
        """
        known: str | None = self.__dict__.get("_scanned")
        if known is not None:
            return known
        digest = hashlib.sha256()
        buffer = torch.empty(CHUNK, dtype=torch.uint8)
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name}:{info.dtype}:{info.shape};".encode())
            for start in range(info.start, info.stop, CHUNK):
                part = buffer[: min(CHUNK, info.stop - start)]
                read_range(info.file, start, part)
                digest.update(byte_view(part))
                if info.dtype in FLOATS and not all_finite(part.view(DTYPES[info.dtype])):
                    raise CheckpointError(
                        f"tensor '{name}' holds NaN or infinite values",
                        where=str(info.file),
                        hint="the checkpoint is damaged or training diverged; compressing it "
                        "would only hide that",
                    )
            if progress is not None:
                progress(info.nbytes)
        self.__dict__["_scanned"] = digest.hexdigest()
        return digest.hexdigest()


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        CheckpointError: it is not there, or no JSON object.
    """
    return _read_json(path / "config.json", "name a Hugging Face model directory")


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The type that config.json says the model is loaded in, None if it does not."""
    for source in (config, config.get("text_config") or {}):
        name = str(source.get("dtype") or source.get("torch_dtype") or "").removeprefix("torch.")
        if name in CONFIG_NAMES:
            return CONFIG_NAMES[name]
    return None


def main_dtype(infos: Iterable[TensorInfo]) -> torch.dtype | None:
    """The floating-point type most of the bytes are stored in, None if there is none."""
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    known = [name for name in sizes if name in FLOATS]
    return FLOATS[max(known, key=sizes.__getitem__)] if known else None


def all_finite(values: torch.Tensor) -> bool:
    """No NaN or infinity, by the exponent bits: one integer pass, no float temporaries."""
    integer, mask = {
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float16: (torch.int16, 0x7C00),
        torch.float32: (torch.int32, 0x7F800000),
    }[values.dtype]
    return int(values.view(integer).bitwise_and(mask).max()) < mask


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"no {file.name}", where=str(file.parent), hint=hint) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror}", where=str(file), hint="check the file's permissions"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(file), hint=hint) from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", where=str(file), hint=hint)
    return content


def _shards(path: Path) -> dict[Path, list[str] | None]:
    """Files of the checkpoint, with the tensor names an index promises of each (None: all)."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.exists():
        if single.exists():
            return {single: None}
        pickled = next((p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"}), "")
        raise CheckpointError(
            "no safetensors weights" + (f" (only '{pickled}', a pickle file)" if pickled else ""),
            where=str(path),
            hint="convert with save_pretrained(..., safe_serialization=True); "
            "pickle runs code when read and is never opened"
            if pickled
            else "the directory needs model.safetensors or model.safetensors.index.json",
        )
    weight_map = _read_json(index, "fetch the index again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=str(index))
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        names = shards.setdefault(path / str(file), [])
        assert names is not None
        names.append(name)
    missing = sorted(file.name for file in shards if not file.exists())
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}"
            + (" ..." if len(missing) > 3 else ""),
            where=str(path),
            hint="fetch the missing files; the index names them",
        )
    return shards


def _check_types(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitnest":
        raise CheckpointError(
            "this is already a bitnest artifact",
            where=str(path),
            hint="compress the original checkpoint; eval and serve open artifacts as they are",
        )
    if method is not None:
        raise CheckpointError(
            f"the checkpoint is already quantised ({method})",
            where=str(path),
            hint="start from the 16-bit checkpoint",
        )
    for name, info in tensors.items():
        if info.dtype not in FLOATS and info.dtype not in _INTEGERS:
            raise CheckpointError(
                f"tensor '{name}' is stored as {info.dtype}",
                where=str(info.file),
                hint="weights must be BF16, F16 or F32: start from the 16-bit checkpoint",
            )
        if info.dtype in _INTEGERS and len(info.shape) >= 2 and name.endswith("weight"):
            raise CheckpointError(
                f"weight '{name}' is stored as integers ({info.dtype})",
                where=str(info.file),
                hint="weights must be BF16, F16 or F32: start from the 16-bit checkpoint",
            )
    if not any(info.dtype in FLOATS for info in tensors.values()):
        raise CheckpointError("the checkpoint holds no floating-point tensors", where=str(path))


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Directory of `model`: a local directory, the word `demo`, or a Hugging Face hub id.

    A hub id is looked up in the local cache first; the network is used only for what is not there.

    Raises:
        CheckpointError: no such directory, or the hub id cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if text == "demo":
        from bitnest import demo

        return demo.model_path()
    if path.exists():
        raise CheckpointError(
            f"'{text}' is a file, not a model directory",
            hint="name the directory that holds config.json and the .safetensors files",
        )
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no such model directory: '{text}'",
            hint="name a local directory, a hub id such as Qwen/Qwen3-30B-A3B, or 'demo'",
        )
    return _download(text, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache: ask the hub
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot fetch '{repo_id}' from the hub: {_first_line(error)}",
            hint="check the name and the network, or name a local directory",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
