"""Experts' tokens: counted, drawn for until a minimum is met, written by the model itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnest import api
from bitnest.calibrate.branching import beam_step, imbalance, level, resample
from bitnest.calibrate.coverage import lean, routed_tokens, window_counts
from bitnest.calibrate.covering import Covered, Pool, candidate_windows, draw_until_covered
from bitnest.calibrate.data import CalibrationSet, DataSource, calibration_windows
from bitnest.calibrate.ebss import Generated, ebss
from bitnest.calibrate.sensitivity import LayerInputs
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.summary.coverage import Seen, coverage_section
from bitnest.checkpoint import Checkpoint
from bitnest.errors import BitnestError, DataError, RecipeError, UnsupportedModel
from bitnest.packed.loading import load_model, load_tokenizer
from bitnest.sites import is_experts
from bitnest.skeleton import Skeleton
from tests.tiny import VOCAB, Builder, words

MOES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
NAME = "model.layers.{}.mlp.experts"


def stream(path: Path, tokens: torch.Tensor, **options: Any) -> Stream:
    skeleton = Skeleton.build(Checkpoint.open(path))
    return Stream(skeleton, tokens, dtype=torch.float32, device=torch.device("cpu"), **options)


def brute_force(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens per window and expert as transformers runs the model, window by window."""
    experts = {n: m for n, m in model.named_modules() if is_experts(m)}
    counts = {n: torch.zeros(len(tokens), m.num_experts, dtype=torch.int64)
              for n, m in experts.items()}  # fmt: skip
    at = 0

    def hook(name: str) -> Callable[..., None]:
        def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            for expert in index.flatten().tolist():
                counts[name][at, expert] += 1

        return count

    hooks = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in experts.items()]
    with torch.no_grad():
        for at in range(len(tokens)):
            model(input_ids=tokens[at : at + 1])
    for handle in hooks:
        handle.remove()
    return counts


# counting


@pytest.mark.parametrize("family", MOES)
def test_counts_are_those_of_the_running_model(tiny: Builder, family: str) -> None:
    path = tiny(family)
    tokens = torch.randint(1, VOCAB, (5, 24), generator=torch.Generator().manual_seed(1))
    found = routed_tokens(stream(path, tokens))
    expected = brute_force(load_model(path, dtype=torch.float32), tokens)
    assert found.keys() == expected.keys()
    for name, counts in expected.items():
        assert torch.equal(found[name], counts), name


def test_counting_leaves_the_skeleton_empty_and_usable_again(tiny: Builder) -> None:
    first = stream(tiny("qwen3_moe"), torch.randint(1, VOCAB, (3, 16)))
    a = routed_tokens(first)
    model = first.skeleton.model
    assert all(p.is_meta for n, p in model.named_parameters() if ".layers." in n)
    assert not any("forward" in vars(m) for m in model.modules())
    tokens = torch.randint(1, VOCAB, (4, 16))
    again = Stream(first.skeleton, tokens, dtype=torch.float32, device=torch.device("cpu"))
    b = routed_tokens(again)
    assert [len(t) for t in (*a.values(), *b.values())] == [3, 3, 4, 4]


def test_batches_of_two_labels_and_a_memory_limit_change_no_count(tiny: Builder) -> None:
    tokens = torch.randint(1, VOCAB, (7, 16), generator=torch.Generator().manual_seed(2))
    plain = routed_tokens(stream(tiny("mixtral"), tokens))
    labels = ["a", "a", "b", "a", "b", "b", "b"]
    other = routed_tokens(stream(tiny("mixtral"), tokens, labels=labels, memory_limit=0))
    assert all(torch.equal(plain[n], other[n]) for n in plain)


def test_dense_model_is_told_that_it_has_no_experts(tiny: Builder) -> None:
    with pytest.raises(UnsupportedModel, match="no routed experts") as caught:
        routed_tokens(stream(tiny("llama"), torch.ones(1, 8, dtype=torch.int64)))
    assert caught.value.hint
    with pytest.raises(UnsupportedModel, match="no routed experts"):
        ebss(load_model(tiny("llama")), load_tokenizer(tiny("llama")), windows=1, length=8)


