"""What of `vector`, `linear`, `rounded` and `experts` is compiled ahead of time: one
specialisation per way in which codes are read, at the default tiles."""

from __future__ import annotations

from typing import Any

from bitnest.kernels.gpu import layout as w
from bitnest.kernels.gpu import tiles
from bitnest.kernels.gpu.experts_kernels import combine_kernel, down_kernel, gate_up_kernel, swiglu
from bitnest.kernels.gpu.layout import Spec
from bitnest.kernels.gpu.linear import product_kernel, sum_pieces
from bitnest.kernels.gpu.registry import Variant
from bitnest.kernels.gpu.rounded import rounded_kernel
from bitnest.kernels.gpu.vector import sum_shares, vector_kernel
from bitnest.kernels.gpu.words import lanes_of

ALIGNED = ("stride", "N", "K")
STORED = {
    w.NONE: "i32", w.HALF: "bf16", w.E8M0: "u8", w.E4M3: "u8", w.DQ: "i8", w.M2: "u8", w.DUAL: "u8"
}  # fmt: skip


def spec(
    kind: int, segs: tuple[int, ...], scale: int = w.HALF, group: int = 128, zero: float = 0.0,
    floats: tuple[int, int] = (0, 0), base: int | None = None, folds: bool = False,
) -> Spec:  # fmt: skip
    """A Spec as `GpuWeight.spec` would give it."""
    count = len(segs) if base is None else base
    return (
        kind, segs, lanes_of(max(segs)), scale, group, 1, zero, *floats, count, int(folds),
    )  # fmt: skip


SPECS: dict[str, Spec] = {
    "int1": spec(w.INT, (1,), zero=0.5),
    "int2": spec(w.INT, (2,), zero=2.0),
    "int3": spec(w.INT, (2, 1), zero=4.0),
    "int4": spec(w.INT, (4,), zero=8.0),
    "int4-g32": spec(w.ASYM, (4,), group=32),
    "int5": spec(w.INT, (4, 1), zero=16.0),
    "int6": spec(w.ASYM, (4, 2)),
    "int7": spec(w.INT, (4, 2, 1), zero=64.0),
    "int8": spec(w.INT, (8,), group=0, zero=128.0),
    "int8-g16": spec(w.INT, (4, 4), group=16, zero=128.0),
    "dq": spec(w.INT, (4,), w.DQ, zero=8.0),
    "dgq4": spec(w.ASYM, (4,), w.DUAL, folds=True),
    "m2": spec(w.INT, (4,), w.M2, group=64, zero=8.0, folds=True),
    "mat": spec(w.LINE, (2, 1, 1), zero=8.0),
    "mwq": spec(w.RESIDUAL, (2, 1, 1), base=1),
    "mxfp4": spec(w.FLOAT, (4,), w.E8M0, 32, floats=(2, 1), folds=True),
    "mxfp6": spec(w.FLOAT, (4, 2), w.E8M0, 32, floats=(2, 3), folds=True),
    "mxfp8": spec(w.FLOAT, (8,), w.E8M0, 32, floats=(4, 3), folds=True),
    "nvfp4": spec(w.FLOAT, (4,), w.E4M3, 16, floats=(2, 1), folds=True),
    "fp8": spec(w.FLOAT, (8,), group=0, floats=(4, 3)),
    "nf4": spec(w.TABLE, (4,), group=64),
    "lut3-channel": spec(w.ROW_TABLE, (2, 1), w.NONE, 0),
    "nest4": spec(w.TABLE, (2, 1, 1)),
}
WHOLE = (w.INT, w.ASYM, w.LINE, w.RESIDUAL)  # what `vector` takes


def _pointers(made: Spec, half: str) -> dict[str, str]:
    stored = STORED[made[3]]
    table = half if made[0] == w.ROW_TABLE else "fp32"
    return {
        "words": "*i32", "scales": f"*{half if stored == 'bf16' else stored}",
        "shared": "*fp32" if made[3] == w.E4M3 else f"*{half}", "zeros": "*u8",
        "table": f"*{table}", "bias": f"*{half}",
    }  # fmt: skip


def _vector(name: str, half: str = "bf16") -> Variant:
    made = SPECS[name]
    tile = tiles.choose("vector", sum(made[1]), 1, 4096, 4096)
    sizes = dict.fromkeys(("N", "K", "blocks"), "i32")
    given = {"x": f"*{half}", **_pointers(made, half), "out": f"*{half}", "shares": "*fp32"}
    constants = {"SPEC": made, "BN": tile.bn, "SPAN": tile.span, "BIAS": False, "SHARES": True}
    return Variant(
        f"vector-{name}-{half}", vector_kernel, {**given, **sizes}, constants, tile.warps,
        tile.stages, ALIGNED,
    )  # fmt: skip


