"""`python -m bitnest.serve MODEL`: the server without the rest of the command line."""

from __future__ import annotations

import argparse
import sys

from bitnest.errors import BitnestError


def main(argv: list[str] | None = None) -> int:
    """Load MODEL and serve it; 0 after a clean shutdown, 2 for a mistake in the input."""
    parser = argparse.ArgumentParser(prog="python -m bitnest.serve")
    parser.add_argument("model", help="a model directory, a hub id, or 'demo'")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--model-name", default=None, help="default: MODEL as typed")
    parser.add_argument("--backend", choices=["continuous", "generate"], default="continuous")
    parser.add_argument("--cache-tokens", type=int, default=32768)
    parser.add_argument("--max-pending", type=int, default=256)
    options = parser.parse_args(argv)
    try:
        from bitnest.packed.loading import load_model, load_tokenizer
        from bitnest.serve.run import run_server

        run_server(
            load_model(options.model),
            load_tokenizer(options.model),
            model_name=options.model_name or options.model,
            host=options.host,
            port=options.port,
            api_key=options.api_key,
            backend=options.backend,
            cache_tokens=options.cache_tokens,
            max_pending=options.max_pending,
        )
    except BitnestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
