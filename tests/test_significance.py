"""Significance, tiers, rankings and domains of experts: by hand, by definition, at the edges."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.calibrate.distribution.domains import domain_experts, output_similarity
from bitnest.calibrate.distribution.rankings import (
    NAMES,
    average_ranks,
    best_first,
    rankings_section,
    spearman,
)
from bitnest.calibrate.distribution.significance import (
    DynamicChannel,
    channel_significance,
    dynamic_channels,
    dynamics,
    expert_significance,
    joint_significance,
)
from bitnest.calibrate.distribution.tiers import fuzzy_tiers
from bitnest.errors import DataError, RecipeError

fast = settings(deadline=None, max_examples=60)
lists = st.lists(st.floats(0, 1), min_size=1, max_size=40)


# significance


def test_channel_significance_is_input_times_column_norm_times_share() -> None:
    mean_abs = [[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [5.0, 0.5]]]
    s = channel_significance(mean_abs, [[10, 1], [2, 0]], [[0.25, 0.75], [1.0, 0.0]])
    assert s.tolist() == [[[2.5, 0.5], [4.5, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]


def test_channel_significance_is_the_mean_size_of_a_channels_part_of_the_output() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 5, 4))  # experts, out, in
    x = rng.normal(size=(30, 4))
    chosen = np.repeat([0, 1, 1, 2, 1], 6)
    by_hand = np.zeros((3, 4))
    for t, e in enumerate(chosen):
        for c in range(4):
            by_hand[e, c] += np.linalg.norm(x[t, c] * w[e, :, c]) / 30
    mean_abs = [[np.abs(x[chosen == e]).mean(0) for e in range(3)]]
    share = np.bincount(chosen)[None] / 30
    s = channel_significance(mean_abs, np.linalg.norm(w, axis=1), share)
    np.testing.assert_allclose(s[0], by_hand, rtol=1e-12)


def test_expert_significance_adds_projections_of_different_width() -> None:
    gate = [[[1.0, 1.0], [0.0, 2.0]]]
    down = [[[3.0], [1.0]]]
    assert expert_significance({"gate": gate, "down": down}).tolist() == [[5 / 8, 3 / 8]]


def test_dataset_without_tokens_has_no_significance_and_makes_nobody_dynamic() -> None:
    s = expert_significance({"up": [[[1.0], [3.0]], [[0.0], [0.0]], [[1.0], [1.0]]]})
    assert s.tolist() == [[0.25, 0.75], [0, 0], [0.5, 0.5]]
    assert dynamics(s).tolist() == pytest.approx([1 / 3, 0.2])
    joint = joint_significance(s)
    assert joint.mean.tolist() == [0.375, 0.625]
    assert joint.deviation.tolist() == [0.125, 0.125]
    assert joint.dynamics.tolist() == dynamics(s).tolist()


def test_dynamics_run_from_equal_to_absent() -> None:
    assert dynamics([[0.3, 0.1, 0.0, 0.6], [0.3, 0.3, 0.0, 0.0]]).tolist() == pytest.approx(
        [0, 0.5, 0, 1]
    )


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@fast
def test_dynamics_stay_between_zero_and_one(labels: int, experts: int, data: Any) -> None:
    row = st.lists(st.floats(0, 1e300), min_size=experts, max_size=experts)
    d = dynamics(data.draw(st.lists(row, min_size=labels, max_size=labels)))
    assert d.shape == (experts,) and (d >= 0).all() and (d <= 1).all()


@pytest.mark.parametrize("labels", [0, 1, 2])
def test_no_tokens_at_all_is_zero_and_never_nan(labels: int) -> None:
    nothing = np.zeros((labels, 3, 2))
    s = expert_significance(
        {"up": channel_significance(nothing, np.ones((3, 2)), nothing[:, :, 0])}
    )
    joint = joint_significance(s)
    for values in (s, joint.mean, joint.deviation, joint.dynamics, dynamics(s)):
        assert not values.any()
    assert dynamic_channels({(0, "up"): nothing}, 1.0).records == ()


def test_nan_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"nan at \(0, 1, 0\)"):
        channel_significance([[[1.0], [np.nan]]], np.ones((2, 1)), np.ones((1, 2)))
    with pytest.raises(DataError, match="-1"):
        dynamics([[-1.0]])


def test_statistics_of_two_models_are_refused() -> None:
    with pytest.raises(DataError, match="experts"):
        channel_significance(np.ones((1, 2, 3)), np.ones((4, 3)), np.ones((1, 2)))
    with pytest.raises(DataError, match="datasets"):
        expert_significance({"up": np.ones((1, 2, 3)), "down": np.ones((2, 2, 3))})
    with pytest.raises(DataError, match="axes"):
        dynamics(np.ones(3))
    with pytest.raises(DataError):
        expert_significance({})


# dynamic channels


def test_dynamic_channels_by_hand() -> None:
    channels = {
        (1, "up"): [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]],
        (0, "up"): [[[4.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 3.0]]],
        (0, "down"): [[[2.0], [2.0]], [[0.0], [0.0]]],
    }
    found = dynamic_channels(channels, 0.3)  # layer 0 totals 10 and 5; 3 of 10 channels
    assert found.total == 10
    assert found.records == (
        DynamicChannel(0, 1, "up", 1, 0.6),
        DynamicChannel(0, 0, "up", 0, 0.4),
        DynamicChannel(0, 0, "down", 0, 0.2),  # ties with the other expert's
    )
    section = found.section(1)
    assert section == {
        "share": 0.3,
        "count": 3,
        "list": [{"layer": 0, "expert": 1, "projection": "up", "channel": 1, "change": 0.6}],
    }
    assert json.loads(json.dumps(section)) == section


def test_dynamic_channels_do_not_depend_on_a_datasets_scale_or_on_the_order_given() -> None:
    rng = np.random.default_rng(1)
    channels = {(i, p): rng.random((3, 4, 8)) for i in range(3) for p in ("up", "gate", "down")}
    scaled = {key: channels[key] * [[[4.0]], [[0.5]], [[1.0]]] for key in reversed(channels)}
    assert dynamic_channels(channels, 0.1) == dynamic_channels(scaled, 0.1)


def test_dynamic_channels_are_the_largest_of_brute_force() -> None:
    rng = np.random.default_rng(2)
    channels = {(i, p): rng.random((3, 5, c)) for i in (2, 5) for p, c in (("up", 7), ("down", 4))}
    everything = []
    for (layer, p), s in channels.items():
        total = sum(channels[layer, q].sum((1, 2)) for q in ("up", "down"))
        for e in range(5):
            for c in range(s.shape[2]):
                shares = s[:, e, c] / total
                everything.append((-(shares.max() - shares.min()), layer, e, p, c))
    best = sorted(everything)[:11]
    found = dynamic_channels(channels, 0.1)  # of 110
    assert [(r.layer, r.expert, r.projection, r.channel) for r in found.records] == [
        x[1:] for x in best
    ]
    np.testing.assert_allclose([r.change for r in found.records], [-x[0] for x in best])


def test_ties_at_the_limit_go_by_layer_expert_projection_channel() -> None:
    same = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    channels = {(layer, p): same for layer in (1, 0) for p in ("up", "down")}
    records = dynamic_channels(channels, 0.5).records
    assert [(r.layer, r.expert, r.projection, r.channel) for r in records] == [
        (0, e, p, c) for e in (0, 1) for p in ("down", "up") for c in (0, 1)
    ]


def test_one_dataset_or_proportional_ones_have_no_dynamic_channels() -> None:
    one = np.random.default_rng(3).random((1, 4, 50))
    assert dynamic_channels({(0, "up"): one}, 1.0).records == ()
    assert dynamic_channels({(0, "up"): np.concatenate([one, one / 3])}, 1.0).records == ()
    assert dynamic_channels({}, 0.5).section() == {"share": 0.5, "count": 0, "list": []}
    with pytest.raises(RecipeError):
        dynamic_channels({}, 1.5)


# tiers


def naive_c_means(
    x: list[list[float]], c: int, m: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Loops over the definition, from the same quantiles of distinct points."""
    distinct = sorted({tuple(p) for p in x}, key=lambda p: (sum(p), p), reverse=True)
    v = [list(distinct[int((k + 0.5) * len(distinct) / c)]) for k in range(c)]

    def distance(a: list[float], b: list[float]) -> float:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5

    for _ in range(3000):
        u = []
        for p in x:
            d = [distance(p, q) for q in v]
            hits = d.count(0.0)
            if hits:
                u.append([1 / hits if a == 0 else 0.0 for a in d])
            else:
                u.append([1 / sum((a / b) ** (2 / (m - 1)) for b in d) for a in d])
        for k in range(c):
            weight = [row[k] ** m for row in u]
            for axis in range(len(x[0])):
                total = sum(w * p[axis] for w, p in zip(weight, x, strict=True))
                v[k][axis] = total / sum(weight)
    return v, u


