"""Does vLLM compute what bitnest measured? Top-token agreement of an export with its artifact.

    python -m benchmarks.vllm_agreement ARTIFACT EXPORT TEXT.txt VLLM_PYTHON

Windows of the text, evenly spread, are teacher-forced through vLLM (in its own interpreter, started
as a subprocess, since it pins other versions) and through bitnest's own model in float32; the share
of positions with the same most likely next token is the result. The export is also loaded by
transformers and its logits compared with bitnest's in the model's own type.

The bar is 95 %, not 100 %: vLLM's CPU kernels quantise activations to 8 bits. The floor is what
bitnest itself agrees with when it computes in the model's type instead of float32. Where the
artifact rounds inputs, bitnest's model is the integer-exact emulation. How far it agrees with the
same weights and inputs left alone says what of the agreement is due to rounding in the same way:
little at 8 bits, whose rounding moves few tokens.

stdout ends with one JSON line. Left out: speed, which `benchmarks/` measures elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, LENGTH = 20, 64

VLLM_PROGRAM = """
import json, os, sys
if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm import LLM, SamplingParams
    model, prompts, answers = sys.argv[1:]
    tokens = json.load(open(prompts))
    llm = LLM(model=model, enforce_eager=True, max_model_len=2 * len(tokens[0]), max_num_seqs=32)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": row} for row in tokens], params)
    top = []
    for output in outputs:  # position 0 has no prediction; the last one is the sampled token
        row = [
            next(token for token, value in entry.items() if value.rank == 1)
            for entry in output.prompt_logprobs[1:]
        ]
        top.append(row + [output.outputs[0].token_ids[0]])
    json.dump({"top": top, "version": vllm.__version__}, open(answers, "w"))
"""


@dataclass(frozen=True)
class Agreement:
    """The shares of positions with the same top token, over `positions`.

    vllm_agrees: vLLM with bitnest in float32. floor: bitnest in the model's type with float32.
    transformers_agrees: transformers' load of the export with bitnest, both in the model's type;
    None if it cannot load this export. max_logit_difference: the largest between those two.
    logit_std: of bitnest's logits. unrounded_*: with bitnest in float32, its inputs left alone,
    of vLLM, of bitnest in float32 with them rounded, of transformers with bitnest in the model's
    type; None where no inputs are rounded.
    """

    positions: int
    vllm_agrees: float
    floor: float
    transformers_agrees: float | None
    max_logit_difference: float | None
    logit_std: float
    unrounded_vllm: float | None = None
    unrounded_own: float | None = None
    unrounded_transformers: float | None = None


def prompts(artifact: Path, text: Path) -> list[list[int]]:
    """PROMPTS windows of LENGTH tokens, evenly spread over the text."""
    from bitnest.packed.loading import load_tokenizer

    tokens = load_tokenizer(artifact)(text.read_text(encoding="utf-8"))["input_ids"]
    if len(tokens) < PROMPTS * LENGTH:
        raise SystemExit(f"{text} has {len(tokens)} tokens, {PROMPTS * LENGTH} are needed")
    stride = (len(tokens) - LENGTH) // (PROMPTS - 1)
    return [list(tokens[i * stride : i * stride + LENGTH]) for i in range(PROMPTS)]


def vllm_top(python: Path, export: Path, tokens: list[list[int]]) -> dict[str, Any]:
    """vLLM's most likely next token after every position, `top` (PROMPTS, LENGTH)."""
    with tempfile.TemporaryDirectory() as place:
        program, asked, answers = (Path(place) / n for n in ("run.py", "asked.json", "top.json"))
        program.write_text(VLLM_PROGRAM, encoding="utf-8")
        asked.write_text(json.dumps(tokens), encoding="utf-8")
        command = [str(python), str(program), str(export.resolve()), str(asked), str(answers)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ, check=False, cwd=place
        )
        if not answers.exists():
            causes = [
                x for x in done.stdout.splitlines() + done.stderr.splitlines() if "Error:" in x
            ]
            print(
                "vllm refused: " + (causes[0].partition("] ")[2] if causes else "no reason given")
            )
            raise SystemExit(f"vLLM did not finish:\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
        for line in (done.stdout + done.stderr).splitlines():
            for word in ("Using ", "Selected "):
                if word in line and any(w in line for w in ("Kernel", "MoE", "qlinear")):
                    print(f"vllm: {word}" + line.partition(word)[2])
        answer: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
        return answer


def logits(model: Any, tokens: list[list[int]]) -> Any:
    """Logits (PROMPTS, LENGTH, vocabulary) in float32."""
    import torch

    with torch.no_grad():
        rows = [model(torch.tensor([row]), use_cache=False).logits[0].float() for row in tokens]
    return torch.stack(rows)


def compare(artifact: Path, export: Path, tokens: list[list[int]], top: Any) -> Agreement:
    """bitnest's own model against vLLM's `top` and transformers' load of the export."""
    import torch
    from transformers import AutoModelForCausalLM

    from bitnest.artifact import Artifact
    from bitnest.errors import TargetError
    from bitnest.export.targets import check_engine
    from bitnest.packed.loading import load_model
    from bitnest.packed.modules import inputs_unrounded

    records = Artifact.open(artifact).records
    model = load_model(artifact, dtype=torch.float32)
    exact = logits(model, tokens)
    with inputs_unrounded(model):
        alone = logits(model, tokens)
    model = load_model(artifact)
    own = logits(model, tokens)
    with inputs_unrounded(model):
        own_alone = logits(model, tokens)
    best = exact.argmax(-1)
    try:
        check_engine("transformers", records, {})
        model = AutoModelForCausalLM.from_pretrained(export, dtype="auto").eval()
        other = logits(model, tokens)
    except TargetError as error:
        print(f"transformers left out: {error.what}")
        other = None
    unrounded: dict[str, float | None] = {}
    if any(record.inputs for record in records):
        unrounded["unrounded_vllm"] = _share(alone.argmax(-1) == torch.tensor(top))
        unrounded["unrounded_own"] = _share(alone.argmax(-1) == best)
        if other is not None:
            same = own_alone.argmax(-1) == other.argmax(-1)
            unrounded["unrounded_transformers"] = _share(same)
    return Agreement(
        **unrounded,
        positions=best.numel(),
        vllm_agrees=_share(best == torch.tensor(top)),
        floor=_share(best == own.argmax(-1)),
        transformers_agrees=None if other is None else _share(own.argmax(-1) == other.argmax(-1)),
        max_logit_difference=None if other is None else float((own - other).abs().max()),
        logit_std=float(own.std()),
    )


def _share(same: Any) -> float:
    return round(float(same.float().mean()), 4)


def machine() -> dict[str, str]:
    """Processor and versions of this side."""
    import torch
    import transformers

    import bitnest

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "cores": str(os.cpu_count()),
        "bitnest": bitnest.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Parse the command line, run both sides, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, help="bitnest artifact directory")
    parser.add_argument("export", type=Path, help="its compressed-tensors export")
    parser.add_argument("text", type=Path, help="text file")
    parser.add_argument("python", type=Path, help="Python interpreter that has vLLM installed")
    args = parser.parse_args()
    facts = machine()
    tokens = prompts(args.artifact, args.text)
    answer = vllm_top(args.python.absolute(), args.export, tokens)
    facts["vllm"] = answer["version"]
    result = compare(args.artifact, args.export, tokens, answer["top"])
    for key, value in {**facts, **vars(result)}.items():
        print(f"{key:22} {value}")
    print(json.dumps({"benchmark": "vllm_agreement", **facts, **vars(result)}))


if __name__ == "__main__":
    main()
