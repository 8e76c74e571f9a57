"""LoRA adapters as files, for tests: what peft writes, of chosen tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import Builder

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter directory of `tensors` by their names in the model."""
    path.mkdir(parents=True, exist_ok=True)
    own = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (path / "adapter_config.json").write_text(json.dumps(own))
    save_file({PREFIX + k: v.contiguous() for k, v in tensors.items()},
              path / "adapter_model.safetensors")  # fmt: skip
    return path


def pair(module: str, out: int, inner: int, rank: int = 4, seed: int = 0) -> dict[str, Any]:
    return {
        f"{module}.lora_A.weight": noise(rank, inner, seed=seed),
        f"{module}.lora_B.weight": noise(out, rank, seed=seed + 1),
    }


def product(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = (tensors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    return b @ a


def float32(tiny: Builder, family: str) -> Path:
    """The family's checkpoint with the same values in float32."""
    source, path = tiny(family), tiny.root / f"{family}-f32"
    if not path.exists():
        shutil.copytree(source, path)
        for file in path.glob("*.safetensors"):
            save_file({k: v.float() for k, v in load_file(file).items()}, file, {"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return path
