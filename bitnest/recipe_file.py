"""A recipe file: the options of `bitnest compress`, kept in YAML.

    budget: {bits: 3.0}            or size: 12GiB, max_kl: 0.02, min_agreement: 95%; context: 8192
    target: vllm-cuda              who is to load it
    policy: bitnest
    candidates: [int2-g128, ...]   formats to choose among
    ends: true                     plan embedding and head
    format: int4-g128              one format instead of a budget
    rules:                         no plan overrules them; the last match decides
    - kind:attention: int8-g128
    fit: {method: gptq, damp: 0.03, weighting: gate, min_tokens: 256, clip: true}
    data: {texts: [books=books.txt, code=code.jsonl], samples: 64, length: 512, seed: 0}
    check: [books=held-out.txt]    what a limit is measured on

Every key may be left out. Options given on the command line win over it; a dial given there puts
aside the recipe's with all that belongs to it (`left_behind`). Errors name the line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from bitnest.errors import BitnestError, PlanError
from bitnest.recipe import Rule
from bitnest.yaml_lines import broken, items, pair, plain, top_level

Parse = Callable[[Any], Any]


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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a word")
    return value


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of words")
    return list(value)


def _size(value: Any) -> int:
    from bitnest.sizes import parse_size

    return _whole(value) if isinstance(value, int) else parse_size(_word(value))


def _share(value: Any) -> float:
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError as error:
        raise ValueError("a share such as 95% or 0.95") from error
    return number / (100 if text.endswith("%") else 1)


SECTIONS: dict[str, dict[str, tuple[str, Parse]]] = {
    "budget": {
        "bits": ("bits", _number), "size": ("size", _size), "max_kl": ("max_kl", _number),
        "min_agreement": ("min_agreement", _share), "context": ("context", _whole),
    },
    "fit": {
        "method": ("method", _word), "damp": ("damp", _number), "weighting": ("weighting", _word),
        "min_tokens": ("min_tokens", _whole), "clip": ("clip", _flag),
    },
    "data": {
        "texts": ("data", _words), "samples": ("samples", _whole), "length": ("length", _whole),
        "seed": ("seed", _whole),
    },
}  # fmt: skip
PLAIN: dict[str, tuple[str, Parse]] = {
    "target": ("target", _word), "policy": ("policy", _word),
    "candidates": ("candidates", _words), "ends": ("ends", _flag), "exact": ("exact", _flag),
    "format": ("format", _word), "check": ("check", _words),
}  # fmt: skip
KEYS = (*SECTIONS, *PLAIN, "rules")
DIALS = {"bits", "size", "max_kl", "min_agreement", "format", "group", "plan"}
LIMITS = {"max_kl", "min_agreement"}  # what `check` belongs to
FIXED = {"format", "group", "plan"}  # nothing is planned beside one of these
PLANNING = {"target", "policy", "candidates", "ends", "exact"}


def read_recipe(path: Path, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Keyword arguments of `api.compress` that a recipe gives. skip: those given otherwise, which
    take others with them, see `left_behind`.

    Raises:
        PlanError: unreadable or broken, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the recipe: {error}", where=str(path),
                        hint="recipes/ in the repository has some") from error  # fmt: skip
    found = parse_recipe(text, str(path))
    gone = set(skip) | left_behind(skip)
    return {key: value for key, value in found.items() if key not in gone}


def left_behind(given: Collection[str]) -> set[str]:
    """What a recipe says in vain once the options `given` win over it: its dial beside another, the
    cache without a size, the text of a limit without one, planning where nothing is planned."""
    dials = DIALS & set(given)
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
    for key, node in top_level(text, where, KEYS, "recipe").items():
        if key == "rules":
            values["rules"] = _rules(node, where)
        elif key in PLAIN:
            name, parse = PLAIN[key]
            values[name] = _value(key, node, parse, where)
        else:
            values.update(_section(key, node, where))
    return values


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
        except BitnestError as error:
            raise broken(error.what, item, where, error.hint) from error
        found.append(f"{pattern}={fmt}")
    return found
