"""Compile kernels for GPUs that need not be there, and say what they take.

    python -m bitnest.kernels.gpu.compile [--only TEXT] [--target 80 90] [--json]

Every variant (`registry.Variant`) is compiled to PTX and machine code for compute capabilities 8.0
and 9.0. The machine code says how many registers a thread takes and how much local memory
(`spill`, bytes a thread: registers that did not fit live there); shared memory is what the launch
asks for, bytes a block. Triton brings the assembler and `cuobjdump`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitnest.kernels.gpu.registry import Variant

TARGETS = (80, 90)
WARP = 32
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What one variant takes on one target; ptx and cubin: bytes of code."""

    name: str
    target: int
    registers: int
    spill: int
    shared: int
    warps: int
    stages: int
    ptx: int
    cubin: int


def compile_variant(variant: Variant, target: int) -> Compiled:
    """Compile for compute capability target / 10.

    Raises:
        Exception: whatever Triton's compiler or the assembler refuse.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.function.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[name].startswith("*") or name in variant.aligned
    }
    constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
    source = ASTSource(variant.function, types, constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", target, WARP), options=options)
    registers, spill = usage(made.asm["cubin"])
    return Compiled(
        variant.name, target, registers, spill, made.metadata.shared, variant.num_warps,
        variant.num_stages, len(made.asm["ptx"]), len(made.asm["cubin"]),
    )  # fmt: skip


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread takes.

    Raises:
        ValueError: cuobjdump does not say.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = USAGE.search(done.stdout)
    if found is None:
        raise ValueError(f"no resource usage in cuobjdump's answer: {done.stdout[:200]}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return registers, stack + local


def table(rows: list[Compiled]) -> str:
    """Rows as a table in Markdown."""
    head = ("variant", "target", "registers", "spill", "shared", "warps", "stages")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (r.name, f"sm_{r.target}", r.registers, r.spill, r.shared, r.warps, r.stages)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; 1 if a variant does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="variants whose name has this in it")
    parser.add_argument("--target", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

    from bitnest.kernels.gpu.registry import variants

    rows, failed = [], {}
    for variant in variants():
        if args.only and args.only not in variant.name:
            continue
        for target in args.target:
            try:
                rows.append(compile_variant(variant, target))
            except Exception as error:  # noqa: BLE001 - any of them is a row of the answer
                cause = error.__cause__ or error
                failed[f"{variant.name} sm_{target}"] = f"{type(cause).__name__}: {cause}"
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)  # noqa: T201
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "failed": failed}))  # noqa: T201
    else:
        print(table(rows))  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
