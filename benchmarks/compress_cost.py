"""What one W4 g128 GPTQ compression costs, as a whole process, beside llm-compressor's.

    python -m benchmarks.compress_cost --model DIR --text FILE [--peer PYTHON] [--runs 3]

Both are given the same 64 x 512 tokens (bitnest's seeded choice from FILE) and run in turn; user
CPU seconds, wall seconds and peak memory are the system's figures for each finished process.
PYTHON is an interpreter with llm-compressor; without it only bitnest is measured. Without --model
and --text: the embedded model and text. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
model_path, tokens, out, scheme = sys.argv[1:]
rows = json.load(open(tokens))
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
oneshot(model=model, dataset=data, max_seq_length=len(rows[0]), num_calibration_samples=len(rows),
        recipe=GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*mlp.gate$"]))
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
"""


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Run to the end: user and system seconds, wall seconds, peak MB (10^6 bytes)."""
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"failed: {' '.join(command[:4])}\n{log.read_text()[-3000:]}")
    return {
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "wall_s": time.monotonic() - started,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    """Measure in turn and print medians."""
    from bitnest import demo
    from bitnest.api import load_tokenizer
    from bitnest.calibrate.data import calibration_windows, parse_source

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.model_path())
    parser.add_argument("--text", type=Path, default=demo.calibration_text())
    parser.add_argument("--peer", help="python with llm-compressor")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the last results in this directory")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"bitnest": []}
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        windows = calibration_windows(
            load_tokenizer(args.model), [parse_source(f"text={args.text}")],
            samples=64, length=512, seed=0,
        )  # fmt: skip
        tokens = place / "tokens.json"
        tokens.write_text(json.dumps(windows.tokens.tolist()))
        for run in range(args.runs):
            out = place / f"bitnest-w{args.bits}-{run}"
            command = [
                sys.executable, "-m", "bitnest", "compress", str(args.model), "-o", str(out),
                "--bits", str(args.bits), "--data", f"text={args.text}", "--quiet",
            ]  # fmt: skip
            found["bitnest"].append(measure(command, place / "bitnest.log"))
            if args.peer:
                out = place / f"peer-w{args.bits}-{run}"
                scheme = f"W{args.bits}A16"
                command = [args.peer, "-c", PEER, str(args.model), str(tokens), str(out), scheme]
                found.setdefault("llm-compressor", []).append(measure(command, place / "peer.log"))
    report(found)


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Median of each figure, and the ratio."""
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    for name, row in medians.items():
        print(f"{name:16}" + "".join(f"{key} {value:9.1f}   " for key, value in row.items()))
    if "llm-compressor" in medians:
        ratio = medians["bitnest"]["user_s"] / medians["llm-compressor"]["user_s"]
        print(f"user CPU ratio {ratio:.2f}")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"machine": machine, "runs": found, "median": medians}))


if __name__ == "__main__":
    main()
