"""Names and layouts: the grammar read and written, every byte decoded by numpy from the docstrings.

`read_weight` below knows bitnest only by names of formats and the layout text of `formats/`; it
starts from the bytes of a safetensors file. What it shares with the package is nothing but them.
"""

import heapq
import json
import re
import struct
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bitnest.errors import FormatError
from bitnest.formats import core_format, parse_format
from bitnest.kernels.decode import decode
from bitnest.quantize.solve import Options, solve

GROUPS = range(16, 129, 16)
SHAPES = [(1, 16), (3, 40), (7, 129), (65, 272), (64, 32)]
HALF_CODES = {"BF16": torch.bfloat16, "F16": torch.float16}

FAMILY_NAMES = """
int1-g128 int2-g64 int3-g48 int4-g128 int5-g16 int6-channel int7-g112 int8-channel
int4-g128-balanced int2-g32-asym int3-g48-asym int8-g128-asym int5-channel-asym int4-tensor
int4-tensor-asym int4-b32x64 int3-b32x48-asym int8-b128x128 int4-g64-dq int8-g64-dq
int4-g64-asym-dq int2-channel-dq int4-g32-m1 int4-g32-m2 int4-g16-asym-m2 int4-g32-e8m0
int4-g32-asym-e8m0 int4-g32-e4m3 int4-g32-asym-e4m3 int8-tensor-m1 fp8_e4m3-channel
fp8_e5m2-tensor fp8_e4m3-b128x128 fp8_e5m2-g32-e4m3 fp7_e3m3-g32 fp6_e3m2-g64 fp6_e2m3-channel
fp6_e5m0-g16 fp5_e2m2-g64 fp5_e3m1-g64 fp4_e2m1-g32 fp4_e2m1-g64-m2 fp4_e3m0-g32 fp3_e1m1-g32
fp3_e2m0-g32 fp2_e1m0-g16 fp5_e2m2-g32-dq mxfp8 mxfp8_e5m2 mxfp6 mxfp6_e3m2 mxfp4 mxfp4-ocp
mxfp4-ceil mxint8 mxint8-ocp mxint6 mxint4-ceil nvfp4 nvint4 nf4-g64 nf4-g64-dq nf4-tensor
nf4-g64-m2 nf4-g16-e4m3
nf4-g32-e8m0-ocp lut2-g64 lut3-g64 lut4-channel lut2-channel dgq4-g128 dgq4-g32 ternary-g128
ternary-channel ternary-b16x32 ternary-g32-e8m0-ocp ternary-channel-dict ternary-tensor-dict
ternary-g128-dict-m2 int4-g128@had64 int4-g128@had int3-g32@rhad
nvint4@rhad16 int3-g128@awq int3-g128@perm
lut3-channel@awq@perm int3-g128+lorc8 int3-g64@rhad32+lqer16 int2-g32+hlr4
ternary-g64-dict@had16+lorc2
"""
FAMILIES = FAMILY_NAMES.split()


# ---------------------------------------------------------------- names


@st.composite
def bases(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["int", "fp", "nf4", "lut", "ternary", "dgq4", "alias"]))
    group = f"g{draw(st.sampled_from(GROUPS))}"
    if kind == "dgq4":
        return f"dgq4-{group}"
    if kind == "lut":
        return f"lut{draw(st.integers(2, 4))}-{draw(st.sampled_from([group, 'channel']))}"
    if kind == "alias":
        mx = [alias for alias in ALIAS if alias.startswith("mx")]
        rules = [f"{name}{rule}" for name in mx for rule in ("", "-ocp", "-ceil")]
        return draw(st.sampled_from([*rules, "nvfp4", "nvint4"]))
    option = ""
    if kind == "int":
        bits = draw(st.integers(1, 8))
        name = f"int{bits}"
        option = draw(st.sampled_from([""] + ["-asym", "-balanced"] * (bits > 1)))
    elif kind == "fp":
        e = draw(st.integers(1, 5))
        m = draw(st.integers(0, min(3, 7 - e)))
        name = f"fp{1 + e + m}_e{e}m{m}"
    else:
        name = kind
        option = draw(st.sampled_from(["", "-dict"])) if kind == "ternary" else ""
    rows = draw(st.integers(2, 9999))
    blocks = draw(st.sampled_from(["tensor", f"b{rows}x{group[1:]}", ""]))
    rules = ["-e8m0-ocp", "-e8m0-ceil"] * (option != "-asym")
    scales = ["", "-m1"] if blocks else ["", "-m1", "-m2", "-dq", "-e8m0", "-e4m3", *rules]
    grain = blocks or draw(st.sampled_from([group, "channel"]))
    return f"{name}-{grain}{option}{draw(st.sampled_from(scales))}"


