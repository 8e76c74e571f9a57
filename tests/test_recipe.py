"""Formats by name, rules in order, and contradictions refused."""

import pytest

from bitnest.errors import FormatError, RecipeError
from bitnest.formats import DenseFormat, integer, parse_format
from bitnest.recipe import Recipe, Rule, default_format
from bitnest.sites import Site


def site(name: str, kind: str = "mlp") -> Site:
    return Site(name, kind, 0, None, (64, 64), name, "weight")


SITES = [
    site("model.layers.0.self_attn.q_proj", "attention"),
    site("model.layers.0.mlp.down_proj"),
    site("model.layers.0.mlp.gate", "router"),
]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tail", ["g16", "g128", "channel", "g64-asym", "channel-asym"])
def test_names_read_back_to_the_same_format(bits: int, tail: str) -> None:
    assert parse_format(f"int{bits}-{tail}").name == f"int{bits}-{tail}"


@pytest.mark.parametrize(
    "name", ["int0-g128", "int9-g128", "int4-g7", "int4-g256", "int4", "fp4", "", "int4-g0"]
)
def test_impossible_formats_are_refused_by_name(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_format(name)
    assert caught.value.hint


def test_later_rules_win_and_routers_stay_dense() -> None:
    recipe = Recipe(rules=(Rule.parse("*=int8-g64"), Rule.parse("kind:attention=dense")))
    formats = recipe.formats(SITES, 2)
    assert formats[SITES[0].name] == DenseFormat(2)
    assert formats[SITES[1].name] == integer(8, 64)
    assert Recipe().formats(SITES, 4)[SITES[2].name] == DenseFormat(4)


@pytest.mark.parametrize("pattern", ["*.nothing", "re:^down", "kind:expert"])
def test_rule_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(RecipeError, match="matches no site"):
        Recipe(rules=(Rule(pattern, "int4-g128"),)).formats(SITES, 2)


@pytest.mark.parametrize("text", ["int4-g128", "=int4-g128", "kind:nonsense=dense", "re:(=dense"])
def test_malformed_rules_are_refused(text: str) -> None:
    with pytest.raises((RecipeError, FormatError)):
        Recipe(rules=(Rule.parse(text),)).formats(SITES, 2)


def test_format_and_bits_together_are_a_contradiction() -> None:
    with pytest.raises(RecipeError):
        default_format(4, "int4-g128", None)
    assert default_format(3, None, 64) == "int3-g64"
    assert default_format(None, None, None) == "int4-g128"
