"""Where text comes from: files and data sets, read document by document.

A source is a .txt or .md file (one document; so is any other text file), a .jsonl or .parquet file
(a field per row), a directory of .txt files, or `hub:NAME[:CONFIG][@SPLIT]` through the datasets
library. It may carry a label, `code=path/to/file`; without one the file's stem serves. Where
samples are drawn, a whole number behind the label is its weight, `code:3=path/to/file`. Rows
without the field may hold a conversation instead, see `chat`.

Only .parquet and hub need libraries beyond the standard one, only hub needs a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnest.calibrate.chat import FIELDS, Conversation, find_conversation
from bitnest.errors import DataError, require

FIELD = "text"
_ROWS = {".jsonl", ".ndjson"}
_ROW_HINT = 'each line reads {"text": "..."} or {"messages": [...]}'
_WEIGHT = re.compile(r"([^/\\:.=]*):(-?\d[\d.,]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class DataSource:
    """A labelled text. source: path, or hub:NAME. weight: its share of the samples, in parts."""

    label: str
    source: str
    weight: int = 1


def parse_source(spec: str, *, weighted: bool = False) -> DataSource:
    """The source spelt `[label[:weight]=]source`; a label holds no `/`, `\\`, `.` or `:`.

    weighted: whether a weight means something where the source is used.

    Raises:
        DataError: an empty source or label, a weight that is no whole number or has no meaning.
    """
    found = _WEIGHT.fullmatch(spec)
    if found is None:
        return DataSource(*_label(spec))
    if not weighted:
        raise DataError(
            "a weight, where no samples are shared out", where=spec, hint=f"{found[1]}={found[3]}"
        )
    if not found[2].isdigit() or int(found[2]) == 0:
        raise DataError(
            f"weight {found[2]} is not a whole number from 1", where=spec, hint="code:3=path"
        )
    return DataSource(*_label(f"{found[1]}={found[3]}"), weight=int(found[2]))


def _label(spec: str) -> tuple[str, str]:
    label, equals, source = spec.partition("=")
    if equals and not label.strip():
        raise DataError("an empty label", where=repr(spec), hint=f"code={source}")
    if not equals or re.search(r"[/\\:.]", label):
        label, source = "", spec
    if not source:
        raise DataError("an empty data source", where=repr(spec), hint="label=path/to/file")
    if not label:
        label = source.split("@")[0].rsplit(":", 1)[-1] if source.startswith("hub:") else ""
        label = Path(label or source).stem
    return label, source


def load_texts(source: str, *, field: str = FIELD) -> Iterator[str]:
    """The documents of `source`, one by one.

    Raises:
        DataError: missing, unreadable or empty, a missing field, a line that is not JSON, a
            conversation.
        MissingExtra: parquet or hub without their libraries.
    """
    for document in load_documents(source, field=field):
        if not isinstance(document, str):
            raise DataError(
                f"no text in field '{field}': the rows are conversations",
                where=source,
                hint="only calibration renders them; put the text to read into that field",
            )
        yield document


def load_documents(source: str, *, field: str = FIELD) -> Iterator[str | Conversation]:
    """The documents of `source`, one by one, conversations not yet rendered.

    Raises:
        DataError: as `load_texts`, or a conversation that is none.
        MissingExtra: parquet or hub without their libraries.
    """
    if source.startswith("hub:"):
        yield from _hub(source, field)
        return
    found = False
    for file in _files(source):
        for document in _file(file, field):
            if document and not (isinstance(document, str) and document.isspace()):
                found = True
                yield document
    if not found:
        raise _empty(source)


def check_source(source: str, *, field: str = FIELD) -> str | Conversation | None:
    """Refuse at once what a glance at `source` shows; the first document if it lies in rows.

    Raises:
        DataError: missing, unreadable or empty; columns or a first row without a document.
        MissingExtra: parquet or hub without their libraries.
    """
    if source.startswith("hub:"):
        require("datasets", "eval")
        return None
    files = _files(source)
    if not all(file.is_file() for file in files):  # a pipe can be read only once
        return None
    if files[0].suffix in _ROWS or files[0].suffix == ".parquet":
        return next(_file(files[0], field), None)
    if all(_is_empty(file) for file in files):
        raise _empty(source)
    return None


def _is_empty(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return not stream.read(1)
    except OSError as error:
        raise _unreadable(file, error) from error


def _empty(source: str) -> DataError:
    return DataError("the text is empty", where=source, hint="name a file with text in it")


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


def _file(file: Path, field: str) -> Iterator[str | Conversation]:
    if file.suffix == ".parquet":
        yield from _parquet(file, field)
        return
    try:
        if file.suffix in _ROWS:
            with file.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _json_row(line, field, f"{file}:{number}")
        else:
            yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {error.start})", where=str(file), hint="convert it to UTF-8"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _json_row(line: str, field: str, where: str) -> str | Conversation:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where, hint=_ROW_HINT) from error
    document = _document(row, field, where) if isinstance(row, dict) else None
    if document is None:
        raise DataError(f"no text in field '{field}'", where=where, hint=_ROW_HINT)
    return document


def _document(row: Mapping[str, Any], field: str, where: str) -> str | Conversation | None:
    """The text of a row, or else its conversation; None if it holds neither."""
    text = row.get(field)
    if text is None:
        return find_conversation(row, where)
    return text if isinstance(text, str) else None


def _parquet(file: Path, field: str) -> Iterator[str | Conversation]:
    require("pyarrow", "eval")
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        column = next((name for name in (field, *FIELDS) if name in names), None)
        if column is None:
            raise DataError(
                f"no column '{field}'", where=str(file), hint="columns: " + ", ".join(names)
            )
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                document = "" if value is None else _document({column: value}, field, str(file))
                if document is None:
                    raise DataError(f"column '{column}' holds no text", where=str(file))
                yield document
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"cannot read parquet: {error}", where=str(file), hint="write the file again"
        ) from error


def _hub(source: str, field: str) -> Iterator[str | Conversation]:
    require("datasets", "eval")
    import datasets

    name, _, split = source.removeprefix("hub:").partition("@")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            document = _document(row, field, source)
            if document is None and row.get(field, 0) is not None:
                raise DataError(
                    f"no field '{field}' with text in it",
                    where=source,
                    hint="fields: " + ", ".join(row),
                )
            yield document or ""
    except DataError:
        raise
    except Exception as error:  # whatever the library raises for a hub it cannot reach
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load from the hub: {first}",
            where=source,
            hint="check name and network, or use a local file",
        ) from error
