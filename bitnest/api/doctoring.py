"""What this machine has and what runs on it, as plain values.

Nothing here fails for want of something: what is missing is a hint.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitnest.kernels import csource, native
from bitnest.kernels.cpu_features import features, model_name, usable
from bitnest.kernels.csource import Unavailable
from bitnest.kernels.gpu.paths import old_triton

PACKAGES = ("bitnest", "torch", "transformers", "triton", "safetensors", "numpy")
SIMD = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512vbmi", "gfni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
EXTRAS = {
    "eval": "datasets", "serve": "fastapi", "gguf": "gguf", "lora": "peft", "bnb": "bitsandbytes",
    "plots": "matplotlib",
}  # fmt: skip
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY = Path("/proc/meminfo")
DRIVER = Path("/proc/driver/nvidia/version")
PAIRS = (
    "int8-channel/int8-token", "int8-channel/int8-static", "int8-channel/int8-token-t6",
    "int6-g128/int6-g128", "int4-g128/int8-token", "dgq4-g128/int8-token",
    "int4-g128/128xint8-token~int4-g128", "fp8_e4m3-channel/fp8_e4m3-token", "mxfp8/mxfp8",
    "mxfp4/mxfp4", "nvfp4/nvfp4",
)  # fmt: skip
CACHED = ("fp8", "fp8_e5m2", "int8", "int4")


def doctor() -> dict[str, Any]:
    """versions, cpu, memory, compiler, libraries, gpus, paths (by device, rows of family, format,
    path, reason) and hints. Compiles libraries that are not there yet."""
    compiler, gpus = _compiler(), _gpus()
    libraries = [_library(name) for name in csource.libraries()]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "cpu": _cpu(),
        "memory": _memory(),
        "compiler": compiler,
        "libraries": libraries,
        "gpus": gpus,
        "driver": _driver(),
        "paths": {device: _paths(device) for device in ["cpu"] + ["cuda"] * bool(gpus)},
        "hints": _hints(compiler, libraries, gpus, versions),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    known = features()
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": model_name(),
        "cores": granted or os.cpu_count(),
        "cores_of_machine": os.cpu_count(),
        "simd": [name for name in SIMD if name in known],
        "level": usable(known)[0].name,
        "caches": _caches(),
    }


def _caches() -> dict[str, str]:
    """By name (L1d, L2 ...), as the kernel writes their sizes: 32K."""
    found: dict[str, str] = {}
    for index in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def _memory() -> dict[str, int | None]:
    """Bytes; None where they are not known."""
    found: dict[str, int | None] = {"total": None, "available": None}
    for line in MEMORY.read_text().splitlines() if MEMORY.exists() else []:
        key, _, value = line.partition(":")
        if key in {"MemTotal", "MemAvailable"}:
            found["total" if key == "MemTotal" else "available"] = int(value.split()[0]) << 10
    return found


def _compiler() -> dict[str, str]:
    """command and version, or why there is none."""
    try:
        command = csource.find_compiler()
        said = csource.compiler_version(command).splitlines()
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        return {"missing": str(error)}
    return {"command": " ".join(command), "version": said[0] if said else "unknown"}


def _library(name: str) -> dict[str, str]:
    """name, and file, with the level of one that came with the package; why none was built."""
    found = native.find(name)
    about = {"name": name, "level": found.level, "why": found.why}
    return about | {"file": "" if found.file is None else str(found.file)}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "multiprocessors": about.multi_processor_count,
                "memory": total,
                "free": free,
                "runtime": torch.version.cuda or torch.version.hip,
            }
        )
    return found


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        words = DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word.count(".") and word[0].isdigit()), " ".join(words))


def _paths(device: str) -> list[dict[str, str]]:
    from bitnest.formats.catalogue import CATALOGUE
    from bitnest.kernels.paths import KV, path

    asked = [(entry.family, entry.name) for entry in CATALOGUE if entry.family != "dropped"]
    asked += [("rounded inputs", name) for name in PAIRS]
    asked += [("KV cache", KV + name) for name in CACHED]
    found = ((family, name, path(name, device)) for family, name in asked)
    return [
        {"family": family, "format": name.removeprefix(KV), "path": way.name, "reason": way.reason}
        for family, name, way in found
    ]


def _hints(
    compiler: dict[str, str],
    libraries: list[dict[str, str]],
    gpus: list[dict[str, Any]],
    versions: dict[str, str | None],
) -> list[str]:
    """What a person could do, and what for."""
    hints = []
    if "missing" in compiler:
        hints.append("install gcc or clang, or set CC: kernels are then compiled for this CPU")
    elif failed := [lib for lib in libraries if lib["why"]]:
        hints.append(f"native kernels were not built here: {failed[0]['why']}")
    if gpus and versions["triton"] is None:
        hints.append("pip install 'triton>=3.6': GPU kernels need it")
    elif gpus and (why := old_triton(versions["triton"] or "")):
        hints.append(f"pip install 'triton>=3.6': {why}")
    if not gpus and _driver():
        hints.append(
            "there is an NVIDIA driver, and this torch sees no GPU: install torch for CUDA, or "
            "look at CUDA_VISIBLE_DEVICES"
        )
    for extra, module in EXTRAS.items():
        if find_spec(module) is None:
            hints.append(f"pip install 'bitnest[{extra}]': {module} is not installed")
    return hints
