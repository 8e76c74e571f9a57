"""Serving an exported directory with vLLM, as a child process.

vLLM pins its own torch and transformers, so it lives in an environment of its own and is started
as a command. The child runs in its own session: SIGINT and SIGTERM reach it once, passed on from
here. The API key travels in the child's environment, where other users cannot read it.

Left out on purpose: installing vLLM, and choosing its options.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnest.errors import CheckpointError, MissingExtra, TargetError


def serve_with_vllm(
    directory: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    extra_args: Sequence[str] = (),
    *,
    vllm_bin: str | None = None,
) -> int:
    """Run `vllm serve DIRECTORY` until it ends; its exit code, 0 when a signal ended it.

    port: 0 takes a free one.
    vllm_bin: the command, when it is not on the PATH.

    Raises:
        MissingExtra: there is no such command.
        TargetError: the directory is in a format vLLM does not read.
    """
    _check_readable(directory)
    command = find_vllm(vllm_bin)
    arguments = [
        command,
        "serve",
        str(directory),
        "--host",
        host,
        "--port",
        str(port or _free(host)),
    ]
    environment = dict(os.environ) | ({"VLLM_API_KEY": api_key} if api_key else {})
    return _run([*arguments, *extra_args], environment)


def find_vllm(vllm_bin: str | None = None) -> str:
    """Path of the vllm command: `vllm_bin`, or the one on the PATH.

    Raises:
        MissingExtra: there is none.
    """
    command = shutil.which(vllm_bin or "vllm")
    if command is None:
        raise MissingExtra(
            f"vllm is not installed: no command '{vllm_bin or 'vllm'}'",
            hint="install it in an environment of its own (pip install vllm) and name its command "
            "with --vllm-bin, or serve without --engine vllm",
        )
    return command


def _check_readable(directory: Path) -> None:
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable config.json: {error}", where=str(directory)) from error
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitnest":
        raise TargetError(
            "vLLM does not read bitnest's own format",
            where=str(directory),
            hint="export it first: bitnest export DIR -o OUT --for vllm-cuda",
        )


def _free(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run `command` to its end, passing SIGINT and SIGTERM on to it."""
    passed: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        passed.append(number)
        if child is not None:
            child.send_signal(number)

    before = {sig: signal.signal(sig, forward) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        if passed:  # it came while the child was being started
            child.send_signal(passed[-1])
        code = child.wait()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
    return 0 if passed else code
