"""Patterns that name sites, and folding a long list of sites into few of them.

A pattern is a shell glob over the whole name in which `{0,3-5,q_proj}` stands for any one of the
numbers, ranges of numbers or words in it; or after `re:` a regular expression that must match
somewhere; or `kind:attention`.

`fold` writes a map from names to values as ordered rules, the last match deciding. Names are sorted
into families by what is left when numbers are taken out; a family's most common value comes first,
`a.*.b`, then the exceptions, `a.{1,4}.b` or, with two numbers, one rule for all layers that have a
value at the same experts. What is folded expands to exactly what went in; that is checked, and
names that would not are written out, those that read as patterns by `re:`.
"""

from __future__ import annotations

import fnmatch
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from bitnest.errors import RecipeError
from bitnest.sites import KINDS, Site

_SET = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z0-9_]+")
_RANGE = re.compile(r"(\d+)-(\d+)")
_SPECIAL = re.compile(r"[*?\[{]")
_PATTERN = re.compile(r"[*?\[\]{}]|^kind:|^re:")  # in a name: it would not stand for itself
_LARGEST = 100_000  # numbers in one range


class Names:
    """Sites to be matched by many patterns, without looking at every site for each."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.name: site for site in sites}
        self._sorted = sorted(self._sites)

    def matching(self, pattern: str) -> list[str]:
        """Names of the sites that match, in the order given.

        Raises:
            RecipeError: a broken pattern or an unknown kind.
        """
        matches = matcher(pattern)
        special = _SPECIAL.search(pattern)
        if pattern.startswith(("kind:", "re:")):
            return [name for name, site in self._sites.items() if matches(site)]
        if special is None:
            return [pattern] if pattern in self._sites else []
        prefix = pattern[: special.start()]
        start = bisect_left(self._sorted, prefix)
        stop = bisect_left(self._sorted, prefix + "\U0010ffff")
        return [name for name in self._sorted[start:stop] if matches(self._sites[name])]


def matcher(pattern: str) -> Callable[[Site], bool]:
    """Whether a site matches.

    Raises:
        RecipeError: a broken pattern or an unknown kind.
    """
    if pattern.startswith("kind:"):
        kind = pattern.removeprefix("kind:")
        if kind not in KINDS:
            raise RecipeError(f"unknown kind '{kind}'", hint="one of " + ", ".join(KINDS))
        return lambda site: site.kind == kind
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise RecipeError(
                f"broken pattern '{pattern}': {error}",
                hint="re: takes a Python regular expression; without it a pattern is a glob",
            ) from error
        return lambda site: regex.search(site.name) is not None
    if "{" not in pattern and "}" not in pattern:
        return lambda site: fnmatch.fnmatchcase(site.name, pattern)
    whole = re.compile(_translate(pattern))
    return lambda site: whole.fullmatch(site.name) is not None


def _translate(pattern: str) -> str:
    """The regular expression of a glob with sets."""
    parts, start = [], 0
    for found in _SET.finditer(pattern):
        parts.append(_glob(pattern[start : found.start()], pattern))
        parts.append(_alternatives(found[1], pattern))
        start = found.end()
    parts.append(_glob(pattern[start:], pattern))
    return "".join(parts)


def _glob(text: str, pattern: str) -> str:
    if "{" in text or "}" in text:
        raise RecipeError(f"broken pattern '{pattern}': a brace without its partner",
                          hint="a set reads {0,3-5} or {q_proj,k_proj}")  # fmt: skip
    return fnmatch.translate(text).removeprefix("(?s:").removesuffix(r")\Z")


def _alternatives(text: str, pattern: str) -> str:
    words: list[str] = []
    for item in text.split(","):
        span = _RANGE.fullmatch(item.strip())
        if span is not None:
            low, high = int(span[1]), int(span[2])
            if not low <= high < low + _LARGEST:
                raise RecipeError(
                    f"broken pattern '{pattern}': the range {item} is empty",
                    hint="a range goes from the lower number to the higher",
                )
            words.extend(str(number) for number in range(low, high + 1))
        elif _WORD.fullmatch(item.strip()):
            words.append(item.strip())
        else:
            raise RecipeError(f"broken pattern '{pattern}': '{item}' is no number or word",
                              hint="a set reads {0,3-5} or {q_proj,k_proj}")  # fmt: skip
    return "(?:" + "|".join(map(re.escape, words)) + ")"


def number_set(numbers: Iterable[int], everything: Sequence[int]) -> str:
    """`3`, `{0,3-5}`, or `*` for all of `everything`."""
    own = sorted(set(numbers))
    if own == sorted(set(everything)) and len(own) > 1:
        return "*"
    if len(own) == 1:
        return str(own[0])
    runs: list[list[int]] = []
    for number in own:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(texts) + "}"


Family = dict[tuple[int, ...], str]
"""Numbers of a name -> value, for names that are equal but for numbers."""


def fold(values: Mapping[str, str]) -> list[tuple[str, str]]:
    """Ordered rules (pattern, value) that expand to `values`."""
    if len(set(values.values())) == 1:
        return [("*", next(iter(values.values())))]
    families: dict[tuple[str, ...], Family] = {}
    for name, value in values.items():
        parts = name.split(".")
        key = tuple("#" if part.isdigit() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdigit())
        families.setdefault(key, {})[numbers] = value
    rules: list[tuple[str, str]] = []
    for keys, family in _alike(families):
        rules.extend(_family_rules(keys, family))
    return _exact(rules, values)


def _alike(families: Mapping[tuple[str, ...], Family]) -> list[tuple[tuple[str, ...], Family]]:
    """Families that differ in their last word only and have equal values, as one."""
    merged: list[tuple[list[tuple[str, ...]], Family]] = []
    for key, family in families.items():
        for keys, other in merged:
            words = _WORD.fullmatch(key[-1]) and _WORD.fullmatch(keys[0][-1])
            if words and keys[0][:-1] == key[:-1] and other == family:
                keys.append(key)
                break
        else:
            merged.append(([key], family))
    result = []
    for keys, family in merged:
        last = keys[0][-1] if len(keys) == 1 else "{" + ",".join(k[-1] for k in keys) + "}"
        result.append(((*keys[0][:-1], last), family))
    return result


def _family_rules(key: tuple[str, ...], family: Family) -> list[tuple[str, str]]:
    numbers = list(zip(*family, strict=True)) if next(iter(family)) else []
    common = Counter(family.values()).most_common(1)[0][0]
    stars = ["*" if len(set(axis)) > 1 else str(axis[0]) for axis in numbers]
    rules = [(_spell(key, stars), common)]
    for value in sorted(set(family.values()) - {common}):
        own = [place for place, held in family.items() if held == value]
        if len(numbers) == 1:
            rules.append((_spell(key, [number_set((n for (n,) in own), numbers[0])]), value))
            continue
        rows: dict[tuple[int, ...], set[int]] = {}
        for place in own:
            rows.setdefault(place[:-1], set()).add(place[-1])
        by_set: dict[frozenset[int], list[tuple[int, ...]]] = {}
        for row, columns in rows.items():
            by_set.setdefault(frozenset(columns), []).append(row)
        for columns_set, same in by_set.items():
            last = number_set(columns_set, numbers[-1])
            if len(numbers) == 2:
                rules.append(
                    (_spell(key, [number_set((r for (r,) in same), numbers[0]), last]), value)
                )
            else:
                rules.extend((_spell(key, [*map(str, row), last]), value) for row in same)
    return rules


def _spell(key: tuple[str, ...], numbers: Sequence[str]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if part == "#" else part for part in key)


def _exact(rules: list[tuple[str, str]], values: Mapping[str, str]) -> list[tuple[str, str]]:
    """The rules, less those that are no patterns or match nothing, and after them by name whatever
    they do not expand to rightly."""
    names = Names(_named(name) for name in values)
    found: dict[str, str] = {}
    kept = []
    for pattern, value in rules:
        try:
            hits = names.matching(pattern)
        except RecipeError:  # of a name with a brace in it, say
            continue
        if hits:
            kept.append((pattern, value))
        found.update(dict.fromkeys(hits, value))
    wrong = ((name, value) for name, value in values.items() if found.get(name) != value)
    return [*kept, *((_literal(name), value) for name, value in wrong)]


def _literal(name: str) -> str:
    """The pattern that matches this name alone."""
    return rf"re:\A{re.escape(name)}\Z" if _PATTERN.search(name) else name


def _named(name: str) -> Site:
    return Site(name, "other", 0, None, (1, 1), name, "weight")
