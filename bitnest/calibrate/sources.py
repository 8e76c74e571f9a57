"""Where text comes from: files and data sets, read document by document.

A source is a .txt or .md file (one document; so is any other text file), a .jsonl or .parquet file
(a field per row), a directory of .txt files, or `hub:NAME[:CONFIG][@SPLIT]` through the datasets
library. It may carry a label, `code=path/to/file`; without one the file's stem serves.

Only .parquet and hub need libraries beyond the standard one, only hub needs a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitnest.errors import DataError, require

FIELD = "text"


@dataclass(frozen=True)
class DataSource:
    """A labelled text. source: path, or hub:NAME."""

    label: str
    source: str


def parse_source(spec: str) -> DataSource:
    """The source spelt `[label=]source`; a label holds no `/`, `\\` or `:`.

    Raises:
        DataError: empty.
    """
    label, equals, source = spec.partition("=")
    if not equals or re.search(r"[/\\:.]", label) or not label:
        label, source = "", spec
    if not source:
        raise DataError("an empty data source", where=repr(spec), hint="label=path/to/file")
    if not label:
        label = source.split("@")[0].rsplit(":", 1)[-1] if source.startswith("hub:") else ""
        label = Path(label or source).stem
    return DataSource(label, source)


def load_texts(source: str, *, field: str = FIELD) -> Iterator[str]:
    """The documents of `source`, one by one.

    Raises:
        DataError: missing, unreadable or empty, a missing field, a line that is not JSON.
        MissingExtra: parquet or hub without their libraries.
    """
    if source.startswith("hub:"):
        yield from _hub(source, field)
        return
    found = False
    for file in _files(source):
        for text in _file(file, field):
            if text.strip():
                found = True
                yield text
    if not found:
        raise DataError("the text is empty", where=source, hint="name a file with text in it")


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = sorted(path.glob("*.txt"))
            if not files:
                raise DataError(
                    "the directory holds no .txt files", where=source, hint="name a file in it"
                )
            return files
        if path.exists():
            return [path]
    except OSError as error:
        raise _unreadable(path, error) from error
    raise DataError(
        "no such text",
        where=source,
        hint="a .txt, .jsonl or .parquet file, a directory of .txt files, or hub:NAME",
    )


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read: {error.strerror or error}", where=str(file), hint="check its permissions"
    )


def _file(file: Path, field: str) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from _parquet(file, field)
        return
    try:
        if file.suffix in {".jsonl", ".ndjson"}:
            with file.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _json_field(line, field, f"{file}:{number}")
        else:
            yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {error.start})", where=str(file), hint="convert it to UTF-8"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _json_field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"not JSON: {error}", where=where, hint='each line reads {"text": "..."}'
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise DataError(
            f"no text in field '{field}'", where=where, hint='each line reads {"text": "..."}'
        )
    return str(row[field])


def _parquet(file: Path, field: str) -> Iterator[str]:
    require("pyarrow", "eval")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise DataError(
                f"no column '{field}'",
                where=str(file),
                hint="columns: " + ", ".join(table.schema_arrow.names),
            )
        for batch in table.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise DataError(f"column '{field}' holds no text", where=str(file))
                yield text or ""
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"cannot read parquet: {error}", where=str(file), hint="write the file again"
        ) from error


def _hub(source: str, field: str) -> Iterator[str]:
    require("datasets", "eval")
    import datasets

    name, _, split = source.removeprefix("hub:").partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if field not in row:
                raise DataError(
                    f"no field '{field}'", where=source, hint="fields: " + ", ".join(row)
                )
            yield str(row[field])
    except DataError:
        raise
    except Exception as error:  # whatever the library raises for a hub it cannot reach
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load from the hub: {first}",
            where=source,
            hint="check name and network, or use a local file",
        ) from error
