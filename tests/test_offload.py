"""Expert caches, routing consistency and transitions: hand-computed, simulated and enumerated.

The cache kernel answers for all sizes at once; here every size is simulated by itself, and on tiny
traces every choice of what to evict is tried. Without a compiler the reference alone is tested.
"""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.calibrate.distribution.caches import capacity, hit_rates, priorities, sch, srp
from bitnest.calibrate.distribution.offload import (
    SIZES,
    _sizes,
    coactivation,
    offloading,
    phi,
    transition_counts,
    transition_entropy,
    transitions,
)
from bitnest.errors import BitnestError
from bitnest.kernels import native
from bitnest.kernels.cache_trace import stack_hits

no_compiler = native.load("cache_trace") is None
needs_compiler = pytest.mark.skipif(no_compiler, reason="no C compiler: only the reference runs")
PATHS = [False, pytest.param(True, marks=needs_compiler)]


def column(*requests: int) -> np.ndarray:
    """A trace of tokens that use one expert each."""
    return np.array(requests)[:, None]


def random_trace(seed: int, tokens: int, experts: int, k: int) -> np.ndarray:
    """Uneven, and drifting, so that policies differ."""
    rng = np.random.default_rng(seed)
    taste = np.cumsum(rng.normal(size=(tokens, experts)), axis=0) * 0.3 + np.arange(experts) * 0.1
    return np.argsort(rng.normal(size=(tokens, experts)) + taste, axis=1)[:, :k]


@st.composite
def traces(draw: st.DrawFn, tokens: int = 24, most: int = 7) -> tuple[np.ndarray, int]:
    """A trace and the number of experts."""
    experts = draw(st.integers(1, most))
    k = draw(st.integers(1, min(3, experts)))
    token = st.permutations(range(experts)).map(lambda order: order[:k])
    rows = draw(st.lists(token, min_size=1, max_size=tokens))
    return np.array(rows).reshape(len(rows), k), experts


# ---------------------------------------------------------------- one size at a time


def simulated(trace: np.ndarray, size: int, policy: str, m: int = 0) -> int:
    """Hits of one cache, by the words of the policy."""
    requests = trace.ravel().tolist()
    held: set[int] = set()
    hits = 0
    for i, x in enumerate(requests):
        t = i // trace.shape[1]
        past, future = requests[:i], requests[i + 1 :]

        def age(e: int, past: list[int] = past) -> int:
            return past[::-1].index(e)

        def uses(e: int, past: list[int] = past) -> tuple[int, int]:
            return past.count(e), -age(e)

        def until(e: int, future: list[int] = future) -> int:
            return future.index(e) if e in future else len(requests)

        def ahead(e: int, t: int = t) -> tuple[int, int]:
            # a request of this token need not be past: it cannot be evicted anyway
            return int((trace[t + 1 : t + 1 + m] == e).sum()), -age(e)

        if x in held:
            hits += 1
            continue
        if len(held) == size:
            if policy == "lru":
                held.remove(max(held, key=age))
            elif policy == "lfu":
                held.remove(min(held, key=uses))
            elif policy == "belady":
                held.remove(max(held, key=until))
            else:
                held.remove(min(held - set(trace[t].tolist()), key=ahead))
        held.add(x)
    return hits


def most_hits(requests: tuple[int, ...], size: int) -> int:
    """Over every choice of what to evict."""

    @cache
    def best(i: int, held: frozenset[int]) -> int:
        if i == len(requests):
            return 0
        x = requests[i]
        if x in held:
            return 1 + best(i + 1, held)
        if len(held) < size:
            return best(i + 1, held | {x})
        return max(best(i + 1, held - {e} | {x}) for e in held)

    return best(0, frozenset())


@pytest.mark.parametrize("path", PATHS)
def test_hit_rates_by_hand(path: bool) -> None:
    trace = column(0, 1, 0, 2, 1, 0)
    found = hit_rates(trace, 3, [1, 2, 3, 9], native=path)
    # two experts: 2 replaces 1 for LRU and LFU, which then misses 1; Belady gives up 0
    np.testing.assert_allclose(found["lru"] * 6, [0, 1, 3, 3])
    np.testing.assert_allclose(found["lfu"] * 6, [0, 2, 3, 3])
    np.testing.assert_allclose(found["belady"] * 6, [0, 2, 3, 3])


