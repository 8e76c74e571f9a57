"""A recipe: what was asked for, before any weight is looked at.

Rules are ordered; for each site the last rule whose pattern matches decides its format, and sites
no rule matches get the default format. Patterns are those of `patterns`: globs over the site's
whole name (`*.mlp.experts.{0,4-7}.down_proj`), `re:...` or `kind:attention`. Routers, embedding and
head stay dense unless a rule names them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bitnest.errors import RecipeError
from bitnest.formats import AnyFormat, CodedFormat, DenseFormat, integer, parse_format
from bitnest.formats.inputs import DENSE, InputFormat, parse_inputs, split_name, weights_of
from bitnest.formats.kv import parse_kv
from bitnest.formats.names import sparse_name
from bitnest.patterns import Names
from bitnest.sites import UNNAMED_DENSE, Site

METHODS = ("gptq", "rtn")
WEIGHTINGS = ("none", "gate", "gate2")  # of tokens in an expert's H: 1, gate weight, its square
PRUNERS = ("sparsegpt", "wanda", "magnitude")  # how sparse formats choose (`prune/`)
STATIC = ("mse", "percentile", "absmax")  # how static scales of inputs are chosen
DEFAULT_BITS = 4
DEFAULT_GROUP = 128
DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Rule:
    """One line of a recipe: sites that match `pattern` get `format`."""

    pattern: str
    format: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """A rule spelt PATTERN=FORMAT.

        Raises:
            RecipeError, FormatError: not of that form.
        """
        pattern, equals, fmt = text.rpartition("=")
        if not equals or not pattern:
            raise RecipeError(
                f"a rule reads PATTERN=FORMAT, not '{text}'",
                hint="for example --rule 'kind:attention=int8-g128' or --rule '*.down_proj=dense'",
            )
        check_format(fmt)
        return cls(pattern, fmt)

    @property
    def weights(self) -> str:
        """The format that matching sites are stored in."""
        return weights_of(self.format)

    @property
    def inputs(self) -> str | None:
        """What their inputs are rounded to, `dense` for nothing; None: what the recipe says."""
        return split_name(self.format)[1]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the model and the calibration text.

    format: default format name. rules: see above. method: gptq or rtn. damp: share of the mean
    diagonal added to H. weighting: tokens' weights in an expert's H. min_tokens: tokens under which
    an expert's H leans on its layer's inputs; None: as many as the expert has input channels.
    clip: search the clipping ratio of every scale. seed: of the choice of calibration windows.
    width_weights: (width, how much its error counts) in nested codes of kind nest and mat, 1 for
    others. prune: how sparse formats choose what stays (`prune/solution.py`). inputs: what inputs
    of packed matrices in the blocks are rounded to unless a rule says (`formats/inputs`), empty for
    nothing. static: how static scales of inputs are chosen (`kernels/inputs`). kv: format of the KV
    cache that the artifact asks for (`formats/kv.py`), empty for 16 bits.
    """

    format: str = f"int{DEFAULT_BITS}-g{DEFAULT_GROUP}"
    rules: tuple[Rule, ...] = ()
    method: str = "gptq"
    damp: float = 0.03
    weighting: str = "gate"
    min_tokens: int | None = None
    clip: bool = True
    seed: int = 0
    width_weights: tuple[tuple[int, float], ...] = ()
    prune: str = PRUNERS[0]
    inputs: str = ""
    static: str = STATIC[0]
    kv: str = ""

    def __post_init__(self) -> None:
        parse_format(self.format)
        if self.inputs:
            parse_inputs(self.inputs)
        if self.static not in STATIC:
            raise RecipeError(
                f"unknown way to choose a static scale '{self.static}'",
                hint="one of " + ", ".join(STATIC),
            )
        if self.method not in METHODS:
            raise RecipeError(
                f"unknown method '{self.method}'", hint="one of " + ", ".join(METHODS)
            )
        if self.weighting not in WEIGHTINGS:
            raise RecipeError(
                f"unknown expert weighting '{self.weighting}'",
                hint="one of " + ", ".join(WEIGHTINGS),
            )
        if self.prune not in PRUNERS:
            raise RecipeError(
                f"unknown method of pruning '{self.prune}'", hint="one of " + ", ".join(PRUNERS)
            )
        if self.kv:
            parse_kv(self.kv)
        if self.min_tokens is not None and self.min_tokens < 1:
            raise RecipeError(
                f"an expert needs at least one token, not {self.min_tokens}",
                hint="--min-tokens 1 trusts the Hessian of every expert that saw a token",
            )
        for width, weight in self.width_weights:
            if not (1 <= width <= 8 and 0 < weight < math.inf):
                raise RecipeError(
                    f"width {width} cannot count {weight:g} times",
                    hint="--width-weight 3=4: a width of 1 to 8 bits, a number above 0",
                )
        if len({width for width, _ in self.width_weights}) < len(self.width_weights):
            raise RecipeError("a width has two weights", hint="--width-weight once for each")
        if not 0 <= self.seed < 1 << 63:
            raise RecipeError(f"a seed is a whole number from 0 to 2^63 - 1, not {self.seed}")
        if not 0 < self.damp < 1:
            raise RecipeError(
                f"damp is a share between 0 and 1, not {self.damp:g}",
                hint="for example --damp 0.01",
            )

    def formats(self, sites: Sequence[Site], itemsize: int) -> dict[str, AnyFormat]:
        """The format of every site. itemsize: bytes of a source value, for dense sites.

        Raises:
            RecipeError: a rule that matches no site.
        """
        chosen: dict[str, AnyFormat] = {}
        for site in sites:
            name = "dense" if site.kind in UNNAMED_DENSE else self.format
            chosen[site.name] = sized(parse_format(name), itemsize)
        names = Names(sites)
        for rule in self.rules:
            fmt = sized(parse_format(rule.weights), itemsize)
            hits = names.matching(rule.pattern)
            if not hits:
                raise RecipeError(
                    f"rule '{rule.pattern}={rule.format}' matches no site",
                    hint="bitnest inspect MODEL --sites lists them by name",
                )
            chosen.update(dict.fromkeys(hits, fmt))
        return chosen

    def input_formats(
        self, sites: Sequence[Site], formats: Mapping[str, AnyFormat]
    ) -> dict[str, InputFormat]:
        """What inputs are rounded to, by site; sites that are not named read them as they are.

        formats: of the weights.

        Raises:
            RecipeError: a rule that rounds what a router or an end reads.
        """
        chosen = {s.name: self.inputs for s in sites if s.kind not in UNNAMED_DENSE}
        names, by_name = Names(sites), {site.name: site for site in sites}
        for rule in self.rules:
            if rule.inputs is None:
                continue
            for hit in names.matching(rule.pattern):
                if by_name[hit].kind in UNNAMED_DENSE and rule.inputs != DENSE:
                    raise RecipeError(
                        f"rule '{rule.pattern}={rule.format}' rounds what '{hit}' reads",
                        hint="routers, embeddings and heads read their inputs as they are",
                    )
                chosen[hit] = rule.inputs
        return {
            name: parse_inputs(inputs)
            for name, inputs in chosen.items()
            if inputs not in {"", DENSE} and isinstance(formats[name], CodedFormat)
        }

    def ruled(self, sites: Sequence[Site]) -> dict[str, str]:
        """Format names that rules give, by site.

        Raises:
            RecipeError: a rule that matches no site.
        """
        names = Names(sites)
        found: dict[str, str] = {}
        for rule in self.rules:
            found.update(dict.fromkeys(names.matching(rule.pattern), rule.weights))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest and the fingerprint."""
        values = {**asdict(self), "rules": [asdict(rule) for rule in self.rules]}
        if not self.width_weights:
            del values["width_weights"]
        if self.prune == PRUNERS[0]:  # so that runs from before there was a choice resume
            del values["prune"]
        for key, usual in (("inputs", ""), ("static", STATIC[0]), ("kv", "")):
            if values[key] == usual:
                del values[key]
        return values


def check_format(name: str) -> str:
    """A format as rules name it, WEIGHTS or WEIGHTS/INPUTS, in its usual spelling.

    Raises:
        FormatError, RecipeError: there is none.
    """
    weights, inputs = split_name(name)
    fmt = parse_format(weights)
    if inputs not in {None, DENSE} and not isinstance(fmt, CodedFormat):
        raise RecipeError(
            f"'{name}': only inputs of packed weights are rounded",
            hint=f"for example int8-channel/{inputs}, or {weights} alone",
        )
    return fmt.name if inputs is None else f"{fmt.name}/{inputs}"


def parse_width_weight(text: str) -> tuple[int, float]:
    """A weight spelt WIDTH=WEIGHT.

    Raises:
        RecipeError: not of that form.
    """
    width, _, weight = text.partition("=")
    try:
        return int(width), float(weight)
    except ValueError as error:
        raise RecipeError(
            f"a weight reads WIDTH=WEIGHT, not '{text}'", hint="for example --width-weight 3=4"
        ) from error


def resolved(
    recipe: Recipe,
    dial: Mapping[str, Any] | None = None,
    *,
    planning: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    check: Sequence[str] = (),
    lora: Sequence[str] = (),
    fold: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that was asked for with every default filled in, in the keys of a recipe file.

    dial: `budget: {...}`, `format: NAME` or `plan: DIGEST`; None: the recipe's one format.
    planning: target, policy, candidates, ends and exact. texts: calibration texts as they were
    given; none means those of the statistics, or the embedded text. check, lora, fold: as given.
    """
    fit = {key: getattr(recipe, key) for key in ("method", "damp", "weighting", "clip")}
    if recipe.min_tokens is not None:
        fit["min_tokens"] = recipe.min_tokens
    if recipe.width_weights:
        fit["width_weights"] = [f"{width}={weight:g}" for width, weight in recipe.width_weights]
    named = [recipe.format, *(rule.weights for rule in recipe.rules)]
    named += [(dial or {}).get("format", ""), *(planning or {}).get("candidates", ())]
    if recipe.prune != PRUNERS[0] or any("%" in name for name in named):
        fit["prune"] = recipe.prune
    if recipe.static != STATIC[0]:
        fit["static"] = recipe.static
    data = {"texts": list(texts), "samples": samples, "length": length, "seed": recipe.seed}
    return {
        **({"lora": list(lora)} if lora else {}),
        **({"fold": list(fold)} if fold else {}),
        **({"format": recipe.format} if dial is None else dial),
        **({"inputs": recipe.inputs} if recipe.inputs else {}),
        **({"kv": recipe.kv} if recipe.kv else {}),
        **(planning or {}),
        "rules": [{rule.pattern: rule.format} for rule in recipe.rules],
        "fit": fit,
        "data": data,
        **({"check": list(check)} if check else {}),
    }


