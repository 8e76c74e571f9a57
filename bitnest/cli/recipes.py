"""bitnest recipes."""

from __future__ import annotations

from pathlib import Path

import typer

from bitnest.cli.options import Json


def command(
    name: str = typer.Argument(None, help="One of them, to see the whole file."),
    json: bool = Json,
) -> None:
    """List the recipes that come with bitnest, for compress --recipe NAME."""
    from bitnest.cli.render import print_json
    from bitnest.errors import RecipeError
    from bitnest.recipe_file import own_recipes, read_recipe

    own = own_recipes()
    if name is not None and name not in own:
        raise RecipeError(f"no recipe is called '{name}'", hint="one of " + ", ".join(own))
    if name is not None and not json:
        typer.echo(own[name].read_text(encoding="utf-8").rstrip())
        return
    chosen = own if name is None else {name: own[name]}
    about = {key: description(file) for key, file in chosen.items()}
    if json:
        print_json({k: {"about": about[k], **read_recipe(file)} for k, file in chosen.items()})
        return
    width = max(map(len, about))
    for key, text in about.items():
        typer.echo(f"{key:<{width}}  {text.partition('. ')[0].rstrip('.')}")


def description(file: Path) -> str:
    """The comment a recipe begins with, on one line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:head])