@pytest.mark.parametrize(
    ("axes", "m", "seed"), [(1, 2.0, 0), (1, 1.5, 1), (2, 2.0, 2), (3, 3.0, 3)]
)
def test_tiers_equal_a_naive_implementation(axes: int, m: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = rng.random((4, axes)) * 10
    x = np.concatenate([mean + rng.normal(size=(5, axes)) * 0.4 for mean in means])
    v, u = naive_c_means(x.tolist(), 4, m)
    order = sorted(range(4), key=lambda k: -sum(v[k]))
    found = fuzzy_tiers(x, fuzzifier=m)
    assert found.converged
    np.testing.assert_allclose(found.centres, np.array(v)[order], atol=1e-6)
    np.testing.assert_allclose(found.memberships, np.array(u)[:, order], atol=1e-6)
    assert found.tiers.tolist() == np.array(u)[:, order].argmax(1).tolist()


@given(lists, st.sampled_from([1.5, 2.0, 3.0]))
@fast
def test_tiers_are_a_fixed_point_of_the_definition(values: list[float], m: float) -> None:
    x = np.array(values)
    found = fuzzy_tiers(x, fuzzifier=m)
    v, u, reach = found.centres, found.memberships, max(np.ptp(x), 1e-12)
    assert np.isfinite(v).all() and np.isfinite(u).all()
    np.testing.assert_allclose(u.sum(1), 1, atol=1e-12)
    assert (np.diff(v) <= 1e-12).all()
    assert found.section()["counts"] == np.bincount(found.tiers, minlength=4).tolist()
    if found.converged:
        w = u**m
        np.testing.assert_allclose(w.T @ x / w.sum(0), v, atol=1e-6 * reach)
    d = np.abs(x[:, None] - v[None])
    apart = (d > 1e-6 * reach).all(1)  # elsewhere rounding decides what is on a centre
    d = d[apart]
    power = 2 / (m - 1)
    expected = 1 / ((d[:, :, None] / d[:, None, :]) ** power).sum(2)
    np.testing.assert_allclose(u[apart], expected, atol=1e-4)


@given(lists, st.randoms())
@fast
def test_tiers_follow_significance_and_not_the_order_of_experts(
    values: list[float], random: Any
) -> None:
    tiers = fuzzy_tiers(values).tiers
    by_value = np.argsort(values, kind="stable")
    assert (np.diff(tiers[by_value]) <= 0).all()
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)
    again = fuzzy_tiers([values[i] for i in shuffled]).tiers
    assert again.tolist() == tiers[shuffled].tolist()


