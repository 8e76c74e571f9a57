"""Nested formats: planes, tables, choosing codes for all widths, loading at any of them."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnest
from bitnest import api, safetensors_io
from bitnest.artifact import Artifact
from bitnest.errors import ArtifactError, FormatError, RecipeError
from bitnest.formats import NestedFormat, cut, parse_format, refinement, widths
from bitnest.formats.names import nested_name, parse_widths
from bitnest.kernels import nested
from bitnest.kernels.decode import decode
from bitnest.kernels.nested import choose, choose_reference, halve, join_planes, split_planes
from bitnest.kernels.rows import decode_rows
from bitnest.planes import plane_file
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import gptq
from bitnest.quantize.nested.clusters import solve_clusters
from bitnest.quantize.nested.gauss import gauss_table
from bitnest.quantize.nested.residual import solve_residuals
from bitnest.quantize.nested.solution import solve_nested
from bitnest.quantize.nested.tree import shares, solve_tree
from tests.tiny import Builder

ALL = (2, 3, 4, 5, 6, 7, 8)
NAMES = ("nest2345678-g32", "mat248-g48", "mwq2345-g32", "any2348-channel", "nest38-g16")
TOKENS = torch.arange(60)[None] % 50 * 6


def problem(rows: int = 24, columns: int = 70, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (O, I) and a second moment (I, I) of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / math.sqrt(columns) + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=g) @ mix
    return torch.randn(rows, columns, generator=g), x.T @ x / len(x)


def loss(weight: torch.Tensor, other: torch.Tensor, h: torch.Tensor) -> float:
    miss = (weight - other).double()
    return float(((miss @ h.double()) * miss).sum())


def stored(
    name: str, weight: torch.Tensor, h: torch.Tensor | None
) -> tuple[NestedFormat, dict[str, torch.Tensor]]:
    fmt = parse_format(name)
    assert isinstance(fmt, NestedFormat)
    hessian = None if h is None else h[None]
    found = solve_nested(weight[None], hessian, fmt, half=torch.bfloat16, damp=0.03)
    return fmt, found.store(0, slice(0, len(weight)))


# ---------------------------------------------------------------- names and sizes


@pytest.mark.parametrize("name", [*NAMES, "nest2345678-g128", "mwq23-g128", "any3-channel"])
def test_names_are_read_back(name: str) -> None:
    fmt = parse_format(name)
    assert fmt.name == name and widths(fmt) == fmt.widths
    assert widths(parse_format(f"{name}@had16")) == fmt.widths
    assert parse_format(f"{name}@had16").nbytes((8, 64)) == fmt.nbytes((8, 64))


@pytest.mark.parametrize(
    "name",
    ["nest-g128", "nest22-g128", "nest32-g128", "nest29-g128", "nest24-g7", "nest24-channel",
     "any24-g128", "mwq123-g128", "nest24", "nest24-g128+lorc4", "nest24-g128@had64+hlr4"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(FormatError):
        parse_format(name)


def test_a_cut_format_is_a_prefix_of_its_parts() -> None:
    for name in (*NAMES, "nest248-g32@had16"):
        fmt = parse_format(name)
        whole = fmt.parts((24, 64))
        for width in widths(fmt):
            part = cut(fmt, width).parts((24, 64))
            assert part == {k: whole[k] for k in list(whole)[: len(part)]}
            late = {p for p in whole if (refinement(fmt, p) or 0) > width}
            assert set(part) == set(whole) - late
    assert cut(parse_format("nest248-g32"), 7).name == "nest24-g32"
    assert cut(parse_format("int4-g32"), 2).name == "int4-g32"
    with pytest.raises(FormatError, match="begins at 3"):
        cut(parse_format("nest38-g16"), 2)


# ---------------------------------------------------------------- planes and tables


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 8), min_size=1), st.integers(1, 70), st.integers(0, 2**31))
def test_planes_are_the_bits_of_codes(chosen: set[int], columns: int, seed: int) -> None:
    fmt = NestedFormat("nest", tuple(sorted(chosen)), 16)
    top = fmt.widths[-1]
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << top, (3, columns), generator=g, dtype=torch.uint8)
    planes = split_planes(codes, fmt)
    assert {k: tuple(v.shape) for k, v in planes.items()} == {
        k: p.shape for k, p in fmt.parts((3, columns)).items() if k.startswith("plane")
    }
    for width in fmt.widths:
        assert torch.equal(join_planes(planes, fmt.at(width), columns), codes >> (top - width))


def test_halving_keeps_order_and_parents() -> None:
    table = torch.tensor([-3.0, -1.0, 0.0, 5.0])
    assert halve(table).tolist() == [-3.5, -2.5, -1.5, -0.75, -0.25, 1.25, 3.75, 6.25]


def test_gauss_tables_are_lloyd_and_max_at_two_bits() -> None:
    assert gauss_table(1).tolist() == pytest.approx(
        [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)]
    )
    assert gauss_table(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-4)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for width, free in ((3, 0.03454), (4, 0.009497), (5, 0.002499)):  # Max (1960), table I
        table = gauss_table(width)
        assert bool((table[1:] > table[:-1]).all())
        near = table[torch.bucketize(draws, (table[1:] + table[:-1]) / 2)]
        assert free * 0.97 < float((draws - near).square().mean()) < free * 1.08


def numpy_weight(
    tensors: dict[str, torch.Tensor], fmt: NestedFormat, shape: tuple[int, int]
) -> Any:
    """The layout of docs/format.md read bit by bit, in float64."""
    rows, columns = shape

    def bits(words: Any, count: int, width: int) -> Any:
        raw = np.frombuffer(np.ascontiguousarray(words).tobytes(), dtype=np.uint8)
        stream = np.unpackbits(raw, bitorder="little")[: count * width].reshape(count, width)
        return (stream * (1 << np.arange(width))).sum(1)

    codes = np.zeros(shape, dtype=np.int64)
    for width in fmt.widths:
        plane = tensors[f"plane{width}"].numpy()
        n = fmt.plane_bits(width)
        codes = (codes << n) | np.stack([bits(row, columns, n) for row in plane])
    top = fmt.widths[-1]
    if fmt.kind == "any":
        return np.take_along_axis(tensors[f"table{top}"].double().numpy(), codes, 1)
    g = min(fmt.group or columns, columns)
    group = np.arange(columns) // g
    scales = tensors["scales"].double().numpy()[:, group]
    if fmt.kind == "mat":
        a, b = tensors[f"affine{top}"].double().numpy()
        return scales * (a * (codes + 0.5) + b)
    if fmt.kind == "nest":
        stored_at = max(w for w in fmt.widths if f"table{w}" in tensors)
        table = list(tensors[f"table{stored_at}"].double().numpy())
        for _ in range(top - stored_at):
            ends = [2 * table[0] - (table[0] + table[1]) / 2]
            ends += [(x + y) / 2 for x, y in itertools.pairwise(table)]
            ends += [2 * table[-1] - (table[-1] + table[-2]) / 2]
            table = [
                m for i, x in enumerate(table) for m in ((x + ends[i]) / 2, (x + ends[i + 1]) / 2)
            ]
        return scales * np.array(table)[codes]
    first = fmt.widths[0]
    zeros = np.stack([bits(c, rows, first) for c in tensors["zeros"].numpy().T], axis=1)[:, group]
    weight = ((codes >> (top - first)) - zeros) * scales
    for bit in range(first + 1, top + 1):
        sign = 2 * ((codes >> (top - bit)) & 1) - 1
        weight = weight + sign * tensors[f"scales{bit}"].double().numpy()[:, group]
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 70), (5, 33)])
def test_every_width_decodes_as_the_layout_says(name: str, shape: tuple[int, int]) -> None:
    weight, h = problem(*shape)
    fmt, tensors = stored(name, weight, h)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        k: p.shape for k, p in fmt.parts(shape).items()
    }
    assert sum(t.nbytes for t in tensors.values()) == fmt.nbytes(shape)
    for width in fmt.widths:
        part = fmt.at(width)
        own = {k: tensors[k] for k in part.parts(shape)}
        found = decode(own, part, shape)
        np.testing.assert_allclose(found.double(), numpy_weight(own, part, shape), atol=2e-6)
        rows = torch.tensor([3, 0, 4, 4])
        assert torch.equal(decode_rows(own, part, shape, rows), found[rows])


# ---------------------------------------------------------------- choosing codes


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 8), min_size=1), st.floats(0, 1), st.integers(0, 2**31))
def test_chosen_codes_cost_least(chosen: set[int], balance: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tables = [torch.randn(1 << w, generator=g).sort().values for w in sorted(chosen)]
    share = torch.tensor([4.0 ** (balance * w) for w in sorted(chosen)])
    targets = torch.randn(len(tables), 37, generator=g)
    cost = sum(
        s * (x[:, None] - t.repeat_interleave(len(tables[-1]) // len(t))[None]) ** 2
        for s, x, t in zip(share, targets, tables, strict=True)
    )
    codes = choose(targets, tables, share).long()
    mine = cost.gather(1, codes[:, None])[:, 0]
    assert torch.allclose(mine, cost.min(1).values, rtol=1e-5)
    assert torch.equal(codes, choose_reference(targets, tables, share).long())


def test_ties_go_to_the_lower_code(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0, 1.0])]
    for _ in range(2):
        codes = choose(torch.zeros(2, 5), tables, torch.ones(2))
        assert codes.tolist() == [0] * 5
        monkeypatch.setattr(nested, "_library", lambda: None)


def test_torch_and_c_solve_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, h = problem()
    fmt = NestedFormat("nest", ALL, 32)
    native = solve_tree(weight, h, fmt)
    monkeypatch.setattr(nested, "_library", lambda: None)
    plain = solve_tree(weight, h, fmt)
    assert torch.equal(native.codes, plain.codes) and torch.equal(native.scales, plain.scales)


# ---------------------------------------------------------------- how good


def relative(weight: torch.Tensor, h: torch.Tensor, name: str) -> dict[int, float]:
    """Error at every width over that of GPTQ at this width alone."""
    fmt, tensors = stored(name, weight, h)
    shape = (weight.shape[0], weight.shape[1])
    found = {}
    for width in fmt.widths:
        part = fmt.at(width)
        own = loss(weight, decode({k: tensors[k] for k in part.parts(shape)}, part, shape), h)
        codec = BlockCodec(parse_format(f"int{width}-g64"))  # type: ignore[arg-type]
        alone = gptq(weight[None], h[None], codec)
        found[width] = own / loss(weight, alone.weight[0], h)
    return found


def test_a_tree_is_near_gptq_at_every_width() -> None:
    weight, h = problem(96, 128)
    tree = relative(weight, h, "nest2345678-g64")
    assert all(ratio < 2.1 for w, ratio in tree.items() if w <= 6), tree
    assert tree[7] < 3 and tree[8] < 6, tree
    uniform = relative(weight, h, "mat2345678-g64")
    assert all(tree[w] < uniform[w] for w in (2, 3, 4, 5)), (tree, uniform)


def test_passes_lower_the_loss_they_are_for() -> None:
    weight, h = problem(64, 96)
    fmt = NestedFormat("nest", ALL, 32)
    share = dict(zip(ALL, shares(ALL, None).tolist(), strict=True))

    def total(passes: int) -> float:
        found = solve_tree(weight, h, fmt, passes=passes)
        return sum(share[w] * float(e.sum()) for w, e in found.errors.items())

    found = [total(passes) for passes in (0, 1, 3)]
    assert found[0] > 1.05 * found[1] > 1.05 * found[2]


def test_a_width_that_counts_more_is_served_better() -> None:
    weight, h = problem(64, 96)
    fmt = NestedFormat("nest", (2, 4, 8), 32)
    plain, heavy = (solve_tree(weight, h, fmt, weights=w) for w in (None, {2: 50.0}))
    assert float(heavy.errors[2].sum()) < 0.9 * float(plain.errors[2].sum())
    assert float(heavy.errors[8].sum()) > float(plain.errors[8].sum())


def test_stated_errors_are_those_of_what_is_stored() -> None:
    weight, h = problem()
    for name in NAMES:
        fmt, tensors = stored(name, weight, h)
        found = solve_nested(weight[None], h[None], fmt, half=torch.bfloat16, damp=0.03)
        decoded = decode(tensors, fmt, (24, 70))
        assert torch.equal(decoded, found.weight[0]), name
        assert float(found.error.sum()) == pytest.approx(loss(weight, decoded, h), rel=1e-3)


def test_without_inputs_every_width_is_near_the_weights() -> None:
    weight, _ = problem()
    for name in NAMES:
        fmt, tensors = stored(name, weight, None)
        before = math.inf
        for width in fmt.widths:
            part = fmt.at(width)
            own = decode({k: tensors[k] for k in part.parts((24, 70))}, part, (24, 70))
            now = float((own - weight).square().sum())
            assert now < before
            before = now


def test_odd_matrices_solve() -> None:
    for shape in ((1, 1), (1, 17), (3, 16), (2, 130)):
        weight, h = problem(*shape)
        for matrix in (weight, torch.zeros(shape), torch.full(shape, 2.0)):
            for name in NAMES:
                fmt, tensors = stored(name, matrix, h)
                assert bool(decode(tensors, fmt, shape).isfinite().all()), (name, shape)


def test_clusters_are_cut_where_it_helps_most() -> None:
    weight, h = problem(4, 19)
    found = solve_clusters(weight, h, NestedFormat("any", (2, 3), None))
    d = (h.diagonal() / h.diagonal().mean()).double()
    for o in range(4):
        for base in range(4):
            own = (found.codes[o] >> 1 == base).nonzero()[:, 0]
            if len(own) < 2:
                continue
            order = own[weight[o, own].argsort()]
            x, m = weight[o, order].double(), d[order]

            def cost(part: slice, x: Any = x, m: Any = m) -> float:
                if not len(x[part]):
                    return 0.0
                mean = (x[part] * m[part]).sum() / m[part].sum()
                return float((m[part] * (x[part] - mean) ** 2).sum())

            best = min(cost(slice(0, c)) + cost(slice(c, None)) for c in range(1, len(x)))
            upper = int((found.codes[o, order] & 1).sum())
            mine = cost(slice(0, len(x) - upper)) + cost(slice(len(x) - upper, None))
            assert mine == pytest.approx(best, rel=1e-9)


def test_residual_scales_are_least_squares() -> None:
    weight, _ = problem(3, 32)
    found = solve_residuals(weight, None, NestedFormat("mwq", (2, 3), 32))
    base = ((found.codes >> 1).float() - found.zeros) * found.scales
    miss = weight - base
    sign = 2 * (found.codes & 1).float() - 1
    assert torch.equal(sign, torch.where(miss > 0, 1.0, -1.0))
    wanted = (miss * sign).mean(1, keepdim=True)
    torch.testing.assert_close(found.steps[3], wanted, rtol=5e-3, atol=0)


# ---------------------------------------------------------------- artifacts


@pytest.fixture(scope="module")
def artifact(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "out"
    api.compress(
        tiny("qwen3_moe"), out, format="nest2348-g32@had16", rules=["*.o_proj=int8-g32"],
        data=[str(text)], samples=4, length=32,
    )  # fmt: skip
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stored_bytes(model: Any) -> int:
    """Of all packed weights as files hold them; a kernel's layout may take a little more."""
    packed = [m for m in model.modules() if hasattr(m, "fmt")]
    return sum(t.nbytes for m in packed for t in m.tensors.values())


