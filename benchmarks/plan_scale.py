"""Planning at scale: a synthetic allocation of 30,000 items, and the plan of a Qwen3-235B shape.

    python -m benchmarks.plan_scale [--items 30000] [--layers 94] [--experts 128] [--exact]

The first is the solver alone: random losses that fall about fourfold with every bit, matrices of
three sizes, experts that can be dropped. The second makes no weights: a Qwen3-MoE of the published
configuration (94 layers of 128 experts, hidden 4096) on the meta device, its sites, made-up
losses, the menu of exact bytes, the plan, its fold into rules and back. Prints seconds, peak memory
and the gap to the proven bound; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.predicted_kl import machine


def main() -> None:
    """Both, printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=30_000)
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--exact", action="store_true")
    args = parser.parse_args()
    found = {"solver": solver(args.items, args.exact), "model": model(args.layers, args.experts),
             "machine": machine()}  # fmt: skip
    print(machine())
    print(json.dumps(found))


def solver(items: int, exact: bool) -> dict[str, Any]:
    """Seconds and gap of one synthetic instance."""
    from bitnest.quantize.allocation.exact import solve_exact
    from bitnest.quantize.allocation.problem import Bundle, Problem
    from bitnest.quantize.allocation.solver import solve

    random = np.random.default_rng(0)
    numel = random.choice([65536, 1 << 20, 1 << 23], items)
    bits = np.array([0, 1.6, 2, 3, 4, 5, 6, 8])
    cost = (numel[:, None] * (bits + 0.125 * (bits > 0)) // 8).astype(np.int64)
    scale = np.exp(random.normal(0, 2, items))
    noise = np.exp(random.normal(0, 0.05, (items, len(bits))))
    loss = scale[:, None] * 4.0 ** (-bits) * noise
    bundles = tuple(
        Bundle((i, i + 1, i + 2), (0, 0, 0), float(loss[i : i + 3, 0].max()))
        for i in range(0, items - 2, 3)
    )
    problem = Problem(cost, loss, int(3 * numel.sum() / 8), bundles)
    started = time.monotonic()
    solved = (solve_exact if exact else solve)(problem)
    seconds = time.monotonic() - started
    print(f"{items:,} items of {len(bits)} choices, {len(bundles):,} bundles: {seconds:.2f} s, "
          f"gap {solved.gap:.1e}")  # fmt: skip
    return {"items": items, "seconds": seconds, "gap": solved.gap}


def model(layers: int, experts: int) -> dict[str, Any]:
    """Seconds, memory and gap of a plan from a config alone."""
    from bitnest.calibrate.predict import Fit
    from bitnest.export.plan_targets import NATIVE, open_target
    from bitnest.plan import Plan
    from bitnest.quantize.allocation.menu import build_menu
    from bitnest.quantize.allocation.objective import with_weights
    from bitnest.sites import find_sites
    from bitnest.skeleton import Skeleton

    started = time.monotonic()
    skeleton = Skeleton.build(qwen3(layers, experts))
    sites = [site for site in find_sites(skeleton) if site.kind != "router"]
    built = time.monotonic()
    random = np.random.default_rng(0)
    widths = np.array([int(name[3]) for name in NATIVE])
    scale = np.exp(random.normal(-8, 2, (len(sites), 1, 3)))
    losses = scale * 4.0 ** (-widths[None, :, None].astype(float))
    menu = build_menu(sites, NATIVE, losses, open_target("native", {}))
    kinds = menu.kinds
    objective = with_weights(menu, Fit(kinds, (1.4,) * len(kinds), 0.01, 0.3, 16))
    mixed = time.monotonic()
    numel = int(menu.numel.sum())
    solved = objective.minimise(menu.nbytes, round(3.1 * numel / 8))
    done = time.monotonic()
    plan = Plan.of(menu.plan(solved.choice), model="qwen3-235b-shape")
    again = Plan.from_text(plan.to_text()).formats(sites)
    assert again == menu.plan(solved.choice)
    folded = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{numel / 1e9:.1f} G weights, {len(menu.items):,} items of {len(menu.formats)} formats: "
          f"sites {built - started:.1f} s, menu {mixed - built:.1f} s, solved {done - mixed:.2f} s "
          f"(gap {solved.gap:.1e}), {len(plan.rules)} rules folded, written and read again "
          f"{folded - done:.1f} s; peak {peak:.0f} MiB")  # fmt: skip
    return {
        "weights": numel, "items": len(menu.items), "sites_seconds": built - started,
        "menu_seconds": mixed - built, "solve_seconds": done - mixed, "gap": solved.gap,
        "rules": len(plan.rules), "fold_seconds": folded - done, "peak_mib": peak,
    }  # fmt: skip


def qwen3(layers: int, experts: int) -> Any:
    """A checkpoint of Qwen3-235B-A22B's published configuration that has names and shapes only."""
    from bitnest.checkpoint import Checkpoint
    from bitnest.safetensors_io import TensorInfo

    hidden, inner, heads, kept, size, vocabulary = 4096, 1536, 64, 4, 128, 151936
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kept,
        "head_dim": size, "num_experts": experts, "num_experts_per_tok": 8,
        "moe_intermediate_size": inner, "intermediate_size": 12288, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "dtype": "bfloat16", "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_norm.weight": (size,), f"{at}.self_attn.k_norm.weight": (size,),
            f"{at}.self_attn.q_proj.weight": (heads * size, hidden),
            f"{at}.self_attn.k_proj.weight": (kept * size, hidden),
            f"{at}.self_attn.v_proj.weight": (kept * size, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * size),
            f"{at}.mlp.gate.weight": (experts, hidden),
        }  # fmt: skip
        for expert in range(experts):
            for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)),
                                ("down_proj", (hidden, inner))):  # fmt: skip
                shapes[f"{at}.mlp.experts.{expert}.{name}.weight"] = shape
    import tempfile

    place = Path(tempfile.mkdtemp(prefix="bitnest-shape-"))
    (place / "config.json").write_text(json.dumps(config))
    infos = {
        name: TensorInfo(place / "none.safetensors", "BF16", shape, 0, 2 * int(np.prod(shape)))
        for name, shape in shapes.items()
    }
    return Checkpoint(place, config, infos)


if __name__ == "__main__":
    main()
