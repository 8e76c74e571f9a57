"""bitnest compress."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Device, Json, Quiet, Remote, parse_size


def command(
    model: str = typer.Argument(help="Directory, hub id, or 'demo'."),
    out: Path = typer.Option(None, "-o", "--out", help="Artifact directory (default: by name)."),
    bits: float = typer.Option(
        None, "--bits", help="Code width of every site, 1 to 8 (default: 4)."
    ),
    format: str = typer.Option(
        None, "--format", help="int3-g64-asym, mxfp4, nvfp4, fp8-channel ...: see bitnest formats."
    ),
    group: int = typer.Option(
        None, "--group", help="Input channels per scale, 16 to 128 (default: 128)."
    ),
    method: str = typer.Option("gptq", "--method", help="gptq or rtn."),
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

    A killed run resumes when the same command is given again.
    """
    from bitnest.cli.render import Bars, next_commands, print_json, say, summary
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    target = out or Path(default_name(model, bits, format, group))
    if not data and statistics is None and method != "rtn" and not quiet:
        say("calibrating on the embedded text; your own, by --data, fits your use better")
    with Bars(quiet) as bars:
        result = api.compress(
            model,
            target,
            bits=bits,
            format=format,
            group=group,
            method=method,
            rules=[*rule, *(f"{pattern}=dense" for pattern in keep)],
            data=data,
            samples=samples,
            length=length,
            weighting=weighting,
            damp=damp,
            min_tokens=min_tokens,
            clip=clip,
            seed=seed,
            memory=parse_size(memory),
            device=device,
            compute=compute,
            statistics=statistics,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            progress=bars,
        )
    if data and not result.calibrated and not quiet:
        say("rounding to nearest reads no text: --data was not used")
    if method == "rtn" and not quiet:
        _warn_without_compiler(device)
    if json:
        print_json(result.to_json())
        return
    summary(result)
    if not quiet:
        next_commands(result, model)


def _warn_without_compiler(device: str | None) -> None:
    from bitnest.cli.render import say
    from bitnest.device import choose_device
    from bitnest.kernels import encode

    if choose_device(device).type == "cpu" and encode.implementation() == "reference":
        say(
            "no C compiler could be used: rounding ran in torch, ten times slower; "
            "hint: install gcc or clang, or set CC"
        )


def default_name(model: str, bits: float | None, fmt: str | None, group: int | None) -> str:
    """Artifact directory for `model` when none is named: <model>-<format> in this directory."""
    from bitnest.recipe import default_format

    return f"{Path(model).name}-{default_format(bits, fmt, group)}"
