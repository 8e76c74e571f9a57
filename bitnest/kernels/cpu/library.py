"""The C library of this folder: its structs, its signatures, its threads.

Threads are as many as torch uses, and no more than the cores this process may run on.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from bitnest.kernels.native import load

MAX_PLANES = 8
INTEGER, TABLE, DENSE = range(3)  # engines
SCALE_NONE, SCALE_F32, SCALE_F16, SCALE_BF16, SCALE_E8M0, SCALE_E4M3, SCALE_U8, SCALE_I8 = range(8)
SUPER_NONE, SUPER_ROW, SUPER_GROUP = range(3)
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of inputs and outputs


class Weight(ctypes.Structure):
    """weight_t of cpu.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("engine", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("plane_bits", ctypes.c_int32 * MAX_PLANES),
        ("plane_stride", ctypes.c_int64 * MAX_PLANES),
        ("plane", ctypes.c_void_p * MAX_PLANES),
        ("group", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("super_kind", ctypes.c_int32),
        ("scales", ctypes.c_void_p),
        ("super", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("zero", ctypes.c_int32),
        ("zeros", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
    )


class Inputs(ctypes.Structure):
    """inputs_t of cpu.h."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("planes", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("halves", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
    )


class Packed(ctypes.Structure):
    """packed_t of lay_out.c."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("plane_bits", ctypes.c_int32 * MAX_PLANES),
        ("plane_stride", ctypes.c_int64 * MAX_PLANES),
        ("plane", ctypes.c_void_p * MAX_PLANES),
        ("stream", ctypes.c_void_p),
        ("back", ctypes.c_int32),
        ("words", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, None (said once in the log) where they cannot be built."""
    found = load("cpu")
    if found is not None:
        declare(found)
        found.set_threads(threads())
    return found


def threads() -> int:
    """Threads that products use."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(here, torch.get_num_threads()))


def declare(found: ctypes.CDLL) -> None:
    """Give the functions of a build their types.

    Raises:
        RuntimeError: a struct of it has another size than ours.
    """
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    sizes = {"weight_size": Weight, "inputs_size": Inputs, "packed_size": Packed}
    for name, struct in sizes.items():
        function = getattr(found, name)
        function.restype = i64
        if function() != ctypes.sizeof(struct):
            raise RuntimeError(f"{name}: {function()} bytes in C, {ctypes.sizeof(struct)} here")
    weight, inputs = ctypes.POINTER(Weight), ctypes.POINTER(Inputs)
    signatures: dict[str, tuple[object, ...]] = {
        "set_threads": (ctypes.c_int,),
        "product": (weight, inputs, pointer, i64, i64, i64),
        "code_inputs": (pointer, i64, i64, inputs, i64, i64),
        "linear": (weight, pointer, i64, i64, pointer, i64, i32, i32, i32),
        "linear_coded": (weight, inputs, pointer, i64),
        "lay_out": (ctypes.POINTER(Packed),),
    }
    for name, arguments in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.isa.restype = ctypes.c_char_p
    found.stream_read.argtypes, found.stream_read.restype = (pointer, i64), ctypes.c_uint64
