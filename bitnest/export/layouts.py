"""How compressed-tensors stores one weight: the scheme of each format that it can hold.

    ours                     file format            library's scheme
    int2..8, 16-bit scales   pack-quantized         WnA16, per group of a row or per row
    int8-channel, int8-*     int-quantized          INT8_W8A8: where inputs are rounded too
    fp8_e4m3-channel         float-quantized        FP8_DYNAMIC's weights
    fp8_e4m3-tensor          float-quantized        FP8's weights
    fp8_e4m3-b128x128        float-quantized        FP8_BLOCK's weights
    mxfp8                    mxfp8-quantized        MXFP8A16
    mxfp4                    mxfp4-pack-quantized   MXFP4A16
    nvfp4                    nvfp4-pack-quantized   NVFP4A16

Each names its file format: left to itself the library takes FP8 without activations for
`naive-quantized`, the same bytes under another name, and integers with activations for
`int-quantized`, a byte for 4 bits. What inputs can be rounded to is in `inputs`, how the tensors
look in `tensors`.

Left out: mxfp6 (`mxfp6-pack-quantized` of compressed-tensors 0.20, which no engine of `engines` is
known to run), and rotations, which the library puts in a `transform_config` beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from bitnest.errors import TargetError
from bitnest.export.inputs import E4M3 as E4M3_INPUTS
from bitnest.export.inputs import input_arguments, library_name, scale_tensor
from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    BlockSparseFormat,
    LowRankFormat,
    SparseFormat,
    SplitFormat,
    TransformedFormat,
    ZeroFormat,
    parse_format,
    widths,
)
from bitnest.formats.elements import FloatElement, IntElement
from bitnest.formats.names import E2M1, E4M3
from bitnest.kinds import ENDS

if TYPE_CHECKING:
    from bitnest.manifest import SiteRecord

PACKED_INT, MIXED = "pack-quantized", "mixed-precision"
FORMATS = {
    "int": PACKED_INT,
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "fp8-block": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
BLOCK = 128  # rows and columns of an FP8 block
HINT = (
    "compress with a format that exports, such as int4-g128, fp8-channel, mxfp4 or nvfp4; "
    "or run this artifact with bitnest serve"
)
NESTED_HINT = (
    "bitnest export ARTIFACT --bits 4 -o OUT quantises its widest width anew, as integers "
    "(adding that width's error: if you have the original, compress that with --format int4-g128)"
)
INPUTS_HINT = (
    "compress with --inputs that engines have (int8-token beside int8-channel, fp8_e4m3-token "
    "beside fp8_e4m3-channel), export the weights alone by --weights-only, or use bitnest serve"
)


@dataclass(frozen=True)
class Layout:
    """One scheme; weights with equal layouts are read alike.

    family: a key of FORMATS. bits, symmetric, strategy, group: as in the library's arguments.
    inputs: what inputs are rounded to, a name of `inputs`, empty for nothing.
    """

    family: str
    bits: int
    symmetric: bool
    strategy: str
    group: int | None
    inputs: str = ""

    @property
    def format(self) -> str:
        """The library's name for the file format."""
        return FORMATS[self.family]

    @property
    def integer(self) -> bool:
        """Whether codes are integers."""
        return self.family in {"int", "int8"}

    @property
    def input_arguments(self) -> dict[str, Any] | None:
        """The library's QuantizationArgs of inputs, None if they are left alone."""
        return input_arguments(self.inputs) if self.inputs else None

    @property
    def input_tensor(self) -> str:
        """Name of the tensor of the inputs' static scale, empty if there is none."""
        return scale_tensor(self.inputs) if self.inputs else ""

    @property
    def arguments(self) -> dict[str, Any]:
        """The library's QuantizationArgs, as it would write them."""
        arguments: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int" if self.integer else "float",
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group,
            "dynamic": False,
            "actorder": None,
        }
        if self.strategy == "block":
            arguments["block_structure"] = [BLOCK, BLOCK]
        if self.family in {"mxfp4", "mxfp8"}:
            arguments["scale_dtype"] = "torch.uint8"
        if self.family == "nvfp4":
            arguments["scale_dtype"] = "torch.float8_e4m3fn"
        return arguments

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of a weight's tensors."""
        static = (self.input_tensor,) if self.input_tensor else ()
        if self.family == "int":
            zeros = () if self.symmetric else ("weight_zero_point",)
            return ("weight_packed", "weight_scale", "weight_shape", *zeros, *static)
        codes = "weight" if self.bits == 8 else "weight_packed"
        more = ("weight_global_scale",) if self.family == "nvfp4" else ()
        return (codes, "weight_scale", *more, *static)


def packed_format(record: SiteRecord) -> BlockFormat:
    """The format of a packed site.

    Raises:
        TargetError: one that the file format does not hold.
    """
    return _read(record)[0]


def packed_layout(record: SiteRecord) -> Layout:
    """How a packed site is stored.

    Raises:
        TargetError: a format that the file format does not hold.
    """
    return _read(record)[1]


def layout_kind(record: SiteRecord) -> str:
    """`packed` as codes, `decoded` for a packed end, which engines look up or multiply dense, else
    `dense`."""
    if record.format == "dense" or not (record.file or record.format == "zero"):
        return "dense"
    return "decoded" if record.site.kind in ENDS else "packed"


def layout_of(record: SiteRecord) -> Layout | None:
    """How a site is stored in the export, None if it is dense there.

    Raises:
        TargetError: a format that the file format does not hold.
    """
    return packed_layout(record) if layout_kind(record) == "packed" else None


