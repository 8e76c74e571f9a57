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
from pathlib import Path

import torch

from bitnest import demo
from bitnest.safetensors_io import Entry, write_file

HIDDEN, INTER, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM = 2048, 768, 32, 4, 16, 4, 128


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one block's tensors."""
    prefix = f"model.layers.{layer}."
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INTER) if name == "down_proj" else (INTER, HIDDEN)
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


def main() -> None:
    """Write the checkpoint; prints its directory and bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    args = parser.parse_args()
    per_block = sum(2 * torch.Size(shape).numel() for shape in shapes(0).values())
    layers = max(1, round(args.gigabytes * 1e9 / per_block))
    args.out.mkdir(parents=True)
    source = demo.model_path()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, args.out / name)
    config = json.loads((source / "config.json").read_text())
    config.update(
        hidden_size=HIDDEN, intermediate_size=INTER, moe_intermediate_size=INTER,
        num_experts=EXPERTS, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        num_hidden_layers=layers,
    )  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    weight_map: dict[str, str] = {}
    total = 0
    outer = {
        "model.embed_tokens.weight": (config["vocab_size"], HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for number, block in enumerate([outer, *map(shapes, range(layers))]):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        entries = [
            entry(name, shape, 1000 * number + i) for i, (name, shape) in enumerate(block.items())
        ]
        total += write_file(args.out / file, entries)[0]
        weight_map.update(dict.fromkeys(block, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{args.out}: {layers} layers, {total:,} bytes")


if __name__ == "__main__":
    main()