@pytest.mark.parametrize("path", PATHS)
def test_frequent_expert_stays_under_lfu_and_leaves_under_lru(path: bool) -> None:
    trace = column(0, 0, 0, 1, 2, 0)
    found = hit_rates(trace, 3, [2], native=path)
    assert found["lru"][0] * 6 == 2 and found["lfu"][0] * 6 == 3


@pytest.mark.parametrize("path", PATHS)
def test_sch_by_hand(path: bool) -> None:
    # k = 2, cache of 3. Token 2 misses 3 and may evict 1 or 2.
    trace = np.array([[0, 1], [0, 2], [0, 3], [0, 2], [0, 1], [0, 1]])
    found = sch(trace, 4, windows=[1, 2], ratios=[1, 1.5, 2], native=path)
    # 3 replaces 1: the next token asks for 2, the next two for either once, and 1 is older
    np.testing.assert_allclose(found[:, 1] * 12, [7, 7])
    np.testing.assert_allclose(found[:, 0] * 12, [6, 6])
    np.testing.assert_allclose(found[:, 2] * 12, [8, 8])  # four first misses


@pytest.mark.parametrize("path", PATHS)
def test_sch_sees_no_further_than_its_window(path: bool) -> None:
    trace = column(1, 0, 2, 2, 1)  # 2 must replace 0 or 1, which two tokens later is asked for
    near, far = sch(trace, 3, windows=[1, 2], ratios=[2], native=path)[:, 0] * 5
    assert near == 1  # nothing in sight: 1, the oldest, goes
    assert far == 2  # 0 goes


@pytest.mark.parametrize("path", PATHS)
def test_sch_counts_requests_and_belady_their_distance(path: bool) -> None:
    # 2 must replace 0 or 1: 1 is asked for sooner, 0 more often
    trace = column(1, 0, 2, 1, 2, 0, 0)
    assert sch(trace, 3, windows=[4], ratios=[2], native=path)[0, 0] * 7 == pytest.approx(2)
    assert hit_rates(trace, 3, [2], native=path)["belady"][0] * 7 == pytest.approx(3)


@pytest.mark.parametrize("path", PATHS)
def test_experts_of_the_present_token_are_not_evicted_by_each_other(path: bool) -> None:
    trace = np.array([[0, 1], [2, 0]])  # two places: loading 2 must not cost the token its 0
    assert sch(trace, 3, windows=[4], ratios=[1], native=path)[0, 0] == 1 / 4
    assert hit_rates(trace, 3, [2], native=path)["lru"][0] == 0


@given(traces(), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_one_pass_gives_what_each_size_gives_by_itself(
    drawn: tuple[np.ndarray, int], m: int
) -> None:
    trace, experts = drawn
    k = trace.shape[1]
    for path in (False, None):
        for policy in ("lru", "lfu", "belady"):
            hits = stack_hits(trace, priorities(trace, policy), experts, native=path)
            for size in range(1, experts + 1):
                assert hits[size - 1] == simulated(trace, size, policy), (policy, size)
        hits = stack_hits(trace, priorities(trace, "lru"), experts, m, native=path)
        for size in range(k, experts + 1):
            assert hits[size - 1] == simulated(trace, size, "sch", m), (m, size)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=11), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_belady_is_the_best_of_all_evictions(requests: list[int], size: int) -> None:
    rate = hit_rates(column(*requests), 5, [size])["belady"][0]
    assert round(rate * len(requests)) == most_hits(tuple(requests), size)


@given(traces(tokens=40))
@settings(max_examples=150, deadline=None)
def test_no_policy_beats_belady_and_larger_caches_hit_more(drawn: tuple[np.ndarray, int]) -> None:
    trace, experts = drawn
    k = trace.shape[1]
    found = hit_rates(trace, experts, range(1, experts + 4))
    for rates in found.values():
        assert (found["belady"] >= rates).all() and (np.diff(rates) >= 0).all()
        distinct = len(np.unique(trace))
        np.testing.assert_allclose(rates[experts - 1 :] * trace.size, trace.size - distinct)
    for rates in sch(trace, experts):
        for rho, rate in zip((1, 1.5, 2, 3, 4), rates, strict=True):
            assert math.isnan(rate) == (rho * k > experts)
            assert math.isnan(rate) or rate <= found["belady"][capacity(rho, k) - 1]


