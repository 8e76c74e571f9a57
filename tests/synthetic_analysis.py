"""Made-up analyses of realistic shape and size, for the tests of the report.

Numbers follow what real models show: skewed use of experts, a few that serve one data set, outlier
channels at fixed places, losses that fall fourfold a bit. Everything is drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

FORMATS = [
    {"name": "int2-g128", "bits": 2.125}, {"name": "int3-g128", "bits": 3.125},
    {"name": "int4-g128", "bits": 4.125}, {"name": "nvfp4", "bits": 4.5},
    {"name": "int6-g128", "bits": 6.125}, {"name": "int8-g128", "bits": 8.125},
]  # fmt: skip
NAMES = ["frequency", "gate mass", "REAP", "Hessian trace", "Fisher"]
WINDOWS = [4, 16, 64, 256]
BINS = 24


def _normalised(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [v / total for v in values]


def _layer(random: Random, n: int, experts: int, labels: int, following: int) -> dict[str, Any]:
    base = [random.lognormvariate(0, 0.8) for _ in range(experts)]
    shares, tokens = [], []
    for k in range(labels):
        own = [
            b * random.lognormvariate(0, 0.5) * (9 if (e + n) % labels == k and e % 7 == 3 else 1)
            for e, b in enumerate(base)
        ]
        share = _normalised(own)
        counts = [int(2 * 11264 * s) for s in share]
        if n == 1 and experts > 5:
            counts[5], share[5] = 0, 0.0
        tokens.append(counts)
        shares.append(_normalised(share))
    mean = [sum(column) / labels for column in zip(*shares, strict=True)]
    weights = [[s * random.lognormvariate(0, 0.35) for s in row] for row in shares]
    phi = [[0.0] * experts for _ in range(experts)]
    for a in range(experts):
        phi[a][a] = 1.0
        for b in range(a):
            phi[a][b] = phi[b][a] = max(-1, min(1, random.gauss(-0.03, 0.06) + (
                0.4 if random.random() < 0.02 else 0)))  # fmt: skip
    order = sorted(range(experts), key=lambda e: -mean[e])
    tier = [0] * experts
    for place, e in enumerate(order):
        tier[e] = 0 if place < experts / 10 else 1 if place < experts / 3 else 2 if place < (
            0.7 * experts) else 3  # fmt: skip
    return {
        "layer": n, "experts": experts, "top_k": 2, "tokens": tokens, "share": shares,
        "gate_mass": [_normalised(w) for w in weights],
        "reap": [[random.lognormvariate(1, 0.4) for _ in range(experts)] for _ in range(labels)],
        "hessian_trace": [m * 1e4 * random.lognormvariate(0, 0.5) for m in mean],
        "fisher": [m * 1e-3 * random.lognormvariate(0, 0.9) for m in mean],
        "significance": [_normalised(w) for w in weights],
        "dynamics": [random.random() for _ in range(experts)], "tier": tier,
        "balance": [
            -sum(s * math.log(s) for s in row if s) / math.log(experts) for row in shares
        ],
        "margin": {
            "edges": [i * 0.15 for i in range(BINS + 1)],
            "counts": [
                [int(4000 * math.exp(-i / (4 + n % 5 + k))) for i in range(BINS)]
                for k in range(labels)
            ],
        },
        "logit_mean": [[random.gauss(0, 0.6) for _ in range(experts)] for _ in range(labels)],
        "logit_std": [[random.uniform(0.5, 1.6) for _ in range(experts)] for _ in range(labels)],
        "coactivation": phi,
        "transitions": [
            _normalised([random.lognormvariate(0, 1.2) for _ in range(following)])
            for _ in range(experts)
        ] if following else None,
        "transition_entropy": math.log2(following) - random.uniform(0.3, 1) if following else None,
    }  # fmt: skip


def _domains(layers: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for layer in layers:
        for e, column in enumerate(zip(*layer["share"], strict=True)):
            high = max(range(len(column)), key=column.__getitem__)
            low = min(range(len(column)), key=column.__getitem__)
            found.append({
                "layer": layer["layer"], "expert": e, "label": labels[high],
                "share": dict(zip(labels, column, strict=True)),
                "difference": column[high] - column[low], "other": labels[low],
            })  # fmt: skip
    return sorted(found, key=lambda d: -d["difference"])


def _inputs(random: Random, blocks: int, width: int, moe: bool) -> list[dict[str, Any]]:
    roles = [("attention", "q_proj, k_proj, v_proj"), ("attention", "o_proj"),
             ("expert" if moe else "mlp", "gate_proj, up_proj"), ("mlp", "down_proj")]  # fmt: skip
    found = []
    for n in range(blocks):
        for kind, role in roles:
            absmax = [random.lognormvariate(0.7, 0.25) for _ in range(width)]
            outliers = []
            for channel in (17, 17 + width // 2, width - 40)[: 1 + n % 3]:
                absmax[channel] *= random.uniform(4, 14 + 4 * n % 40)
                outliers.append({
                    "channel": channel, "absmax": absmax[channel], "rms": absmax[channel] / 4,
                    "ratio": absmax[channel] / 2.1, "rank_share": random.uniform(0.5, 1),
                })  # fmt: skip
            found.append({
                "name": f"model.layers.{n}.{role.split(',')[0]}", "readers": role.count(",") + 1,
                "kind": kind, "layer": n, "role": role, "width": width, "absmax": absmax,
                "rms": [a / 4 for a in absmax], "tokens": 33792, "outliers": outliers,
                "over_six": random.uniform(0, 0.004) * (1 + n / 8),
                "kappa": {"16": 1.9, "32": 2.2, "128": 2.7},
            })  # fmt: skip
    return found


def _crest(random: Random, blocks: int, kinds: Sequence[str]) -> dict[str, Any]:
    def entries(spread: float) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "layer": n, "kappa": {
                str(b): (1.55 + 0.28 * math.log2(b / 8)) * random.lognormvariate(0.02 * i, spread)
                for b in (16, 32, 128)}}
            for n in range(blocks) for i, kind in enumerate(kinds)
        ]  # fmt: skip

    limits = [("mxint8/mxfp8", 32, 7.55), ("mxint6/mxfp6", 32, 1.96), ("mxint4/mxfp4", 32, 2.04),
              ("nvint4/nvfp4", 16, 2.39)]  # fmt: skip
    return {
        "limits": [{"pair": p, "block": b, "limit": v} for p, b, v in limits],
        "weights": entries(0.03), "inputs": entries(0.2),
    }  # fmt: skip


def _sensitivity(random: Random, blocks: int, experts: int, kinds: Sequence[str]) -> dict[str, Any]:
    sites, by_layer = [], []
    for n in range(blocks):
        for kind in kinds:
            count = experts if kind == "expert" else 1
            parameters = 65536 * (1 if kind != "expert" else 3 * count)
            level = (0.5 if kind == "expert" else 1.0) * (1 + 3 * math.exp(-n)) / blocks
            loss = [
                level * 3.2 * 4 ** -f["bits"] * random.lognormvariate(0, 0.2)
                for f in FORMATS
            ]  # fmt: skip
            by_layer.append({"layer": n, "kind": kind, "parameters": parameters, "loss": loss})
            for e in range(count):
                part = random.lognormvariate(0, 0.8) / count
                sites.append({
                    "name": f"model.layers.{n}.{kind}.{e}.gate_proj" if count > 1
                    else f"model.layers.{n}.{kind}.q_proj",
                    "kind": kind, "layer": n, "expert": e if count > 1 else None,
                    "projection": "gate_proj", "parameters": 65536,
                    "fisher": random.lognormvariate(-7, 1),
                    "error": [0.4 * 4 ** -(f["bits"] - 1) for f in FORMATS],
                    "loss": [part * v for v in loss],
                })  # fmt: skip
    return {"method": "gptq", "importance": "kl", "formats": FORMATS, "sites": sites,
            "by_layer": by_layer}  # fmt: skip


def _offloading(random: Random, layers: list[dict[str, Any]]) -> dict[str, Any]:
    experts, k = layers[0]["experts"], 2
    sizes = list(range(1, experts + 1))

    def curve(power: float) -> list[float]:
        return [min(1.0, (s / experts) ** power) for s in sizes]

    rho = [1, 1.5, 2, 3, 4]
    return {
        "top_k": k, "windows": WINDOWS,
        "srp": [{"layer": layer["layer"], "values": [
            0.72 - 0.05 * i + random.uniform(-0.08, 0.08) for i in range(4)]} for layer in layers],
        "srp_mean": [0.72 - 0.05 * i for i in range(4)],
        "sch": {"rho": rho, "m": WINDOWS, "values": [
            [min(1.0, (r * k / experts) ** (0.42 - 0.03 * i)) for r in rho] for i in range(4)]},
        "hit_rates": {
            "sizes": sizes, "lru": curve(0.7), "lfu": curve(0.62), "belady": curve(0.36),
            "layers": [
                {"layer": layer["layer"], "lru": curve(0.7 + random.uniform(-0.1, 0.1)),
                 "lfu": curve(0.62), "belady": curve(0.36)} for layer in layers],
        },
        "transition_entropy": [layer["transition_entropy"] for layer in layers], "tokens": 33792,
    }  # fmt: skip


def _rankings(random: Random, layers: list[dict[str, Any]]) -> dict[str, Any]:
    def table() -> list[list[float | None]]:
        n = len(NAMES)
        values: list[list[float | None]] = [[1.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(i):
                value = max(-0.2, 0.97 - 0.19 * (i - j) - random.uniform(0, 0.15))
                values[i][j] = values[j][i] = value
        return values

    return {
        "names": NAMES, "mean": table(),
        "layers": [{"layer": layer["layer"], "correlation": table()} for layer in layers],
        "top": [
            {"layer": layer["layer"],
             "order": {n: random.sample(range(layer["experts"]), layer["experts"]) for n in NAMES}}
            for layer in layers
        ],
    }  # fmt: skip


def make(
    blocks: int = 6,
    experts: int = 16,
    labels: Sequence[str] = ("books", "code", "wiki"),
    width: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """The analysis of a model with routed experts in every block."""
    random = Random(seed)
    layers = [
        _layer(random, n, experts, len(labels), experts if n + 1 < blocks else 0)
        for n in range(blocks)
    ]
    starved = [
        {"layer": layer["layer"], "expert": e, "tokens": t, "fitted": 3 * t // 4,
         "minimum": {"up": 2048, "down": 1024},
         "lean": {"up": 1 - 3 * t // 4 / 2048, "down": max(0, 1 - 3 * t // 4 / 1024)},
         "fallback": "the Hessian of gate and up is 40 % the layer's inputs"}
        for layer in layers
        for e, t in enumerate(map(sum, zip(*layer["tokens"], strict=True))) if 3 * t // 4 < 2048
    ]  # fmt: skip
    counts = [sum(layer["tier"].count(t) for layer in layers) for t in range(4)]
    points = []
    for _ in range(48):
        predicted = 10 ** random.uniform(-4, -0.3)
        points.append({
            "label": random.choice(list(labels)), "bits": random.uniform(2, 8),
            "predicted": predicted, "measured": predicted * random.lognormvariate(0, 0.13),
        })  # fmt: skip
    return {
        "version": 1, "bitnest": "0.1", "model": "books-moe", "architecture": "Qwen3MoeForCausalLM",
        "parameters": 22170000, "bytes": 44340000, "blocks": blocks, "labels": list(labels),
        "length": 512, "lengths": [512], "seed": seed, "seconds": 95.1,
        "data": [
            {"label": label, "source": f"data/text/{label}_valid.txt", "documents": 3 + i,
             "duplicates": i, "samples": 22, "tokens": 11264, "available": 500000,
             "sha256": f"{i + 10:02x}" * 32}
            for i, label in enumerate(labels)
        ],
        "layers": layers, "domains": _domains(layers, labels),
        "rankings": _rankings(random, layers),
        "tiers": {"centres": [5.7, 3.6, 1.4, 0.15], "bits": [8, 6, 4, 2], "counts": counts},
        "dynamic_channels": {"share": 0.01, "count": blocks * experts * 8, "list": [
            {"layer": random.randrange(blocks), "expert": random.randrange(experts),
             "projection": random.choice(["up", "gate", "down"]),
             "channel": random.randrange(width), "change": 0.004 / (i + 2)} for i in range(100)]},
        "inputs": _inputs(random, blocks, width, moe=True),
        "crest": _crest(random, blocks, ("attention", "expert")),
        "sensitivity": _sensitivity(random, blocks, experts, ("attention", "expert")),
        "prediction": {"scales": {"attention": 1.8, "expert": 1.4}, "flips": 0.02,
                       "error": 0.12, "probes": 16, "points": points},
        "offloading": _offloading(random, layers),
        "coverage": {
            "minimum": 2048, "minima": [2048], "held": 3, "experts": blocks * experts,
            "covered": blocks * experts - len(starved), "starved": starved,
            "drawn": {"windows": 12, "rounds": 2},
        },
    }  # fmt: skip


def make_dense() -> dict[str, Any]:
    """The analysis of a dense model on one data set: no experts, nothing about them."""
    random = Random(1)
    return make(blocks=4, labels=("default",)) | {
        "model": "books-dense", "architecture": "LlamaForCausalLM", "layers": [], "domains": [],
        "rankings": {"names": NAMES, "mean": [[None] * 5 for _ in range(5)], "layers": [],
                     "top": []},
        "tiers": {"centres": [], "bits": [], "counts": []},
        "dynamic_channels": {"share": 0.01, "count": 0, "list": []},
        "inputs": _inputs(random, 4, 256, moe=False),
        "crest": _crest(random, 4, ("attention", "mlp")),
        "sensitivity": None, "prediction": None, "offloading": None, "coverage": None,
    }  # fmt: skip


def make_large() -> dict[str, Any]:
    """As large as models get: 48 layers of 128 experts, eight data sets."""
    labels = ("books", "code", "wiki", "mathematics", "chat", "law", "german", "tables")
    return make(blocks=48, experts=128, labels=labels, width=2048)
