"""Options that several verbs share, spelt once."""

from __future__ import annotations

import typer

from bitnest.sizes import parse_size

Json = typer.Option(False, "--json", help="Print the result as JSON on stdout.")
Quiet = typer.Option(False, "--quiet", "-q", help="No progress, no remarks.")
Remote = typer.Option(
    False, "--trust-remote-code", help="Run Python code that the model brings with it."
)
Lora = typer.Option(
    [],
    "--lora",
    help="LoRA adapter merged in first: DIRECTORY, or DIRECTORY:scale; repeat it to add several.",
)
Device = typer.Option(None, "--device", help="cpu, cuda, cuda:1 ... (default: cuda if present).")

__all__ = ["Device", "Json", "Lora", "Quiet", "Remote", "parse_size"]
