"""What llama.cpp's quantisers keep of a Qwen3-MoE or Qwen2-MoE, beside its exact file bytes.

    python -m benchmarks.llama_cpp MODEL --llama DIR --calibration FILE \\
        --data LABEL=FILE [--data ...] --type Q2_K [--type Q3_K_M ...] [--work DIR]

DIR holds llama-quantize and llama-imatrix, and llama-tokenize if the two tokenizers are to be
compared token by token. Steps:

1. MODEL becomes a GGUF file: matrices F16; vectors and routers F32, as llama.cpp's own converter
   has them; a layer's experts stacked. Neither family permutes queries or keys.
2. llama-imatrix reads the first 64 chunks of 512 tokens of the calibration text. The perplexity it
   prints (over the second half of every chunk) is computed here from MODEL as well: the two agree
   only if tokens, names, rotary embedding and gates do.
3. llama-quantize writes every type, all its mixtures as they are: the embedding is quantised too.
4. Every tensor is decoded by gguf's own decoder to float32 and evaluated as a checkpoint by
   `bitnest.eval`: 64 windows of 256 tokens spread evenly over a text, KL(MODEL || decoded) per
   token, float32. Activations are not quantised, which flatters llama.cpp a little.

Bits per weight: 8 bytes / weights over attention and experts, shared ones included, but not
embedding, head, router, norms, biases. File bytes: of the whole file, vocabulary included; tensor
bytes: of its tensors alone. F16 may be named as a type: the file of step 1.

stdout ends with one JSON line. Left out: speed, other families and tokenizers that are not
byte-level BPE (refused), files in several parts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnest.checkpoint import Checkpoint

FAMILIES = {"qwen3_moe": "QWEN3MOE", "qwen2_moe": "QWEN2MOE"}  # model_type -> gguf's name
CHUNKS, CONTEXT = 64, 512  # of the importance matrix
TOLERANCE = 0.01  # nats between llama.cpp's loss and transformers', on the same model and text
PREFIX = 100_000  # characters of the calibration text that both tokenizers read
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SIZED = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down)_(exps|shexp))\.weight")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
DIGIT = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class Sizes:
    """One GGUF file. bits_per_weight: see above; types: how many tensors have each type;
    embedding, head: their types, the head's that of the embedding where they are tied."""

    bits_per_weight: float
    file_bytes: int
    tensor_bytes: int
    types: dict[str, int]
    embedding: str
    head: str


def gguf() -> ModuleType:
    """The package gguf, wanted by this file alone."""
    try:
        import gguf
    except ImportError as error:
        raise SystemExit(
            "the package gguf is missing\nhint: pip install 'bitnest[gguf]'"
        ) from error
    return gguf


