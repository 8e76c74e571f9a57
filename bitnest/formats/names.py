"""Format names: one grammar, read and written.

name      base [%sparsity] [@transform]... [+residual], dense [%sparsity], zero or a fate
base      alias | element-grain[-option]... | nested | <n>x<base>~<base>
element   int1..int8, fp<bits>_e<E>m<M>, nf4, lut2..lut4, ternary, dgq4
grain     tensor, channel, g16..g128, b<rows>x<columns>
option    asym, balanced, dict (ternary), m1, m2, dq, e8m0[-ocp|-ceil], e4m3
alias     mxfp8 mxfp8_e5m2 mxfp6 mxfp6_e3m2 mxfp4 mxint8 mxint6 mxint4 [-ocp|-ceil], nvfp4, nvint4
sparsity  1..99 (percent of every row dropped), n:m (n of every m kept), m 2, 4, 8 or 16, or
          b<rows>x<columns>-<percent of blocks kept>, sides 16, 32, 64 or 128
transform had16..had128, rhad16..rhad128, had, rhad, awq, perm
nested    nest<widths>-g<group>, mat<widths>-g<group>, mwq<widths>-g<group>, any<widths>-channel,
          stack<widths>-r<rank>; widths are digits: nest2345678-g128
residual  lorc<rank>, lqer<rank>, hlr<rank>
fate      drop, constant, copy, merge<expert>

`<n>x...~...`: the first n input channels in the first base (`split`). What follows a slash in rules
and candidates is the format of inputs (`inputs`), no part of these names.
"""

from __future__ import annotations

import re
from dataclasses import replace

from bitnest.errors import FormatError
from bitnest.formats.base import DenseFormat
from bitnest.formats.block import BlockFormat
from bitnest.formats.block_sparse import BlockSparseFormat
from bitnest.formats.elements import (
    Element,
    FloatElement,
    IntElement,
    TableElement,
    TernaryElement,
)
from bitnest.formats.fates import parse_fate
from bitnest.formats.minifloat import MiniFloat
from bitnest.formats.nested import NestedFormat
from bitnest.formats.sparse import SparseFormat
from bitnest.formats.split import SplitFormat
from bitnest.formats.wrappers import (
    AnyFormat,
    CodedFormat,
    CoreFormat,
    LowRankFormat,
    TransformedFormat,
)
from bitnest.formats.zero import ZeroFormat

E4M3, E5M2 = MiniFloat(4, 3), MiniFloat(5, 2)
E3M2, E2M3, E2M1 = MiniFloat(3, 2), MiniFloat(2, 3), MiniFloat(2, 1)

_MX: dict[str, Element] = {
    "mxfp8": FloatElement(E4M3),
    "mxfp8_e5m2": FloatElement(E5M2),
    "mxfp6": FloatElement(E2M3),
    "mxfp6_e3m2": FloatElement(E3M2),
    "mxfp4": FloatElement(E2M1),
    "mxint8": IntElement(8),
    "mxint6": IntElement(6),
    "mxint4": IntElement(4),
}
_NV: dict[str, Element] = {"nvfp4": FloatElement(E2M1), "nvint4": IntElement(4)}
ALIASES: dict[str, BlockFormat] = {
    **{name: BlockFormat(e, 32, scale="e8m0", alias=name) for name, e in _MX.items()},
    **{name: BlockFormat(e, 16, scale="e4m3", alias=name) for name, e in _NV.items()},
}
SHORT_FLOATS = {"fp8": E4M3, "fp6": E3M2, "fp4": E2M1}
HINT = "for example int4-g128, int3-g64-asym, mxfp4, fp8-channel, nf4-g64; see bitnest formats"

NESTED_TRANSFORM = "@had64"  # lowers the error of nested codes as of others (docs/log.md)

NEAREST = {
    "w8a16": "int8-channel", "w4a16": "int4-g128", "fp8_dynamic": "fp8-channel",
    "fp8": "fp8-channel", "nf4": "nf4-g64", "fp4": "nvfp4", "ternary": "ternary-g128",
}  # fmt: skip

_NUMBER = r"(?:0|[1-9][0-9]{0,3})"  # one spelling for each number
_BASE = re.compile(
    rf"(?P<element>int(?P<int>{_NUMBER})|fp(?P<fp>{_NUMBER})(?:_e(?P<e>{_NUMBER})m(?P<m>{_NUMBER}))?"
    rf"|nf4|lut(?P<lut>{_NUMBER})|ternary|dgq4)"
    r"-(?:(?P<channel>channel)|(?P<tensor>tensor)"
    rf"|g(?P<group>{_NUMBER})|b(?P<rows>{_NUMBER})x(?P<columns>{_NUMBER}))"
    r"(?P<asym>-asym)?(?P<balanced>-balanced)?(?P<dict>-dict)?"
    r"(?:-(?P<scale>m1|m2|dq|e8m0|e4m3))?(?:-(?P<rule>ocp|ceil))?"
)
_NESTED = re.compile(
    r"(?P<kind>nest|mat|mwq|any|stack)(?P<widths>[0-9]{1,8})"
    rf"-(?:channel|g(?P<group>{_NUMBER})|r(?P<rank>{_NUMBER}))"
)
_SPLIT = re.compile(r"(?P<channels>[1-9][0-9]{0,5})x(?P<wide>[^~]+)~(?P<rest>[^~]+)")
_SPARSITY = re.compile(
    rf"(?P<drop>{_NUMBER})|(?P<keep>{_NUMBER}):(?P<cell>{_NUMBER})"
    rf"|b(?P<rows>{_NUMBER})x(?P<columns>{_NUMBER})-(?P<share>{_NUMBER})"
)
_WRAPPER = re.compile(
    r"(?P<mark>[@+])(?P<kind>had|rhad|awq|perm|lorc|lqer|hlr)(?P<number>[1-9][0-9]{0,3})?"
)


