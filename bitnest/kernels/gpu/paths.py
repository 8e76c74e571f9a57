"""What the Triton kernels run in packed models, for `kernels/paths`.

    weights      `layout.why`, which `laid.lay_out` obeys
    Rounded      the same, and what `rounded.takes`; else the reference, on codes where it can
    sparse, KV   the kernels of `sparse.py` and `attention.py` are not called by packed models yet

`missing` is asked before anything imports triton: by `laid` too.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

from bitnest.formats import AnyFormat, BlockFormat, SparseFormat
from bitnest.formats.elements import IntElement, TernaryElement
from bitnest.formats.inputs import InputFormat
from bitnest.formats.kv import KVFormat
from bitnest.kernels.paths import Asked, Provider, Rounded, register, whole_integers

NAME = "triton"
TRITON = (3, 6)  # the first release that compiles all kernels: what they were written and tested on
CAPABILITY = (8, 0)


def missing() -> str:
    """Why no Triton kernel runs on this machine; empty: they do."""
    import torch

    if find_spec("triton") is None:
        return "no triton"
    if why := old_triton(triton_version()):
        return why
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    own = torch.cuda.get_device_capability()
    if own < CAPABILITY:
        return f"compute capability {own[0]}.{own[1]}: kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
    return ""


@cache
def triton_version() -> str:
    """Of the package; empty where no metadata say."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def old_triton(version: str) -> str:
    """Why this release of triton does not do; empty: it does, or says no version."""
    words = version.split(".")[:2]
    if len(words) < 2 or not all(word.isdigit() for word in words):
        return ""
    least = ".".join(map(str, TRITON))
    return f"triton {version}: kernels need {least}" if tuple(map(int, words)) < TRITON else ""


def why_not(asked: Asked, shape: tuple[int, int]) -> str:
    """Empty where the kernels run it here."""
    return missing() or why_format(asked, shape)


def why_format(asked: Asked, shape: tuple[int, int]) -> str:
    """Empty where the kernels run it in packed models on a GPU that fits."""
    if isinstance(asked, KVFormat):
        return "packed models do not call gpu/attention: the cache is decoded"
    if isinstance(asked, Rounded):
        return _weight(asked.weights, shape) or _rounded(asked.weights, asked.inputs, shape)
    return _weight(asked, shape)


def _weight(fmt: AnyFormat, shape: tuple[int, int]) -> str:
    from bitnest.kernels.gpu.layout import why

    if isinstance(fmt, SparseFormat):
        from bitnest.kernels.gpu.sparse import why as of_sparse

        return of_sparse(fmt) or "packed models do not call gpu/sparse: the weight is decoded"
    return why(fmt, shape)


def _rounded(fmt: AnyFormat, inputs: InputFormat, shape: tuple[int, int]) -> str:
    if why := whole_integers(inputs, shape[1]):
        return why
    element = fmt.element if isinstance(fmt, BlockFormat) else None
    if not isinstance(element, IntElement | TernaryElement):
        return f"{fmt.name} has no integers"
    halves = element.symmetric and element.zero == 0.5
    return f"{fmt.name} stands for +-1/2" if halves else ""


register(Provider(NAME, "cuda", why_not))