def test_sch_that_sees_everything_does_not_depend_on_how_far() -> None:
    trace = random_trace(3, 50, 8, 2)
    far = sch(trace, 8, windows=[50, 51, 5000])
    np.testing.assert_array_equal(far[0], far[1])
    np.testing.assert_array_equal(far[0], far[2])


@needs_compiler
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (300, 16, 2), (120, 128, 8)])
def test_c_and_python_agree(tokens: int, experts: int, k: int) -> None:
    trace = random_trace(tokens, tokens, experts, k)
    for dtype in (np.int8, np.uint8, np.int32, np.int64):
        if experts <= np.iinfo(dtype).max:
            cut = trace.astype(dtype)[::1]
            for policy, m in (("lru", 0), ("lfu", 0), ("belady", 0), ("lru", 4), ("lru", 1000)):
                rank = priorities(cut, policy)
                np.testing.assert_array_equal(
                    stack_hits(cut, rank, experts, m, native=True),
                    stack_hits(cut, rank, experts, m, native=False),
                )
    strided = np.asfortranarray(trace)
    np.testing.assert_array_equal(sch(strided, experts, native=True), sch(trace, experts))


def test_kernel_refuses_what_would_write_out_of_bounds() -> None:
    trace = np.array([[0, 3]])
    rank = np.arange(2)
    with pytest.raises(ValueError, match="0 to 2"):
        stack_hits(trace, rank, 3)
    with pytest.raises(ValueError, match="0 to 3"):
        stack_hits(-trace, rank, 4)
    with pytest.raises(ValueError, match="priorities"):
        stack_hits(trace, rank[:1], 4)
    with pytest.raises(ValueError, match="window"):
        stack_hits(trace, rank, 4, window=-1)
    with pytest.raises(ValueError, match="window"):
        stack_hits(trace, -rank, 4, window=1)
    assert stack_hits(trace[:0], rank[:0], 4).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- SRP


def test_srp_by_hand() -> None:
    # m = 2, windows 00, 01, 12: f = (2 0 0), (1 1 0), (0 1 1); actual 6
    # a = 2: one prediction of 2, 2 matches: 4 / (2 + 6). a = 1: five of 2, 6 matches: 12 / (10 + 6)
    assert srp(column(0, 0, 1, 2), 3, windows=[2])[0] == 12 / 16
    # windows 00, 00, 01: f = 2, 2, (1 1). a = 2: 2 * 4 / (4 + 6); a = 1: 2 * 6 / (8 + 6)
    assert srp(column(0, 0, 0, 1), 2, windows=[2])[0] == 12 / 14
    # windows of 3: 000, 001, 012 with 3, (2 1), (1 1 1): a = 2 gives 2 * 5 / (6 + 9)
    found = srp(column(0, 0, 0, 1, 2), 3, windows=[3])[0]
    assert found == max(2 * 3 / (3 + 9), 2 * 5 / (6 + 9), 2 * 9 / (18 + 9))


def test_srp_by_the_formula_on_random_traces() -> None:
    trace = random_trace(5, 60, 8, 2)
    starts = [0, 17, 20, 43]
    for m, found in zip((1, 4, 16), srp(trace, 8, (1, 4, 16), starts), strict=True):
        f = np.array([
            [(trace[t : t + m] == e).sum() for e in range(8)]
            for first, last in zip(starts, [*starts[1:], 60], strict=True)
            for t in range(first, last - m + 1)
        ])  # fmt: skip
        scores = [
            2 * f[f >= a].sum() / (m * (f >= a).sum() + f.sum()) for a in range(1, f.max() + 1)
        ]
        assert found == pytest.approx(max(scores), abs=1e-12)


def test_windows_do_not_straddle_sequences() -> None:
    trace = column(0, 0, 0, 0, 1, 1, 1, 1)
    assert srp(trace, 2, [4], [0, 4])[0] == 1
    assert srp(trace, 2, [4])[0] < 1