@st.composite
def names(draw: st.DrawFn) -> str:
    kinds = draw(st.lists(st.sampled_from(["had", "rhad", "awq", "perm"]), unique=True, max_size=3))
    block = st.sampled_from(["", 16, 32, 64, 128])
    wrappers = [f"@{kind}{draw(block) if 'had' in kind else ''}" for kind in kinds]
    residual = draw(st.sampled_from(["", "+lorc", "+lqer", "+hlr"]))
    if residual:
        wrappers.append(f"{residual}{draw(st.integers(1, 512))}")
    return draw(bases()) + "".join(wrappers)


@settings(max_examples=300, deadline=None)
@given(names())
def test_every_name_of_the_grammar_is_read_and_spelt_the_same(name: str) -> None:
    fmt = parse_format(name)
    assert fmt.name == name
    assert parse_format(fmt.name) == fmt


def test_short_spellings_have_one_name() -> None:
    long = {
        "fp8-channel": "fp8_e4m3-channel",
        "fp6-g64": "fp6_e3m2-g64",
        "fp4-g32": "fp4_e2m1-g32",
        "int4-b1x64": "int4-g64",
        "dense": "dense",
    }
    for short, name in long.items():
        assert parse_format(short).name == name
        assert parse_format(name).name == name


WRONG_NAMES = """
int0-g64 int9-g128 int4-g17 int4-g8 int4-g144 int4-g0 int4 int4- int4-g int4-asym int4-g128-
INT4-g128 int04-g128 int4-g064 int4-g٣٢ int4-g64-asym-balanced int1-g64-balanced int1-g64-asym
int4-g64-balanced-asym int4-g64-ocp int4-g64-dict int4-g64-m1-ocp int4-g32-asym-e8m0-ocp
int4-g64-m2-dq int4-tensor-dq int4-b32x64-m2 int4-b0x64 int4-b32x200 int4-b32 int4-bx64
int4-tensor-e4m3 nf4 nf4-g64-asym nf4-g64-balanced nf3-g64 lut1-g64 lut5-g64 lut3-tensor
lut3-b32x64 lut3-g64-dq lut3-g64-asym fp4 fp5-g32 fp9_e5m3-g32 fp6_e4m3-g32 fp8_e4m3-g32-asym
fp7_e6m0-g32 fp8_e3m4-g32 fp4_e0m3-g32 ternary ternary-g128-asym ternary-g64-dq-dict dgq4-channel
dgq4-tensor dgq4-b32x64 dgq4-g128-asym dgq4-g128-m2 dgq4-g128-balanced dgq4-g128-dict dgq3-g64
mxfp4- mxfp4-asym mxfp4-ocp-ceil mxfp4-g32 mxfp5 mxint5 nvfp4-ocp nvfp4- nvint4-ceil nvfp4-g16
int4-g128@ int4-g128@had0 int4-g128@had48 int4-g128@had8 int4-g128@had256 int4-g128@had016
int4-g128@awq7 int4-g128@awq16 int4-g128@awq0 int4-g128@perm1 int4-g128@lorc8 int4-g128@perm@perm
int4-g128@had16@had32 int4-g128@awq@perm@awq int4-g128@foo int4-g128had64 int4-g128+
int4-g128+lorc int4-g128+lorc0 int4-g128+lorc513 int4-g128+lorc08 int4-g128+had16
int4-g128+lorc8@had16 int4-g128+lorc8+lqer8 int4-g128@had16@ @had16 +lorc8 dense@had16 dense+lorc8
dense-g64
"""
REFUSED = WRONG_NAMES.split()


@pytest.mark.parametrize(
    "name",
    [
        *(*REFUSED, "", " ", "\0", "int4-g128 ", "int4-g128\n", f"int4-b{'9' * 40}x64"),
        *(f"int{'9' * 5000}-g64", f"int4-g{'9' * 5000}", f"int4-g64+lorc{'9' * 5000}"),
    ],
)
def test_a_wrong_name_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_format(name)
    assert caught.value.what and caught.value.hint


@settings(max_examples=300, deadline=None)
@given(names(), st.integers(0, 40), st.text("@+-_gbxem0123456789adhintfpclo٣", max_size=3))
def test_a_damaged_name_is_refused_or_means_what_it_says(name: str, at: int, text: str) -> None:
    for damaged in (name[:at] + text + name[at:], name[:at] + text + name[at + 1 :], text):
        try:
            fmt = parse_format(damaged)
        except FormatError:
            continue
        assert parse_format(fmt.name) == fmt