@given(lists, st.floats(1e-3, 1e3))
@fast
def test_one_column_of_points_is_the_same_as_plain_numbers(
    values: list[float], factor: float
) -> None:
    flat, column = fuzzy_tiers(values), fuzzy_tiers(np.array(values)[:, None])
    assert column.centres.shape == (4, 1)
    assert column.tiers.tolist() == flat.tiers.tolist()
    assert column.section() == flat.section()


@pytest.mark.parametrize("power", [-290, -30, 30, 300])
def test_tiers_do_not_depend_on_the_unit_of_significance(power: int) -> None:
    x = np.random.default_rng(4).random(30)
    assert fuzzy_tiers(x * 2.0**power).tiers.tolist() == fuzzy_tiers(x).tiers.tolist()
    assert fuzzy_tiers(x * 10.0**power).centres == pytest.approx(
        fuzzy_tiers(x).centres * 10.0**power, rel=1e-9
    )


def test_four_clear_groups_get_eight_six_four_two() -> None:
    found = fuzzy_tiers([0.1, 0.9, 0.5, 0.3, 0.11, 0.91, 0.51, 0.31])
    assert [found.bits[t] for t in found.tiers] == [2, 8, 6, 4, 2, 8, 6, 4]
    assert found.section()["counts"] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("points", "tiers"),
    [
        ([0.5], [3]),
        ([0.25] * 5, [3] * 5),
        ([0.0] * 3, [3] * 3),
        ([0.1 + 0.2, 0.3, 0.3, 0.15 * 2, 3 * 0.1], [3] * 5),  # equal but for rounding
        ([1.0, 2.0, 1.0], [3, 0, 3]),
        ([1.0, 2.0, 3.0], [3, 1, 0]),
        ([4.0, 1.0, 2.0, 3.0, 3.0], [0, 3, 2, 1, 1]),
    ],
)
def test_fewer_values_than_clusters_leave_the_lowest_the_lowest_precision(
    points: list[float], tiers: list[int]
) -> None:
    found = fuzzy_tiers(points)
    assert found.tiers.tolist() == tiers
    assert found.converged and np.isfinite(found.memberships).all()
    np.testing.assert_allclose(found.memberships.sum(1), 1)


