"""What each engine runs of pack-quantized integer weights: facts, one table, with their versions.

Sources: compressed-tensors 0.20 (compressors/pack_quantized, quantization/lifecycle), vLLM 0.32
(layers/quantization/compressed_tensors, kernels/linear/mixed_precision, and of fused_moe
oracle/int_wna16 and experts), transformers 5.23 (integrations/compressed_tensors). The vLLM-CPU and
transformers lines were also run; those for CUDA were read.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
DENSE_STREAM_BITS = (3, 5, 6, 7)  # packed as one bitstream since compressed-tensors 0.18
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)  # matrices that vLLM loads as one


@dataclass(frozen=True)
class Engine:
    """What one engine runs of pack-quantized integer weights.

    source: where the facts were read. bits, asymmetric_bits: widths that run as installed.
    extra_bits: widths that run once the package `extra` is installed. groups: group sizes for
    `bits`, None in it for one scale per row; empty: any. multiple: in and out features of linears
    divide by it. expert_bits: widths of experts. expert_channel, expert_asymmetric: whether experts
    may have one scale per row, zero points. min_top_k: experts per token at least.
    one_expert_scheme: all layers' fused experts share one, and none is dense. whole_words: packed
    rows of experts and packed zero points must fill their 32-bit words. note: said with every
    export for it; expert_note: if experts are packed.
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
    note: str = ""
    expert_note: str = ""


ENGINES: dict[str, Engine] = {
    "vllm-cuda": Engine(
        source="vLLM 0.32.0: kernels/linear/mixed_precision/{marlin,humming}.py",
        bits=(4, 8),
        asymmetric_bits=(4,),
        expert_bits=(4, 8),
        extra_bits=(2, 3, 5, 6, 7),
        extra="humming (SM75 or newer)",
        groups=(None, 32, 64, 128),
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
        expert_note="4-bit experts on a CPU need AMX, or AMD with zentorch, and bfloat16",
    ),
    "transformers": Engine(
        source="transformers 5.23.0: integrations/compressed_tensors.py",
        bits=ALL_BITS,
        asymmetric_bits=(),  # its empty model expects zero points unpacked: a shape mismatch
        expert_bits=ALL_BITS,
        expert_asymmetric=False,
        one_expert_scheme=True,
        whole_words=False,
        note="transformers decodes the whole model to 16 bit when it first runs",
    ),
}