def parse_format(name: str) -> AnyFormat:
    """The format spelt `name`, for example `int4-g128`, `mxfp4`, `int3-g64-asym@rhad64+lqer16`.

    Raises:
        FormatError: the name is not of that form, or its numbers are out of range.
    """
    if name == "dense":
        return DenseFormat()
    if name == "zero":
        return ZeroFormat()
    if (fate := parse_fate(name)) is not None:
        return fate
    if "/" in name:
        raise FormatError(
            f"'{name}': what follows the slash is a format of inputs, and has no place here",
            hint="WEIGHTS/INPUTS is for rules and --format of compress; --inputs says it elsewhere",
        )
    cut = min((i for i in (name.find("@"), name.find("+")) if i >= 0), default=len(name))
    base, mark, pattern = name[:cut].partition("%")
    core = _sparse(base, pattern, name) if mark else parse_base(base, name)
    return _wrap(core, name[cut:], name)


def _sparse(base: str, pattern: str, whole: str) -> SparseFormat | BlockSparseFormat:
    found = _SPARSITY.fullmatch(pattern)
    if found is None:
        raise FormatError(
            f"unknown sparsity '%{pattern}' in '{whole}'",
            hint="%50 drops half of every row, %2:4 keeps 2 of every 4, %b16x16-50 half of all "
            "blocks",
        )
    fmt = DenseFormat() if base == "dense" else parse_base(base, whole)
    if not isinstance(fmt, BlockFormat | DenseFormat):
        raise FormatError(
            f"nested and split formats have no sparsity, not '{whole}'",
            hint="for example int4-g128%2:4",
        )
    if found["rows"]:
        return BlockSparseFormat(fmt, *(int(found[k]) for k in ("rows", "columns", "share")))
    drop, keep, cell = (int(found[key] or 0) for key in ("drop", "keep", "cell"))
    return SparseFormat(fmt, drop, keep, cell)


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths as the command line writes them: `2-8`, `4` or `2,3,4,6,8`, ascending.

    Raises:
        FormatError: not of that form, or no width.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-8])(?:-([1-8]))?\s*", part)
        if match is None or int(match[2] or 8) < int(match[1]):
            raise FormatError(
                f"'{text}' is no list of widths", hint="2-8 or 2,3,4,6,8; from 1 to 8 bits"
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def sparse_name(name: str, sparsity: str) -> str:
    """The format `name` with a sparsity as `--sparsity` writes it: `50%`, `2:4`, `b16x16-50`.

    Raises:
        FormatError: it has one already, it cannot have any, or there is no such sparsity.
    """
    pattern = sparsity.strip()
    if "%" in name:
        raise FormatError(
            f"'{name}' is sparse already", hint="leave out --sparsity, or what follows the %"
        )
    if pattern.startswith("%") or "%" in pattern[:-1]:
        raise FormatError(f"no such sparsity: '{sparsity}'", hint="50%, 2:4, 4:8 or b16x16-50")
    cut = min((i for i in (name.find("@"), name.find("+")) if i >= 0), default=len(name))
    return parse_format(f"{name[:cut]}%{pattern.removesuffix('%')}{name[cut:]}").name


def nested_name(text: str, group: int | None = None) -> str:
    """The format that `--nested TEXT` asks for.

    Raises:
        FormatError: see `parse_widths`.
    """
    return NestedFormat("nest", parse_widths(text), group or 128).name + NESTED_TRANSFORM


def brief_name(name: str) -> str:
    """A format's name for tables: of nested ones the widest width alone, `nest..5-g128@had64`."""
    name = re.sub(r"^merge[0-9]+$", "merge", name)
    return re.sub(r"^(nest|mat|mwq|any|stack)[0-9]+([0-9])-", r"\1..\2-", name)


def parse_base(text: str, whole: str = "") -> CoreFormat:
    """The format of `text`, which has no wrappers. whole: the name to complain about.

    Raises:
        FormatError: no such format.
    """
    alias, dash, rule = text.partition("-")
    if alias in ALIASES:
        fmt = ALIASES[alias]
        if dash and (fmt.scale != "e8m0" or rule not in {"ocp", "ceil"}):
            raise FormatError(
                f"'{alias}' has no option '{rule}'",
                hint="the MX formats take -ocp or -ceil, for how the exponent is chosen",
            )
        return replace(fmt, rule=rule)
    if split := _SPLIT.fullmatch(text):
        first, rest = parse_base(split["wide"], whole), parse_base(split["rest"], whole)
        if not isinstance(first, BlockFormat) or not isinstance(rest, BlockFormat):
            raise FormatError(f"'{whole or text}': parts of a matrix are not nested", hint=HINT)
        return SplitFormat(first, int(split["channels"]), rest)
    if nested := _NESTED.fullmatch(text):
        group, rank = (int(nested[k]) if nested[k] else None for k in ("group", "rank"))
        return NestedFormat(nested["kind"], tuple(map(int, nested["widths"])), group, rank)
    match = _BASE.fullmatch(text)
    if match is None:
        raise FormatError(f"unknown format '{whole or text}'", hint=_hint(text))
    return _base(match)


def _hint(text: str) -> str:
    """What somebody who wrote `text` may have meant."""
    from bitnest.formats.inputs import is_inputs  # which knows weights' names

    if is_inputs(text):
        return (
            "that is a format of inputs: --inputs, or after a slash as in int8-channel/int8-token"
        )
    lower = text.lower()
    known = dict(NEAREST)
    if ggml := re.fullmatch(r"(?:i?q|tq)(\d)_[0-9a-z_]+", lower):  # llama.cpp's names
        known[lower] = "ternary-g128" if ggml[1] == "1" else f"int{ggml[1]}-g32"
    if lower in known:
        return f"the nearest format is {known[lower]}; bitnest formats lists all"
    for spelt in (lower, f"{lower}-g128"):
        if spelt != text and (spelt in ALIASES or _BASE.fullmatch(spelt)):
            return f"did you mean {spelt}? bitnest formats lists all"
    return HINT


def _base(match: re.Match[str]) -> BlockFormat:
    element, scale = _element(match), match["scale"] or "half"
    if match["asym"] and not isinstance(element, IntElement):
        raise FormatError(f"only integers are asymmetric, not {match[0]}", hint="leave out -asym")
    if match["balanced"] and not isinstance(element, IntElement):
        raise FormatError(
            f"only integers have a balanced range, not {match[0]}", hint="leave out -balanced"
        )
    if match["dict"] and not isinstance(element, TernaryElement):
        raise FormatError(
            f"only ternary codes have a dictionary, not {match[0]}", hint="leave out -dict"
        )
    if match["rule"] and scale != "e8m0":
        raise FormatError(
            f"only e8m0 scales have the rules ocp and ceil, not {match[0]}",
            hint="for example int4-g32-e8m0-ceil",
        )
    if match["element"] == "dgq4":
        if match["scale"] or match["asym"] or match["balanced"] or match["group"] is None:
            raise FormatError(f"dgq4 has groups and nothing else, not {match[0]}", hint="dgq4-g128")
        scale = "dual"
    group = match["group"] or match["columns"]
    rows = int(match["rows"]) if match["rows"] else (None if match["tensor"] else 1)
    return BlockFormat(element, int(group) if group else None, rows, scale, match["rule"] or "")


def _element(match: re.Match[str]) -> Element:
    if match["int"]:
        return IntElement(int(match["int"]), not match["asym"], bool(match["balanced"]))
    if match["element"] == "dgq4":
        return IntElement(4, symmetric=False)
    if match["element"] == "ternary":
        return TernaryElement(bool(match["dict"]))
    if match["fp"]:
        return FloatElement(_float(match))
    if match["lut"]:
        return TableElement(int(match["lut"]), learned=True)
    return TableElement()


def _float(match: re.Match[str]) -> MiniFloat:
    bits = int(match["fp"])
    if match["e"] is None:
        short = SHORT_FLOATS.get(f"fp{bits}")
        if short is None:
            raise FormatError(
                f"fp{bits} needs its exponent and mantissa bits", hint="for example fp5_e2m2-g32"
            )
        return short
    spec = MiniFloat(int(match["e"]), int(match["m"]))
    if spec.bits != bits:
        raise FormatError(
            f"{spec.name} has {spec.bits} bits with its sign, not {bits}",
            hint=f"fp{spec.bits}_{spec.name}",
        )
    return spec


def _wrap(fmt: CoreFormat, text: str, whole: str) -> CodedFormat:
    wrapped: CodedFormat = fmt
    place = 0
    for match in _WRAPPER.finditer(text):
        number = int(match["number"] or 0)
        if match.start() != place or isinstance(wrapped, LowRankFormat):
            break
        if match["mark"] == "@":
            wrapped = TransformedFormat(wrapped, match["kind"], number)
        else:
            if not number:
                raise FormatError(f"'+{match['kind']}' needs a rank", hint=f"+{match['kind']}16")
            wrapped = LowRankFormat(wrapped, match["kind"], number)
        place = match.end()
    if place != len(text):
        raise FormatError(
            f"unknown format '{whole}'",
            hint="after the format: @had64, @rhad64, @awq or @perm, then +lorc16, +lqer16 "
            "or +hlr16",
        )
    return wrapped
