"""bitnest compress."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import typer

from bitnest.cli import dials
from bitnest.cli.options import Device, Json, Lora, Quiet, Remote, parse_size

# options that name the artifact, where none is named
NAMING = {
    "bits", "size", "max_kl", "min_agreement", "format", "group", "sparsity", "inputs", "nested",
    "plan", "input_bits", "input_time",
}  # fmt: skip


def command(
    call: typer.Context,
    model: str = typer.Argument(help="Directory, hub id, or 'demo'."),
    out: Path = typer.Option(None, "-o", "--out", help="Artifact directory (default: by name)."),
    lora: list[str] = Lora,
    bits: float = dials.Bits,
    size: str = dials.Size,
    max_kl: float = dials.MaxKl,
    min_agreement: str = dials.MinAgreement,
    context: int = dials.Context,
    format: str = typer.Option(
        None,
        "--format",
        help="One format for all: int3-g64-asym, mxfp4, nvfp4 ...: see bitnest formats.",
    ),
    group: int = typer.Option(
        None, "--group", help="One integer format for all: input channels per scale, 16 to 128."
    ),
    sparsity: str = typer.Option(
        None,
        "--sparsity",
        help="With --format or --group, else of 16-bit weights: 50%, 2:4, 4:8, or b16x16-50.",
    ),
    prune: str = dials.Prune,
    inputs: list[str] = dials.Inputs,
    input_bits: float = dials.InputBits,
    input_time: float = dials.InputTime,
    latency: Path = typer.Option(
        None, "--latency", help="JSON of seconds per multiply-accumulate by WEIGHTS/INPUTS."
    ),
    static: str = typer.Option(
        "mse", "--static", help="How static scales of inputs are chosen: mse, percentile, absmax."
    ),
    kv: str = typer.Option(
        None,
        "--kv",
        help="KV cache that eval and serve use for the artifact: fp8, int8, int4-g128-w128, none.",
    ),
    nested: str = dials.Nested,
    base_size: str = dials.BaseSize,
    plan: Path = typer.Option(None, "--plan", help="Carry out this plan of bitnest plan."),
    recipe: str = typer.Option(
        None,
        "--recipe",
        help="YAML with any of these options, which the command line overrides; or w8a8-int8, "
        "w8a8-fp8, w6a6, w4a8-dgq, w4a4-atom, mxfp4, three-bits ...: bitnest recipes lists them.",
    ),
    target: str = dials.TargetName,
    policy: str = dials.PolicyName,
    candidate: list[str] = dials.Candidates,
    ends: bool = dials.Ends,
    exact: bool = dials.Exact,
    check: list[str] = typer.Option(
        [],
        "--check",
        help="Text that --max-kl and --min-agreement are measured on (default: that of --data).",
    ),
    method: str = typer.Option("gptq", "--method", help="gptq or rtn."),
    fold: list[str] = typer.Option(
        [],
        "--fold",
        help="Put into the weights first what keeps the function: smooth=0.5, smooth=dgq, "
        "smooth-all=0.5, smooth-free=0.5, permute, rotate, rotate=heads; repeat it for several.",
    ),
    rule: list[str] = typer.Option(
        [], "--rule", help="PATTERN=FORMAT: a glob, re:REGEX or kind:KIND. Later rules win."
    ),
    keep: list[str] = typer.Option([], "--keep", help="PATTERN: leave matching sites dense."),
    data: list[str] = typer.Option(
        [],
        "--data",
        help="Calibration text: [label=]file, directory or hub:name (default: embedded text).",
    ),
    samples: int = typer.Option(64, "--samples", min=1, help="Calibration windows."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens per window."),
    weighting: str = typer.Option(
        "gate",
        "--expert-weighting",
        help="Token weights in an expert's Hessian: none, gate, gate2.",
    ),
    min_tokens: int = typer.Option(
        None, "--min-tokens", help="Tokens an expert needs before its own Hessian is trusted alone."
    ),
    damp: float = typer.Option(0.03, "--damp", help="Share of mean diag(H) added to it."),
    width_weight: list[str] = typer.Option(
        [],
        "--width-weight",
        help="WIDTH=WEIGHT: how much a width's error counts in nested codes (default: 1 each).",
    ),
    clip: bool = typer.Option(True, "--clip/--no-clip", help="Search the clipping of every scale."),
    seed: int = typer.Option(0, "--seed", min=0, help="Choice of calibration windows."),
    memory: str = typer.Option(None, "--memory", help="Bound on the process, such as 3GiB."),
    device: str = Device,
    compute: str = typer.Option(
        "auto", "--compute", help="Calibrate in float32 or bfloat16 (default: float32 on a CPU)."
    ),
    statistics: Path = typer.Option(
        None,
        "--statistics",
        help="What bitnest analyze wrote: says what KL to expect; its texts are the default.",
    ),
    fresh: bool = typer.Option(False, "--fresh", help="Discard an unfinished run, do not resume."),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Compress a checkpoint into an artifact that transformers, eval and serve open.

    A nested artifact may stand for its checkpoint: it is decoded at its widest width then, whose
    own error is added.

    A killed run resumes when the same command is given again.
    """
    from bitnest.cli.render import Bars, next_commands, print_json, say, summary
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    values: dict[str, Any] = {
        "lora": lora, "bits": bits, "size": parse_size(size), "max_kl": max_kl,
        "min_agreement": dials.parse_share(min_agreement), "context": context, "format": format,
        "group": group, "sparsity": sparsity, "prune": prune, "inputs": inputs,
        "input_bits": input_bits, "input_time": input_time, "latency": latency,
        "static": static, "kv": kv, "nested": nested,
        "base_size": parse_size(base_size), "plan": plan,
        "target": target, "policy": policy,
        "candidates": candidate,
        "ends": ends, "exact": exact, "check": check, "method": method,
        "rules": [*rule, *(f"{pattern}=dense" for pattern in keep)], "data": data,
        "samples": samples, "length": length, "weighting": weighting, "damp": damp,
        "min_tokens": min_tokens, "clip": clip, "width_weights": width_weight, "seed": seed,
        "memory": parse_size(memory), "compute": compute, "statistics": statistics, "fold": fold,
    }  # fmt: skip
    given: set[str] = set()
    if recipe is not None:
        from bitnest.recipe_file import read_recipe

        given = given_options(
            call,
            {
                "rules": ("rule", "keep"),
                "candidates": ("candidate",),
                "width_weights": ("width_weight",),
            },
        )
        if "/" in (values["format"] or ""):  # says inputs, too
            given.add("inputs")
        values = {**values, **read_recipe(recipe, skip=given)}

    table = values["latency"]
    values["latency"] = dials.read_latency(None if table is None else Path(table))

    def announce(planned: Any, before: Any) -> None:
        from bitnest.cli import plan_tables

        bars.pause()
        if planned is not None:
            plan_tables.summary(planned, before, None)
        else:
            for line in plan_tables.estimates(before):
                say(line)

    def advise(advice: Any) -> None:
        bars.remark(f"note: {advice.text}")

    out_dir = out or Path(default_name(model, values, recipe, given))
    plain = (values["format"] or values["group"] or values["sparsity"]) and not values["nested"]
    uniform = plain or values["plan"] or values["method"] == "rtn"
    uniform = uniform and (values["input_bits"] is None and values["input_time"] is None)
    known = values["statistics"] or (not uniform and dials.found(model, values["lora"]))
    if values["plan"]:
        from bitnest.api.compressing import plan_statistics
        from bitnest.plan import Plan

        known = known or plan_statistics(Plan.read(values["plan"]), model, values["lora"])
    blind = values["method"] == "rtn" and not values["fold"]
    if not values["data"] and not known and not blind and not quiet:
        say("calibrating on the embedded text; your own, by --data, fits your use better")
    if not quiet:
        dials.remark_nested(model)
    if not uniform and not quiet:
        dials.remark(model, values["statistics"], values["lora"])
    with Bars(quiet) as bars:
        result = api.compress(
            model, out_dir, **values, device=device, fresh=fresh,
            trust_remote_code=trust_remote_code, progress=bars,
            announce=None if quiet else announce, advise=None if quiet else advise,
        )  # fmt: skip
    if values["data"] and not result.calibrated and not values["fold"] and not quiet:
        say("rounding to nearest reads no text: --data was not used")
    if values["method"] == "rtn" and not quiet:
        _warn_without_compiler(device)
    if json:
        print_json(result.to_json())
        return
    summary(result)
    if not quiet:
        next_commands(result, model, values["lora"])