def _product(name: str, m: int, half: str = "bf16", **others: Any) -> Variant:
    made = SPECS[name]
    tile = tiles.choose("product", sum(made[1]), m, 4096, 4096)
    sizes = dict.fromkeys(("stride", "M", "N", "K", "blocks"), "i32")
    given = {"x": f"*{half}", **_pointers(made, half), "out": f"*{half}", "pieces": "*fp32"}
    constants = {"SPEC": made, "BN": tile.bn, "BM": tile.bm, "BIAS": False, "ATOMIC": False}
    if others:
        given["out"] = "*fp32"
    return Variant(
        f"product-{name}-m{m}-{half}" + "".join(others), product_kernel, {**given, **sizes},
        {**constants, **others}, tile.warps, tile.stages, ALIGNED,
    )  # fmt: skip


def _class(name: str) -> tuple[Spec, int, int, int]:
    codes = {"i32": 0, "bf16": 1, "fp16": 2, "fp32": 3, "u8": 4, "i8": 5}
    given = _pointers(SPECS[name], "bf16")
    return (SPECS[name], *(codes[given[p].strip("*")] for p in ("scales", "shared", "table")))  # type: ignore[return-value]


def _experts(name: str, classes: tuple[str, ...], each: int) -> list[Variant]:
    tile = tiles.choose("experts", 4, each, 768, 2048)
    made = tuple(sorted(_class(one) for one in classes))
    routing = dict.fromkeys(("order", "starts", "ends", "owners"), "*i32")
    sizes = dict.fromkeys(("slots", "E", "N", "K", "blocks", "shares"), "i32")
    constants = {"BN": tile.bn, "BM": tile.bm, "CLASSES": made}
    both = {**routing, "weights": "*i64", "parts": "*fp32", **sizes, "inner": "*bf16"}
    return [
        Variant(
            f"experts-up-{name}-m{each}", gate_up_kernel,
            {**both, "x": "*bf16", "stride": "i32", "k": "i32"}, {**constants, "SPREAD": False},
            tile.warps, tile.stages, ALIGNED,
        ),
        Variant(
            f"experts-down-{name}-m{each}", down_kernel, both, constants, tile.warps, tile.stages,
            ALIGNED,
        ),
    ]  # fmt: skip


def _rounded(name: str, agroup: int, m: int) -> Variant:
    made = SPECS[name]
    tile = tiles.choose("rounded", sum(made[1]), m, 4096, 4096)
    pointers = _pointers(made, "bf16")
    del pointers["bias"]
    sizes = dict.fromkeys(("M", "N", "K", "blocks"), "i32")
    given = {"x": "*i8", "xscales": "*fp32", **pointers, "out": "*fp32", **sizes}
    constants = {"SPEC": made, "AGROUP": agroup, "BN": tile.bn, "BM": tile.bm}
    return Variant(
        f"rounded-{name}-g{agroup}-m{m}", rounded_kernel, given, constants, tile.warps,
        tile.stages, ALIGNED,
    )  # fmt: skip


FEW, MANY = ("int4",), ("int2", "int3", "int4", "int6", "mxfp4", "nest4")
VARIANTS = [
    *(v for each in (8, 64) for v in _experts("int4", FEW, each) + _experts("mixed", MANY, each)),
    *(_rounded(*one) for one in (("int8", 0, 16), ("int8", 0, 256), ("int6", 128, 16),
                                 ("int4", 0, 64), ("dgq4", 0, 16), ("int8-g16", 128, 16))),
    Variant(
        "experts-swiglu", swiglu,
        {"parts": "*fp32", "inner": "*bf16", "size": "i32", "shares": "i32"}, {"SIZE": 1024},
    ),
    Variant(
        "experts-combine", combine_kernel,
        {"parts": "*fp32", "index": "*i64", "gates": "*bf16", "weights": "*i64", "out": "*bf16",
         **dict.fromkeys(("slots", "k", "E", "N", "shares"), "i32")},
        {"SIZE": 512},
    ),
    *(_vector(name) for name, made in SPECS.items() if made[0] in WHOLE),
    _vector("int4", "fp16"),
    _vector("int4", "fp32"),
    *(_product(name, 16) for name in SPECS),
    *(_product(name, m) for name in ("int2", "int3", "int4", "int8", "mxfp4") for m in (64, 256)),
    _product("int4", 16, "fp16"),
    _product("int4", 16, "fp32"),
    _product("int4", 16, ATOMIC=True),
    Variant(
        "sum-shares", sum_shares,
        {"shares": "*fp32", "bias": "*bf16", "out": "*bf16", "N": "i32", "COUNT": "i32"},
        {"BN": 128, "BIAS": True},
    ),
    Variant(
        "sum-pieces", sum_pieces,
        {"pieces": "*fp32", "bias": "*bf16", "out": "*bf16",
         **dict.fromkeys(("M", "N", "blocks", "COUNT"), "i32")},
        {"BN": 64, "BM": 16, "BIAS": True},
    ),
]  # fmt: skip
