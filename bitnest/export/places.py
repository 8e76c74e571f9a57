"""Where an artifact is pulled from: a directory, also a mounted one, or a repository on the hub.

A place answers two questions: what its manifest is, and what bytes a file has from some byte on.
The hub is asked through huggingface_hub, for its tokens, settings and errors: for the manifest
first, and for every file after it at the commit that the manifest came from. Bytes come by plain
range requests, because huggingface_hub's cache would hold every file a second time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from bitnest.errors import ArtifactError
from bitnest.manifest import MANIFEST, no_manifest
from bitnest.safetensors_io import CHUNK

MANIFEST_LIMIT = 1 << 28  # bytes; a manifest has some 60 a site
TRIES = 5  # failures in a row without a byte between them, after which the hub is given up
PAUSE = 1.0  # seconds before the first new try, doubled for each that follows


class Place(Protocol):
    """Where files of an artifact come from. text: its name in messages."""

    text: str

    def manifest(self) -> bytes:
        """bitnest.json as it lies there.

        Raises:
            ArtifactError: there is none, or the place cannot be reached.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file, -1 if there is none; None: it takes asking for it to know."""

    def read(self, name: str, start: int) -> Generator[bytes]:
        """The bytes of a file from `start` on, in pieces.

        Raises:
            ArtifactError: there is no such file, or the place cannot be reached.
        """


def find_place(source: str | Path) -> Place:
    """The place that `source` names: a directory, or a hub id `org/name[@revision]`.

    Raises:
        ArtifactError: neither.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        return Directory(path)
    if path.exists():
        raise ArtifactError(
            f"'{text}' is a file, not an artifact", hint=f"name the directory that holds {MANIFEST}"
        )
    repo, at, revision = text.partition("@")
    if repo.count("/") != 1 or text.startswith((".", "/", "~")) or (at and not revision):
        raise ArtifactError(
            f"no such directory: '{text}'",
            hint="name an artifact's directory, or a hub id: org/name or org/name@revision",
        )
    return Hub(repo, revision or None)


class Directory:
    """An artifact in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = str(path)

    def manifest(self) -> bytes:
        if not (self.path / MANIFEST).is_file():
            raise no_manifest(self.text)
        with closing(self.read(MANIFEST, 0)) as chunks:
            return b"".join(chunks)

    def size(self, name: str) -> int | None:
        file = self.path / name
        return file.stat().st_size if file.is_file() else -1

    def read(self, name: str, start: int) -> Generator[bytes]:
        try:
            with (self.path / name).open("rb") as stream:
                stream.seek(start)
                while chunk := stream.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise ArtifactError(
                f"cannot read '{name}': {error.strerror}",
                where=self.text,
                hint="if it is mounted, see that it still is; the same command continues",
            ) from error


class Hub:
    """An artifact in a model repository on the hub.

    repo: org/name. revision: branch, tag or commit; None: the main branch.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import constants

        self.repo, self.revision = repo, revision
        self.text = repo if revision is None else f"{repo}@{revision}"
        # huggingface_hub reads the variable only once, when it is imported
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.commit: str | None = None  # known with the manifest
        _check_endpoint(self.endpoint)

    def manifest(self) -> bytes:
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import HFValidationError

        try:
            found = get_hf_file_metadata(self._url(MANIFEST, self.revision), headers=_identity())
        except (_transport_error(), HFValidationError, OSError) as error:
            raise self._failure(error, MANIFEST) from error
        if not found.commit_hash:
            raise ArtifactError(
                "the hub does not say which commit it serves",
                where=f"{self.text} at {self.endpoint}",
                hint="HF_ENDPOINT must be a hub or a full mirror of it",
            )
        self.commit = found.commit_hash
        data = bytearray()
        with closing(self.read(MANIFEST, 0)) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > MANIFEST_LIMIT:
                    raise ArtifactError(
                        f"{MANIFEST} has more than {MANIFEST_LIMIT:,} bytes", where=self.text
                    )
        return bytes(data)

    def size(self, name: str) -> int | None:
        return None

    def read(self, name: str, start: int) -> Generator[bytes]:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        failures = 0
        while True:
            try:
                with closing(self._stream(name, start)) as chunks:
                    for chunk in chunks:
                        start, failures = start + len(chunk), 0
                        yield chunk
                return
            except (_transport_error(), HFValidationError, OSError) as error:
                failures += 1
                answered = isinstance(error, (HfHubHTTPError, HFValidationError, OSError))
                if answered or failures >= TRIES:
                    raise self._failure(error, name) from error
                time.sleep(PAUSE * 2 ** (failures - 1))

    def _stream(self, name: str, start: int) -> Generator[bytes]:
        """One request: the bytes from `start` on. A hub that knows no ranges sends all."""
        from huggingface_hub import constants
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff

        headers = _identity() | ({"Range": f"bytes={start}-"} if start else {})
        with http_stream_backoff(
            "GET", self._url(name, self.commit), headers=headers, retry_on_exceptions=(),
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:  # fmt: skip
            hf_raise_for_status(response)
            beyond = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes():  # of no set size: that would be lost on a break
                kept = chunk[beyond:]
                beyond -= len(chunk) - len(kept)
                if kept:
                    yield kept

    def _url(self, name: str, revision: str | None) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, revision=revision, endpoint=self.endpoint)

    def _failure(self, error: Exception, name: str) -> ArtifactError:
        """What a person can do about it."""
        from huggingface_hub import errors

        def told(what: str, hint: str) -> ArtifactError:
            return ArtifactError(what, where=f"{self.text} at {self.endpoint}", hint=hint)

        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        login = "log in with `hf auth login` or set HF_TOKEN"
        match error:
            case errors.OfflineModeIsEnabled():
                return told(
                    "the hub is switched off (HF_HUB_OFFLINE)", "unset it, or name a directory"
                )
            case errors.GatedRepoError():
                return told(
                    "access to this repository must be granted",
                    f"ask for it on the model's page, then {login}",
                )
            case errors.RepositoryNotFoundError():
                return told(
                    "no such model on the hub, or a private one",
                    f"check the name (no directory has it either); for a private one {login}",
                )
            case errors.RevisionNotFoundError():
                return told(
                    f"no revision '{self.revision}' of this model", "name a branch, tag or commit"
                )
            case errors.EntryNotFoundError() if name == MANIFEST:
                return no_manifest(f"{self.text} at {self.endpoint}")
            case errors.EntryNotFoundError():
                return told(
                    f"'{name}' is missing there, its manifest lists it",
                    "the repository is incomplete: pull from another copy, or at fewer bits",
                )
            case errors.HFValidationError():
                return told(f"no hub id: {first}", "org/name or org/name@revision")
            case errors.HfHubHTTPError():
                status = getattr(error.response, "status_code", "?")
                return told(
                    f"the hub answered {status} for '{name}': {first}",
                    "the same command tries again, and continues",
                )
        return told(
            f"cannot reach the hub for '{name}': {first}",
            "check the network, and HF_ENDPOINT if it is set; the same command continues",
        )


def _transport_error() -> type[Exception]:
    """The base of all errors of the http library that huggingface_hub is built on, which is httpx
    or httpx2 by its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])


def _identity() -> dict[str, str]:
    """Headers of a request: the user's token, and no compression, which would shift ranges."""
    from huggingface_hub.utils import build_hf_headers

    from bitnest import __version__

    headers: dict[str, Any] = build_hf_headers(library_name="bitnest", library_version=__version__)
    return {**headers, "Accept-Encoding": "identity"}


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ArtifactError(
            f"HF_ENDPOINT is no address: '{endpoint}'", hint="such as https://huggingface.co"
        )