def _warn_without_compiler(device: str | None) -> None:
    from bitnest.cli.render import say
    from bitnest.device import choose_device
    from bitnest.kernels import encode

    if choose_device(device).type == "cpu" and encode.implementation() == "reference":
        say(
            "no C compiler could be used: rounding ran in torch, ten times slower; "
            "hint: install gcc or clang, or set CC"
        )


def given_options(call: typer.Context, spelt: dict[str, tuple[str, ...]]) -> set[str]:
    """Names of values that the command line gave. spelt: values that options of other names
    give."""
    asked = {
        name for name in call.params
        if getattr(call.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }  # fmt: skip
    return asked | {value for value, names in spelt.items() if asked & set(names)}


def default_name(
    model: str, values: Mapping[str, Any], recipe: str | None = None, given: Collection[str] = ()
) -> str:
    """Artifact directory for `model` when none is named: <model>-<what was asked> here. given:
    options beside the recipe."""
    from bitnest.lora import name_with
    from bitnest.recipe import DEFAULT_BITS, default_format

    name = name_with(Path(model).name, values["lora"])
    if (fmt := values["format"]) is not None and "/" in fmt:
        fmt, _, spelt = fmt.partition("/")
        values = {**values, "format": fmt, "inputs": spelt}
    said = values.get("inputs") or []
    inputs = f"-inputs-{'-'.join([said] if isinstance(said, str) else said)}" if said else ""
    for key in ("input_bits", "input_time"):
        inputs += f"-{values[key]:g}" if values.get(key) is not None else ""
    if recipe is not None:
        name += f"-{Path(recipe).stem}"
        if not NAMING & set(given):
            return name
    if values.get("fold"):
        name += "-folded"
    if values["plan"] is not None:
        return f"{name}-{Path(values['plan']).stem}{inputs}"
    if values["nested"]:
        name = f"{name}-nested-{values['nested'].replace(',', '')}"
    dial = any(values[key] is not None for key in ("bits", "size", "max_kl", "min_agreement"))
    if values["nested"] and not dial:
        return f"{name}{inputs}"
    asked = [values.get(key) for key in ("format", "group", "sparsity")]
    if any(asked):
        chosen = default_format(values["bits"], *asked)
        return f"{name}-{chosen.replace('%', '-sparse').replace(':', 'of')}{inputs}"
    for key in ("size", "max_kl", "min_agreement"):
        if values[key] is not None:
            return f"{name}-{key.replace('_', '-')}-{values[key]:g}{inputs}"
    return f"{name}-{values['bits'] or DEFAULT_BITS:g}bit{inputs}"
