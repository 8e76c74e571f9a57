"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and later.

Each file has one op: a reference in plain torch, the Triton kernel behind a function of the same
signature, and VARIANTS, the specialisations that `compile` builds without a GPU. Nothing here is
imported unless asked for: triton is no dependency of bitnest.

Common rules: no atomics, so a call gives the same bits every time; no reading back to the host and
no decision on data there, so a call can be captured in a CUDA graph; no tuning while serving.
"""