def test_tie_between_two_tiers_goes_to_the_lower_precision() -> None:
    found = fuzzy_tiers([0.0, 0.1, 0.5, 0.9, 1.0], bits=(8, 2))
    assert found.memberships[2] == pytest.approx([0.5, 0.5])
    assert found.tiers.tolist() == [1, 1, 1, 0, 0]


def test_hard_fuzzifier_never_divides_by_an_empty_cluster() -> None:
    found = fuzzy_tiers([0.0, 1e-9, 2e-9, 3e-9, 4e-9, 1.0], fuzzifier=1.001)
    assert np.isfinite(found.centres).all() and np.isfinite(found.memberships).all()
    assert found.tiers[-1] == 0


def test_stopping_early_is_said() -> None:
    assert not fuzzy_tiers(np.random.default_rng(5).random(20), rounds=1).converged


@pytest.mark.parametrize(
    ("points", "options", "error"),
    [
        ([], {}, DataError),
        ([np.nan], {}, DataError),
        ([1.0], {"fuzzifier": 1.0}, RecipeError),
        ([1.0], {"bits": ()}, RecipeError),
        ([1.0], {"bits": (2, 4)}, RecipeError),
    ],
)
def test_impossible_clusterings_are_refused(
    points: list[float], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        fuzzy_tiers(points, **options)


# rankings


def test_equal_experts_share_their_average_rank() -> None:
    assert average_ranks([3, 1, 3, 0, 3]).tolist() == [4, 2, 4, 1, 4]


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6*2/(4*15)
    assert spearman([1, 2, 3], [9, 4, 1]) == -1
    # ranks 1.5 1.5 3 against 1 2 3: 1.5 / sqrt(1.5 * 2)
    assert spearman([0, 0, 5], [1, 2, 3]) == pytest.approx(0.75**0.5)


@pytest.mark.parametrize("other", [None, [0, 0, 0], [7, 7, 7]])
def test_spearman_of_a_missing_or_constant_ranking_is_undefined(other: list[int] | None) -> None:
    assert spearman([1, 2, 3], other) is None
    assert spearman(other, other) is None


def test_spearman_of_one_expert_is_undefined() -> None:
    assert spearman([3.0], [4.0]) is None


@given(lists)
@fast
def test_a_ranking_agrees_with_itself_and_not_with_its_reverse(values: list[float]) -> None:
    x = np.array(values)
    if len(set(values)) > 1:
        assert spearman(x, x) == pytest.approx(1)
        assert spearman(x, -x) == pytest.approx(-1)
        assert [x[i] for i in best_first(x)] == sorted(values, reverse=True)


def test_rankings_section_averages_over_the_layers_that_have_one() -> None:
    full = {"frequency": [3, 1, 2], "gate mass": [3, 2, 1], "REAP": [0, 0, 0], "Fisher": None}
    section = rankings_section({4: full, 2: {"frequency": [1, 2, 3], "gate mass": None}})
    assert section["names"] == list(NAMES)
    assert [layer["layer"] for layer in section["layers"]] == [2, 4]
    assert section["layers"][1]["correlation"][0] == [1, pytest.approx(0.5), None, None, None]
    assert section["mean"][0] == [1, pytest.approx(0.5), None, None, None]
    assert section["mean"][1][1] == 1 and section["mean"][2] == [None] * 5
    assert section["top"][1]["order"] == {
        "frequency": [0, 2, 1],
        "gate mass": [0, 1, 2],
        "REAP": [0, 1, 2],
        "Hessian trace": None,
        "Fisher": None,
    }
    json.dumps(section, allow_nan=False)


def test_rankings_of_no_layers_and_unknown_rankings() -> None:
    assert rankings_section({})["mean"] == [[None] * 5] * 5
    with pytest.raises(DataError, match="luck"):
        rankings_section({0: {"luck": [1, 2]}})
    with pytest.raises(DataError, match="experts"):
        rankings_section({0: {"frequency": [1, 2], "REAP": [1, 2, 3]}})


# domains


def test_domain_experts_by_hand() -> None:
    shares = {
        3: [[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]],
        1: [[0.0, 0.75, 0.25], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]],
    }
    found = domain_experts(shares, ["books", "code", "wiki"])
    assert [(r["layer"], r["expert"], r["label"], r["other"], r["difference"]) for r in found] == [
        (1, 0, "code", "books", 0.5),
        (1, 1, "books", "code", 0.5),
        (1, 2, "wiki", "books", 0.25),
        (3, 0, "books", "wiki", 0.25),
        (3, 1, "wiki", "books", 0.25),
    ]
    assert found[0]["share"] == {"books": 0.0, "code": 0.5, "wiki": 0.25}
    assert domain_experts(shares, ["books", "code", "wiki"], limit=2) == found[:2]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_domain_without_tokens_in_a_layer_is_not_compared() -> None:
    (found, _) = domain_experts({0: [[0.25, 0.75], [0, 0], [0.75, 0.25]]}, ["a", "b", "c"])
    assert found["label"] == "c" and found["difference"] == 0.5
    assert found["share"] == {"a": 0.25, "b": None, "c": 0.75}


