"""What an export made of a nested artifact loses against one made of the original model.

    python -m benchmarks.nested_export MODEL [--data LABEL=FILE ...] [--bits N ...] [--work DIR]

Every text is cut in half: the first halves calibrate, the second halves are measured on. For every
width there are three rows, each int<bits>-g128 by GPTQ: `original` from the model, `nested` by
`export --bits` from an artifact that can be read at 2 to 8 bits, and `rtn` the same by rounding to
nearest. `nested 8` is that artifact itself, at 8 bits. Exports are opened by transformers where the
package compressed-tensors is installed; without it the artifact that was exported is measured,
which decodes to the same weights bit for bit. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.nested_table import evaluate
from benchmarks.predicted_kl import halves, machine

VERSIONS = ("torch", "transformers", "compressed-tensors")


def main() -> None:
    """Compress, export, evaluate, print."""
    from bitnest import demo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--bits", action="append", type=int, default=[])
    parser.add_argument("--nested", default="2-8", help="Widths of the nested artifact.")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-nested-export-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    models = {"nested 8": compress(args, args.model, work / "nested", first, nested=args.nested)}
    for bits in args.bits or [3, 4, 8]:
        name = f"int{bits}-g128"
        own = compress(args, args.model, work / name, first, format=name)
        models[f"{name} original"] = opened(own, work / f"{name}-export")
        for label, method in (("nested", "gptq"), ("rtn", "rtn")):
            models[f"{name} {label}"] = requantised(args, models["nested 8"], work, bits, method,
                                                    first)  # fmt: skip
    found = evaluate(args, list(models.values()), second)
    rows = [row(name, r) for name, r in zip(["model", *models], found.rows, strict=True)]
    report(rows)
    versions = {name: version(name) for name in VERSIONS if find_spec(name.replace("-", "_"))}
    print(json.dumps({
        "model": Path(args.model).name, "rows": rows, "versions": versions, "machine": machine(),
    }))  # fmt: skip


def compress(
    args: argparse.Namespace, model: str | Path, out: Path, data: list[str], **format: Any
) -> Path:
    """An artifact, made once."""
    from bitnest import api

    started = time.monotonic()
    if not out.exists():
        api.compress(model, out, data=data, samples=args.samples, length=args.length, **format)
        sys.stderr.write(f"{out.name}: {time.monotonic() - started:.0f} s\n")
    return out


def opened(artifact: Path, out: Path) -> Path:
    """The export of an artifact, or the artifact where exports cannot be opened."""
    from bitnest import api

    if find_spec("compressed_tensors") is None:
        return artifact
    if not out.exists():
        api.export(artifact, out)
    return out


def requantised(
    args: argparse.Namespace, nested: Path, work: Path, bits: int, method: str, data: list[str]
) -> Path:
    """The export made of a nested artifact, or the same weights as an artifact."""
    from bitnest import api

    out = work / f"int{bits}-g128-{method}-of-nested"
    if find_spec("compressed_tensors") is None:
        return compress(args, nested, out, data, format=f"int{bits}-g128", method=method)
    if not out.exists():
        texts = data if method == "gptq" else []
        result = api.export(nested, out, bits=bits, method=method, data=texts,
                            samples=args.samples, length=args.length)  # fmt: skip
        sys.stderr.write(f"{result.requantised}\n")
    return out


def row(name: str, measured: Any) -> dict[str, Any]:
    """One line: means over texts."""
    scores = measured.scores

    def mean(values: Any) -> float:
        return sum(values) / len(scores)

    found = {"name": name, "perplexity": mean(s.perplexity for s in scores)}
    if scores[0].kl is not None:
        for key in ("mean", "error", "median", "p99"):
            found[key] = mean(getattr(s.kl, key) for s in scores)
    return found


def report(rows: list[dict[str, Any]]) -> None:
    """KL to the model, with one standard error of its mean, and perplexity.

    The median and the 99th percentile are there because single tokens may make up most of a mean.
    """
    print(f"{'KL':<20}{'mean':>10}{'+-':>10}{'median':>11}{'p99':>9}{'perplexity':>12}")
    for r in rows:
        kl = " " * 40
        if "mean" in r:
            kl = f"{r['mean']:>10.5f}{r['error']:>10.5f}{r['median']:>11.6f}{r['p99']:>9.4f}"
        print(f"{r['name']:<20}{kl}{r['perplexity']:>12.4f}")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