def test_sequences_shorter_than_the_window_have_no_srp() -> None:
    found = srp(column(0, 1, 0, 1), 2, [2, 3], [0, 2])
    assert found[0] > 0 and math.isnan(found[1])


def test_same_experts_always_are_perfectly_consistent() -> None:
    trace = np.tile([[3, 1]], (300, 1))
    assert srp(trace, 8).tolist() == [1, 1, 1, 1]


def test_single_tokens_are_perfectly_predicted() -> None:
    assert srp(random_trace(0, 50, 8, 3), 8, [1])[0] == 1


# ---------------------------------------------------------------- transitions, coactivation


def test_transitions_and_their_entropy_by_hand() -> None:
    this = column(0, 0, 0, 0, 1, 1)
    following = np.array([[0, 1], [0, 1], [0, 2], [0, 2], [1, 2], [1, 2]])
    counts = transition_counts(this, following, 3, 3)
    assert counts.tolist() == [[4, 2, 2], [0, 2, 2], [0, 0, 0]]
    np.testing.assert_allclose(transitions(counts), [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0, 0]])
    assert transition_entropy(counts) == pytest.approx((8 * 1.5 + 4 * 1.0) / 12)


def test_transition_entropy_at_its_ends() -> None:
    this = random_trace(1, 64, 4, 1)
    assert transition_entropy(transition_counts(this, (this + 1) % 4, 4, 4)) == 0
    assert transition_entropy(np.full((5, 8), 7)) == pytest.approx(3)
    assert math.isnan(transition_entropy(np.zeros((2, 2), dtype=np.int64)))


def test_layers_of_different_widths_have_a_rectangular_matrix() -> None:
    this, following = random_trace(1, 30, 4, 2), random_trace(2, 30, 300, 3)
    counts = transition_counts(this.astype(np.int8), following.astype(np.int16), 4, 300)
    assert counts.shape == (4, 300) and counts.sum() == 30 * 2 * 3
    assert counts[this[0, 0], following[0, 2]] >= 1


def test_coactivation_and_phi_by_hand() -> None:
    trace = np.array([[0, 1], [1, 0], [2, 3], [0, 2]])
    counts = coactivation(trace, 5)
    assert counts[0].tolist() == [3, 2, 1, 0, 0] and (counts == counts.T).all()
    assert counts.diagonal().tolist() == [3, 2, 2, 1, 0]
    found = phi(counts, 4)
    assert found[0, 1] == pytest.approx((4 * 2 - 3 * 2) / math.sqrt(3 * 1 * 2 * 2))
    assert found[0, 3] == pytest.approx(-1)
    np.testing.assert_allclose(found.diagonal()[:4], 1)
    assert np.isnan(found[4]).all() and np.isnan(found[:, 4]).all()


def test_phi_is_the_correlation_of_the_choices() -> None:
    trace = random_trace(4, 400, 6, 2)
    used = (trace[:, :, None] == np.arange(6)).any(axis=1)
    np.testing.assert_allclose(
        phi(coactivation(trace, 6), 400), np.corrcoef(used.T.astype(float)), atol=1e-12
    )


# ---------------------------------------------------------------- the section


def test_section_is_plain_json_with_null_for_what_is_missing() -> None:
    layers = {4: random_trace(0, 100, 16, 2), 1: random_trace(1, 100, 4, 2)}
    found = offloading(layers, {1: 4, 4: 16}, [0, 60])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["top_k"] == 2 and found["tokens"] == 100
    assert [row["layer"] for row in found["srp"]] == [1, 4]
    assert found["srp_mean"][3] is None and found["srp_mean"][0] > 0  # no window of 256 tokens
    values = found["sch"]["values"]
    assert [len(row) for row in values] == [5] * 4
    assert values[0][2] > 0 and values[0][3] is None  # 3 * 2 experts are more than layer 1 has
    rates = found["hit_rates"]
    assert rates["sizes"] == list(range(1, 17))
    ones, fours = rates["layers"]
    assert ones["lru"][3:] == [196 / 200] * 13
    assert rates["belady"][5] == pytest.approx((ones["belady"][5] + fours["belady"][5]) / 2)
    entropy = found["transition_entropy"]
    assert entropy[1] is None and 1 <= entropy[0] <= 4


