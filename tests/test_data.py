"""Reading text and cutting it into windows: what may be lost, repeated or misread on the way.

The tokenizer is a byte-level BPE trained here on a few lines, with and without an end token.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bitnest.calibrate import data, sources
from bitnest.calibrate.data import (
    DataSource,
    calibration_windows,
    load_texts,
    parse_source,
    token_windows,
)
from bitnest.errors import DataError, MissingExtra

LINES = ["the quick brown fox jumps over a dog\n", "  indented, naïve café 日本語\n", "\n"] * 8


def build_tokenizer(eos: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    core.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)


TOKENIZER = build_tokenizer("<eos>")
EOS = TOKENIZER.eos_token_id


class Numbers:
    """A tokenizer of whitespace-separated numbers, so that windows can be told by their content."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(n: int) -> list[str]:
    return ["\n".join(map(str, range(n)))]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "label", "source"),
    [
        ("books.txt", "books", "books.txt"),
        ("/a/b/books.v2.txt", "books.v2", "/a/b/books.v2.txt"),
        ("code=/a/b.txt", "code", "/a/b.txt"),
        ("code=/a/run=3/b.txt", "code", "/a/run=3/b.txt"),
        ("/a/run=3/b.txt", "b", "/a/run=3/b.txt"),
        ("C:\\texts\\a=b.txt", "C:\\texts\\a=b", "C:\\texts\\a=b.txt"),
        ("hub:org/name", "name", "hub:org/name"),
        ("wiki=hub:org/name:config@test", "wiki", "hub:org/name:config@test"),
        ("hub:org/name:config@test", "config", "hub:org/name:config@test"),
        ("corpus/", "corpus", "corpus/"),
    ],
)
def test_label_is_split_off_but_never_out_of_a_path(spec: str, label: str, source: str) -> None:
    assert parse_source(spec) == DataSource(label, source)


@pytest.mark.parametrize("spec", ["", "code="])
def test_empty_source_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="empty"):
        parse_source(spec)


def test_text_file_is_one_document_and_directory_one_per_file_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "two\n\nlines")
    write(tmp_path / "a.txt", "ä")
    write(tmp_path / "ignored.bin", b"\xff")
    assert list(load_texts(str(tmp_path / "b.txt"))) == ["two\n\nlines"]
    assert list(load_texts(str(tmp_path))) == ["ä", "two\n\nlines"]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    texts = ["first", "zweiter\nTeil", "日本"]
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts) + "\n\n"
    assert list(load_texts(write(tmp_path / "a.jsonl", lines))) == texts
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [*texts, None], "body": ["x", "y", "z", "w"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(load_texts(str(tmp_path / "a.parquet"))) == texts
    assert list(load_texts(str(tmp_path / "a.parquet"), field="body")) == ["x", "y", "z", "w"]


def test_local_text_needs_neither_datasets_nor_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] not in {"datasets", "pyarrow"}
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert list(load_texts(write(tmp_path / "a.txt", "x"))) == ["x"]
    assert list(load_texts(write(tmp_path / "a.jsonl", '{"text": "x"}'))) == ["x"]


@pytest.mark.parametrize("name", ["a.parquet", "hub"])
def test_missing_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def absent(module: str, extra: str) -> None:
        raise MissingExtra(module, hint=f"pip install 'bitnest[{extra}]'")

    monkeypatch.setattr(sources, "require", absent)
    source = "hub:org/name" if name == "hub" else write(tmp_path / name, b"")
    with pytest.raises(MissingExtra, match=r"bitnest\[eval\]"):
        list(load_texts(source))


def test_hub_without_network_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(sources, "require", lambda *_: None)
    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(DataError, match="no route to the hub") as caught:
        list(load_texts("hub:org/name"))
    assert caught.value.where == "hub:org/name"
    assert "local file" in caught.value.hint


def test_hub_name_config_and_split_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            asked.append((*args, kwargs["split"]))
            return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(sources, "require", lambda *_: None)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert list(load_texts("hub:org/name:en@validation")) == ["a", "b"]
    assert list(load_texts("hub:org/name")) == ["a", "b"]
    assert asked == [("org/name", "en", "validation"), ("org/name", None, "train")]
    with pytest.raises(DataError, match="no field 'body'"):
        list(load_texts("hub:org/name", field="body"))


@pytest.mark.parametrize(
    ("name", "content", "message", "where"),
    [
        ("a.txt", b"", "empty", "a.txt"),
        ("a.txt", b" \n\n ", "empty", "a.txt"),
        ("a.txt", b"caf\xe9", "UTF-8", "a.txt"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "not JSON", "a.jsonl:2"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"body": "x"}\n', "no text in field 'text'", "a.jsonl:3"),
        ("a.jsonl", b"[1]\n", "no text in field", "a.jsonl:1"),
        ("a.jsonl", b'{"text": 3}\n', "no text in field", "a.jsonl:1"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8", "a.jsonl"),
        ("a.parquet", b"not parquet", "parquet", "a.parquet"),
    ],
)
def test_damaged_text_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str, where: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=message) as caught:
        list(load_texts(write(tmp_path / name, content)))
    assert caught.value.where.endswith(where)
    assert caught.value.hint


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'") as caught:
        list(load_texts(str(tmp_path / "a.parquet")))
    assert "body" in caught.value.hint
    with pytest.raises(DataError, match="holds no text"):
        list(load_texts(str(tmp_path / "a.parquet"), field="n"))