def default_format(
    bits: float | None, fmt: str | None, group: int | None, sparsity: str | None = None
) -> str:
    """The format name that --bits, --format, --group and --sparsity ask for together.

    bits: a whole number; a float because that is how the command line reads it. sparsity: see
    `sparse_name`; of 16-bit weights if nothing else is said.

    Raises:
        RecipeError, FormatError: contradictory or impossible.
    """
    if sparsity is not None:
        dense = fmt is None and bits is None and group is None
        return sparse_name("dense" if dense else default_format(bits, fmt, group), sparsity)
    if fmt is not None:
        if bits is not None or group is not None:
            raise RecipeError(
                "--format already says bits and group", hint="leave out --bits and --group"
            )
        return parse_format(fmt).name
    if bits is None:
        bits = DEFAULT_BITS
    if not float(bits).is_integer():
        raise RecipeError(
            f"--bits {bits:g}: one width for all sites must be a whole number",
            hint="mix widths by --rule, for example --bits 3 --rule 'kind:attention=int4-g128'",
        )
    return integer(int(bits), DEFAULT_GROUP if group is None else group).name


def sized(fmt: AnyFormat, itemsize: int) -> AnyFormat:
    """The format; a dense one with bytes per value of the source."""
    return replace(fmt, itemsize=itemsize) if isinstance(fmt, DenseFormat) else fmt