# ---------------------------------------------------------------- a decoder of its own


def data_section(stored: dict[str, torch.Tensor]) -> tuple[dict, bytes]:
    """Header and data of the safetensors file that holds `stored`."""
    raw = save({key: value.contiguous() for key, value in stored.items()})
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return header, raw[8 + size :]


def read_tensors(stored: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    header, data = data_section(stored)
    kinds = {"I32": "<i4", "F32": "<f4", "I16": "<i2", "U8": "u1", "I8": "i1", "F16": "<f2"}
    tensors = {}
    for name, entry in header.items():
        raw = data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, kinds[entry["dtype"]])
        if entry["dtype"] == "F16":
            values = values.astype(np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def bit_codes(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Each row one little-endian bitstream, code i at bits [i b, (i+1) b)."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : columns * bits].reshape(len(words), columns, bits).astype(np.int64)
    return (stream << np.arange(bits)).sum(2)


def minifloat_values(e: int, m: int) -> np.ndarray:
    codes = np.arange(1 << (1 + e + m))
    field, fraction = (codes >> m) % (1 << e), codes % (1 << m)
    exponent = np.maximum(field, 1) - ((1 << (e - 1)) - 1)
    value = np.ldexp((field > 0) + fraction / 2**m, exponent)
    return np.where(codes >> (e + m), -value, value).astype(np.float32)


ALIAS = {
    "mxfp8": "fp8_e4m3-g32-e8m0",
    "mxfp8_e5m2": "fp8_e5m2-g32-e8m0",
    "mxfp6": "fp6_e2m3-g32-e8m0",
    "mxfp6_e3m2": "fp6_e3m2-g32-e8m0",
    "mxfp4": "fp4_e2m1-g32-e8m0",
    "mxint8": "int8-g32-e8m0",
    "mxint6": "int6-g32-e8m0",
    "mxint4": "int4-g32-e8m0",
    "nvfp4": "fp4_e2m1-g16-e4m3",
    "nvint4": "int4-g16-e4m3",
}
# NF4 as QLoRA's appendix E prints it
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023
1.0"""


@lru_cache(maxsize=64)
def tunstall_paths(k: int) -> list[str]:
    """Leaves of `kernels/trits.py`'s tree k: expand the most probable node 32767 times."""
    seen: dict[tuple[int, int], int] = {}

    def entry(path: str) -> tuple[int, int, str]:
        z = path.count("1")
        kind = (z, len(path) - z)
        if kind not in seen:
            seen[kind] = (2 * k) ** z * (256 - k) ** kind[1] << (9 * (255 - len(path)))
        return (-seen[kind], len(path), path)

    heap, leaves = [entry("")], []
    inner = 0
    while inner < 32767:
        path = heapq.heappop(heap)[2]
        if len(path) == 255:
            leaves.append(path)
            continue
        inner += 1
        for digit in "012":
            heapq.heappush(heap, entry(path + digit))
    return sorted(leaves + [path for _, _, path in heap])


def trit_codes(t: dict[str, np.ndarray], rows: int, columns: int, coded: bool) -> np.ndarray:
    if not coded:
        digits = t["codes"].astype(np.int64)[:, :, None] // 3 ** np.arange(5) % 3
        return digits.reshape(rows, -1)[:, :columns]
    paths, starts = tunstall_paths(int(t["zeros_share"][0])), t["starts"]
    out = np.empty((rows, columns), np.int64)
    for row in range(rows):
        words = t["codes"][starts[row] : starts[row + 1]].view(np.uint16)
        text = "".join(paths[word] for word in words)
        assert len(text) - len(paths[words[-1]]) < columns <= len(text)
        out[row] = [int(digit) for digit in text[:columns]]
    return out


def element_values(
    name: str, t: dict[str, np.ndarray], rows: int, columns: int, coded: bool
) -> np.ndarray:
    """What codes stand for, integers and trits without their zero point."""
    if name == "ternary":
        return trit_codes(t, rows, columns, coded)
    if name.startswith("fp"):
        bits, e, m = (int(x) for x in re.findall(r"\d+", name))
        widths = [width for width in (8, 4, 2, 1) if bits & width]
        codes = np.zeros((rows, columns), np.int64)
        for width in widths:
            part = t["codes" if len(widths) == 1 else f"codes{width}"]
            codes = codes << width | bit_codes(part, width, columns)
        return minifloat_values(e, m)[codes]
    codes = bit_codes(t["codes"], int(re.findall(r"\d", name)[0]), columns)
    if name == "nf4":
        return np.array(NF4.split(), np.float32)[codes]
    if name.startswith("lut"):
        table = t["table"]
        return table[codes] if table.ndim == 1 else np.take_along_axis(table, codes, 1)
    return codes


def scale_values(kind: str, t: dict[str, np.ndarray], groups: int) -> np.ndarray:
    s = t["scales"]
    if kind in {"e8m0", "m1"}:
        assert s.min() >= 1 and s.max() <= 254
        return np.ldexp(np.float32(1), s.astype(np.int64) - 127)
    if kind == "e4m3":
        assert not (s & 0x80).any() and (s != 0x7F).all() and s.all()
        return minifloat_values(4, 3)[s] / t["global"]
    if kind == "dq":
        return s.astype(np.float32) * np.repeat(t["super"], 64, axis=0)[: len(s)]
    if kind == "m2":
        return np.ldexp(t["super"], -bit_codes(s, 4, groups))
    return s.astype(np.float32) * t["super"] if kind == "dual" else s


def read_block(name: str, t: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The weight of a format without wrappers, float32, in the order of operations of the docs."""
    base = re.sub("-(ocp|ceil)$", "", name)
    element, grain, *options = ALIAS.get(base, base).split("-")
    rows, columns = shape
    dgq = element == "dgq4"
    element, asym = ("int4", True) if dgq else (element, "asym" in options)
    values = element_values(element, t, rows, columns, "dict" in options)
    if element.startswith("lut") and grain == "channel":
        return values
    tile, group = {"channel": (1, columns), "tensor": (rows, columns)}.get(grain, (0, 0))
    if not tile:
        tile, group = (
            int(x) for x in (["1", grain[1:]] if grain[0] == "g" else grain[1:].split("x"))
        )
    spread = np.arange(rows)[:, None] // tile, np.arange(columns) // group
    groups = int(spread[1].max()) + 1
    kind = [o for o in options if o in {"m1", "m2", "dq", "e8m0", "e4m3"}]
    scale = scale_values("dual" if dgq else (kind or ["half"])[0], t, groups)[spread]
    if asym:
        zeros = bit_codes(t["zeros"].T, int(element[3:]), int(spread[0].max()) + 1).T
        values = values - zeros[spread]
    elif element.startswith("int"):
        values = values - (0.5 if element == "int1" else 2 ** (int(element[3:]) - 1))
    elif element == "ternary":
        values = values - 1
    return values.astype(np.float32) * scale.astype(np.float32)


def sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def splitmix_signs(count: int) -> np.ndarray:
    mask, signs = 2**64 - 1, []
    for i in range(1, count + 1):
        z = i * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        signs.append(1 - 2 * ((z ^ z >> 31) >> 63))
    return np.array(signs)


def whole_hadamard(width: int) -> np.ndarray:
    """The matrix of @had without a number."""
    for m in (1, *range(4, 257, 4)):
        power = width // m
        if width % m or power & (power - 1):
            continue
        if m == 1:
            return sylvester(width)
        if is_prime(m - 1):
            q = m - 1
            corner = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), squares(q)]])
            paley = np.eye(m) + corner
        elif m % 8 == 4 and is_prime(m // 2 - 1):
            q = m // 2 - 1
            corner = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), squares(q)]])
            paley = np.kron(corner, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
        else:
            continue
        assert np.array_equal(paley @ paley.T, m * np.eye(m))
        return np.kron(paley, sylvester(power))
    return sylvester(max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= width))


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, n))


def squares(q: int) -> np.ndarray:
    found = {i * i % q for i in range(1, q)}
    sign = [0] + [1 if i in found else -1 for i in range(1, q)]
    return np.array([[sign[(i - j) % q] for j in range(q)] for i in range(q)])


def read_weight(name: str, t: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Any format: wrappers undone from the outside in, in float64."""
    head, plus, _ = name.partition("+")
    if plus:
        left = t["left"] * t["left_scales"].astype(np.float64)
        right = t["right"] * t["right_scales"].astype(np.float64)[:, None]
        return read_weight(head, t, shape) + left @ right
    head, at, kind = name.rpartition("@")
    if not at:
        return read_block(name, t, shape)
    w = read_weight(head, t, shape)
    if kind == "awq":
        return w / t["channels"]
    if kind == "perm":
        out = np.empty_like(w)
        out[:, t["order"]] = w
        return out
    number = re.findall(r"\d+", kind)
    matrix = sylvester(int(number[0])) if number else whole_hadamard(shape[1])
    block = len(matrix)
    body = shape[1] // block * block
    rotation = np.eye(shape[1])
    rotation[:body, :body] = np.kron(np.eye(body // block), matrix / block**0.5)
    if kind[0] == "r":
        rotation[:body] *= splitmix_signs(body)[:, None]
    return w @ rotation.T


# ---------------------------------------------------------------- stored bytes


def problem(
    rows: int, width: int, batch: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2 * width + 40, width, generator=g) * torch.rand(width, generator=g) * 2
    x = x + 0.3 * x.roll(1, 2)
    w = torch.randn(batch, rows, width, generator=g)
    return w * torch.rand(rows, 1, generator=g), x.transpose(1, 2) @ x / x.shape[1]


def site_rows(tile: int | None, rows: int) -> list[slice]:
    """Sites of a stack of `rows` output rows: cut where no stored number is shared."""
    if tile is None or tile >= rows:
        return [slice(0, rows)]
    cut = max(tile, rows // 2 // tile * tile)
    return [slice(0, cut), slice(cut, rows)]


def check_stored(name: str, shape: tuple[int, int], options: Options) -> None:
    fmt = parse_format(name)
    w, h = problem(*shape, batch=2)
    solution = solve(w, h, fmt, options)
    for b in range(2):
        for rows in site_rows(fmt.row_tile, shape[0]):
            own = (rows.stop - rows.start, shape[1])
            stored = solution.store(b, rows)
            header, data = data_section(stored)
            parts = fmt.parts(own)
            assert header.keys() == parts.keys()
            half = "BF16" if options.half == torch.bfloat16 else "F16"
            for key, part in parts.items():
                assert header[key]["dtype"] == (half if part.dtype == "HALF" else part.dtype)
                if fmt.fixed_size or key != "codes":
                    assert tuple(header[key]["shape"]) == part.shape
            assert len(data) == sum(t.numel() * t.element_size() for t in stored.values())
            assert len(data) == fmt.nbytes(own) if fmt.fixed_size else len(data) <= fmt.nbytes(own)
            expected = solution.weight[b, rows]
            decoded = decode(stored, fmt, own)
            by_hand = read_weight(name, read_tensors(stored), own)
            if fmt is core_format(fmt):
                assert torch.equal(decoded, expected)
                assert np.array_equal(by_hand, decoded.numpy())
            else:  # products of matrices: the order of summation is free
                assert torch.allclose(decoded, expected, rtol=1e-6, atol=1e-6)
                assert np.allclose(by_hand, decoded.numpy(), rtol=1e-5, atol=1e-5)
            assert torch.equal(decode(stored, fmt, own, options.half), decoded.to(options.half))


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_bytes_are_those_promised_and_decode_by_their_description(name: str) -> None:
    for shape in SHAPES[:3] if "dict" in name else SHAPES:  # a tree of 65535 leaves per matrix
        check_stored(name, shape, Options(method="gptq"))
    check_stored(name, (65, 272), Options(method="rtn", half=torch.float16))
    if "dict" in name:
        return
    check_stored(name, (7, 129), Options(method="rtn"))
    check_stored(name, (3, 40), Options(method="gptq", clip=False, half=torch.float16))
    check_stored(name, (65, 129), Options(method="rtn", clip=False))


def test_dense_is_the_source_itself() -> None:
    fmt = parse_format("dense")
    w = torch.randn(3, 5).to(torch.bfloat16)
    assert fmt.nbytes((3, 5)) == len(data_section({"weight": w})[1]) == 30
    assert torch.equal(decode({"weight": w}, fmt, (3, 5)), w.float())


@pytest.mark.parametrize("columns", [1, 9, 10, 11, 250])
@pytest.mark.parametrize("dense_rows", [0, 1, 5, 16])
def test_entropy_coded_ternary_never_exceeds_its_bound(columns: int, dense_rows: int) -> None:
    """Mostly zeros asks for a tree under which the dense rows would cost twice their share."""
    w = torch.zeros(1, 40, columns)
    w[:, :dense_rows] = torch.randn(1, dense_rows, columns).sign()
    w[:, dense_rows:, 0] = 1  # no row's scale is arbitrary
    for name in ("ternary-channel-dict", "ternary-g16-dict"):
        fmt = parse_format(name)
        solution = solve(w, None, fmt, Options(method="rtn"))
        stored = solution.store(0, slice(0, 40))
        assert torch.equal(solution.weight, w)
        assert len(data_section(stored)[1]) <= fmt.nbytes((40, columns))
        assert torch.equal(decode(stored, fmt, (40, columns)), w[0])
