"""A checkpoint: a read-only model on disk, opened tensor by tensor and never all in memory.

`resolve_model` turns what the user typed (a directory, `demo`, or a hub id) into a directory.
`Checkpoint` indexes its safetensors files, checks that every one is whole before any work starts,
and reads single tensors by name through memory maps.

Left out on purpose: pickle files (`pytorch_model.bin`), which execute code when they are read, and
checkpoints that are already quantised.
"""

from __future__ import annotations

from pathlib import Path

from bitnest.errors import CheckpointError


def resolve_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Directory of `model`: a local directory, the word `demo`, or a Hugging Face hub id.

    A hub id is looked up in the local cache first; the network is used only for what is not there.

    Raises:
        CheckpointError: no such directory, or the hub id cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    text = str(model)
    if text == "demo":
        from bitnest import demo

        return demo.model_path()
    if path.exists():
        raise CheckpointError(
            f"'{text}' is a file, not a model directory",
            hint="name the directory that holds config.json and the .safetensors files",
        )
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no such model directory: '{text}'",
            hint="name a local directory, a hub id such as Qwen/Qwen3-30B-A3B, or 'demo'",
        )
    return _download(text, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # not in the cache: ask the hub
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot fetch '{repo_id}' from the hub: {_first_line(error)}",
            hint="check the name and the network, or name a local directory",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