def log(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def run(binary: Path, *arguments: str | Path) -> str:
    """What a program of llama.cpp printed, on both channels."""
    command = [str(binary), *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = done.stdout.decode(errors="replace")  # vocabulary is printed cut off mid-character
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{printed[-3000:]}")
    return printed


# ---- names and metadata


def layout(source: Checkpoint) -> dict[str, list[str]]:
    """GGUF name -> names of MODEL: one, or one per expert in order."""
    lib = gguf()
    arch = lib.MODEL_ARCH[FAMILIES[source.config["model_type"]]]
    names = lib.get_tensor_name_map(arch, source.config["num_hidden_layers"])
    found: dict[str, dict[int, str]] = {}
    for name in source.tensors:
        expert = EXPERT.fullmatch(name)
        merged = f"{expert[1]}.{expert[3]}" if expert else name
        target = names.get_name(merged, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SystemExit(f"{source.path}: llama.cpp has no name for tensor '{name}'")
        found.setdefault(target, {})[int(expert[2]) if expert else 0] = name
    return {target: [parts[i] for i in sorted(parts)] for target, parts in found.items()}


def describe(writer: Any, config: dict[str, Any]) -> None:
    """Hyperparameters, as llama.cpp's converter writes them."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"rotary embedding of type '{rope['rope_type']}' is not written here")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_file_type(gguf().LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf().GGML_QUANT_VERSION)


def splitting(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging; `compare_tokens` proves it."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    last = steps[-1]
    if last["type"] == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]:
        if len(steps) == 1:
            return "gpt-2"
        if steps[:-1] == [DIGIT]:
            return "refact"  # every digit alone, then as GPT-2
    raise SystemExit(f"no name is known here for the pre-tokenizer {json.dumps(pre_tokenizer)}")


def describe_tokenizer(writer: Any, source: Checkpoint) -> None:
    """The byte-level BPE of tokenizer.json, padded to the rows of the embedding."""
    lib = gguf()
    stored = json.loads((source.path / "tokenizer.json").read_text(encoding="utf-8"))
    if stored["model"]["type"] != "BPE" or stored.get("normalizer"):
        raise SystemExit(f"{source.path}: only byte-level BPE without normaliser is written here")
    size = source.config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [lib.TokenType.UNUSED] * size
    for text, i in stored["model"]["vocab"].items():
        tokens[i], types[i] = text, lib.TokenType.NORMAL
    for added in stored["added_tokens"]:
        kind = lib.TokenType.CONTROL if added["special"] else lib.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(stored["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if isinstance(eos := source.config.get("eos_token_id"), int):
        writer.add_eos_token_id(eos)
    if isinstance(bos := source.config.get("bos_token_id"), int):
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(False)


def write_f16(source: Checkpoint, names: dict[str, list[str]], file: Path) -> None:
    """MODEL as one GGUF file."""
    writer = gguf().GGUFWriter(file, FAMILIES[source.config["model_type"]].lower())
    writer.add_name(source.path.name)
    describe(writer, source.config)
    describe_tokenizer(writer, source)
    for target, parts in names.items():
        values = torch.stack([source.read(name).float() for name in parts]).squeeze()
        wide = values.ndim == 1 or target.endswith("ffn_gate_inp.weight")
        writer.add_tensor(target, values.numpy().astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- proofs that llama.cpp reads what was written


def compare_tokens(args: argparse.Namespace, file: Path, text: str, tokenizer: Any) -> int | None:
    """Tokens of the text's first PREFIX characters, the same in both; None: no llama-tokenize."""
    binary = args.llama / "llama-tokenize"
    if not binary.exists():
        return None
    part = args.work / "tokens.txt"
    part.write_text(text[:PREFIX], encoding="utf-8")
    options = ("--ids", "--no-bos", "--no-parse-special", "--no-escape")
    printed = run(binary, "-m", file, "-f", part, *options)
    theirs = json.loads([line for line in printed.splitlines() if line.startswith("[")][-1])
    ours = tokenizer(text[:PREFIX], verbose=False)["input_ids"]
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), "end")
        raise SystemExit(f"{file}: llama.cpp tokenises otherwise, from token {at} on")
    return len(ours)


@torch.no_grad()
def half_perplexity(model: Any, ids: Tensor) -> float:
    """Perplexity of ids (chunks, CONTEXT), predictions of the second half of each only."""
    first, nats = CONTEXT // 2, 0.0
    for chunk in ids.split(4):
        logits = model(input_ids=chunk, use_cache=False).logits[:, first:-1]
        labels = chunk[:, first + 1 :].flatten()
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels, reduction="sum"
        ).item()
    return math.exp(nats / (len(ids) * (CONTEXT - 1 - first)))


def importance(args: argparse.Namespace, file: Path) -> tuple[Path, dict[str, Any]]:
    """The importance matrix, and what shows that both run the same model on the same tokens."""
    from bitnest.packed.loading import load_model, load_tokenizer

    matrix = args.work / "imatrix.gguf"
    printed = run(
        args.llama / "llama-imatrix", "-m", file, "-f", args.calibration, "-o", matrix,
        "-c", str(CONTEXT), "--chunks", str(CHUNKS), "-t", str(args.threads), "--no-escape",
    )  # fmt: skip
    theirs = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    if theirs is None:
        raise SystemExit(f"llama-imatrix printed no perplexity:\n{printed[-3000:]}")
    text = args.calibration.read_text(encoding="utf-8")
    tokenizer: Any = load_tokenizer(args.model)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    chunks = min(CHUNKS, len(ids) // CONTEXT)
    ours = half_perplexity(
        load_model(args.model, dtype="float32"), ids[: chunks * CONTEXT].view(chunks, CONTEXT)
    )
    if abs(math.log(ours / float(theirs[1]))) > TOLERANCE:
        raise SystemExit(f"{file}: perplexity {theirs[1]} in llama.cpp, {ours:.4f} in transformers")
    return matrix, {
        "chunks": chunks,
        "tokens_compared": compare_tokens(args, file, text, tokenizer),
        "perplexity_llama_cpp": float(theirs[1]),
        "perplexity_transformers": round(ours, 4),
    }


# ---- quantised files


def quantise(args: argparse.Namespace, f16: Path, matrix: Path, kind: str) -> Path:
    """The file of one type."""
    if kind == "F16":
        return f16
    file: Path = args.work / f"{kind}.gguf"
    imatrix = ("--imatrix", matrix)
    run(args.llama / "llama-quantize", *imatrix, f16, file, kind, str(args.threads))
    return file


def measure(file: Path) -> Sizes:
    """Exact sizes of one file."""
    tensors = gguf().GGUFReader(file).tensors
    sized = [t for t in tensors if SIZED.fullmatch(t.name)]
    by_name = {t.name: t.tensor_type.name for t in tensors}
    embedding = by_name["token_embd.weight"]
    return Sizes(
        8 * sum(int(t.n_bytes) for t in sized) / sum(int(t.n_elements) for t in sized),
        file.stat().st_size,
        sum(int(t.n_bytes) for t in tensors),
        dict(Counter(by_name.values()).most_common()),
        embedding,
        by_name.get("output.weight", embedding),
    )


def decode(file: Path, source: Checkpoint, names: dict[str, list[str]], out: Path) -> None:
    """`file` as a float32 checkpoint in `out`; every tensor of MODEL comes from the file."""
    from bitnest.safetensors_io import entry, write_file

    lib, entries = gguf(), []
    for tensor in lib.GGUFReader(file).tensors:
        values = torch.from_numpy(np.array(lib.dequantize(tensor.data, tensor.tensor_type)))
        parts = names[tensor.name]
        for name, part in zip(parts, values.chunk(len(parts)), strict=True):
            shape = source.tensors[name].shape
            entries.append(entry(name, part.float().reshape(shape).contiguous()))
    missing = set(source.tensors) - {e.name for e in entries}
    if missing:
        raise SystemExit(f"{file}: no tensor for {sorted(missing)[:3]}")
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "model.safetensors", entries)
    (out / "config.json").write_text(json.dumps(source.config | {"dtype": "float32"}))
    for name in TOKENIZER_FILES:
        if (source.path / name).exists():
            shutil.copy(source.path / name, out / name)


