"""bitnest export."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Device, Json, Quiet, Remote, parse_size


def command(
    artifact: Path = typer.Argument(help="Artifact directory."),
    out: Path = typer.Option(..., "-o", "--out", help="Directory to write."),
    engine: str = typer.Option(
        None, "--for", help="Refuse what it cannot run: vllm-cuda, vllm-cpu or transformers."
    ),
    weights_only: bool = typer.Option(
        False, "--weights-only", help="Leave inputs in 16 bit that the artifact rounds."
    ),
    bits: int = typer.Option(
        None,
        "--bits",
        help="Of a nested artifact: quantise its widest width anew, to integers of 2 to 8 bits.",
    ),
    group: str = typer.Option(
        None,
        "--group",
        help="With --bits: input channels per scale, 16 to 128, or channel (default: 128).",
    ),
    method: str = typer.Option("gptq", "--method", help="With --bits: gptq or rtn."),
    data: list[str] = typer.Option(
        [],
        "--data",
        help="With --bits or an fp8 cache: calibration text, label=source or just the source: a "
        "file, a directory or hub:name (default: embedded text).",
    ),
    samples: int = typer.Option(64, "--samples", min=1, help="Calibration windows."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens per window."),
    seed: int = typer.Option(0, "--seed", min=0, help="Choice of calibration windows."),
    kv: str = typer.Option(
        None,
        "--kv",
        help="The engine's KV cache: fp8, with scales calibrated on --data (default: what the "
        "artifact asks for, its own texts), or none.",
    ),
    memory: str = typer.Option(None, "--memory", help="Bound on the process, such as 3GiB."),
    device: str = Device,
    verify: bool = typer.Option(
        True,
        "--verify/--no-verify",
        help="Reopen with an independent reader, compare every weight.",
    ),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Write an artifact as compressed-tensors, for vLLM and transformers, and verify it.

    Inputs that the artifact rounds as the model runs are rounded by the engine too, or refused.

    A nested artifact needs --bits: its weights are requantised from the widest width that is
    there (8 bits, mostly), whose own error is added. Quantising the original model directly does
    without it: do that if you have it.
    """
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api

    if bits is not None and method != "rtn" and not data and not quiet:
        say("calibrating on the embedded text; your own, by --data, fits your use better")
    with Bars(quiet) as bars:
        result = api.export(
            artifact, out, engine=engine, verify=verify, weights_only=weights_only, bits=bits,
            group=group, method=method, data=data, samples=samples, length=length, seed=seed, kv=kv,
            memory=parse_size(memory), device=device, trust_remote_code=trust_remote_code,
            progress=bars,
        )  # fmt: skip
    if json:
        print_json(result.to_json())
    else:
        typer.echo(str(result))
