"""A LoRA adapter on disk, in the layout of peft: what it was trained as, and its tensors by module.

    adapter_config.json        rank, alpha, patterns, kind
    adapter_model.safetensors  base_model.model.<module>.<what>:
        lora_A.weight (r, I), lora_B.weight (O, r), lora_B.bias (O)   W + s B A, b + s bias
        lora_magnitude_vector (O)                         DoRA: diag(m / |row|) (W + s B A)
        lora_embedding_A (r, V), lora_embedding_B (H, r)  W^T + s B A, W (V, H)
        any other name                                    replaces the base's tensor

s = alpha / r, or alpha / sqrt(r) with `use_rslora`. A module that keeps its weight transposed
(GPT-2) is merged transposed. Experts fused in one parameter (E, ., .) have lora_A (E r, .) with the
experts outermost and lora_B (., r E) with them innermost; a second parameter of the same module is
`<module>.base_layer`. A directory without adapter_config.json holds replacements only, such as
experts trained whole (ESFT).

Papers: LoRA 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, ESFT 2407.01906.
Left out: pickle files, adapters of other kinds than LoRA, those that depend on the input (aLoRA,
Arrow), and inits that change the base (PiSSA and its like) unless the base is the changed one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitnest.checkpoint import FLOATS, all_finite
from bitnest.errors import CheckpointError, RecipeError
from bitnest.safetensors_io import TensorInfo, read_header, read_tensor
from bitnest.workdir import sha256_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Inits that subtract the adapter's first product from the base it is trained on.
RESIDUAL = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Settings whose merged weights are not W + s B A, or that have none.
OTHER = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)


@dataclass(frozen=True)
class LowRank:
    """The factors of one module, each where it lies.

    name: module in the trained model, without `.base_layer`. a, b: the factors. embedding: they are
    an embedding's. magnitude: DoRA's m. bias: of lora_B.
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None


