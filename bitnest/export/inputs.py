"""What compressed-tensors says of rounded inputs: `input_activations` of a group of the config.

    ours              strategy       dynamic   tensor               weights beside it
    int8-token        token          true                           int8-channel, int2..8 packed
    int4-token        token          true                           int2..4 packed
    int8-static       tensor         false     input_scale          int8-channel
    fp8_e4m3-token    token          true                           fp8, mxfp4, int4-g128
    fp8_e4m3-static   tensor         false     input_scale          fp8_e4m3-channel, -tensor
    fp8_e4m3-g128     group 128      true                           fp8_e4m3-b128x128, mxfp4
    mxfp8, mxfp4      group 32       true                           mxfp8, mxfp4
    nvfp4             tensor_group   local     input_global_scale   nvfp4

All are symmetric; which weights go with which is in `layouts`. The library's own int8 inputs reach
-128, which ours never do. Engines choose the exponents of MX scales by rules of their own: the
files cannot say ours, so -ocp and -ceil export alike.

Left out: what engines have no kernels for, such as 6-bit integers, E5M2, clipped scales, channels
in another format; and groups of integers, which vLLM 0.32 has for one optional package only.
"""

from __future__ import annotations

from typing import Any

from bitnest.formats.inputs import parse_inputs

E4M3 = "fp8_e4m3"
STATIC_SCALE, GLOBAL_SCALE = "input_scale", "input_global_scale"

_SCHEMES: dict[str, tuple[int, str, str, int | None, bool | str, str]] = {
    "int8-token": (8, "int", "token", None, True, ""),
    "int4-token": (4, "int", "token", None, True, ""),
    "int8-static": (8, "int", "tensor", None, False, ""),
    f"{E4M3}-token": (8, "float", "token", None, True, ""),
    f"{E4M3}-static": (8, "float", "tensor", None, False, ""),
    f"{E4M3}-g128": (8, "float", "group", 128, True, ""),
    "mxfp8": (8, "float", "group", 32, True, "torch.uint8"),
    "mxfp4": (4, "float", "group", 32, True, "torch.uint8"),
    "nvfp4": (4, "float", "tensor_group", 16, "local", "torch.float8_e4m3fn"),
}  # bits, type, strategy, channels of a scale, dynamic, type of scales


def library_name(inputs: str) -> str | None:
    """The key above of our format `inputs`, None if the library has none like it."""
    fmt = parse_inputs(inputs)
    name = fmt.alias if fmt.alias and fmt.wide is None else fmt.name
    return name if name in _SCHEMES else None


def input_arguments(name: str) -> dict[str, Any]:
    """The library's QuantizationArgs of a key above, as it would write them."""
    bits, kind, strategy, group, dynamic, scale = _SCHEMES[name]
    arguments: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
    }
    return {**arguments, "scale_dtype": scale} if scale else arguments


def input_group(name: str) -> int | None:
    """Channels that share a scale, None for all of a token's."""
    return _SCHEMES[name][3]


def scale_tensor(name: str) -> str:
    """The tensor of the static scale, empty where there is none."""
    if name == "nvfp4":
        return GLOBAL_SCALE
    return "" if _SCHEMES[name][4] else STATIC_SCALE