def _read(record: SiteRecord) -> tuple[BlockFormat, Layout]:
    found = _parsed(record.format, record.inputs)
    if isinstance(found, str):
        if record.inputs and not isinstance(_parsed(record.format, ""), str):
            raise TargetError(
                f"inputs rounded to '{record.inputs}' do not export with weights of "
                f"{record.format}: {found}",
                where=record.site.name,
                hint=INPUTS_HINT,
            )
        raise TargetError(
            f"format '{record.format}' does not export: {found}",
            where=record.site.name,
            hint=NESTED_HINT if widths(parse_format(record.format)) else HINT,
        )
    return found


@cache
def _parsed(name: str, inputs: str) -> tuple[BlockFormat, Layout] | str:
    """The format and its layout, or what the file format has no place for."""
    fmt = parse_format(name)
    alone = layout_for(fmt) if isinstance(fmt, BlockFormat) else None
    if not isinstance(fmt, BlockFormat) or alone is None:
        return _missing(fmt)
    found = with_inputs(alone, inputs)
    if found is None:
        names = ", ".join(inputs_beside(alone))
        return f"engines have {names} beside these" if names else "engines round none beside these"
    return fmt, found


def with_inputs(layout: Layout, inputs: str) -> Layout | None:
    """The layout beside inputs of our format `inputs`, None if the files or all engines lack it."""
    if not inputs:
        return layout
    name = library_name(inputs)
    if name not in inputs_beside(layout):
        return None
    family = "int8" if layout.family == "int" and _is_w8(layout) else layout.family
    return replace(layout, family=family, inputs=name)


def scheme(layout: Layout) -> str:
    """Family and inputs, as the tables of `engines` spell them: FP8 with one scale for the matrix
    is a family of its own there."""
    whole = "-tensor" if layout.strategy == "tensor" else ""
    return f"{layout.family}{whole}/{layout.inputs}"


def inputs_beside(layout: Layout) -> tuple[str, ...]:
    """Inputs that go with weights of a layout."""
    token, static, grouped = (f"{E4M3_INPUTS}-{grain}" for grain in ("token", "static", "g128"))
    if layout.family == "int":
        if _is_w8(layout):
            return ("int8-token", "int8-static")
        narrow = ("int4-token",) if layout.bits <= 4 else ()
        float8 = layout.bits == 4 and layout.symmetric and layout.group == BLOCK
        return ("int8-token", *narrow, *((token,) if float8 else ()))
    return {
        "fp8": (token, static),
        "fp8-block": (grouped,),
        "mxfp8": ("mxfp8",),
        "mxfp4": ("mxfp4", token, grouped),
        "nvfp4": ("nvfp4",),
    }[layout.family]


def _is_w8(layout: Layout) -> bool:
    """Whether the integers are those of W8A8: one scale per row, no zero points."""
    return layout.bits == 8 and layout.group is None and layout.symmetric


def layout_for(fmt: BlockFormat) -> Layout | None:
    """How weights of that format are stored, None if they cannot be."""
    element, grain, e8m0 = fmt.element, fmt.grain, fmt.scale in {"e8m0", "m1"}
    group, bits = fmt.group, int(fmt.bits)
    if isinstance(element, IntElement):
        if not fmt.plain_integer or bits < 2:
            return None
        return Layout("int", bits, fmt.symmetric, "group" if group else "channel", group)
    if not isinstance(element, FloatElement):
        return None
    if element.spec == E4M3 and fmt.scale == "half":
        if grain in {"channel", "tensor"}:
            return Layout("fp8", 8, True, grain, None)
        return Layout("fp8-block", 8, True, "block", None) if grain == "b128x128" else None
    if e8m0 and grain == "g32" and element.spec in {E4M3, E2M1}:
        return Layout("mxfp8" if bits == 8 else "mxfp4", bits, True, "group", 32)
    if fmt.scale == "e4m3" and grain == "g16" and element.spec == E2M1:
        return Layout("nvfp4", 4, True, "tensor_group", 16)
    return None


def _missing(fmt: AnyFormat) -> str:
    """What compressed-tensors has no place for."""
    if isinstance(fmt, ZeroFormat):
        return "engines have no format for a matrix that is not there"
    if isinstance(fmt, LowRankFormat):
        return f"compressed-tensors has no tensors for a low-rank residual (+{fmt.kind}{fmt.rank})"
    if widths(fmt):
        return "nested codes are no integers on an even grid"
    if isinstance(fmt, SparseFormat | BlockSparseFormat):
        return f"engines have no kernels for a bitmask with packed survivors (%{fmt.pattern})"
    if isinstance(fmt, TransformedFormat):
        kind = f"@{fmt.kind}{fmt.block or ''}"
        return f"a compressed-tensors weight is stored in its own basis, not transformed ({kind})"
    if isinstance(fmt, SplitFormat):
        return "engines have one format for all channels of a matrix"
    assert isinstance(fmt, BlockFormat)
    element = fmt.element
    if isinstance(element, IntElement):
        if int(element.bits) < 2:
            return "compressed-tensors packs integers of 2 to 8 bits"
        return "integers there have 16-bit scales in groups of a row, or one per row"
    if isinstance(element, FloatElement) and element.spec == E4M3:
        return "8-bit floats there have 16-bit scales per channel, tensor or b128x128, or are mxfp8"
    if isinstance(element, FloatElement) and element.spec == E2M1:
        return "4-bit floats there are mxfp4 (e8m0, g32) or nvfp4 (e4m3, g16)"
    return f"compressed-tensors has no scheme that engines read for {element.name} codes"