def test_section_of_one_layer_has_its_values_as_means() -> None:
    trace = random_trace(0, 600, 8, 2)
    found = offloading({0: trace}, {0: 8})
    assert found["srp_mean"] == found["srp"][0]["values"] == srp(trace, 8).tolist()
    assert found["sch"]["values"] == sch(trace, 8).tolist()
    assert found["hit_rates"]["lfu"] == hit_rates(trace, 8, range(1, 9))["lfu"].tolist()
    assert found["transition_entropy"] == [None]


def test_limit_keeps_whole_sequences_from_everywhere() -> None:
    starts = np.arange(0, 1000, 100)
    trace = (np.arange(1000) // 100)[:, None]  # each sequence asks for its own expert
    found = offloading({0: trace}, {0: 10}, starts, limit=350)
    assert found["tokens"] == 300
    # 3 sequences, 3 experts: nothing missed but their first requests
    assert found["hit_rates"]["lru"][0] == pytest.approx(297 / 300)
    assert found["srp_mean"][:3] == [1, 1, 1]
    assert offloading({0: trace}, {0: 10}, starts, limit=70)["tokens"] == 70
    assert offloading({0: trace}, {0: 10}, limit=70)["tokens"] == 70


def test_layers_with_different_top_k_have_none_in_common() -> None:
    found = offloading({0: random_trace(0, 50, 8, 2), 1: random_trace(1, 50, 8, 3)}, {0: 8, 1: 8})
    assert found["top_k"] is None


@pytest.mark.parametrize("experts", [1, 2, 63, 64, 65, 128, 160, 512])
def test_cache_sizes_are_few_and_include_both_ends(experts: int) -> None:
    found = _sizes(experts)
    assert found[0] == 1 and found[-1] == experts and len(found) <= SIZES + 2
    assert found == sorted(set(found))
    if experts <= SIZES:
        assert found == list(range(1, experts + 1))


@pytest.mark.parametrize(
    ("trace", "match"),
    [
        (np.array([0, 1, 2]), "matrix"),
        (np.array([[0.0, 1.0]]), "matrix"),
        (np.zeros((0, 2), dtype=int), "0 requests"),
        (np.array([[0, 4]]), r"0\.\.4"),
        (np.array([[0, -1]]), r"-1\.\.0"),
        (np.array([[1, 2, 1]]), "twice"),
    ],
)
def test_what_is_no_trace_is_refused(trace: np.ndarray, match: str) -> None:
    for call in (
        lambda: hit_rates(trace, 4, [1]),
        lambda: sch(trace, 4),
        lambda: srp(trace, 4),
        lambda: coactivation(trace, 4),
        lambda: offloading({3: trace}, {3: 4}),
    ):
        with pytest.raises(BitnestError, match=match) as error:
            call()
        assert error.value.where and error.value.hint


def test_contradictory_arguments_are_refused() -> None:
    trace = random_trace(0, 10, 4, 2)
    for starts in ([], [1], [0, 10], [0, 5, 5], [0, 6, 3]):
        with pytest.raises(BitnestError, match="ascend"):
            srp(trace, 4, [2], starts)
    with pytest.raises(BitnestError, match="windows"):
        srp(trace, 4, [0])
    with pytest.raises(BitnestError, match="cache of 0"):
        hit_rates(trace, 4, [0])
    with pytest.raises(BitnestError, match="ratio"):
        sch(trace, 4, ratios=[0.5])
    with pytest.raises(BitnestError, match="ratio"):
        sch(trace, 4, windows=[0])
    with pytest.raises(BitnestError, match="fifo"):
        priorities(trace, "fifo")
    with pytest.raises(BitnestError, match="9 tokens"):
        transition_counts(trace, trace[:9], 4, 4)
    with pytest.raises(BitnestError, match="0 layers"):
        offloading({}, {})
    with pytest.raises(BitnestError, match="at most 0"):
        offloading({0: trace}, {0: 4}, limit=0)
    with pytest.raises(BitnestError, match="unknown"):
        offloading({0: trace}, {1: 4})
    with pytest.raises(BitnestError, match=r"\[9, 10\]"):
        offloading({0: trace, 1: trace[:9]}, {0: 4, 1: 4})
