"""Nested formats at every width, beside GPTQ made for that width alone and slices of its 8 bits.

    python -m benchmarks.nested_table MODEL --data LABEL=FILE ... [--work DIR] [--samples N]

Every text is cut in half: the first halves calibrate, the second halves are measured on. All rows
are Hadamard-rotated in blocks of 64 but `any`, whose tables are of single rows. `alone` is one
artifact per width, `sliced` the first bits of the 8-bit one, each standing for the middle of its
cell. Widths of `stack` are blocks, each of a little more than a bit. Size: of the whole nested
artifact over that of the 8-bit one. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import halves, machine

WIDTHS = (2, 3, 4, 5, 6, 8)
KINDS = {
    "nest": "nest2345678-g128@had64",
    "mat": "mat2345678-g128@had64",
    "mwq": "mwq2345678-g128@had64",
    "any": "any2345678-channel",
    "stack": "stack12345678-r1@had64",
}


def main() -> None:
    """Compress, evaluate, print."""
    from bitnest import demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--kind", action="append", default=[], choices=list(KINDS))
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-nested-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    rows: list[dict[str, Any]] = []
    top = make(args, work, "int8-g128@had64", first)
    for kind in args.kind or KINDS:
        out = make(args, work, KINDS[kind], first)
        ratio = size(out) / size(top)
        found = evaluate(args, [out], second, bits=WIDTHS)
        rows += [row(kind, w, r, found, ratio) for w, r in zip(WIDTHS, found.rows[1:], strict=True)]
    for name in ("alone", "sliced"):
        for width in WIDTHS:
            if name == "alone":
                out = make(args, work, f"int{width}-g128@had64", first)
                found = evaluate(args, [out], second)
            else:
                found = sliced(args, top, second, width)
            rows.append(row(name, width, found.rows[1], found, 1.0))
    report(rows)
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def make(args: argparse.Namespace, work: Path, name: str, data: list[str]) -> Path:
    """The artifact of one format, made once."""
    from bitnest import api

    out = work / name
    started = time.monotonic()
    if not out.exists():
        api.compress(
            args.model, out, format=name, data=data, samples=args.samples, length=args.length
        )
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    return out


def evaluate(args: argparse.Namespace, models: list[Path], data: list[str], **options: Any) -> Any:
    """Rows of the base and the models."""
    from bitnest import api

    return api.evaluate(models, against=args.model, data=data, **options)


def sliced(args: argparse.Namespace, artifact: Path, data: list[str], width: int) -> Any:
    """The 8-bit artifact with only the first `width` bits of every code."""
    from bitnest.eval import evaluate as module

    real = module.load_model

    def load(path: Path, **options: Any) -> Any:
        model = real(path, **options)
        for weight in getattr(getattr(model, "bitnest_source", None), "weights", ()):
            cut_codes(weight[1], width)
        return model

    module.load_model = load
    try:
        return evaluate(args, [artifact], data)
    finally:
        module.load_model = real


def cut_codes(weight: Any, width: int) -> None:
    """Replace 8-bit codes by the middle of the cell that their first bits name."""
    from bitnest.kernels.packing import pack_bits, unpack_bits

    rest = 8 - width
    codes = unpack_bits(weight.codes, 8, weight.shape[1]).int()
    middle = ((codes >> rest) << rest) + ((1 << rest) >> 1)
    weight.codes = pack_bits(middle, 8)


def size(artifact: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in artifact.iterdir())


def row(name: str, width: int, measured: Any, found: Any, ratio: float) -> dict[str, Any]:
    """One line of the table."""
    base = {s.text: s.perplexity for s in found.rows[0].scores}
    return {
        "name": name, "width": width, "size": ratio, "base": base,
        "kl": {s.text: s.kl.mean for s in measured.scores},
        "perplexity": {s.text: s.perplexity for s in measured.scores},
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> None:
    """Mean KL, and perplexity over that of `alone`, at every width."""
    alone = {r["width"]: r for r in rows if r["name"] == "alone"}
    texts = list(rows[0]["kl"])
    print(f"{'mean KL':<8}" + "".join(f"{w:>10}" for w in WIDTHS) + f"{'size':>8}")
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name]
        means = [sum(r["kl"].values()) / len(texts) for r in own]
        print(f"{name:<8}" + "".join(f"{m:10.5f}" for m in means) + f"{own[0]['size']:8.3f}")
    print("\nperplexity over that of GPTQ at this width alone, the worst text")
    for name in dict.fromkeys(r["name"] for r in rows):
        own = [r for r in rows if r["name"] == name]
        worst = [
            max(r["perplexity"][t] / alone[r["width"]]["perplexity"][t] for t in texts) for r in own
        ]
        print(f"{name:<8}" + "".join(f"{w:10.3f}" for w in worst))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