def test_missing_file_and_directory_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such text"):
        list(load_texts(str(tmp_path / "none.txt")))
    with pytest.raises(DataError, match=r"no \.txt files"):
        list(load_texts(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "x")
    os.chmod(source, 0)
    with pytest.raises(DataError, match="cannot read"):
        list(load_texts(source))


def test_read_error_of_the_system_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    source = write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        list(load_texts(source))


# --- tokens ----------------------------------------------------------------------------------


def test_documents_are_joined_by_end_tokens_between_them_only() -> None:
    one, two = (TOKENIZER(text)["input_ids"] for text in ("the fox", "a dog"))
    texts = ["the fox", "a dog", "the fox"]
    found = token_windows(TOKENIZER, texts, window=1, count=None)
    assert found.flatten().tolist() == [*one, EOS, *two, EOS, *one]
    bare = token_windows(build_tokenizer(None), texts, window=1, count=None)
    assert bare.flatten().tolist() == [*one, *two, *one]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["fox", " dog", "\n", "\n\n", "  ", "\t", "x" * 9, "日", '"', ".\n"])),
    st.integers(8, 40),
)
def test_cutting_long_text_into_pieces_changes_no_character(parts: list[str], piece: int) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PIECE", piece)
        pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(each) <= piece for each in pieces)


def test_cutting_long_text_into_pieces_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(LINES)
    whole = TOKENIZER(text)["input_ids"]
    for piece in range(100, 140):
        monkeypatch.setattr(data, "PIECE", piece)
        assert len(list(data._pieces(text))) > 3
        found = token_windows(TOKENIZER, [text], window=1, count=None)
        assert found.flatten().tolist() == whole


def test_reading_stops_at_the_limit_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data, "MAX_TOKENS", 30)
    taken = []

    def texts() -> Any:
        for i in range(100):
            taken.append(i)
            yield " ".join(["7"] * 10)

    with caplog.at_level("INFO"):
        found = token_windows(Numbers(), texts(), window=5, count=None, where="corpus")
    assert found.shape == (6, 5)
    assert len(taken) == 3
    assert "corpus" in caplog.text


# --- windows ---------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 60))
@settings(deadline=None)
def test_windows_are_runs_of_the_text_and_never_overlap(window: int, count: int, rest: int) -> None:
    text = numbers(window * count + rest)
    for selection in ("spread", "random"):
        found = token_windows(
            Numbers(), text, window=window, count=count, selection=selection, seed=rest
        )
        assert found.shape == (count, window)
        assert found.dtype == torch.int64
        assert torch.equal(found, found[:, :1] + torch.arange(window))
        assert (found[1:, 0] - found[:-1, 0] >= window).all()


def test_spread_windows_begin_at_equal_steps_from_the_first_token() -> None:
    found = token_windows(Numbers(), numbers(103), window=4, count=10)
    assert found[:, 0].tolist() == list(range(0, 100, 10))


def test_random_windows_depend_on_the_seed_alone() -> None:
    def draw(seed: int) -> list[int]:
        options: dict[str, Any] = {"window": 3, "count": 5, "selection": "random"}
        return token_windows(Numbers(), numbers(300), seed=seed, **options)[:, 0].tolist()

    assert draw(1) == draw(1) == sorted(draw(1))
    assert draw(1) != draw(2)


@pytest.mark.parametrize("count", [None, 3])
def test_too_short_text_says_how_much_is_needed(count: int | None) -> None:
    with pytest.raises(DataError, match="too short") as caught:
        token_windows(Numbers(), numbers(9), window=10, count=count, where="tiny.txt")
    assert f"{10 * (count or 1)} tokens" in caught.value.what
    assert "has 9" in caught.value.what
    assert caught.value.where == "tiny.txt"


def test_unknown_selection_is_no_silent_default() -> None:
    with pytest.raises(ValueError, match="neither"):
        token_windows(Numbers(), numbers(9), window=1, count=1, selection="sprad")


# --- calibration -----------------------------------------------------------------------------


def calibration_sources(tmp_path: Path) -> list[DataSource]:
    return [
        DataSource("low", write(tmp_path / "a.txt", numbers(400)[0])),
        DataSource("high", write(tmp_path / "b.txt", "\n".join(map(str, range(1000, 1400))))),
    ]


def test_samples_are_split_evenly_and_labelled_by_where_they_come_from(tmp_path: Path) -> None:
    found = calibration_windows(
        Numbers(), calibration_sources(tmp_path), samples=7, length=8, seed=0
    )
    assert found.tokens.shape == (7, 8)
    assert found.counts == {"low": 4, "high": 3}
    assert found.labels == ("low",) * 4 + ("high",) * 3
    assert [bool(row.max() < 1000) for row in found.tokens] == [True] * 4 + [False] * 3


def test_calibration_hash_follows_the_tokens(tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        made = calibration_windows(
            Numbers(), calibration_sources(tmp_path), samples=6, length=8, seed=seed
        )
        return made.sha256

    assert digest(0) == digest(0) != digest(1)


def test_source_that_would_get_no_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 samples cannot be split over 2"):
        calibration_windows(Numbers(), calibration_sources(tmp_path), samples=1, length=8, seed=0)
