"""A recipe file: the options of `bitnest compress`, kept in YAML.

    budget: {bits: 3.0}            or size: 12GiB, max_kl: 0.02, min_agreement: 95%; context: 8192
    target: vllm-cuda              who is to load it
    policy: bitnest
    candidates: [int2-g128, ...]   formats to choose among
    ends: true                     plan embedding and head
    nested: 2-8                    widths to read weights at; base_size: 6GiB at their narrowest
    format: int4-g128              one format instead of a budget
    inputs: int8-token             what inputs are rounded to as the model runs; of a list every
                                   matrix gets one, by budget: {input_bits: 6.4} or {input_time:
                                   0.8}, beside bits, size or a format; latency: FILE.json for
                                   the latter
    kv: int4-g128-w128             the KV cache that the artifact asks for
    rules:                         no plan overrules them; the last match decides
    - kind:attention: int8-g128
    fit: {method: gptq, damp: 0.03, weighting: gate, min_tokens: 256, clip: true}
                                   prune: sparsegpt, wanda or magnitude in sparse formats;
                                   width_weights: [3=4] where weights are nested;
                                   static: mse, percentile or absmax for static inputs
    data: {texts: [books=books.txt, code=code.jsonl], samples: 64, length: 512, seed: 0}
    check: [books=held-out.txt]    what a limit is measured on
    lora: [code-adapter:0.5]       merged in first
    fold: [smooth=0.5, permute]    put into the weights after that, see bitnest/folds.py

Every key may be left out. Options given on the command line win over it; a dial given there puts
aside the recipe's with all that belongs to it (`left_behind`). Errors name the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from bitnest.errors import BitnestError, PlanError
from bitnest.folds import Fold
from bitnest.formats import parse_format
from bitnest.formats.inputs import split_name
from bitnest.formats.kv import read_kv
from bitnest.patterns import matcher
from bitnest.plan import POLICIES
from bitnest.recipe import Recipe, Rule, parse_width_weight
from bitnest.targets import TARGETS
from bitnest.yaml_lines import broken, items, pair, plain, top_level

Parse = Callable[[Any], Any]
OWN = Path(__file__).parent / "recipes"


def _number(value: Any) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-2 as a word
        try:
            value = float(value)
        except ValueError as error:
            raise ValueError("a number") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number from 0 on")
    return value


def _from(least: int) -> Parse:
    def parse(value: Any) -> int:
        if _whole(value) < least:
            raise ValueError(f"a whole number from {least} on")
        return int(value)

    return parse


def _width(value: Any) -> float:
    if not 0 < _number(value) <= 16:
        raise ValueError("a width above 0, 16 at most")
    return _number(value)


def _limit(value: Any) -> float:
    if not 0 < _number(value) < math.inf:
        raise ValueError("a number above 0")
    return _number(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a word")
    return value


def _one_of(known: Collection[str]) -> Parse:
    def parse(value: Any) -> str:
        if value not in known:
            raise ValueError("one of " + ", ".join(known))
        return str(value)

    return parse


def _format(value: Any) -> str:
    parse_format(_word(value))
    return str(value)


def _cache(value: Any) -> str:
    read_kv(_word(value))
    return str(value)


def _inputs(value: Any) -> str | list[str]:
    names = [_word(name) for name in (value if isinstance(value, list) else [value])]
    if not names:
        raise ValueError("a format of inputs, or a list of them")
    for name in names:
        split_name(f"dense/{name}")
    return names if isinstance(value, list) else names[0]


def _widths(value: Any) -> str:
    from bitnest.formats.names import parse_widths

    # YAML reads one width as a number, and [2, 3, 4] is as good as 2,3,4
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    parse_widths(text)
    return text


def _width_weight(value: Any) -> str:
    Recipe(width_weights=(parse_width_weight(_word(value)),))
    return str(value)


def _fold(value: Any) -> str:
    return str(Fold.parse(_word(value)))


def _fits(name: str, parse: Parse) -> Parse:
    """A value that a `Recipe` takes."""

    def checked(value: Any) -> Any:
        options: dict[str, Any] = {name: parse(value)}
        Recipe(**options)
        return options[name]

    return checked


def _size(value: Any) -> int:
    from bitnest.sizes import parse_size

    number = _whole(value) if isinstance(value, int) else parse_size(_word(value))
    if number < 1:
        raise ValueError("a size above 0")
    return number


def _share(value: Any) -> float:
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        raise ValueError("a share such as 95% or 0.95") from error
    share = number / (100 if text.endswith("%") else 1)
    if not 0 < share < 1:
        raise ValueError("a share between 0 and 1, such as 95% or 0.95")
    return share


SECTIONS: dict[str, dict[str, tuple[str, Parse]]] = {
    "budget": {
        "bits": ("bits", _width), "size": ("size", _size), "max_kl": ("max_kl", _limit),
        "min_agreement": ("min_agreement", _share), "context": ("context", _whole),
        "input_bits": ("input_bits", _width), "input_time": ("input_time", _limit),
    },
    "fit": {
        "method": ("method", _fits("method", _word)), "damp": ("damp", _fits("damp", _number)),
        "weighting": ("weighting", _fits("weighting", _word)),
        "min_tokens": ("min_tokens", _fits("min_tokens", _whole)), "clip": ("clip", _flag),
        "width_weights": ("width_weights", _width_weight),
        "prune": ("prune", _fits("prune", _word)), "static": ("static", _fits("static", _word)),
    },
    "data": {
        "texts": ("data", _word), "samples": ("samples", _from(1)), "length": ("length", _from(2)),
        "seed": ("seed", _fits("seed", _whole)),
    },
}  # fmt: skip
PLAIN: dict[str, tuple[str, Parse]] = {
    "target": ("target", _one_of(TARGETS)), "policy": ("policy", _one_of(POLICIES)),
    "candidates": ("candidates", _format), "ends": ("ends", _flag), "exact": ("exact", _flag),
    "format": ("format", _format), "check": ("check", _word),
    "inputs": ("inputs", _inputs), "latency": ("latency", _word),
    "lora": ("lora", _word), "fold": ("fold", _fold),
    "nested": ("nested", _widths), "base_size": ("base_size", _size),
    "kv": ("kv", _cache),
}  # fmt: skip
LISTS = {"candidates", "lora", "fold", "check", "data.texts", "fit.width_weights"}  # of such values
KEYS = (*SECTIONS, *PLAIN, "rules")
DIALS = {"bits", "size", "max_kl", "min_agreement", "format", "group", "plan"}
LIMITS = {"max_kl", "min_agreement"}  # what `check` belongs to
FIXED = {"format", "group", "plan"}  # nothing is planned beside one of these
PLANNING = {"target", "policy", "candidates", "ends", "exact", "nested", "base_size"}


def own_recipes() -> dict[str, Path]:
    """Recipes that come with bitnest, by name."""
    return {file.stem: file for file in sorted(OWN.glob("*.yaml"))}


def read_recipe(path: str | Path, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Keyword arguments of `api.compress` that a recipe gives. path: a file, or the name of one of
    `own_recipes`. skip: those given otherwise, which take others with them, see `left_behind`.

    Raises:
        PlanError: unreadable or broken, with the line.
    """
    path, own = Path(path), own_recipes()
    if not path.exists() and str(path) in own:
        path = own[str(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise PlanError(f"cannot read the recipe: {said}", where=str(path),
                        hint=f"a YAML file, or one of {', '.join(own)}") from error  # fmt: skip
    found = parse_recipe(text, str(path))
    gone = set(skip) | left_behind(skip)
    return {key: value for key, value in found.items() if key not in gone}


def left_behind(given: Collection[str]) -> set[str]:
    """What a recipe says in vain once the options `given` win over it: its dial beside another, the
    cache without a size, the text of a limit without one, planning where nothing is planned."""
    gone = {"input_bits", "input_time", "latency"} if "inputs" in given else set()
    return gone | _dials_behind(given)


def _dials_behind(given: Collection[str]) -> set[str]:
    dials = DIALS & set(given)
    if "nested" in given:
        return {"format", "plan", "candidates", "target"} | (set(DIALS) if dials else set())
    if not dials:
        return set()
    gone = set(DIALS)
    if "size" not in dials:
        gone.add("context")
    if not dials & LIMITS:
        gone.add("check")
    if dials & FIXED:
        gone |= PLANNING
    return gone


def parse_recipe(text: str, where: str = "recipe") -> dict[str, Any]:
    """The same of its text.

    Raises:
        PlanError: broken, with the line.
    """
    values: dict[str, Any] = {}
    nodes = top_level(text, where, KEYS, "recipe")
    for key, node in nodes.items():
        if key == "rules":
            values["rules"] = _rules(node, where)
        elif key in PLAIN:
            name, parse = PLAIN[key]
            values[name] = _value(key, node, parse, where)
        else:
            values.update(_section(key, node, where))
    _check_one_dial(nodes, where)
    return values


def _check_one_dial(nodes: Mapping[str, yaml.Node], where: str) -> None:
    """Refuse two answers to what the result is to be.

    Raises:
        PlanError: with the line of the second.
    """
    found: list[tuple[str, yaml.Node]] = []
    for key, node in nodes.items():
        if key == "format":
            found.append((key, node))
        elif key == "budget":
            found += [(name.value, name) for name, _ in node.value if name.value in DIALS]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise broken(f"one dial at a time, not {names}", found[1][1], where, "leave one out")


def _section(key: str, node: yaml.Node, where: str) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise broken(f"'{key}' must be a mapping", node, where, ", ".join(SECTIONS[key]))
    found: dict[str, Any] = {}
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise broken(f"a key of '{key}' is no word", name, where, ", ".join(SECTIONS[key]))
        if name.value in SECTIONS[key] and SECTIONS[key][name.value][0] in found:
            raise broken(f"'{name.value}' twice in '{key}'", name, where)
        if name.value not in SECTIONS[key]:
            raise broken(f"unknown key '{name.value}' in '{key}'", name, where,
                         "known: " + ", ".join(SECTIONS[key]))  # fmt: skip
        target, parse = SECTIONS[key][name.value]
        found[target] = _value(f"{key}.{name.value}", value, parse, where)
    return found


def _value(key: str, node: yaml.Node, parse: Parse, where: str) -> Any:
    if key in LISTS:
        hint = f"'{key}' is a list, such as [A, B]"
        return [_single(key, item, parse, where) for item in items(node, where, hint)]
    return _single(key, node, parse, where)


def _single(key: str, node: yaml.Node, parse: Parse, where: str) -> Any:
    value = plain(node, where)
    try:
        return parse(value)
    except ValueError as error:
        raise broken(f"'{key}' must be {error}, not {value!r}", node, where) from error
    except BitnestError as error:
        raise broken(error.what, node, where, error.hint) from error


def _rules(node: yaml.Node, where: str) -> list[str]:
    hint = "a rule reads - PATTERN: FORMAT"
    found = []
    for item in items(node, where, hint):
        pattern, fmt = pair(item, where, hint)
        try:
            Rule.parse(f"{pattern}={fmt}")
            matcher(pattern)
        except BitnestError as error:
            raise broken(error.what, item, where, error.hint) from error
        found.append(f"{pattern}={fmt}")
    return found