@dataclass(frozen=True)
class Adapter:
    """One adapter directory, checked by itself; whether it fits a base is seen in `bitnest.merged`.

    path: the directory. config: its adapter_config.json, empty without one. modules: factors.
    replaced: whole tensors by name. sha256: of config and weights.
    """

    path: Path
    config: dict[str, Any]
    modules: tuple[LowRank, ...]
    replaced: Mapping[str, TensorInfo]
    sha256: str = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, residual_base: bool = False) -> Adapter:
        """Read and check the adapter in `path`; every tensor is read once, to find NaN.

        residual_base: the base it is for is the one its init left behind.

        Raises:
            CheckpointError: no adapter, a pickle file, a kind that cannot be merged, NaN.
        """
        path = Path(path).expanduser()
        files = _weight_files(path)
        config = _read_config(path)
        _check_config(config, path, residual_base)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update(read_header(file))
        if not tensors:
            raise CheckpointError("the adapter holds no tensors", where=str(files[0]))
        for name, info in tensors.items():
            _check_tensor(name, info)
        modules, replaced = _sort(tensors, path)
        if modules and not config:
            raise CheckpointError(
                f"no {CONFIG}, which says rank and alpha", where=str(path),
                hint="copy it from where the adapter was trained",
            )  # fmt: skip
        used = [*files, path / CONFIG] if config else files
        digest = "".join(sha256_file(file) for file in used)
        return cls(path, config, modules, replaced, digest)

    @property
    def old_experts(self) -> bool | None:
        """Whether fused experts (E, O, I) have A on the output side, as peft before 0.19 had it;
        None if the configuration does not say by which version it was trained."""
        found = re.match(r"(\d+)\.(\d+)", str(self.config.get("peft_version") or ""))
        return (int(found[1]), int(found[2])) < (0, 19) if found else None

    def scaling(self, names: tuple[str, ...], rank: int, where: str) -> float:
        """s of a module that a pattern may call by any of `names`, of factors of `rank`.

        Raises:
            CheckpointError: the configuration states another rank.
        """
        stated = self._by_pattern("rank_pattern", names, self.config.get("r", 8))
        alpha = self._by_pattern("alpha_pattern", names, self.config.get("lora_alpha", 8))
        if stated != rank:
            raise CheckpointError(
                f"rank {rank} in the weights, {stated} in {CONFIG}: '{where}'",
                where=str(self.path),
                hint="config and weights are of different adapters: copy both again",
            )
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _by_pattern(self, key: str, names: tuple[str, ...], default: Any) -> Any:
        """A pattern is a regular expression for the end of a name, beginning after a dot."""
        for pattern, value in (self.config.get(key) or {}).items():
            for name in names:
                try:
                    if re.match(rf"(.*\.)?({pattern})$", name):
                        return value
                except re.error as error:
                    raise CheckpointError(
                        f"{key}: '{pattern}' is no regular expression: {error}",
                        where=str(self.path / CONFIG),
                    ) from error
        return default


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:scale.

    Raises:
        RecipeError: the scale is no finite number, or 0.
    """
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().is_dir():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise RecipeError(
            f"'{scale}' is no scale", where=f"--lora {text}", hint=f"--lora {path}:0.5"
        )
    return Path(path), value


def open_adapters(loras: Sequence[str]) -> list[tuple[Adapter, float]]:
    """The adapters named by PATH or PATH:scale, with their scales.

    Raises:
        RecipeError: a scale that is none. CheckpointError: see `Adapter.open`.
    """
    asked = [parse_lora(str(text)) for text in loras]
    return [(Adapter.open(path), scale) for path, scale in asked]


def name_with(model: str, loras: Sequence[str]) -> str:
    """What a model with adapters is called: `model+adapter+other-x0.5`."""
    parts = [model]
    for path, scale in (parse_lora(str(text)) for text in loras):
        name = path.expanduser().resolve().name
        parts.append(name if scale == 1 else f"{name}-x{scale:g}")
    return "+".join(parts)


def _weight_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(
            f"no such adapter directory: '{path}'", hint=f"it holds {CONFIG} and {WEIGHTS}"
        )
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    pickled = next((p.name for p in sorted(path.glob("*.bin"))), "")
    if pickled:
        raise CheckpointError(
            f"no safetensors weights (only '{pickled}', a pickle file)",
            where=str(path),
            hint="save it with peft's save_pretrained(..., safe_serialization=True); pickle runs "
            "code when read and is never opened",
        )
    files = sorted(path.glob("*.safetensors"))
    if not files or (path / CONFIG).exists():
        raise CheckpointError(f"no {WEIGHTS}", where=str(path), hint="name an adapter's directory")
    return files


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(file)) from error
    if not isinstance(config, dict) or not config:
        raise CheckpointError("not a JSON object", where=str(file))
    return config


def _check_config(config: Mapping[str, Any], path: Path, residual_base: bool) -> None:
    if not config:
        return
    where = str(path / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"an adapter of type {kind} cannot be merged", where=where,
            hint="LORA can, with use_rslora or use_dora too",
        )  # fmt: skip
    for key in OTHER:
        if config.get(key):
            raise CheckpointError(
                f"adapters with {key} cannot be merged", where=where,
                hint="merge it with peft, if peft offers it, and go on from the result",
            )  # fmt: skip
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(RESIDUAL) and not residual_base:
        raise CheckpointError(
            f"init_lora_weights is '{init}', which changed the base the adapter belongs to",
            where=where,
            hint="bitnest merge CHANGED_BASE --residual-base, or convert the adapter with "
            "peft's path_initial_model_for_weight_conversion",
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CheckpointError(f"{key}: {value} is no positive number", where=where)


def _check_tensor(name: str, info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor '{name}' is stored as {info.dtype}", where=str(info.file),
            hint="adapters must be BF16, F16 or F32",
        )  # fmt: skip
    if not info.nbytes or not all_finite(read_tensor(info)):
        raise CheckpointError(
            f"tensor '{name}' holds NaN or infinite values" if info.nbytes
            else f"tensor '{name}' is empty",
            where=str(info.file),
            hint="training diverged, or the file is damaged",
        )  # fmt: skip


def _sort(
    tensors: Mapping[str, TensorInfo], path: Path
) -> tuple[tuple[LowRank, ...], dict[str, TensorInfo]]:
    """Factors by module, and the other tensors by their names in the trained model."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for key, info in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _PART.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = info
        elif "lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"unknown adapter tensor '{key}'", where=str(path),
                hint="merge it with peft, if peft offers it, and go on from the result",
            )  # fmt: skip
        else:
            replaced[name.replace(".base_layer.", ".")] = info
    return tuple(_low_rank(module, own, path) for module, own in parts.items()), replaced


def _low_rank(module: str, own: Mapping[str, TensorInfo], path: Path) -> LowRank:
    embedding = "lora_embedding_A" in own or "lora_embedding_B" in own
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else (
        "lora_A.weight", "lora_B.weight"
    )  # fmt: skip
    for name in names:
        if name not in own or len(own[name].shape) != 2:
            raise CheckpointError(
                f"'{module}' lacks a matrix {name}", where=str(path),
                hint="the file is incomplete, or of a layer that is no matrix",
            )  # fmt: skip
    a, b = own[names[0]], own[names[1]]
    if a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"'{module}': A {a.shape} and B {b.shape} have no rank in common", where=str(path)
        )
    bias, magnitude = own.get("lora_B.bias"), own.get("lora_magnitude_vector")
    name = re.sub(r"(\.base_layer)+$", "", module)
    return LowRank(name, a, b, embedding, magnitude, bias)
