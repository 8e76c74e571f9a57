"""Formats of inputs: how what a matrix reads is rounded as the model runs.

    name     [<n>x<base>~]<base>     the first n channels in the wider base, the others in the other
    base     <element>-<grain>[-c<percent>][-t<threshold>] | an MX or NV alias
    element  int2..int8, fp8 (fp8_e4m3), fp8_e5m2, fp<bits>_e<E>m<M>
    grain    token      one scale per token, measured as it comes
             g16..g256  one per token and group of channels
             static     one for all tokens, measured on the calibration text
    alias    mxfp8 mxfp8_e5m2 mxfp6 mxfp6_e3m2 mxfp4 mxint8 mxint6 mxint4 [-ocp|-ceil], groups of 32
             under a power of two; nvfp4 nvint4, groups of 16 under E4M3 scales under a static one
    -c90     the largest number is 90 % of the largest magnitude: what is beyond is clipped (Atom)
    -t6      channels in which any token of the batch reaches 6 stay as they are (LLM.int8())

A rule says both, `int4-g128/int8-token`: weights, a slash, inputs; `/dense` says that inputs are
left alone. Integers are balanced, +-(2^(b-1) - 1). What is done with them is `kernels/inputs`.
Nothing of an input format is stored but the static scale, in the manifest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitnest.errors import FormatError
from bitnest.formats.elements import FloatElement, IntElement
from bitnest.formats.minifloat import MiniFloat
from bitnest.formats.names import ALIASES, SHORT_FLOATS

DENSE = "dense"
LEAST_GROUP, GREATEST_GROUP = 16, 256
HINT = "for example int8-token, int6-g128, fp8-token, int8-static, mxfp4, 128xint8-token~int4-g128"

_BASE = re.compile(
    r"(?P<element>int(?P<int>[2-8])|fp(?P<fp>[2-8])(?:_e(?P<e>[1-5])m(?P<m>[0-3]))?)"
    r"-(?:(?P<token>token)|(?P<static>static)|g(?P<group>[1-9][0-9]{1,2}))"
    r"(?:-c(?P<clip>[1-9][0-9]?))?(?:-t(?P<keep>[1-9][0-9]{0,3}))?"
)
_WIDE = re.compile(r"(?P<count>[1-9][0-9]{0,5})x(?P<wide>[^~]+)~(?P<rest>.+)")


@dataclass(frozen=True)
class InputFormat:
    """See above.

    element: what codes stand for. group: channels that share a scale; None: all of a token's.
    scale: float (float32), e8m0 or e4m3. static: one scale of the calibration text instead. rule:
    of e8m0 exponents, `ocp` or `ceil`. clip: percent of the largest magnitude that is the largest
    number. keep: magnitude from which a channel stays as it is. alias: a fixed name such as mxfp4.
    wide, wide_channels: format of the first channels.

    Raises:
        FormatError: a combination that does not exist.
    """

    element: IntElement | FloatElement
    group: int | None = None
    scale: str = "float"
    static: bool = False
    rule: str = ""
    clip: int = 100
    keep: int | None = None
    alias: str = ""
    wide: InputFormat | None = None
    wide_channels: int = 0

    def __post_init__(self) -> None:
        if self.group is not None and not (
            LEAST_GROUP <= self.group <= GREATEST_GROUP and self.group % 16 == 0
        ):
            raise FormatError(
                f"inputs have groups of {LEAST_GROUP} to {GREATEST_GROUP} channels in steps of 16, "
                f"not {self.group}",
                hint="for example int6-g128",
            )
        if self.static and (self.clip != 100 or self.keep is not None):
            raise FormatError(
                "a static scale is fitted to the text: it takes no -c or -t",
                hint="leave them out, or measure each token: int8-token-c90",
            )
        if self.wide is not None and (
            self.wide.wide is not None or self.keep is not None or self.wide.keep is not None
        ):
            raise FormatError("beside wider channels there is no further kind", hint=HINT)
        if self.wide is not None and (self.has_static or self.wide.has_static):
            raise FormatError(
                "beside wider channels scales are measured as tokens come",
                hint="128xint8-token~int4-g128",
            )

    @property
    def base_name(self) -> str:
        """The spelling without the wider channels."""
        if self.alias:
            return self.alias + (f"-{self.rule}" if self.rule else "")
        grain = "static" if self.static else "token" if self.group is None else f"g{self.group}"
        clip = "" if self.clip == 100 else f"-c{self.clip}"
        return f"{self.element.name}-{grain}{clip}" + (f"-t{self.keep}" if self.keep else "")

    @property
    def name(self) -> str:
        """The spelling that `parse_inputs` reads back."""
        wide = "" if self.wide is None else f"{self.wide_channels}x{self.wide.name}~"
        return wide + self.base_name

    @property
    def bits(self) -> int:
        """Of one code, but for wider channels."""
        return self.element.bits

    @property
    def integer(self) -> bool:
        """Whether codes are integers, so that products of them are."""
        return isinstance(self.element, IntElement)

    @property
    def largest(self) -> float:
        """The largest number before its scale."""
        element = self.element
        if isinstance(element, IntElement):
            return float((1 << (element.bits - 1)) - 1)
        return element.spec.largest

    @property
    def has_static(self) -> bool:
        """Whether a scale is measured on the calibration text."""
        return self.static or self.scale == "e4m3"

    def wide_of(self, channels: int) -> int:
        """How many of `channels` are in the wider format: at most half of them."""
        return min(self.wide_channels, channels // 2)

    def mean_bits(self, channels: int) -> float:
        """Bits of a code, over all of `channels`."""
        if self.wide is None:
            return self.bits
        wide = self.wide_of(channels)
        return (self.wide.bits * wide + self.bits * (channels - wide)) / channels


def parse_inputs(name: str) -> InputFormat:
    """The format of inputs spelt `name`.

    Raises:
        FormatError: there is none.
    """
    found = _WIDE.fullmatch(name)
    if found is None:
        return _base(name)
    base, wide = _base(found["rest"]), _base(found["wide"])
    return InputFormat(
        base.element, base.group, base.scale, base.static, base.rule, base.clip, base.keep,
        base.alias, wide, int(found["count"]),
    )  # fmt: skip


def is_inputs(name: str) -> bool:
    """Whether `name` is spelt as a format of inputs."""
    try:
        parse_inputs(name)
    except FormatError:
        return False
    return True


def split_name(name: str) -> tuple[str, str | None]:
    """Weights and inputs of a name; None where it says nothing of inputs, `dense` where it leaves
    them alone.

    Raises:
        FormatError: no such inputs.
    """
    weights, slash, inputs = name.partition("/")
    if not slash:
        return weights, None
    return weights, DENSE if inputs == DENSE else parse_inputs(inputs).name


def weights_of(name: str) -> str:
    """The part of a name that says what is stored."""
    return name.partition("/")[0]


def joined_name(weights: str, inputs: str) -> str:
    """The name of both; inputs: empty or `dense` for those that are left alone."""
    return f"{weights}/{inputs}" if inputs not in {"", DENSE} else weights


def _base(name: str) -> InputFormat:
    alias, dash, rule = name.partition("-")
    if alias in ALIASES:
        like = ALIASES[alias]
        assert isinstance(like.element, IntElement | FloatElement)
        if dash and (like.scale != "e8m0" or rule not in {"ocp", "ceil"}):
            raise FormatError(
                f"inputs '{alias}' have no option '{rule}'", hint="the MX formats take -ocp, -ceil"
            )
        return InputFormat(like.element, like.group, like.scale, rule=rule, alias=alias)
    found = _BASE.fullmatch(name)
    if found is None:
        raise FormatError(f"unknown format of inputs '{name}'", hint=HINT)
    group = int(found["group"]) if found["group"] else None
    return InputFormat(
        _element(found, name), group, static=bool(found["static"]),
        clip=int(found["clip"] or 100), keep=int(found["keep"]) if found["keep"] else None,
    )  # fmt: skip


def _element(found: re.Match[str], name: str) -> IntElement | FloatElement:
    if found["int"]:
        return IntElement(int(found["int"]))
    if found["e"] is None:
        spec = SHORT_FLOATS.get(f"fp{found['fp']}")
    else:
        spec = MiniFloat(int(found["e"]), int(found["m"]))
    if spec is None or spec.bits != int(found["fp"]):
        raise FormatError(
            f"'{name}': fp{found['fp']} needs exponent and mantissa bits that fit",
            hint="fp8_e4m3-token, fp8_e5m2-token or fp6_e2m3-g32",
        )
    return FloatElement(spec)