def test_numbers_beyond_the_experts_count_for_none() -> None:
    index = torch.tensor([[0, 3], [3, 1], [4, 2], [2, 0]])  # 3 experts: 3 and 4 mean none
    assert window_counts(index, 3, 2).tolist() == [[1, 1, 0], [1, 0, 2]]
    with pytest.raises(UnsupportedModel, match="4 tokens"):
        window_counts(index, 3, 3)


# drawing


def route(table: torch.Tensor) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """A stand-in model: a window of token i is routed as row i of the table says."""
    return lambda tokens: {"e": table[tokens[:, 0]]}


def pool(count: int) -> Pool:
    return Pool(torch.arange(count)[:, None].expand(count, 4).clone(), ("x",) * count)


def draw(table: list[list[int]], have: list[int], minimum: int, **options: Any) -> Covered:
    rows = torch.tensor(table)
    counts = {"e": torch.tensor(have)}
    return draw_until_covered(route(rows), pool(len(rows)), counts, {"e": minimum}, **options)


def test_window_that_brings_most_of_what_is_missing_is_kept_first() -> None:
    found = draw([[9, 1, 0], [0, 2, 2], [0, 0, 5], [1, 9, 9]], [10, 5, 0], 10, first=4)
    assert found.tokens[:, 0].tolist() == [3, 1]  # 5 + 9 missing tokens, then one more
    assert found.counts["e"].tolist() == [11, 16, 11]
    assert (found.still_starved, found.rounds, found.windows_tried) == ((), 1, 4)


def test_greedy_choice_is_near_the_smallest_cover() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = torch.randint(0, 4, (8, 4), generator=generator)
        need = table[[0, 3, 5]].sum(0)
        found = draw_until_covered(
            route(table), pool(8), {"e": torch.zeros(4, dtype=torch.int64)},
            {"e": max(1, int(need.min()))}, first=8,
        )  # fmt: skip
        least = next(n for n in range(9) if any(
            (table[list(c)].sum(0) >= max(1, int(need.min()))).all()
            for c in combinations(range(8), n)))  # fmt: skip
        assert not found.still_starved
        assert len(found.tokens) <= least * (1 + math.log(16))


def test_drawing_stops_in_the_first_round_that_covers_everything() -> None:
    found = draw([[1, 1]] * 64, [0, 0], 5, first=4)
    assert (found.rounds, found.windows_tried, len(found.tokens)) == (2, 8, 5)


def test_later_round_replaces_poor_windows_of_an_early_one() -> None:
    found = draw([[0, 1]] * 4 + [[0, 9]] * 4, [9, 0], 9, first=4)
    assert found.tokens[:, 0].tolist() == [4]


def test_window_that_brings_less_than_it_is_worth_is_not_kept() -> None:
    found = draw([[7, 1], [3, 2], [0, 2]], [0, 0], 10, worth=3, first=3)
    assert found.tokens[:, 0].tolist() == [0, 1]  # 8, then 3 + 2, then 2
    assert found.still_starved == (("e", 1, 3),)


def test_dead_expert_does_not_use_up_the_pool() -> None:
    found = draw([[5, 0]] * 200, [0, 0], 5, first=2)
    assert found.windows_tried < 20
    assert len(found.tokens) == 1
    assert found.still_starved == (("e", 1, 0),)


def test_nothing_is_drawn_when_everything_is_covered_or_the_pool_is_empty() -> None:
    covered = draw([[1, 1]], [5, 5], 5)
    assert (covered.rounds, len(covered.tokens), covered.still_starved) == (0, 0, ())
    nothing = {"e": torch.tensor([0, 9])}
    empty = draw_until_covered(route(torch.zeros(0, 2)), pool(0), nothing, {"e": 5})
    assert (empty.rounds, tuple(empty.tokens.shape)) == (0, (0, 4))
    assert empty.still_starved == (("e", 0, 0),)


