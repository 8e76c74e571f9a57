"""bitnest: compress large language models, prove what was lost, and serve them.

The verbs of the command line are functions here, imported when first used. Importing bitnest makes
transformers open its artifacts: `AutoModelForCausalLM.from_pretrained(ARTIFACT)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitnest.packed import registration as _registration

if TYPE_CHECKING:
    from bitnest.api import compare_formats as compare_formats
    from bitnest.api import compress as compress
    from bitnest.api import evaluate as evaluate
    from bitnest.api import export as export
    from bitnest.api import fit_widths as fit_widths
    from bitnest.api import inspect as inspect
    from bitnest.api import load as load
    from bitnest.api import load_tokenizer as load_tokenizer
    from bitnest.errors import BitnestError as BitnestError

__version__ = "0.1.0"
__all__ = [
    "BitnestError", "compare_formats", "compress", "evaluate", "export", "fit_widths", "inspect",
    "load", "load_tokenizer",
]  # fmt: skip

_registration.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitnest' has no attribute '{name}'")
    home = "bitnest.errors" if name == "BitnestError" else "bitnest.api"
    return getattr(import_module(home), name)
