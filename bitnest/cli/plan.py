"""bitnest plan: a budget becomes a plan; a frontier; why a site got its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from bitnest.cli import dials
from bitnest.cli.options import Json, Lora, Quiet, Remote, parse_size
from bitnest.errors import RecipeError

POINTS = 12  # sizes on a frontier


def command(
    model: str = typer.Argument(help="Checkpoint: directory, hub id, or 'demo'."),
    out: Path = typer.Option(None, "-o", "--out", help="Write the plan here (default: stdout)."),
    lora: list[str] = Lora,
    bits: float = dials.Bits,
    size: str = dials.Size,
    max_kl: float = dials.MaxKl,
    min_agreement: str = dials.MinAgreement,
    context: int = dials.Context,
    target: str = dials.TargetName,
    policy: str = dials.PolicyName,
    candidate: list[str] = dials.Candidates,
    ends: bool = dials.Ends,
    exact: bool = dials.Exact,
    nested: str = dials.Nested,
    base_size: str = dials.BaseSize,
    group: int = typer.Option(
        None, "--group", help="With --nested: input channels per scale, 16 to 128."
    ),
    format: str = typer.Option(
        None, "--format", help="One format for all weights: only their inputs are planned."
    ),
    inputs: list[str] = dials.Inputs,
    input_bits: float = dials.InputBits,
    input_time: float = dials.InputTime,
    rule: list[str] = typer.Option(
        [], "--rule", help="PATTERN=FORMAT that no plan overrules: a glob, re:REGEX or kind:KIND."
    ),
    keep: list[str] = typer.Option([], "--keep", help="PATTERN: leave matching sites dense."),
    weight: list[str] = typer.Option(
        [], "--weight", help="LABEL=WEIGHT of a text in the mean KL (default: 1 each)."
    ),
    statistics: Path = typer.Option(
        None,
        "--statistics",
        help="What bitnest analyze wrote (default: MODEL-statistics, measured now if missing).",
    ),
    data: list[str] = typer.Option(
        [],
        "--data",
        help="If statistics are measured now: text, [label=]file, directory, hub:name.",
    ),
    latency: Path = typer.Option(
        None,
        "--latency",
        help="JSON of seconds: per weight by format, for --policy mxmoe; per multiply-accumulate "
        "by WEIGHTS/INPUTS, for --input-time.",
    ),
    check: Path = typer.Option(None, "--check", help="Say what this plan file costs and loses."),
    explain: list[str] = typer.Option(
        [], "--explain", help="SITE or pattern: why it got its format."
    ),
    frontier: bool = typer.Option(False, "--frontier", help="Size against KL, as a table."),
    points: int = typer.Option(
        None, "--points", min=2, help="Sizes on the frontier (default: 12)."
    ),
    plot: Path = typer.Option(
        None, "--plot", help="With --frontier: draw it into this .svg or .png."
    ),
    mark: list[Path] = typer.Option(
        [], "--mark", help="With --plot: JSON that bitnest eval wrote; its models are marked."
    ),
    compare: bool = typer.Option(
        False, "--compare", help="Every policy at this budget, in one table."
    ),
    machine: str = typer.Option(
        None, "--machine", help="Predict speed there too: h100, h200, a100, rtx4090, m2-ultra ..."
    ),
    trust_remote_code: bool = Remote,
    json: bool = Json,
    quiet: bool = Quiet,
) -> None:
    """Plan which format every weight gets under a budget; no weights are read.

    The plan is a YAML file to read and edit; bitnest compress --plan carries it out.
    """
    from bitnest.cli.render import Bars, print_json, say
    from bitnest.cli.setup import prepare_process

    prepare_process()
    from bitnest import api
    from bitnest.api.planning import default_statistics
    from bitnest.cli import plan_tables as tables
    from bitnest.quantize.allocation.policies import POLICIES

    rounded = {
        "--inputs": bool(inputs), "--input-bits": input_bits is not None,
        "--input-time": input_time is not None, "--format": format is not None,
    }  # fmt: skip
    _check_ways(
        {"--check": check is not None, "--frontier": frontier, "--compare": compare},
        {
            "--frontier": {
                **rounded, "-o": out is not None, "--explain": bool(explain),
                "--context": bool(context),
                "--machine": machine is not None,
                "--nested": nested is not None or base_size is not None,
            },
            "--compare": {
                **rounded, "-o": out is not None, "--explain": bool(explain),
                "--machine": machine is not None,
                "--nested": nested is not None or base_size is not None,
            },
            "--check": {
                "--nested": nested is not None or base_size is not None,
                "--context": bool(context), "--exact": exact, "--latency": latency is not None,
                **rounded,
            },
        },
        {
            "--plot": (plot is not None, frontier, "--frontier --plot FILE"),
            "--mark": (bool(mark), plot is not None, "--frontier --plot FILE --mark EVAL.json"),
            "--points": (points is not None, frontier, "--frontier --points 20"),
            "--latency": (
                latency is not None,
                policy == "mxmoe" or compare or input_time is not None,
                "--policy mxmoe --latency FILE, or --input-time 0.8 --latency FILE",
            ),
        },
    )  # fmt: skip
    if data and (statistics is not None or dials.found(model, lora)):
        raise RecipeError(
            "--data is what is measured if there are no statistics yet, and these are there",
            where=str(statistics or default_statistics(model, lora)),
            hint=f"leave out --data; or bitnest analyze {model} --data ... -o DIR, and "
            "--statistics DIR",
        )
    asked = [b for b in (bits, size, max_kl, min_agreement) if b is not None]
    if (check is not None or frontier) and asked:
        raise RecipeError("--check and --frontier have no budget", hint="leave out the dial")
    if check is not None and (target != "native" or policy != "bitnest"):
        raise RecipeError("--check takes target and policy from the plan", hint="leave them out")
    if compare and policy != "bitnest":
        raise RecipeError("--compare shows every policy", hint="leave out --policy")
    tables.check_early(explain, plot, machine)
    tables.check_place("-o", out)
    tables.check_place("--plot", plot)
    options: dict[str, Any] = {
        "statistics": statistics, "lora": lora, "target": target, "ends": ends, "exact": exact,
        "rules": [*rule, *(f"{pattern}=dense" for pattern in keep)], "candidates": candidate,
        "weights": _weights(weight), "latency": dials.read_latency(latency), "data": data,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    budget = {
        "bits": bits, "size": parse_size(size), "max_kl": max_kl,
        "min_agreement": dials.parse_share(min_agreement), "context": context,
    }  # fmt: skip
    if not quiet:
        dials.remark_nested(model)
        dials.remark(model, statistics, lora)
    state = None
    with Bars(quiet) as bars:
        options["progress"] = bars
        if check is not None:
            from bitnest.plan import Plan

            given = Plan.read(check)
            state = given.state
            options.pop("target")
            planned = api.check_plan(model, given, **options)
        elif frontier:
            found = api.frontier(
                model,
                points=points or POINTS,
                policies=tuple(POLICIES) if compare else (policy,),
                **options,
            )
            if plot is not None:
                from bitnest.cli.frontier_plot import draw

                draw(found, plot, mark)
            print_json(found.to_json()) if json else tables.frontier(found)
            return
        elif compare:
            rows = api.compare_policies(model, **budget, **options)
            print_json([tables.row(planned) for planned in rows]) if json else tables.policies(rows)
            return
        else:
            planned = api.plan(
                model, policy=policy, nested=nested, group=group,
                base_size=parse_size(base_size), format=format, inputs=inputs,
                input_bits=input_bits, input_time=input_time,
                **budget, **options,
            )  # fmt: skip
        cost = (
            api.constraint_cost(model, planned, **budget, **options)
            if target != "native" and check is None
            else None
        )
        preflight = api.preflight(
            model, planned, lora=lora, machine=machine, trust_remote_code=trust_remote_code
        )
    if json:
        known = {} if state is None else {"state": state}
        print_json({**tables.as_json(planned, preflight, cost, explain), **known})
    elif explain:
        tables.explain(planned, explain)
    elif out is None and check is None:
        typer.echo(planned.plan.to_text(), nl=False)
    if out is not None:
        planned.plan.write(out)
    if not json and (state is not None or not quiet):
        tables.summary(planned, preflight, cost, state)
    if not quiet and not json and out is not None:
        adapters = "".join(f" --lora {one}" for one in lora)
        named = f" --statistics {statistics}" if statistics is not None else ""
        say(f"next: bitnest compress {model}{adapters} --plan {out}{named}")


def _check_ways(
    ways: dict[str, bool],
    barred: dict[str, dict[str, bool]],
    needs: dict[str, tuple[bool, bool, str]],
) -> None:
    """Refuse two ways at once, options that a way does not have, and options without their way.

    Raises:
        RecipeError: see above.
    """
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) > 1 and chosen != ["--frontier", "--compare"]:
        raise RecipeError(f"{chosen[0]} and {chosen[1]} at once", hint="one of them")
    for way in chosen:
        for option, given in barred.get(way, {}).items():
            if given:
                raise RecipeError(f"{option} says nothing beside {way}", hint=f"leave out {option}")
    for option, (given, present, hint) in needs.items():
        if given and not present:
            raise RecipeError(f"{option} without what it belongs to", hint=hint)


def _weights(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        label, equals, value = text.rpartition("=")
        try:
            found[label] = float(value)
        except ValueError:
            equals = ""
        if not equals or not label:
            raise RecipeError(f"a weight reads LABEL=NUMBER, not '{text}'", hint="--weight code=2")
    return found
