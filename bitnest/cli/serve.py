"""bitnest serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitnest.cli.options import Quiet, Remote, parse_size

if TYPE_CHECKING:
    from bitnest.progress import Progress
    from bitnest.quantize.allocation.fitting import Fitted


def command(
    model: str = typer.Argument(help="Artifact or checkpoint: directory, hub id, or 'demo'."),
    bits: float = typer.Option(
        None,
        "--bits",
        help="Compress a checkpoint to this width first (default: 4); the width to read a nested "
        "artifact at.",
    ),
    size: str = typer.Option(
        None,
        "--size",
        help="Memory for the weights, such as 2GiB: widths of a nested artifact are chosen for it, "
        "a checkpoint is compressed to it.",
    ),
    lora: list[str] = typer.Option(
        [],
        "--lora",
        help="LoRA adapter, DIRECTORY or DIRECTORY:scale: beside the weights of an artifact, "
        "merged into a checkpoint before it is compressed; may be repeated.",
    ),
    format: str = typer.Option(None, "--format", help="Compress to this format first."),
    method: str = typer.Option("gptq", "--method", help="gptq or rtn, when compressing."),
    dense: bool = typer.Option(False, "--dense", help="Serve a checkpoint as it is."),
    engine: str = typer.Option("bitnest", "--engine", help="bitnest or vllm."),
    vllm_bin: str = typer.Option(None, "--vllm-bin", help="The vllm command, if not on the PATH."),
    vllm_for: str = typer.Option(
        "vllm-cuda", "--vllm-for", help="Which vLLM the export must suit: vllm-cuda or vllm-cpu."
    ),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on."),
    port: int = typer.Option(8000, "--port", min=0, max=65535, help="Port; 0 takes a free one."),
    api_key: str = typer.Option(None, "--api-key", help="Ask clients for this key."),
    name: str = typer.Option(None, "--model-name", help="Name clients use (default: MODEL)."),
    backend: str = typer.Option(
        "auto",
        "--backend",
        help="native: the C runtime, one request at a time; continuous: batches; generate: any "
        "model, one at a time; auto: native where it takes the model, else continuous.",
    ),
    cache_tokens: int = typer.Option(32768, "--cache-tokens", help="KV cache, in tokens."),
    kv: str = typer.Option(
        None,
        "--kv",
        help="KV cache: fp8, int8, int4-g128-w128 ... or none (default: what the artifact asks "
        "for). A quantised one is served by --backend generate; vllm takes fp8 and none.",
    ),
    max_pending: int = typer.Option(256, "--max-pending", help="Requests waiting before 503."),
    cache_dir: Path = typer.Option(
        None, "--cache-dir", help="Where compressed models are kept (default: ~/.cache/bitnest)."
    ),
    trust_remote_code: bool = Remote,
    quiet: bool = Quiet,
) -> None:
    """Serve a model behind an OpenAI-compatible API, compressing it first if it must be."""
    from bitnest.cli.setup import prepare_process, quiet_transformers
    from bitnest.errors import RecipeError, require

    prepare_process()
    if engine not in {"bitnest", "vllm"}:
        raise RecipeError(f"unknown engine '{engine}'", hint="bitnest or vllm")
    if backend not in {"auto", "native", "continuous", "generate"}:
        raise RecipeError(
            f"unknown backend '{backend}'", hint="auto, native, continuous or generate"
        )
    if engine == "bitnest":
        require("fastapi", "serve")
        require("uvicorn", "serve")
    if engine == "vllm":
        from bitnest.serve.engine_vllm import find_vllm

        find_vllm(vllm_bin)  # before compressing and exporting for it
    from bitnest.artifact import is_artifact
    from bitnest.cli.render import Bars, say
    from bitnest.quantize.allocation.fitting import Fitted

    with Bars(quiet) as bars:
        options: dict[str, Any] = {
            "bits": bits, "size": parse_size(size), "format": format, "method": method,
        }  # fmt: skip
        beside = _beside(model, lora, dense, engine)
        if lora and not beside:
            options["lora"] = lora
        width = _widths(model, options, engine)
        if width is not None:
            options |= {"bits": None, "size": None}
            if isinstance(width, Fitted):
                say(f"widths: {width.bits:.2f} bits on average, {width.nbytes:,} bytes")
        flag = _vllm_kv(kv, engine)
        path = _artifact(model, options, dense, cache_dir, trust_remote_code, bars, say)
        if engine == "vllm":
            flag = None if is_artifact(path) else flag  # an export says it itself
            if lost := _left_behind(path, kv, vllm_for):
                say(lost)
            path = _exported(path, vllm_for, cache_dir, kv)
    if engine == "vllm":
        from bitnest.serve.engine_vllm import serve_with_vllm

        extra = ["--served-model-name", name or model]
        extra += ["--kv-cache-dtype", flag] if flag is not None else []
        raise typer.Exit(serve_with_vllm(path, host, port, api_key, extra, vllm_bin=vllm_bin))
    from bitnest.artifact import Artifact
    from bitnest.formats.kv import read_kv
    from bitnest.packed.loading import load_model, load_tokenizer
    from bitnest.serve.run import run_server

    quiet_transformers()
    if kv is None and is_artifact(path):
        kv = Artifact.open(path).manifest.get("kv")
    run_server(
        load_model(
            path,
            bits=width.widths if isinstance(width, Fitted) else width,
            lora=beside,
            trust_remote_code=trust_remote_code,
        ),
        load_tokenizer(path, trust_remote_code=trust_remote_code),
        model_name=name or model,
        host=host,
        port=port,
        api_key=api_key,
        backend=backend,  # type: ignore[arg-type]  # one of the four, above
        cache_tokens=cache_tokens,
        max_pending=max_pending,
        kv=read_kv(kv),
    )


def _vllm_kv(kv: str | None, engine: str) -> str | None:
    """What vLLM is told of the cache of a model that it serves as it is; None: nothing.

    Raises:
        FormatError: no such format.
        TargetError: one that vLLM does not have.
    """
    from bitnest.errors import TargetError
    from bitnest.formats.kv import read_kv

    fmt = read_kv(kv)
    if engine != "vllm" or fmt is None:
        return None
    if fmt.name != "fp8_e4m3":
        raise TargetError(
            f"vLLM has no KV cache {fmt.name}",
            where="--kv",
            hint="--kv fp8, --kv none, or --engine bitnest",
        )
    return "fp8"


def _beside(model: str, lora: list[str], dense: bool, engine: str) -> list[str]:
    """The adapters that go on the loaded model; the others go into it before it is compressed.

    Raises:
        RecipeError: vLLM is to serve them beside an artifact, or in a plain checkpoint.
    """
    from bitnest.artifact import is_artifact
    from bitnest.checkpoint import resolve_model
    from bitnest.errors import RecipeError

    if not lora or not (dense or is_artifact(resolve_model(model))):
        return []
    if engine == "vllm":
        raise RecipeError(
            "--lora on a model that vLLM is to serve as it is",
            where=model,
            hint="bitnest merge MODEL --lora ... -o OUT, or compress with --lora, and serve that",
        )
    return lora


def _widths(model: str, options: dict[str, Any], engine: str) -> int | Fitted | None:
    """What a nested artifact is to be read at, None for other models and for all of it.

    Raises:
        RecipeError: a width that is not whole, a size too small, or an engine that reads no planes.
    """
    from bitnest.artifact import Artifact, is_artifact
    from bitnest.checkpoint import resolve_model
    from bitnest.errors import RecipeError
    from bitnest.packed.widths import nested_widths
    from bitnest.quantize.allocation.fitting import fit_widths

    source, bits, size = resolve_model(model), options["bits"], options["size"]
    if bits is None and size is None:
        return None
    if not is_artifact(source) or not nested_widths(Artifact.open(source)):
        return None
    if engine != "bitnest":
        raise RecipeError(
            "vLLM reads no planes", hint="serve it by bitnest's own engine, or compress with --bits"
        )
    if size is not None:
        if bits is not None:
            raise RecipeError("--bits and --size both say what is read", hint="leave out one")
        return fit_widths(Artifact.open(source), size)
    if not float(bits).is_integer():
        raise RecipeError(f"--bits {bits:g}: a width is a whole number", hint="--bits 3")
    return int(bits)


def _artifact(
    model: str,
    options: dict[str, Any],
    dense: bool,
    cache_dir: Path | None,
    trust_remote_code: bool,
    bars: Progress,
    say: Any,
) -> Path:
    """The directory to serve: `model` itself, or its compressed form from the cache."""
    from bitnest import api
    from bitnest.artifact import is_artifact
    from bitnest.checkpoint import resolve_model
    from bitnest.errors import RecipeError
    from bitnest.lora import open_adapters
    from bitnest.serve.cache import cached_artifact

    lora = options.get("lora", [])
    source = resolve_model(model)
    asked = any(options[key] is not None for key in ("bits", "size", "format"))
    if is_artifact(source) or dense:
        if asked:
            raise RecipeError(
                "--bits, --size and --format compress a checkpoint; this is served as it is",
                where=str(source),
                hint="leave them out, or name the original checkpoint",
            )
        return source

    def build(target: Path) -> None:
        say(f"compressing {model} into {target}")
        api.compress(source, target, **options, trust_remote_code=trust_remote_code, progress=bars)

    key = {**options, "lora": [[a.sha256, scale] for a, scale in open_adapters(lora)]}
    return cached_artifact(source, key if lora else options, build, root=cache_dir)


def _left_behind(path: Path, kv: str | None, target: str) -> str | None:
    """What to say of the KV cache that an artifact asks for and vLLM does not have."""
    import json

    from bitnest.artifact import Artifact, is_artifact
    from bitnest.export.kv_scales import engine_reads
    from bitnest.formats.kv import read_kv

    if kv is not None or not is_artifact(path):
        return None
    fmt = read_kv(Artifact.open(path).manifest.get("kv"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    why = None if fmt is None else engine_reads(fmt, config, target)
    return None if why is None else f"{why}: the cache stays in 16 bits"


def _exported(path: Path, target: str, cache_dir: Path | None, kv: str | None) -> Path:
    from bitnest import api
    from bitnest.artifact import is_artifact
    from bitnest.serve.cache import cached_export

    if not is_artifact(path):
        return path
    return cached_export(
        path,
        {"for": target, **({"kv": kv} if kv is not None else {})},
        lambda out: api.export(path, out, engine=target, kv=kv),
        root=cache_dir,
    )
