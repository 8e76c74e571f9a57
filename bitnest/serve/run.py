"""Putting the application on a port, and taking it down cleanly.

The socket is bound before the model's cache is allocated, so a port in use is told at once. SIGINT
and SIGTERM close the port, let running requests finish for `grace` seconds, end the others with an
error, and leave with exit code 0. A second SIGINT does not wait.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitnest.errors import BitnestError, require

require("fastapi", "serve")
require("uvicorn", "serve")

import uvicorn  # noqa: E402

from bitnest.serve.server import BackendName, create_app, make_backend  # noqa: E402
from bitnest.serve.service import Service  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bitnest.formats.kv import KVFormat

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Server(uvicorn.Server):
    """uvicorn, told when it is ready and ending the running requests after the grace time."""

    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.closing = True
        asyncio.get_running_loop().call_later(self._grace, self._service.end_all)
        await super().shutdown(sockets=sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        BitnestError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BitnestError(f"cannot listen on '{host}': {error}", where="--host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        used = error.errno == errno.EADDRINUSE
        raise BitnestError(
            f"port {port} is already in use" if used else f"cannot listen: {error.strerror}",
            where=f"{host}:{port}",
            hint="choose another with --port, or --port 0 for any free one",
        ) from error
    return listener


def curl_line(url: str, model_name: str, api_key: str | None) -> str:
    """A command that asks the server for a few words. The key itself is not shown."""
    key = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    body = f'{{"model": "{model_name}", "prompt": "Once upon a time", "max_tokens": 32}}'
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def unapplied_defaults(generation_config: Any) -> list[str]:
    """Settings of the model's generation config that this server does not apply."""
    neutral: dict[str, tuple[Any, ...]] = {
        "repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "encoder_repetition_penalty": (None, 1.0),
        "min_p": (None, 0.0),
        "typical_p": (None, 1.0),
        "min_length": (None, 0),
        "min_new_tokens": (None, 0),
        "bad_words_ids": (None, []),
        "suppress_tokens": (None, []),
        "num_beams": (None, 1),
    }
    return [n for n, fine in neutral.items() if getattr(generation_config, n, None) not in fine]


def run_server(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    backend: BackendName = "auto",
    cache_tokens: int = 32768,
    max_pending: int = 256,
    grace: float = 3.0,
    say: Callable[[str], None] | None = None,
    kv: KVFormat | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. `say` gets lines for people; by default they go to stderr. kv:
    format of the KV cache, which takes the backend `generate`.

    Raises:
        BitnestError: the port cannot be used, or the backend cannot run the model.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
    if host not in _LOOPBACK and api_key is None:
        say(f"warning: anyone who reaches {host} can use this server; --api-key asks for a key")
    if ignored := unapplied_defaults(model.generation_config):
        say(f"warning: not applied from generation_config.json: {', '.join(ignored)}")
    if kv is not None and backend != "generate":
        say(f"KV cache {kv.name}: one request at a time (--kv none for continuous batching)")
    listener = listen(host, port)
    try:
        engine = make_backend(backend, model, tokenizer, cache_tokens=cache_tokens, kv=kv, say=say)
        engine.start()
        app = create_app(
            model,
            tokenizer,
            model_name=model_name,
            api_key=api_key,
            backend=engine,
            max_pending=max_pending,
        )
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(grace + 2)),
        )

        def ready() -> None:
            say(f"ready: {url} serves '{model_name}' ({engine.name})")
            say(f"try: {curl_line(url, model_name, api_key)}")

        _run(_Server(config, app.state.service, grace, ready), listener)
    finally:
        listener.close()


def _run(server: _Server, listener: socket.socket) -> None:
    """Run with SIGINT and SIGTERM meaning a normal end.

    After its own clean-up uvicorn raises the signal again for whoever was there before; that is us.
    """
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