@pytest.mark.parametrize(
    ("counts", "minimum", "first", "says"),
    [
        ({}, {}, 1, "no experts were counted"),
        ({"e": [1]}, {"f": 1}, 1, "different experts"),
        ({"e": [1]}, {"e": 0}, 1, "at least 1"),
        ({"e": [1]}, {"e": 1}, 0, "at least 1"),
    ],
)
def test_contradictory_demands_are_refused(
    counts: dict[str, list[int]], minimum: dict[str, int], first: int, says: str
) -> None:
    given = {n: torch.tensor(c) for n, c in counts.items()}
    with pytest.raises(BitnestError, match=says):
        draw_until_covered(route(torch.zeros(1, 1)), pool(1), given, minimum, first=first)


def biased(path: Path, tokenizer: Any, files: list[DataSource]) -> tuple[CalibrationSet, Pool, Any]:
    """Calibration on the first file alone, candidates from all, and a way to count them."""
    drawn = calibration_windows(tokenizer, files[:1], samples=3, length=16, seed=0)
    more = candidate_windows(tokenizer, files, drawn, limit=40, seed=0)
    skeleton = Skeleton.build(Checkpoint.open(path))

    def count(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        cpu = torch.device("cpu")
        return routed_tokens(Stream(skeleton, tokens, dtype=torch.float32, device=cpu))

    return drawn, more, count


def test_expert_that_biased_text_starves_is_covered_from_other_text(
    tiny: Builder, tmp_path: Path
) -> None:
    path = tiny("qwen3_moe", "eight", num_experts=8)
    (tmp_path / "a.txt").write_text("aaaa " * 400, encoding="utf-8")
    (tmp_path / "b.txt").write_text(words(800, seed=7), encoding="utf-8")
    files = [DataSource(n, str(tmp_path / f"{n}.txt")) for n in "ab"]
    drawn, more, count = biased(path, load_tokenizer(path), files)
    before = {n: c.sum(0) for n, c in count(drawn.tokens).items()}
    assert any((c == 0).any() for c in before.values())
    found = draw_until_covered(count, more, before, dict.fromkeys(before, 8))
    assert not found.still_starved
    assert "b" in found.labels
    assert len(found.tokens) < len(more.tokens)
    after = count(torch.cat([drawn.tokens, found.tokens]))
    for name, n in after.items():
        assert torch.equal(n.sum(0), found.counts[name])
        assert int(n.sum(0).min()) >= 8


def test_candidates_are_new_windows_up_to_the_limit(tiny: Builder, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny("mixtral"))
    for name, size in (("a", 300), ("b", 60)):
        text = words(size, seed=len(name) + size)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    files = [DataSource(n, str(tmp_path / f"{n}.txt"), w) for n, w in (("a", 3), ("b", 1))]
    drawn = calibration_windows(tokenizer, files, samples=8, length=16, seed=4)
    more = candidate_windows(tokenizer, files, drawn, limit=12, seed=4)
    rows = [tuple(row.tolist()) for row in more.tokens]
    assert len(set(rows)) == len(rows) == len(more.labels) == 12
    assert not set(rows) & {tuple(row.tolist()) for row in drawn.tokens}
    assert set(more.labels) == {"a", "b"}
    again = candidate_windows(tokenizer, files, drawn, limit=12, seed=4)
    assert torch.equal(again.tokens, more.tokens)
    every = candidate_windows(tokenizer, files, drawn, limit=10_000, seed=4)
    assert len(every.tokens) == sum(r.windows - r.samples for r in drawn.sources)
    assert len(candidate_windows(tokenizer, files, drawn, limit=1, seed=4).tokens) == 1
    other = candidate_windows(tokenizer, files[1:], drawn, limit=10_000, seed=4)
    assert len(other.tokens) == drawn.sources[1].windows - drawn.sources[1].samples


def test_more_samples_of_a_seed_hold_those_of_fewer(tiny: Builder, text: Path) -> None:
    tokenizer = load_tokenizer(tiny("mixtral"))
    few, many = (
        calibration_windows(tokenizer, [DataSource("t", str(text))], samples=n, length=16, seed=3)
        for n in (5, 20)
    )
    rows = {tuple(row.tolist()) for row in many.tokens}
    assert {tuple(row.tolist()) for row in few.tokens} <= rows


def test_missing_source_of_candidates_is_named(tiny: Builder, text: Path) -> None:
    tokenizer = load_tokenizer(tiny("mixtral"))
    own = [DataSource("t", str(text))]
    drawn = calibration_windows(tokenizer, own, samples=2, length=16, seed=0)
    with pytest.raises(DataError):
        candidate_windows(tokenizer, [DataSource("x", "no/such.txt")], drawn, limit=4, seed=0)


# what is said


def test_section_names_every_starved_expert_and_its_fallback() -> None:
    wide, narrow = {"up": 256, "down": 256}, {"up": 256, "down": 64}
    found = coverage_section(
        [Seen(3, [9, 1, 300, 256], [0, 1, 255, 256], wide), Seen(5, [0, 80], [0, 64], narrow)],
        held=2, windows=4, rounds=2,
    )  # fmt: skip
    assert found is not None
    assert (found["minimum"], found["minima"], found["held"]) == (256, [256], 2)
    assert (found["experts"], found["covered"]) == (6, 1)
    assert found["drawn"] == {"windows": 4, "rounds": 2}
    told = {(s["layer"], s["expert"]): s for s in found["starved"]}
    assert {key: (s["tokens"], s["fitted"]) for key, s in told.items()} == {
        (3, 0): (9, 0), (3, 1): (1, 1), (3, 2): (300, 255), (5, 0): (0, 0), (5, 1): (80, 64),
    }  # fmt: skip
    assert told[5, 1]["minimum"] == narrow and told[5, 1]["lean"] == {"up": 0.75, "down": 0.0}
    assert told[5, 1]["fallback"] == "the Hessian of gate and up is 75 % the layer's inputs"
    alone = "reached it: the layer's inputs alone"
    assert told[5, 0]["fallback"] == f"no token {alone}"
    assert told[3, 0]["fallback"] == f"only held-out windows {alone}"
    assert "are 99 %" in told[3, 1]["fallback"]  # 99.6 % is not all of it
    assert "are 1 %" in told[3, 2]["fallback"]


def test_both_inputs_may_lean_each_by_its_own_width() -> None:
    found = coverage_section([Seen(0, [32], [32], {"up": 64, "down": 128})])
    assert found is not None and found["starved"][0]["lean"] == {"up": 0.5, "down": 0.75}
    assert found["starved"][0]["fallback"] == (
        "the Hessian of gate and up is 50 %, that of down is 75 % the layer's inputs"
    )


def test_section_of_a_model_without_experts_is_missing_and_of_a_covered_one_is_empty() -> None:
    assert coverage_section([]) is None
    same = {"up": 20, "down": 20}
    whole = coverage_section([Seen(0, [300, 20], [300, 20], same)])
    assert whole is not None and whole["starved"] == [] and whole["covered"] == 2


@pytest.mark.parametrize("options", [{}, {"hessian": "diagonal"}, {"min_tokens": 90}], ids=str)
def test_coverage_is_what_fitting_leaned_by(
    options: dict[str, Any], tiny: Builder, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Held-out windows, and inputs of gate, up and down of different width."""
    applied: list[tuple[int, str, int, int]] = []
    solver = LayerInputs.lean

    def lean_and_tell(self: Any, own: torch.Tensor, count: int, expert: int, down: bool) -> None:
        minimum = self.options.min_tokens or own.shape[0]
        applied.append((expert, "down" if down else "up", count, minimum))
        solver(self, own, count, expert, down)

    monkeypatch.setattr(LayerInputs, "lean", lean_and_tell)
    found = api.analyze(
        tiny("qwen3_moe", "eight", num_experts=8), tmp_path / "s", data=[str(text)], samples=8,
        length=16, formats=["int4-g32"], importance="loss", probes=2, probe_windows=2, **options,
    )  # fmt: skip
    coverage = json.loads((found.path / "report.json").read_text("utf-8"))["coverage"]
    told = {
        (s["layer"], s["expert"], part): (s["fitted"], s["minimum"][part], s["lean"][part])
        for s in coverage["starved"] for part in ("up", "down")
    }  # fmt: skip
    layers = [n for n in range(found.blocks) for _ in range(len(applied) // found.blocks)]
    did = {
        (layer, expert, part): (count, minimum, lean(count, minimum))
        for layer, (expert, part, count, minimum) in zip(layers, applied, strict=True)
    }
    leaning = {place[:2] for place, (*_, share) in did.items() if share > 0}
    assert leaning and told == {place: own for place, own in did.items() if place[:2] in leaning}
    assert coverage["covered"] == coverage["experts"] - len(leaning)
    assert coverage["held"] == (0 if "hessian" in options else 2)
    fewer = [s for s in coverage["starved"] if s["fitted"] < s["tokens"]]
    assert bool(fewer) == ("hessian" not in options)
    assert {minimum for _, minimum, _ in told.values()} == (
        {90} if "min_tokens" in options else {40, 64}
    )


def test_lean_is_that_of_the_block_solver(tiny: Builder) -> None:
    from bitnest.quantize.block import ExpertInputs
    from bitnest.quantize.solve import Options

    model = load_model(tiny("qwen3_moe"), dtype=torch.float32)
    module = model.get_submodule(NAME.format(0))
    states = torch.randn(20, 64)
    index = torch.tensor([[0, 1]] * 5 + [[1, 2]] * 15)  # 5, 20, 15 and no tokens
    gates = torch.full((20, 2), 0.5)
    options = Options(min_tokens=20)
    inputs = ExpertInputs(states, index, gates, module, options, torch.device("cpu"))
    whole = states.T @ states / 20
    for expert, tokens in enumerate([5, 20, 15, 0]):
        x = states[(index == expert).any(1)]
        own = x.T @ x / max(len(x), 1)
        share = lean(tokens, 20)
        expected = (1 - share) * own + share * whole
        assert torch.allclose(inputs.hessian(expert, "gate_up_proj"), expected, atol=1e-5)


# self-sampling: scores


def test_imbalance_is_the_papers_standard_deviation() -> None:
    counts = {"a": torch.tensor([[4, 0], [2, 2]]), "b": torch.tensor([[1, 2, 3], [0, 0, 0]])}
    a = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).std(1)
    b = torch.tensor([1 / 6, 2 / 6, 3 / 6]).std()
    assert imbalance(counts).tolist() == pytest.approx([(a[0] + b).item() / 2, 0.0])


def test_imbalance_to_a_target_is_least_where_the_shares_are_the_target() -> None:
    target = {"a": torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)}
    counts = {"a": torch.tensor([[3, 1, 0], [1, 1, 1], [0, 0, 4]])}
    sigma = imbalance(counts, target)
    assert sigma[0] == 0 and sigma[0] < sigma[1] < sigma[2]


@pytest.mark.parametrize(
    ("counts", "slots", "shares"),
    [
        ([5, 5], 4, [0.5, 0.5]),
        ([0, 0, 9], 4, [0.5, 0.5, 0.0]),
        ([0, 2, 9], 4, [0.75, 0.25, 0.0]),
        ([0, 2, 4], 9, [5 / 9, 3 / 9, 1 / 9]),
        ([7], 3, [1.0]),
    ],
)
def test_levelling_shares_are_those_worked_out_by_hand(
    counts: list[int], slots: float, shares: list[float]
) -> None:
    assert level(torch.tensor(counts), slots).tolist() == pytest.approx(shares)


def test_beam_keeps_the_lowest_scores_of_all_branches_and_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).log_softmax(2)
    reward = -torch.rand(2, 3, generator=generator, dtype=torch.float64)
    sigma = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    branch, token = beam_step(logp, reward, sigma, 5, 0.8)
    for k in range(2):
        score = {(b, v): -(reward[k, b] + logp[k, b, v]).item() / 5 + 0.8 * sigma[k, b].item()
                 for b in range(3) for v in range(7)}  # fmt: skip
        best = sorted(score, key=score.__getitem__)[:3]
        assert list(zip(branch[k].tolist(), token[k].tolist(), strict=True)) == best


def test_resampling_draws_by_weight_and_only_when_branches_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.zeros(1, 4, dtype=torch.float64)
    stay, paid = resample(same + 0.1, same, generator)
    assert stay.tolist() == [[0, 1, 2, 3]] and paid.tolist() == same.tolist()
    weights = torch.tensor([0.9, 0.05, 0.03, 0.02], dtype=torch.float64)
    energy = -weights.log()[None].expand(5000, 4)
    drawn, paid = resample(energy, torch.zeros_like(energy), generator)
    shares = drawn.flatten().bincount(minlength=4) / drawn.numel()
    assert torch.allclose(shares.double(), weights, atol=0.01)
    assert torch.equal(paid, energy.gather(1, drawn))


# self-sampling: text


@pytest.fixture(scope="module")
def moe(tiny: Builder) -> tuple[Any, Any]:
    """A tiny MoE and its tokenizer, whose routers are decided enough to be balanced."""
    path = tiny("qwen3_moe", "eight", num_experts=8)
    model = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "gate.weight" in name:
                tensor.mul_(4)
            if "lm_head" in name:
                tensor.mul_(3)
    return model, load_tokenizer(path)


def write(moe: tuple[Any, Any], **options: Any) -> Generated:
    return ebss(*moe, **{"windows": 6, "length": 20, "seed": 5, "limit": 1e9, **options})


@pytest.mark.parametrize("rule", ["sample", "beam"])
def test_scores_and_counts_are_those_of_reading_the_windows(
    moe: tuple[Any, Any], rule: str
) -> None:
    found = write(moe, rule=rule, balance=2.0, together=4)
    model, _ = moe
    with torch.no_grad():
        logp = model(input_ids=found.tokens).logits.double().log_softmax(2)
    nll = -logp[:, :-1].gather(2, found.tokens[:, 1:, None]).mean((1, 2))
    assert torch.allclose(found.nll, nll, atol=1e-4)
    expected = brute_force(model, found.tokens)
    assert found.counts.keys() == expected.keys()
    off = sum(int((found.counts[n] - c).abs().sum()) for n, c in expected.items())
    assert off <= 2  # a cached step may round a tie of two routers the other way
    assert torch.allclose(found.imbalance, imbalance(found.counts))


def test_wide_beam_finds_the_best_of_all_short_texts(moe: tuple[Any, Any]) -> None:
    """With as many branches as tokens, three tokens are an exhaustive search but for the last."""
    model, tokenizer = moe
    found = write(moe, rule="beam", windows=1, length=3, beams=VOCAB - 1, balance=0.0)
    start = int(found.tokens[0, 0])
    special = tokenizer.all_special_ids
    with torch.no_grad():
        pairs = torch.tensor([[start, v] for v in range(VOCAB)])
        logp = model(input_ids=pairs).logits.double().log_softmax(2)
    total = logp[0, 0][:, None] + logp[:, 1]
    total[special], total[:, special] = -torch.inf, -torch.inf
    best = total.argmax().item()
    assert found.tokens[0, 1:].tolist() == [best // VOCAB, best % VOCAB]
    assert found.nll.item() == pytest.approx(-total.max().item() / 2, abs=1e-4)


@pytest.mark.parametrize("rule", ["sample", "beam"])
def test_same_seed_writes_the_same_windows_and_another_seed_others(
    moe: tuple[Any, Any], rule: str
) -> None:
    a, b, c = (write(moe, rule=rule, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.nll, b.nll)
    assert not torch.equal(a.tokens, c.tokens)


def test_balancing_lowers_the_imbalance_of_plain_sampling(moe: tuple[Any, Any]) -> None:
    plain = write(moe, windows=24, length=40, balance=0.0, together=24)
    balanced = write(moe, windows=24, length=40, balance=20.0, together=24, beams=8)
    assert balanced.imbalance.mean() < plain.imbalance.mean()


def test_counts_so_far_draw_the_text_to_starved_experts(moe: tuple[Any, Any]) -> None:
    plain = write(moe, windows=24, length=40, balance=0.0, together=24)
    before = {n: c.sum(0) * 100 for n, c in plain.counts.items()}
    starved = {n: int(c.argmin()) for n, c in before.items()}
    aimed = write(moe, windows=24, length=40, counts=before, balance=20.0, together=8, beams=8)

    def share(found: Generated) -> float:
        return sum(float(c[:, starved[n]].sum() / c.sum()) for n, c in found.counts.items())

    assert share(aimed) > share(plain)


def test_special_tokens_and_those_the_tokenizer_lacks_are_never_written(
    moe: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = moe
    head = model.get_output_embeddings().weight
    kept = head.data.clone()
    monkeypatch.setattr(type(tokenizer), "__len__", lambda _self: VOCAB - 20)
    try:
        head.data[tokenizer.eos_token_id] = 0
        head.data[VOCAB - 1] *= 50  # a token of the padded vocabulary that wants to be written
        for rule in ("sample", "beam"):
            found = write(moe, rule=rule)
            assert tuple(found.tokens.shape) == (6, 20)
            assert int(found.tokens.max()) < VOCAB - 20
            assert not torch.isin(found.tokens, torch.tensor(tokenizer.all_special_ids)).any()
    finally:
        head.data.copy_(kept)


def test_unlikely_windows_are_thrown_away_and_counted(moe: tuple[Any, Any]) -> None:
    every = write(moe, windows=12)
    middle = float(every.nll.median())
    some = write(moe, windows=12, limit=middle)
    assert torch.equal(some.tokens, every.tokens[every.nll <= middle])
    assert some.discarded == 12 - len(some.tokens) > 0
    assert all(len(c) == len(some.tokens) for c in some.counts.values())
    with pytest.raises(UnsupportedModel, match="thrown away"):
        write(moe, limit=0.0)


def test_model_that_gives_nan_is_refused_not_sampled(tiny: Builder) -> None:
    path = tiny("mixtral")
    model = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    for rule in ("sample", "beam"):
        with pytest.raises(UnsupportedModel, match="no NLL is finite"):
            ebss(model, load_tokenizer(path), windows=2, length=6, rule=rule)


@pytest.mark.parametrize("family", MOES)
def test_every_family_writes_with_its_cache(tiny: Builder, family: str) -> None:
    path = tiny(family)
    model = load_model(path, dtype=torch.float32)
    for rule in ("sample", "beam"):
        found = ebss(model, load_tokenizer(path), windows=2, length=20, rule=rule, limit=1e9)
        assert tuple(found.tokens.shape) == (2, 20)
        with torch.no_grad():
            logp = model(input_ids=found.tokens).logits.double().log_softmax(2)
        nll = -logp[:, :-1].gather(2, found.tokens[:, 1:, None]).mean((1, 2))
        assert torch.allclose(found.nll, nll, atol=1e-3)
    assert not any("forward" in vars(m) for m in model.modules() if is_experts(m))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"length": 129}, "context of 128"),
        ({"length": 1}, "windows of 1 tokens"),
        ({"windows": 0}, "0 windows"),
        ({"together": 0}, "windows"),
        ({"beams": 0}, "0 branches"),
        ({"beams": VOCAB + 1}, "branches"),
        ({"balance": -1.0}, "balance"),
        ({"balance": math.nan}, "balance"),
        ({"rule": "greedy"}, "unknown rule"),
    ],
)
def test_dials_out_of_range_are_refused(
    moe: tuple[Any, Any], wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        write(moe, **wrong)


def test_windows_beyond_the_vocabulary_start_with_a_token_again(moe: tuple[Any, Any]) -> None:
    found = write(moe, windows=VOCAB + 3, length=2, beams=1, together=200)
    assert len(found.tokens) == VOCAB + 3
    assert len(found.tokens[: VOCAB - 1, 0].unique()) == VOCAB - 1
