"""A directory that a long run fills block by block, and that has its final name only when whole.

    .<name>.partial/lock                 held by the process that writes
    .<name>.partial/state/inputs.json    the fingerprint: everything the result depends on
    .<name>.partial/state/block-*.json   one record per finished block, with its files' checksums
    .<name>.partial/artifact/            what becomes <name> by one rename at the end

Files appear under their names only when whole, and a block counts as done once its record does, so
a kill at any moment loses at most one block. A run with another fingerprint is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitnest.errors import ArtifactError, BitnestError
from bitnest.safetensors_io import Entry, write_file

INPUTS = "inputs.json"  # in `state`: the fingerprint


class Workdir:
    """A directory in the making.

    out: the final directory. fingerprint: everything the result depends on. blocks: number of
    decoder blocks.
    """

    noun = "artifact"  # what is being written, for messages

    def __init__(self, out: Path, fingerprint: dict[str, Any], blocks: int) -> None:
        self.out = out
        self.fingerprint = fingerprint
        self.blocks = blocks
        self.partial = partial_directory(out)
        self.work = self.partial / "artifact"
        self.state = self.partial / "state"
        self._lock: Any = None
        self._created: list[Path] = []  # directories this run made, the innermost first

    def begin(self, *, fresh: bool) -> int:
        """Create or reopen the partial directory; returns the number of finished blocks.

        Raises:
            ArtifactError: something else is in the way, or the partial run had other inputs.
        """
        self._take_lock()
        if fresh:
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.rmtree(self.state, ignore_errors=True)
        self.work.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)
        inputs = self.state / INPUTS
        if inputs.exists():
            self._check_same(self._previous(inputs))
        else:
            write_text(inputs, json.dumps(self.fingerprint, indent=1, sort_keys=True))
        done = 0
        while done < self.blocks and self._intact(done):
            done += 1
        return done

    def _previous(self, inputs: Path) -> dict[str, Any]:
        try:
            previous = json.loads(inputs.read_text(encoding="utf-8"))
        except ValueError:
            previous = None
        if not isinstance(previous, dict):
            raise ArtifactError(
                "the record of an unfinished run is damaged",
                where=str(inputs),
                hint="add --fresh to start over",
            )
        return previous

    def done(self, block: int) -> bool:
        """Whether a block is finished, whatever those before it are."""
        return self._intact(block)

    def _intact(self, block: int) -> bool:
        """Whether a block was finished and its files are still what was written."""
        if not self._record_file(block).exists():
            return False
        try:
            files = json.loads(self._record_file(block).read_text(encoding="utf-8"))["files"]
            return all(
                sha256_file(self.work / name) == entry["sha256"] for name, entry in files.items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False  # damaged since: this block and those after it are done again

    def _take_lock(self) -> None:
        self._created = [p for p in (self.partial, *self.partial.parents) if not p.exists()]
        self.partial.mkdir(parents=True, exist_ok=True)
        lock = (self.partial / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ArtifactError(
                f"another process is writing this {self.noun}",
                where=str(self.out),
                hint="wait for it, or choose another -o",
            ) from error
        self._lock = lock

    def close(self) -> None:
        """Let go of the lock; remove what this run put down if none of it is worth resuming."""
        if self._lock is None:
            return
        worth = [path for path in self.state.glob("*") if path.name != INPUTS]
        if self.partial in self._created and not worth:
            shutil.rmtree(self.partial, ignore_errors=True)
            for directory in self._created:
                with suppress(OSError):  # gone already, or no longer empty
                    directory.rmdir()
        self._lock.close()
        self._lock = None

    def _check_same(self, previous: dict[str, Any]) -> None:
        changed = [
            key
            for key in sorted({*previous, *self.fingerprint})
            if previous.get(key) != self.fingerprint.get(key)
        ]
        if changed:
            raise ArtifactError(
                "an unfinished run with other inputs is in the way; different: "
                + ", ".join(changed),
                where=str(self.partial),
                hint="repeat the earlier command to resume it, or add --fresh to start over",
            )

    def save_block(
        self, block: int, content: Mapping[str, Any], files: Mapping[str, Sequence[Entry]]
    ) -> None:
        """Store one finished block: its files, then the record that makes it count."""
        written: dict[str, Any] = {}
        for name, entries in files.items():
            size, digest = write_file(self.work / name, entries)
            written[name] = {"bytes": size, "sha256": digest}
        write_text(self._record_file(block), json.dumps({**content, "files": written}))

    def saved_block(self, block: int) -> dict[str, Any]:
        """What `save_block` stored, with the checksums of its files."""
        content = json.loads(self._record_file(block).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content

    def publish(self) -> None:
        """Give the finished directory its name."""
        for file in self.work.glob("*.tmp"):
            file.unlink()
        if self.out.exists():
            self.out.rmdir()  # empty, checked before work began
        os.rename(self.work, self.out)
        shutil.rmtree(self.partial)

    def _record_file(self, block: int) -> Path:
        return self.state / f"block-{block:05d}.json"


def partial_directory(out: Path) -> Path:
    """Where an unfinished artifact lies."""
    return out.parent / f".{out.name}.partial"


def in_the_way(out: Path) -> ArtifactError:
    """The error for an output that exists and is not this run's result."""
    return ArtifactError(
        "the output is in the way: it exists and is not this run's result",
        where=str(out),
        hint="choose another -o, or remove it first",
    )


def is_empty(out: Path) -> bool:
    """Whether nothing is at `out`, or a directory with nothing in it."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def sha256_file(file: Path) -> str:
    """Hex digest of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def storage_error(error: OSError, place: Path) -> BitnestError:
    """A full disk or a missing permission, said as one."""
    return ArtifactError(
        f"cannot write: {error.strerror or error}",
        where=str(place),
        hint="free space or choose another -o; the same command resumes at the last finished block",
    )