def test_raising_in_place_is_loading_at_that_width(artifact: Path) -> None:
    at = {b: logits(bitnest.load(artifact, bits=b, dtype=torch.float32)) for b in (2, 3, 4, 8)}
    assert not torch.equal(at[3], at[4])
    model: Any = bitnest.load(artifact, bits=3, dtype=torch.float32)
    held = stored_bytes(model)
    read = model.set_bits(4)
    assert torch.equal(logits(model), at[4])
    assert read == stored_bytes(model) - held > 0
    assert model.set_bits(2) == 0 and torch.equal(logits(model), at[2])
    model.set_bits(None)
    assert torch.equal(logits(model), at[8])
    assert torch.equal(logits(bitnest.load(artifact, dtype=torch.float32)), at[8])
    assert torch.equal(logits(bitnest.load(artifact, bits=6, dtype=torch.float32)), at[4])


def test_only_what_a_width_needs_is_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    real = safetensors_io.read_range

    def counting(file: Path, start: int, buffer: torch.Tensor) -> None:
        read.append((file.name, buffer.nbytes))
        real(file, start, buffer)

    monkeypatch.setattr(safetensors_io, "read_range", counting)
    opened = Artifact.open(artifact)
    for bits in (2, 3, 4, 8):
        read.clear()
        bitnest.load(artifact, bits=bits)
        needed = sum(
            cut(parse_format(r.format), bits).nbytes(r.site.shape) for r in opened.packed()
        )
        assert sum(n for name, n in read if name.startswith("packed")) == needed
        assert all(f".w{w}." not in name for name, _ in read for w in (3, 4, 8) if w > bits)


