"""Text for calibration and evaluation: reading it, and cutting it into windows of tokens.

Sources: a .txt or .md file (one document), a .jsonl or .parquet file (a field per row), a directory
of .txt files, or `hub:NAME[:CONFIG][@SPLIT]` through the datasets library. A source may carry a
label, `code=path/to/file`; without one the file's stem serves.

Documents are joined by the tokenizer's end-of-sequence token and cut into windows that do not
overlap. `spread` takes windows evenly from the first to the last; `random` draws them by seed and
keeps text order. Text is tokenised in pieces that end at line breaks, so a large file never lies in
memory as one string of tokens, and reading stops once `limit` tokens are there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnest.errors import DataError, require

PIECE = 1 << 20  # characters tokenised at once
FIELD = "text"
MAX_TOKENS = 50_000_000  # read at most this many tokens of one source


@dataclass(frozen=True)
class DataSource:
    """A labelled text. source: path, or hub:NAME."""

    label: str
    source: str


@dataclass(frozen=True)
class CalibrationSet:
    """What a model is calibrated on.

    tokens: (samples, length) int64. labels: one per sample. counts: samples per label.
    sha256: of the tokens.
    """

    tokens: torch.Tensor
    labels: tuple[str, ...]
    counts: dict[str, int]
    sha256: str


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
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError("no such text", where=source, hint="a .txt, .jsonl or .parquet file, a "
                        "directory of .txt files, or hub:NAME")  # fmt: skip
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError("the directory holds no .txt files", where=source)
    else:
        files = [path]
    found = False
    for file in files:
        for text in _file(file, field):
            if text.strip():
                found = True
                yield text
    if not found:
        raise DataError("the text is empty", where=source, hint="name a file with text in it")


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
        raise DataError(
            f"cannot read: {error.strerror}", where=str(file), hint="check its permissions"
        ) from error


def _json_field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where) from error
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
            yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read parquet: {error}", where=str(file)) from error


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
    except Exception as error:  # noqa: BLE001  whatever the library raises for a hub it cannot reach
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load from the hub: {first}",
            where=source,
            hint="check name and network, or use a local file",
        ) from error


def token_windows(
    tokenizer: Any,
    texts: Iterable[str],
    *,
    window: int,
    count: int | None,
    selection: str = "spread",
    seed: int = 0,
    where: str = "",
) -> torch.Tensor:
    """Windows of tokens, (count, window) int64; all windows there are if count is None.

    selection: `spread` or `random`, see above.

    Raises:
        DataError: the text has too few tokens.
    """
    tokens = torch.tensor(_tokenise(tokenizer, texts), dtype=torch.int64)
    available = len(tokens) // window
    wanted = 1 if count is None else count
    if available < wanted:
        raise DataError(
            f"the text is too short: {wanted} windows of {window} tokens need "
            f"{wanted * window:,} tokens, it has {len(tokens):,}",
            where=where,
            hint="more text, or fewer or shorter windows",
        )
    if count is None:
        return tokens[: available * window].view(available, window)
    if selection == "spread":
        starts = torch.linspace(0, len(tokens) - window, count, dtype=torch.float64).long()
        return torch.stack([tokens[s : s + window] for s in starts.tolist()])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:count].sort().values
    return tokens[: available * window].view(available, window)[chosen]


def _tokenise(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    separator = tokenizer.eos_token_id
    tokens: list[int] = []
    for text in texts:
        if tokens and separator is not None:
            tokens.append(int(separator))
        for piece in _pieces(text):
            tokens.extend(tokenizer(piece, add_special_tokens=False)["input_ids"])
        if len(tokens) > MAX_TOKENS:
            break
    return tokens


def _pieces(text: str) -> Iterator[str]:
    """Cut at the last line break before every PIECE characters, so words stay whole."""
    start = 0
    while start < len(text):
        stop = min(start + PIECE, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def calibration_windows(
    tokenizer: Any,
    sources: Sequence[DataSource],
    *,
    samples: int,
    length: int,
    seed: int,
    load: Callable[[str], Iterable[str]] = load_texts,
) -> CalibrationSet:
    """Seeded random windows, split evenly over the sources (the first ones get the remainder).

    Raises:
        DataError: a source is missing, unreadable or too short.
    """
    parts: list[torch.Tensor] = []
    labels: list[str] = []
    for i, item in enumerate(sources):
        share = samples // len(sources) + (i < samples % len(sources))
        if share == 0:
            raise DataError(
                f"{samples} samples cannot be split over {len(sources)} sources",
                hint=f"--samples {len(sources)} or more",
            )
        parts.append(
            token_windows(
                tokenizer,
                load(item.source),
                window=length,
                count=share,
                selection="random",
                seed=seed + i,
                where=item.source,
            )
        )
        labels.extend([item.label] * share)
    tokens = torch.cat(parts)
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return CalibrationSet(tokens, tuple(labels), counts, digest)
