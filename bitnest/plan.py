"""The plan: which format every site gets, as a file that a person can read and edit.

    plan: 1                         version
    model: books-moe                its name, and the sha256 of its weights
    source: 3f...
    target: native
    policy: bitnest
    asked: {bits: 3.0}
    expected: {...}                 bytes, bits and KL of the rules as they were solved
    digest: 8c...                   of the rules as they were solved: tells an edited plan
    rules:
    - model.layers.*.self_attn.{q_proj,k_proj}: int5-g128
    - model.layers.2.mlp.experts.{0,4-7}.down_proj: int2-g128

Rules are read in order, the last that matches a site decides; sites that none matches stay dense.
Patterns are those of `patterns`. A plan written and read again is the same plan, site by site.

Errors name the line. Left out: what a plan costs and loses (`quantize/allocation`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitnest.errors import FormatError, PlanError, RecipeError
from bitnest.formats.inputs import split_name
from bitnest.formats.names import parse_widths
from bitnest.patterns import Names, fold, matcher
from bitnest.recipe import PRUNERS, Rule, check_format
from bitnest.sites import Site
from bitnest.targets import TARGETS
from bitnest.workdir import write_text
from bitnest.yaml_lines import broken, items, pair, plain, top_level

VERSION = 1
HINT = "a rule reads - PATTERN: FORMAT"
KEYS: dict[str, type] = {
    "plan": int, "model": str, "source": str, "target": str, "policy": str,
    "asked": dict, "expected": dict, "digest": str, "prune": str, "rules": list,
}  # fmt: skip
POLICIES = (
    "bitnest", "uniform", "handmade", "frequency", "moqa", "mcmoe", "baq", "mxmoe", "lpvit",
)  # fmt: skip
ASKED = (
    "bits", "size", "kl", "max_kl", "min_agreement", "context", "nested", "base_size",
    "inputs", "input_bits", "input_time",
)  # fmt: skip
HEAD = """\
# A bitnest plan: the number format of every weight. Rules are read in order and the last one that
# matches decides; {0,3-5} is any of these numbers; sites without a rule stay dense. After a slash:
# what the matrix' inputs are rounded to as the model runs.
# Edit it, then: bitnest plan MODEL --check FILE, bitnest compress MODEL --plan FILE
"""


@dataclass(frozen=True)
class Plan:
    """See above. rules: in order. prune: how losses of sparse formats were measured, if the plan
    has any and not in the usual way. expected: figures of the rules that `digest` is of. where,
    lines: file and lines that the rules were read from, if they were. overruled: other rules were
    put on top of these where it was carried out, and changed a format."""

    rules: tuple[Rule, ...]
    model: str = ""
    source: str = ""
    target: str = "native"
    policy: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    prune: str = ""
    where: str = field(default="", compare=False)
    lines: tuple[int, ...] = field(default=(), compare=False)
    overruled: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, formats: Mapping[str, str], **rest: Any) -> Plan:
        """A plan of site names and format names, folded."""
        rules = tuple(Rule(pattern, fmt) for pattern, fmt in fold(formats))
        return cls(rules, digest=digest_of(rules), **rest)

    def deciding(self, site: Site) -> int:
        """Number of the rule that decides a site, -1 for none."""
        found = -1
        for number, rule in enumerate(self.rules):
            found = number if matcher(rule.pattern)(site) else found
        return found

    def place(self, site: Site, fmt: str) -> str:
        """Where it is said that a site gets a format: file and line; the site's name if the plan
        was not read from a file, or says something else."""
        number = self.deciding(site)
        if number < 0 or not self.lines:
            return self.where or site.name
        said = self.rules[number].weights == fmt
        return f"{self.where}:{self.lines[number]}" if said else site.name

    @property
    def edited(self) -> bool:
        """Whether the rules are others than those that were solved."""
        return self.overruled or (bool(self.digest) and self.digest != digest_of(self.rules))

    @property
    def state(self) -> str:
        """`solved` if the rules are those that were solved, else `edited`; `unknown` without a
        digest."""
        return "edited" if self.edited else "solved" if self.digest else "unknown"

    def formats(self, sites: Sequence[Site]) -> dict[str, str]:
        """Format name of every site's weight.

        Raises:
            RecipeError: a rule that matches no site.
        """
        names = Names(sites)
        chosen = {site.name: "dense" for site in sites}
        for number, rule in enumerate(self.rules):
            hits = names.matching(rule.pattern)
            if not hits:
                line = f":{self.lines[number]}" if self.lines else ""
                raise RecipeError(
                    f"rule '{rule.pattern}: {rule.format}' of the plan matches no site",
                    where=f"{self.where}{line}",
                    hint="is the plan of another model? bitnest inspect MODEL --sites lists names",
                )
            chosen.update(dict.fromkeys(hits, rule.weights))
        return chosen

    def inputs(self, sites: Sequence[Site]) -> dict[str, str]:
        """What inputs are rounded to, of sites of which a rule says it."""
        names = Names(sites)
        chosen: dict[str, str] = {}
        for rule in self.rules:
            if rule.inputs is not None:
                chosen.update(dict.fromkeys(names.matching(rule.pattern), rule.inputs))
        return chosen

    def summary(self) -> dict[str, Any]:
        """What an artifact keeps of it; the rules are in its recipe."""
        return {
            "target": self.target, "policy": self.policy, "asked": self.asked,
            "expected": self.expected, "edited": self.edited,
        }  # fmt: skip

    def to_text(self) -> str:
        """The file."""
        head = {
            "plan": VERSION, "model": self.model, "source": self.source, "target": self.target,
            "policy": self.policy, "asked": self.asked, "expected": self.expected,
            "digest": self.digest, **({"prune": self.prune} if self.prune else {}),
        }  # fmt: skip
        parts = [
            yaml.safe_dump(head, sort_keys=False, default_flow_style=None, width=100),
            yaml.safe_dump({"rules": [{r.pattern: r.format} for r in self.rules]},
                           sort_keys=False, default_flow_style=False, width=10_000),
        ]  # fmt: skip
        return HEAD + "".join(parts)

    def write(self, path: Path) -> None:
        """Write the file; it appears only when whole.

        Raises:
            PlanError: it cannot be written.
        """
        if path.is_dir():
            raise PlanError("a directory is in the way", where=str(path), hint="-o plan.yaml")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, self.to_text())
        except OSError as error:
            raise PlanError(f"cannot write: {error.strerror}", where=str(path)) from error

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a file.

        Raises:
            PlanError: unreadable, or broken, with the line.
        """
        path = Path(path)
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError as error:
            raise PlanError(
                "no such plan",
                where=str(path),
                hint="bitnest plan MODEL --bits 3.5 -o FILE makes one",
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read: {error}", where=str(path)) from error

    @classmethod
    def from_text(cls, text: str, where: str = "plan") -> Plan:
        """The plan that `to_text` wrote, or a person.

        Raises:
            PlanError: broken, with the line.
        """
        nodes = top_level(text, where, KEYS, "plan")
        values: dict[str, Any] = {}
        for key, node in nodes.items():
            values[key] = plain(node, where) if key != "rules" else None
            if key != "rules" and type(values[key]) is not KEYS[key]:
                raise broken(f"'{key}' must be a {KEYS[key].__name__}", node, where)
            _check_value(key, values[key], node, where)
        if values.get("plan") != VERSION:
            raise PlanError(
                f"plan of version {values.get('plan')}, this bitnest reads {VERSION}",
                where=where,
                hint="make it again: bitnest plan MODEL --bits 3.5",
            )
        if "rules" not in nodes:
            raise PlanError(
                "a plan without rules", where=where, hint="rules: is a list of PATTERN: FORMAT"
            )
        rules = tuple(_rule(node, where) for node in items(nodes["rules"], where, HINT))
        rest = {k: v for k, v in values.items() if k not in {"plan", "rules"}}
        lines = tuple(node.start_mark.line + 1 for node in items(nodes["rules"], where, HINT))
        return cls(rules, **rest, where=where, lines=lines)


def digest_of(rules: Sequence[Rule]) -> str:
    """Of the rules in their order, 16 digits."""
    text = "\n".join(f"{rule.pattern}={rule.format}" for rule in rules)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_value(key: str, value: Any, node: yaml.Node, where: str) -> None:
    """Refuse a name that nothing has, and a dial that is no number.

    Raises:
        PlanError: with the line.
    """
    if key == "target" and value not in TARGETS:
        raise broken(f"unknown target '{value}'", node, where, "one of " + ", ".join(TARGETS))
    if key == "prune" and value not in PRUNERS:
        raise broken(f"unknown way to prune '{value}'", node, where, "one of " + ", ".join(PRUNERS))
    if key == "policy" and value not in {"", *POLICIES}:
        raise broken(f"unknown policy '{value}'", node, where, "one of " + ", ".join(POLICIES))
    for name, number in value.items() if key == "asked" else ():
        if name not in ASKED:
            raise broken(f"unknown dial '{name}' in 'asked'", node, where,
                         "known: " + ", ".join(ASKED))  # fmt: skip
        if name == "inputs":
            _check_inputs(number, node, where)
        elif name == "nested":
            _check_widths(number, node, where)
        elif isinstance(number, bool) or not isinstance(number, int | float):
            raise broken(f"'asked.{name}' must be a number, not {number!r}", node, where)


def _check_inputs(value: Any, node: yaml.Node, where: str) -> None:
    names = value if isinstance(value, list) else []
    if not names or any(not isinstance(name, str) for name in names):
        raise broken("'asked.inputs' must be a list of formats of inputs", node, where)
    try:
        for name in names:
            split_name(f"dense/{name}")
    except FormatError as error:
        raise broken(f"'asked.inputs': {error.what}", node, where, error.hint) from error


def _check_widths(value: Any, node: yaml.Node, where: str) -> None:
    try:
        parse_widths(str(value))
    except FormatError as error:
        raise broken(f"'asked.nested': {error.what}", node, where, error.hint) from error


def _rule(node: yaml.Node, where: str) -> Rule:
    pattern, fmt = pair(node, where, HINT)
    try:
        matcher(pattern)
        return Rule(pattern, check_format(fmt))
    except (RecipeError, FormatError) as error:
        raise broken(error.what, node, where, error.hint) from error