def test_widths_by_site(artifact: Path) -> None:
    names = [r.site.name for r in Artifact.open(artifact).packed() if "expert" in r.site.name]
    model: Any = bitnest.load(artifact, bits={names[0]: 2, names[1]: 3})
    by_name = {r.site.name: w.fmt.name for r, w in model.bitnest_source.weights}
    assert [by_name[n].partition("-")[0] for n in names[:3]] == ["nest2", "nest23", "nest2348"]
    with pytest.raises(RecipeError, match="no nested site"):
        bitnest.load(artifact, bits={"nobody": 2})
    model = bitnest.load(artifact, bits={"*.experts.*": 2, "*.down_proj": 3, "kind:attention": 4})
    for record, weight in model.bitnest_source.weights:
        name, kind = record.site.name, record.site.kind
        wanted = 4 if kind == "attention" else 3 if name.endswith("down_proj") else 2
        assert name.endswith("o_proj") or widths(weight.fmt)[-1] == wanted


def test_a_missing_plane_spoils_only_its_width(artifact: Path, tmp_path: Path) -> None:
    for damage in ("missing", "short"):
        copy = tmp_path / damage
        shutil.copytree(artifact, copy)
        name = plane_file(Artifact.open(copy).packed()[0].file, 4)
        if damage == "missing":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes((copy / name).read_bytes()[:-8])
        bitnest.load(copy, bits=2)
        model: Any = bitnest.load(copy, bits=3)
        before = logits(model)
        with pytest.raises(ArtifactError, match=name) as caught:
            bitnest.load(copy, bits=4)
        assert "below 4 bits" in str(caught.value.hint)
        with pytest.raises(ArtifactError, match=name):
            model.set_bits(8)
        assert torch.equal(logits(model), before)
        with pytest.raises(ArtifactError, match=name):
            Artifact.open(copy).verify()


