"""YAML read so that every complaint can name a line.

Values come through PyYAML's safe loader: no tags, no objects.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import yaml

from bitnest.errors import PlanError


def top_level(text: str, where: str, known: Collection[str], noun: str) -> dict[str, yaml.Node]:
    """The keys of a file and the nodes of their values.

    Raises:
        PlanError: not YAML, not a mapping, a key that is unknown or there twice.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PlanError(
            f"not YAML: {problem}",
            where=f"{where}{line}",
            hint="quote a value that begins with * or { or contains ': '",
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"not YAML: {type(error).__name__}",
            where=where,
            hint="nested too deep, or a bad number",
        ) from error
    if not isinstance(node, yaml.MappingNode):
        raise PlanError(f"a {noun} is a mapping of keys", where=where, hint=", ".join(known))
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            name = key.value if isinstance(key, yaml.ScalarNode) else "a list"
            raise broken(f"unknown key '{name}'", key, where, "known: " + ", ".join(known))
        if key.value in found:
            raise broken(f"'{key.value}' twice", key, where)
        found[key.value] = value
    return found


def plain(node: yaml.Node, where: str) -> Any:
    """The value of a node.

    Raises:
        PlanError: a tag that asks for an object, an anchor that is not there.
    """
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise broken(
            f"not a plain value: {getattr(error, 'problem', error)}", node, where
        ) from error


def items(node: yaml.Node, where: str, hint: str) -> list[yaml.Node]:
    """The nodes of a list.

    Raises:
        PlanError: not a list.
    """
    if not isinstance(node, yaml.SequenceNode):
        raise broken("not a list", node, where, hint)
    return list(node.value)


def pair(node: yaml.Node, where: str, hint: str) -> tuple[str, str]:
    """A mapping of one scalar to another, as `- PATTERN: FORMAT`.

    Raises:
        PlanError: something else.
    """
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        ((key, value),) = node.value
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            return key.value, value.value
    raise broken("not a rule", node, where, hint)


def broken(what: str, node: yaml.Node, where: str, hint: str = "") -> PlanError:
    """An error that names the node's line."""
    return PlanError(what, where=f"{where}:{node.start_mark.line + 1}", hint=hint)
