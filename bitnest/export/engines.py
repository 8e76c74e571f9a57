"""What each engine runs of compressed-tensors' schemes: one table, with versions.

Sources: compressed-tensors 0.20 (compressors/pack_quantized, quantization/lifecycle), vLLM 0.32
(layers/quantization/compressed_tensors, kernels/linear/mixed_precision, and of fused_moe
oracle/int_wna16 and experts), transformers 5.23 (integrations/compressed_tensors). The vLLM-CPU and
transformers lines for integers were also run; those for CUDA were read.

Float families were run in transformers. In vLLM-CPU (0.32, AMD without AMX, zentorch 2.13) every
scheme of `layouts` was run once, on a dense model and on experts, which gives its lines: FP8 needs
rounded inputs (no kernel for 16-bit ones), per token and beside channel scales (tensor scales and
static ones want an operator that its build lacks); int8 runs dynamic and static; packed int4 beside
int8-token by zentorch; experts in int8-channel/int8-token by zentorch; no kernel for FP8 experts or
blocks without AMX, int4 experts with rounded inputs outside Arm, MX or NVFP4. In transformers'
experts (`CompressedTensorsDequantize.convert`) 8-bit floats are multiplied by the stored scale as
it is, which is right for channels and tensors but neither for blocks nor for E8M0 exponents, and
NVFP4 loses its global scale; their inputs stay as they are. It rounds inputs of linears as bitnest
does, but for int8-token (divided by 127.5, down to -128) and the exponents of MX.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
DENSE_STREAM_BITS = (3, 5, 6, 7)  # packed as one bitstream since compressed-tensors 0.18
FLOATS = ("fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4")  # families of `layouts`
INT8 = ("int8/int8-token", "int8/int8-static")
FP8 = (
    "fp8/fp8_e4m3-token", "fp8/fp8_e4m3-static",
    "fp8-tensor/fp8_e4m3-token", "fp8-tensor/fp8_e4m3-static",
)  # fmt: skip
BLOCKS = (
    "fp8-block/fp8_e4m3-g128", "mxfp8/mxfp8", "mxfp4/mxfp4", "mxfp4/fp8_e4m3-token",
    "mxfp4/fp8_e4m3-g128", "nvfp4/nvfp4",
)  # fmt: skip
PACKED = ("int/int8-token", "int/int4-token")
W4AFP8 = "int/fp8_e4m3-token"


@dataclass(frozen=True)
class Engine:
    """What one engine runs.

    source: where the facts were read. bits, asymmetric_bits: widths that run as installed.
    extra_bits: widths that run once the package `extra` is installed. groups: group sizes for
    `bits`, None in it for one scale per row; empty: any. multiple: in and out features of linears
    divide by it. expert_bits: widths of experts. expert_channel, expert_asymmetric: whether experts
    may have one scale per row, zero points. min_top_k: experts per token at least.
    one_expert_scheme: all layers' fused experts share one, and none is dense. whole_words: packed
    rows of experts and packed zero points must fill their 32-bit words. floats, expert_floats:
    float families of linears and experts. fuses: whether q/k/v and gate/up become one matrix.
    to_bfloat16: families it decodes to that type whatever the model's, which then fails unless
    loaded in it. note: said with every export for it; expert_note: if experts are packed integers;
    float_note: with float weights beside 16-bit inputs; fp8_expert_note: with FP8 experts.

    inputs, expert_inputs: of weights whose inputs are rounded, what runs, as family/inputs
    (families of `layouts`, names of `inputs`). extra_inputs: of linears, with the package `extra`.
    input_note: said with any of these.
    """

    source: str
    bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]
    expert_bits: tuple[int, ...]
    extra_bits: tuple[int, ...] = ()
    extra: str = ""
    groups: tuple[int | None, ...] = ()
    multiple: int = 1
    expert_channel: bool = True
    expert_asymmetric: bool = True
    min_top_k: int = 1
    one_expert_scheme: bool = False
    whole_words: bool = True
    floats: tuple[str, ...] = FLOATS
    expert_floats: tuple[str, ...] = ()
    fuses: bool = True
    to_bfloat16: tuple[str, ...] = ()
    note: str = ""
    expert_note: str = ""
    float_note: str = ""
    fp8_expert_note: str = ""
    inputs: tuple[str, ...] = ()
    expert_inputs: tuple[str, ...] = ()
    extra_inputs: tuple[str, ...] = ()
    input_note: str = ""


ENGINES: dict[str, Engine] = {
    "vllm-cuda": Engine(
        source="vLLM 0.32.0: kernels/linear/mixed_precision/{marlin,humming}.py",
        bits=(4, 8),
        asymmetric_bits=(4,),
        expert_bits=(4, 8),
        extra_bits=(2, 3, 5, 6, 7),
        extra="humming (SM75 or newer)",
        groups=(None, 32, 64, 128),
        expert_floats=FLOATS,
        float_note="vllm-cuda is documented to run float weights; this export was not tried there",
        fp8_expert_note="vllm-cuda: FP8 experts usually come with an activation scheme; whether it "
        "loads weight-only ones was not tried",
        inputs=(*INT8, *FP8, *BLOCKS, W4AFP8),
        expert_inputs=(INT8[0], *FP8, *BLOCKS, W4AFP8),
        extra_inputs=PACKED,
        input_note="vllm-cuda is documented to round inputs so; this export was not tried there",
    ),
    "vllm-cpu": Engine(
        source="vLLM 0.32.0: kernels/linear/mixed_precision/cpu.py, fused_moe/experts/*_moe.py",
        bits=(4,),
        asymmetric_bits=(4,),
        expert_bits=(4,),
        multiple=32,
        expert_channel=False,
        expert_asymmetric=False,
        min_top_k=2,
        floats=(),
        expert_note="integer experts on a CPU need AMX, or AMD with zentorch, and bfloat16",
        inputs=(*INT8, FP8[0]),
        expert_inputs=(INT8[0],),
        extra_inputs=PACKED[:1],
        extra="zentorch",
    ),
    "transformers": Engine(
        source="transformers 5.23.0: integrations/compressed_tensors.py",
        bits=ALL_BITS,
        asymmetric_bits=(),  # its empty model expects zero points unpacked: a shape mismatch
        expert_bits=ALL_BITS,
        expert_asymmetric=False,
        one_expert_scheme=True,
        whole_words=False,
        expert_floats=("fp8", "mxfp4"),
        fuses=False,
        to_bfloat16=("mxfp4", "mxfp8", "nvfp4"),
        inputs=(*INT8, *FP8, *BLOCKS, *PACKED, W4AFP8),
        note="transformers decodes the whole model to 16 bit when it first runs",
    ),
}