# ---- report


def scores(row: Any) -> dict[str, dict[str, float]]:
    """Label -> perplexity, and divergence from the base where there is one."""
    out = {}
    for score in row.scores:
        out[score.text] = {"perplexity": round(score.perplexity, 4)}
        if score.kl is not None:
            out[score.text] |= {
                "kl": float(f"{score.kl.mean:.5g}"),
                "kl_median": float(f"{score.kl.median:.5g}"),
                "kl_p99": float(f"{score.kl.p99:.5g}"),
                "same_top": round(score.kl.same_top, 5),
            }
    return out


def table(base: dict[str, dict[str, float]], rows: Sequence[dict[str, Any]]) -> str:
    """One line per type."""
    head = f"{'type':<10}{'bits':>7}{'file bytes':>13}"
    first = f"{'(base)':<10}{'':>20}"
    for label, score in base.items():
        head += f"{label[:12] + ' PPL':>18}{'KL':>9}{'top-1':>8}"
        first += f"{score['perplexity']:>18.2f}{'':>17}"
    lines = [head, first]
    for row in rows:
        line = f"{row['type']:<10}{row['bits_per_weight']:>7.3f}{row['file_bytes']:>13,}"
        for score in row["texts"].values():
            line += f"{score['perplexity']:>18.2f}{score['kl']:>z9.5f}{score['same_top']:>8.1%}"
        lines.append(line)
    return "\n".join(lines)


def version(llama: Path) -> str:
    """What the programs say of themselves."""
    found = re.search(r"version: (.*)", run(llama / "llama-imatrix", "--version"))
    return found[1] if found else "unknown"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="directory of its programs")
    parser.add_argument("--llama-version", default="", help="release to name beside theirs")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--data", action="append", required=True, metavar="LABEL=FILE")
    parser.add_argument("--type", action="append", required=True, help="as llama-quantize has it")
    parser.add_argument("--work", type=Path, help="keeps the .gguf files there")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Convert, quantise, decode, evaluate, print."""
    from bitnest import api

    args = parse()
    torch.set_num_threads(args.threads)
    source = Checkpoint.open(args.model)
    if source.config["model_type"] not in FAMILIES:
        raise SystemExit(f"{args.model}: only {', '.join(FAMILIES)} are written here")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        names, f16 = layout(source), args.work / "F16.gguf"
        write_f16(source, names, f16)
        matrix, check = importance(args, f16)
        log(f"importance matrix: {check}")
        rows: list[dict[str, Any]] = []
        decoded = [Path(temporary) / "decoded" / kind for kind in args.type]
        for kind, place in zip(args.type, decoded, strict=True):
            file = quantise(args, f16, matrix, kind)
            rows.append({"type": kind} | asdict(measure(file)))
            decode(file, source, names, place)
            log(f"{kind}: {rows[-1]['file_bytes']:,} bytes")
        report = api.evaluate(decoded, against=args.model, data=args.data)
    for row, measured in zip(rows, report.rows[1:], strict=True):
        row["texts"] = scores(measured)
    base = scores(report.rows[0])
    print(table(base, rows))
    text = report.texts[0]
    result = {
        "model": source.path.name,
        "protocol": f"{text.windows} windows x {text.window} tokens, {text.selection}, float32",
        "llama_cpp": f"{args.llama_version} {version(args.llama)}".strip(),
        "gguf": importlib.metadata.version("gguf"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s), "
        f"torch {torch.__version__}",
        "seconds": round(time.monotonic() - began, 1),
        "check": check,
        "base": base,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
