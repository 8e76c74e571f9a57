"""What `compress` was asked, checked before anything is read: options that contradict each other or
would say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitnest.api.planning import Dials
from bitnest.artifact import is_artifact
from bitnest.errors import RecipeError, StatisticsError
from bitnest.folds import Fold
from bitnest.formats import widths
from bitnest.formats.inputs import DENSE, parse_inputs, split_name
from bitnest.recipe import PRUNERS, STATIC, Recipe, default_format
from bitnest.statistics import Statistics, is_statistics
from bitnest.workdir import in_the_way, is_empty

if TYPE_CHECKING:
    from bitnest.quantize.allocation.nesting import Nesting
    from bitnest.quantize.compress import Job


def with_inputs(format: str | None, inputs: str | None) -> tuple[str | None, str | None]:
    """Weights and inputs of a format that may say both.

    Raises:
        RecipeError: inputs are given twice.
    """
    if format is None or "/" not in format:
        return format, inputs
    weights, said = split_name(format)
    if inputs is not None and said != split_name(f"{DENSE}/{inputs}")[1]:
        raise RecipeError(f"--format {format} already says inputs", hint="leave out --inputs")
    return weights, said


def check_weights(recipe: Recipe, nesting: Nesting | None, job: Job) -> None:
    """Refuse weights of widths that nothing has.

    Raises:
        RecipeError: there is one.
    """
    own = {w for fmt in job.formats.values() for w in widths(fmt)}
    own |= set(nesting.widths) if nesting is not None else set()
    lost = [width for width, _ in recipe.width_weights if own and width not in own]
    if recipe.width_weights and not own:
        raise RecipeError("nothing is nested: widths have no weights",
                          hint="--nested 2-8, or leave out --width-weight")  # fmt: skip
    if lost:
        raise RecipeError(f"no weight is nested at {lost[0]} bits",
                          hint="widths: " + ", ".join(map(str, sorted(own))))  # fmt: skip


def check_prune(recipe: Recipe, formats: Sequence[str]) -> None:
    """Refuse to be told how to prune where nothing is pruned.

    Raises:
        RecipeError: no format is sparse.
    """
    if recipe.prune != PRUNERS[0] and not any("%" in name for name in formats):
        raise RecipeError(f"nothing is sparse: --prune {recipe.prune} says nothing",
                          hint="--sparsity 50%, or --format int4-g128%2:4")  # fmt: skip


def check_rounded(inputs: Sequence[str], job: Job) -> None:
    """Refuse inputs beside formats that pack nothing.

    Raises:
        RecipeError: no matrix is packed that could read them.
    """
    from bitnest.quantize.allocation.inputs import may_round

    said = [name for name in inputs if name not in {"", DENSE}]
    formats = {name: fmt.name for name, fmt in job.formats.items()}
    if said and not any(may_round(site, formats) for site in job.sites):
        raise RecipeError(f"only inputs of packed weights are rounded: --inputs {said[0]} says "
                          "nothing", hint=f"--format int8-channel/{said[0]}")  # fmt: skip


def check_static(recipe: Recipe, inputs: Sequence[str]) -> None:
    """Refuse to be told how static scales are chosen where there are none. inputs: that are named
    besides the recipe's rules.

    Raises:
        RecipeError: no format of inputs has a scale to choose.
    """
    if recipe.static == STATIC[0]:
        return
    named = {*inputs, *(rule.inputs for rule in recipe.rules)} - {"", None, DENSE}
    if not any(parse_inputs(str(name)).static for name in named):
        raise RecipeError(f"no inputs have a static scale: --static {recipe.static} says nothing",
                          hint="--inputs int8-static, or leave it out")  # fmt: skip


def check_out(out: Path, statistics: str | Path) -> None:
    """Refuse an output that is there, before anything is measured for it. An artifact may be the
    result of the same command, which is known once there are statistics.

    Raises:
        ArtifactError: something else is there.
    """
    same = is_artifact(out) and is_statistics(Path(statistics))
    if not is_empty(out) and not same:
        raise in_the_way(out)


def check_method(model: str | Path, statistics: Path, method: str) -> None:
    """Refuse to plan by losses of another method than the one that is to be carried out.

    Raises:
        StatisticsError: they are, or the statistics cannot be read.
    """
    if not is_statistics(statistics):
        return
    measured = Statistics.open(statistics).header["method"]
    if measured != method:
        raise StatisticsError(
            f"these statistics were measured with --method {measured}, not {method}",
            where=str(statistics),
            hint=f"--method {measured}; or bitnest analyze {model} --method {method} -o DIR, and "
            "--statistics DIR",
        )


def check_texts(texts: Sequence[str]) -> None:
    """Open texts that are needed late.

    Raises:
        DataError: one is not there, or empty.
    """
    from bitnest.calibrate.sources import load_texts, parse_source

    for text in texts:
        next(iter(load_texts(parse_source(text).source)), None)


def check_folds(
    folds: Sequence[Fold],
    uniform: str | None,
    statistics: str | Path | None,
    nesting: Nesting | None,
    inputs: bool,
) -> None:
    """Refuse folds beside losses that were measured without them. inputs: whether their widths are
    to be planned.

    Raises:
        RecipeError: a budget, a plan, statistics, or widths that are planned.
    """
    if not folds:
        return
    said = None
    if uniform is None:
        said = "a budget or a plan"
    elif nesting is not None:
        said = "--nested"
    elif inputs:
        said = "--input-bits or --input-time"
    elif statistics is not None:
        said = "--statistics"
    if said is not None:
        raise RecipeError(
            f"--fold does not go with {said} yet: losses are measured on weights that are not "
            "folded",
            hint="one format for all, --format int8-channel --fold smooth=0.5, and --rule for "
            "exceptions",
        )


def check_ways(dials: Dials, fmt: str | None, group: int | None, plan: object) -> None:
    """Refuse several answers to one question.

    Raises:
        RecipeError: a plan with a dial, a format with either.
    """
    if plan is not None and (dials.given or fmt or group):
        raise RecipeError(
            "the plan already says every format",
            hint="leave out --bits, --size, --max-kl, --format and --group",
        )
    if fmt is not None and (dials.given or group is not None):
        raise RecipeError("--format already says bits and group",
                          hint="leave out --bits and --group, or leave --format out")  # fmt: skip
    if group is not None and dials.given and dials.bits is None:
        raise RecipeError("--group goes with --bits", hint="--bits 4 --group 64")


def check_extras(
    dials: Dials,
    fmt: str | None,
    group: int | None,
    plan: object,
    policy: str,
    check: Sequence[str],
    extras: Mapping[str, bool],
) -> None:
    """Refuse options that would say nothing.

    Raises:
        RecipeError: what belongs to planning beside a format or a plan, a limit's text without a
            limit, another policy with a limit.
    """
    said = [name for name, given in extras.items() if given]
    if plan is not None and policy != "bitnest":
        said.append("--policy")
    if (fmt or group or plan is not None) and said:
        other = "the plan" if plan is not None else "one format for all"
        raise RecipeError(f"{said[0]} says nothing beside {other}",
                          hint=f"leave out {', '.join(dict.fromkeys(said))}")  # fmt: skip
    if check and not dials.measured:
        raise RecipeError("--check is what a limit is measured on, and there is none",
                          hint="--max-kl 0.02 or --min-agreement 95%")  # fmt: skip
    if dials.measured and policy != "bitnest":
        raise RecipeError(f"policy {policy} has no prediction to steer by",
                          hint="give it --bits or --size")  # fmt: skip


def uniform_format(
    dials: Dials,
    fmt: str | None,
    group: int | None,
    plan: object,
    method: str,
    statistics: str | Path | None,
    policy: str,
    plain: bool,
) -> str | None:
    """The one format that was asked for, or None if there is to be a plan.

    Rounding to nearest reads no text, so without statistics there is nothing to plan by: a whole
    number of bits is one format then. The same holds for a group, and for policy uniform. plain:
    nothing else was asked of a plan.
    """
    if plan is not None:
        return None
    if fmt is not None:
        return default_format(None, fmt, None)
    blind = method == "rtn" and statistics is None
    even = plain and _whole(dials) and (policy == "uniform" or blind)
    if group is not None or even:
        return default_format(dials.bits, None, group)
    return None


def _whole(dials: Dials) -> bool:
    return not dials.given or (dials.bits is not None and float(dials.bits).is_integer())