def test_bits_of_what_is_not_nested_are_refused(tiny: Builder, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one width"):
        bitnest.load(tiny("llama"), bits=3)
    api.compress(tiny("llama"), tmp_path / "a", format="int4-g32", data=[str(text)], samples=2,
                 length=32)  # fmt: skip
    with pytest.raises(RecipeError, match="nothing in this artifact is nested"):
        bitnest.load(tmp_path / "a", bits=3)


def test_a_killed_run_resumes_to_the_same_bytes(
    artifact: Path, tiny: Builder, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnest.quantize import compress

    real = compress._Run._propagate

    def stop(self: Any, layer: int, rounders: Any) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {
        "format": "nest2348-g32@had16", "rules": ["*.o_proj=int8-g32"], "data": [str(text)],
        "samples": 4, "length": 32,
    }  # fmt: skip
    monkeypatch.setattr(compress._Run, "_propagate", stop)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("qwen3_moe"), tmp_path / "out", **options)
    monkeypatch.setattr(compress._Run, "_propagate", real)
    api.compress(tiny("qwen3_moe"), tmp_path / "out", **options)
    for file in artifact.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_errors_are_stated_for_every_width(artifact: Path) -> None:
    for record in Artifact.open(artifact).packed():
        errors = (*record.narrower, record.error)
        if record.format.startswith("nest"):
            assert len(errors) == 4 and sorted(errors, reverse=True) == list(errors)
        else:
            assert errors == (record.error,)


def test_a_slice_is_the_artifact_at_that_width(artifact: Path, tmp_path: Path) -> None:
    for bits in (2, 3, 5, 8):
        sliced = api.slice_artifact(artifact, tmp_path / str(bits), bits)
        own, whole = (bitnest.load(p, dtype=torch.float32) for p in (sliced.path, artifact))
        if bits < 8:
            whole.set_bits(bits)
        assert torch.equal(logits(own), logits(whole))
        sliced.verify()
        size = sum(f.stat().st_size for f in sliced.path.iterdir())
        beyond = [
            f for f in artifact.iterdir() if any(f".w{w}." in f.name for w in (3, 4, 8) if w > bits)
        ]
        more = sum(f.stat().st_size for f in artifact.iterdir()) - size
        assert more >= sum(f.stat().st_size for f in beyond) - 100  # the manifest says what it is
        for record, cut_one in zip(Artifact.open(artifact).records, sliced.records, strict=True):
            assert cut_one.site == record.site
            assert cut_one.format == cut(parse_format(record.format), bits).name
    again = api.slice_artifact(tmp_path / "5", tmp_path / "again", 3)
    assert torch.equal(logits(bitnest.load(again.path)), logits(bitnest.load(tmp_path / "3")))


def test_slices_that_cannot_be(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nested from 2"):
        api.slice_artifact(artifact, tmp_path / "a", 1)
    with pytest.raises(ArtifactError, match="in the way"):
        api.slice_artifact(artifact, artifact, 3)
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    name = plane_file(Artifact.open(copy).packed()[0].file, 3)
    data = bytearray((copy / name).read_bytes())
    data[-5] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        api.slice_artifact(copy, tmp_path / "b", 3)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        api.slice_artifact(copy, tmp_path / "b", 4)
    api.slice_artifact(copy, tmp_path / "c", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "copy"]


def test_sizes_are_known_beforehand(
    artifact: Path, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    for name in ("nest2348-g32@had16", "mwq248-g32", "any24-channel"):
        done = api.compress(
            tiny("qwen3_moe"), tmp_path / name, format=name, data=[str(text)], samples=2, length=32
        )
        assert done.forecast is not None
        real = sum(f.stat().st_size for f in done.path.iterdir())
        sites = len(Artifact.open(done.path).records)
        assert real <= done.forecast["disk"] <= real + 16 * sites


def test_a_row_for_every_width(artifact: Path, tiny: Builder, text: Path) -> None:
    found = api.evaluate(
        [artifact],
        against=tiny("qwen3_moe"),
        data=[str(text)],
        bits=(2, 3, 8),
        window=16,
        windows=4,
    )
    assert [row.model for row in found.rows[1:]] == [f"out at {b} bits" for b in (2, 3, 8)]
    sizes = [row.nbytes for row in found.rows[1:]]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    alone = api.evaluate(
        [artifact], against=tiny("qwen3_moe"), data=[str(text)], bits=(3,), window=16, windows=4
    )
    assert alone.rows[1].scores == found.rows[2].scores
    several = api.evaluate([artifact], data=[str(text)], bits=(4, 5, 6), window=16, windows=4)
    assert [row.model for row in several.rows] == ["out at 4 bits"]  # it has no 5 and 6
    with pytest.raises(RecipeError, match="no width 5, 6"):
        api.evaluate([artifact], data=[str(text)], bits=(5, 6), window=16, windows=4)
    with pytest.raises(RecipeError, match="nested"):
        api.evaluate([tiny("llama")], data=[str(text)], bits=(3,), window=16, windows=4)


@pytest.mark.parametrize(
    "text, found", [("2-8", ALL), ("4", (4,)), ("2,3,4,6,8", (2, 3, 4, 6, 8)), ("6,2-3", (2, 3, 6))]
)
def test_widths_on_the_command_line(text: str, found: tuple[int, ...]) -> None:
    assert parse_widths(text) == found
    assert widths(parse_format(nested_name(text))) == found


@pytest.mark.parametrize("text", ["", "0-3", "2-9", "8-2", "a", "2;3", "2-"])
def test_widths_that_are_none(text: str) -> None:
    with pytest.raises(FormatError):
        parse_widths(text)


def test_nested_goes_with_no_other_format(tiny: Builder, tmp_path: Path) -> None:
    for other in ({"format": "int4-g128"}, {"plan": "p.yaml"}):
        with pytest.raises(RecipeError, match="every width"):
            api.compress(tiny("llama"), tmp_path / "a", nested="2-8", **other)  # type: ignore[arg-type]
    for other in ({"candidates": ["int4-g128"]}, {"target": "vllm-cuda"}):
        with pytest.raises(RecipeError, match=r"formats|reads no nested"):
            api.compress(tiny("llama"), tmp_path / "a", nested="2-8", **other)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="nested weights"):
        api.compress(tiny("llama"), tmp_path / "a", base_size=10_000)
    assert not (tmp_path / "a").exists()


def test_the_width_that_is_served(artifact: Path, tiny: Builder) -> None:
    from bitnest.cli.serve import _widths
    from bitnest.quantize.allocation.fitting import Fitted

    def asked(bits: float | None = None, size: int | None = None) -> dict[str, Any]:
        return {"bits": bits, "size": size}

    nested, plain = str(artifact), str(tiny("llama"))
    assert _widths(nested, asked(3.0), "bitnest") == 3
    assert _widths(nested, asked(), "bitnest") is None
    assert isinstance(_widths(nested, asked(size=1 << 30), "bitnest"), Fitted)
    assert _widths(plain, asked(3.0), "bitnest") is None  # compressed to it first
    with pytest.raises(RecipeError, match="whole number"):
        _widths(nested, asked(2.5), "bitnest")
    with pytest.raises(RecipeError, match="no planes"):
        _widths(nested, asked(3.0), "vllm")
    with pytest.raises(RecipeError, match="both"):
        _widths(nested, asked(3.0, 1 << 30), "bitnest")
    with pytest.raises(RecipeError, match="narrowest widths"):
        _widths(nested, asked(size=10), "bitnest")
