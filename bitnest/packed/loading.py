"""Opening a model for running: a bitnest artifact or a plain checkpoint, the same call.

`load_model` is `AutoModelForCausalLM.from_pretrained` with the checks a person needs first: the
directory exists, the artifact is whole. Remote code is never run unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnest.checkpoint import resolve_model
from bitnest.errors import BitnestError, CheckpointError, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    bits: int | Mapping[str, int] | None = None,
    lora: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `model` (artifact, checkpoint directory, hub id or `demo`), in eval mode.

    dtype: compute type of what is not packed, and of what packed weights decode to. bits: width at
    which nested weights are read, for all or by site; only their planes are. None: whole. lora:
    adapters, PATH or PATH:scale, kept beside packed weights, merged into others (see `adapters`).

    Raises:
        CheckpointError, ArtifactError: the directory cannot be loaded.
        RecipeError, FormatError: bits, and nothing there can be read at them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from bitnest.artifact import is_artifact
    from bitnest.packed.adapters import Adapters
    from bitnest.packed.widths import at_widths

    path = resolve_model(model)
    adapters = Adapters.of(path, lora, trust_remote_code=trust_remote_code)
    if bits is not None and not is_artifact(path):
        raise RecipeError(
            "a plain checkpoint has one width", where=str(path), hint="leave out --bits"
        )
    try:
        with at_widths(bits):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except BitnestError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot load the model: {first}",
            where=str(path),
            hint="check config.json and the .safetensors files; bitnest inspect says more",
        ) from error
    if adapters is not None:
        adapters.put_on(loaded)
    if device is not None:
        loaded = loaded.to(device)
    return loaded.eval()


def load_tokenizer(
    model: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer stored beside `model`.

    Raises:
        CheckpointError: the directory holds no usable tokenizer.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model)
    if not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise CheckpointError(
            "the model has no tokenizer",
            where=str(path),
            hint="copy tokenizer.json and tokenizer_config.json of the base model into it",
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain Exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot read the tokenizer: {first}",
            where=str(path),
            hint="copy tokenizer.json and tokenizer_config.json of the base model again"
            if trust_remote_code
            else "copy the tokenizer files again; if it needs the model's own Python code, read "
            "that and allow it with --trust-remote-code",
        ) from error
