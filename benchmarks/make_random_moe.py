"""Writes a Qwen3-MoE checkpoint of random weights, of any size, one tensor in memory at a time.

    python -m benchmarks.make_random_moe --out DIR --gigabytes 4

For measuring time and memory on shapes of real models, not quality: weights are normal with the
usual initial scale, so experts are used evenly and nothing compresses better than noise. The
tokenizer is the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from bitnest import demo
from bitnest.safetensors_io import Entry, write_file


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. inter: of an expert."""

    hidden: int = 2048
    inter: int = 768
    experts: int = 32
    top_k: int = 4
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 2048


def shapes(layer: int, size: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's tensors."""
    prefix = f"model.layers.{layer}."
    hidden, width = size.hidden, size.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (width,),
        "self_attn.k_norm.weight": (width,),
        "self_attn.q_proj.weight": (size.heads * width, hidden),
        "self_attn.k_proj.weight": (size.kv_heads * width, hidden),
        "self_attn.v_proj.weight": (size.kv_heads * width, hidden),
        "self_attn.o_proj.weight": (hidden, size.heads * width),
        "mlp.gate.weight": (size.experts, hidden),
    }
    for expert in range(size.experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, size.inter) if name == "down_proj" else (size.inter, hidden)
            tensors[f"mlp.experts.{expert}.{name}.weight"] = shape
    return {prefix + name: shape for name, shape in tensors.items()}


def entry(name: str, shape: tuple[int, ...], seed: int) -> Entry:
    """One tensor, drawn when it is written."""

    def values() -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    return Entry(name, torch.bfloat16, shape, values)


def write(out: Path, size: Shape, layers: int) -> int:
    """The checkpoint, in a new directory; its bytes."""
    out.mkdir(parents=True)
    source = demo.model_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)
    config = json.loads((source / "config.json").read_text())
    config.update(
        hidden_size=size.hidden, intermediate_size=size.inter, moe_intermediate_size=size.inter,
        num_experts=size.experts, num_local_experts=size.experts, num_experts_per_tok=size.top_k,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim,
        num_hidden_layers=layers, vocab_size=size.vocabulary,
    )  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2))
    weight_map: dict[str, str] = {}
    total = 0
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size.vocabulary, size.hidden),
        "model.norm.weight": (size.hidden,),
    }
    for number, block in enumerate([outer, *(shapes(i, size) for i in range(layers))]):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        entries = [
            entry(name, shape, 1000 * number + i) for i, (name, shape) in enumerate(block.items())
        ]
        total += write_file(out / file, entries)[0]
        weight_map.update(dict.fromkeys(block, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    """Write the checkpoint; prints its directory and bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    args = parser.parse_args()
    per_block = sum(2 * torch.Size(shape).numel() for shape in shapes(0, Shape()).values())
    layers = max(1, round(args.gigabytes * 1e9 / per_block))
    total = write(args.out, Shape(), layers)
    print(f"{args.out}: {layers} layers, {total:,} bytes")


if __name__ == "__main__":
    main()