@pytest.mark.parametrize(
    ("share", "labels"),
    [
        ([[0.25, 0.75]], ["all"]),
        ([[0.25, 0.75]] * 2, ["a", "b"]),
        ([[1.0], [1.0]], ["a", "b"]),
        ([[0.25, 0.75], [0, 0]], ["a", "b"]),
        ([[0.0], [0.0]], ["a", "b"]),
    ],
)
def test_nothing_to_tell_apart_gives_an_empty_list(
    share: list[list[float]], labels: list[str]
) -> None:
    assert domain_experts({0: share}, labels) == []


def test_labels_that_do_not_fit_the_shares_are_refused() -> None:
    with pytest.raises(DataError, match="labels"):
        domain_experts({0: [[0.5, 0.5]]}, ["a", "b"])


def test_output_similarity_by_hand() -> None:
    s = output_similarity([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(
        s,
        [
            [1, -1, 0, 0, 0.6],
            [-1, 1, 0, 0, -0.6],
            [0, 0, 1, 0, 0.8],
            [0, 0, 0, 0, 0],
            [0.6, -0.6, 0.8, 0, 1],
        ],
        atol=1e-15,
    )


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e300])
def test_output_similarity_survives_tiny_and_huge_outputs(scale: float) -> None:
    s = output_similarity(np.array([[1.0, 2.0], [2.0, 1.0]]) * scale)
    assert s[0, 1] == s[1, 0] == pytest.approx(0.8, rel=1e-2)
    assert output_similarity(np.zeros((2, 0))).tolist() == [[0, 0], [0, 0]]
