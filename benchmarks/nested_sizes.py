"""One nested artifact, read in a dozen sizes: KL, time to load, bytes read, memory.

    python -m benchmarks.nested_sizes MODEL --data LABEL=FILE ... [--work DIR] [--points 12]

Every text is cut in half: the first halves are analysed and calibrate `--nested 2-8`, the second
halves are measured on. Sizes go in equal steps from the narrowest widths to the widest. Each is
loaded in a process of its own, after the imports: seconds for choosing widths and reading, bytes
of tensors read from the artifact's files, bytes the loaded model holds, and by how much the
process' resident memory rose at its highest (what transformers and the allocator take besides is
in it). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.predicted_kl import halves, machine

LOAD = """
import json, sys, time
import bitnest, torch, transformers.modeling_utils
from bitnest import api, safetensors_io
from bitnest.packed import quantizer
from pathlib import Path

path, size = sys.argv[1], int(sys.argv[2])
read = 0
real = safetensors_io.read_tensor

def counting(info):
    global read
    tensor = real(info)
    read += tensor.nbytes
    return tensor

import bitnest.artifact
bitnest.artifact.read_tensor = counting
def memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

api.fit_widths(path, size)  # imports scipy and numpy's parts
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):  # the model's code
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
started = time.perf_counter()
fitted = api.fit_widths(path, size)
chosen = time.perf_counter() - started
model = api.load(path, bits=fitted.widths)
seconds = time.perf_counter() - started
peak = memory("VmHWM") - before
tensors = [*model.parameters()]
tensors += [t for _, weight in model.bitnest_source.weights for t in weight.tensors.values()]
held = {t.data_ptr(): t.nbytes for t in tensors}
from bitnest.quantize.allocation.fitting import dense_bytes
dense = dense_bytes(bitnest.artifact.Artifact.open(path))
found = {"choose": chosen, "seconds": seconds, "read": read + dense, "bytes": fitted.nbytes}
found |= {"held": sum(held.values()), "peak": peak, "bits": fitted.bits, "predicted": fitted.mean}
print(json.dumps(found))
"""


def main() -> None:
    """Compress, load, measure, print."""
    from bitnest import api, demo
    from bitnest.artifact import Artifact
    from bitnest.quantize.allocation.fitting import Fitting

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo.model_path()))
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="bitnest-sizes-"))
    work.mkdir(parents=True, exist_ok=True)
    first, second = halves(args.data or [f"demo={demo.calibration_text()}"], work)
    options = {"data": first, "samples": args.samples, "length": args.length}
    statistics, artifact = work / "statistics", work / "nested"
    if not statistics.exists():
        api.analyze(args.model, statistics, **options)
    if not artifact.exists():
        api.compress(args.model, artifact, nested="2-8", statistics=statistics, **options)
    fitting = Fitting(Artifact.open(artifact))
    low, high = fitting.smallest, fitting.largest
    sizes = [low + (high - low) * i // (args.points - 1) for i in range(args.points)]
    loaded = [load(artifact, size) for size in sizes]
    found = api.evaluate(
        [artifact], against=args.model, data=second, sizes=sizes, windows=args.windows
    )
    rows = [
        {"size": size, **own, "kl": {s.text: s.kl.mean for s in measured.scores},
         "perplexity": {s.text: s.perplexity for s in measured.scores}}
        for size, own, measured in zip(sizes, loaded, found.rows[1:], strict=True)
    ]  # fmt: skip
    report(rows)
    print(json.dumps({"model": Path(args.model).name, "rows": rows, "machine": machine()}))


def load(artifact: Path, size: int) -> dict[str, Any]:
    """What one load takes, in a process of its own."""
    command = [sys.executable, "-c", LOAD, str(artifact), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(rows: list[dict[str, Any]]) -> None:
    """A line per size."""
    print(
        f"{'size':>12}{'used':>8}{'bits':>6}{'KL':>10}{'predicted':>11}{'choose s':>10}"
        f"{'load s':>8}{'read':>12}{'held':>12}{'peak rise':>12}"
    )
    before = float("inf")
    for r in rows:
        kl = sum(r["kl"].values()) / len(r["kl"])
        mark = "" if kl < before else "  not below the last"
        before = kl
        print(
            f"{r['size']:>12,}{r['bytes'] / r['size']:>8.2%}{r['bits']:>6.2f}{kl:>10.6f}"
            f"{r['predicted']:>11.6f}{r['choose']:>10.2f}{r['seconds']:>8.2f}{r['read']:>12,}"
            f"{r['held']:>12,}{r['peak']:>12,}{mark}"
        )
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
