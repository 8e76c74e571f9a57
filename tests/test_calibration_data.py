"""Calibration from many sources: what is read twice, miscounted, misrendered or cut wrongly.

Tokenizers are built here: a byte-level BPE with special tokens and a chat template, and one that
reads numbers, so that a window can be told by its content.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitnest import api, demo
from bitnest.api import texts as api_texts
from bitnest.calibrate import dedup, sources
from bitnest.calibrate.data import CalibrationSet, DataSource, calibration_windows, parse_source
from bitnest.calibrate.dedup import document_digest, draw_windows
from bitnest.calibrate.sources import load_documents, load_texts
from bitnest.calibrate.windows import join_documents, pack_documents, split_samples
from bitnest.errors import DataError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}"
)
TALK = [{"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "four"}]


def build_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, four special ones, of which <|end|> ends a sequence; it would add a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<s>", "<|start|>", "<|end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", chat_template=template
    )


TOKENIZER = build_tokenizer()
BOS, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
START = TOKENIZER.convert_tokens_to_ids("<|start|>")


class Numbers:
    """A tokenizer of whitespace-separated numbers; 0 ends a document."""

    eos_token_id = 0
    eos_token = "0"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def count(start: int, n: int) -> str:
    return " ".join(map(str, range(start, start + n)))


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def rows(path: Path, *lines: Any) -> str:
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


def texts(path: Path, *documents: str) -> str:
    return rows(path, *({"text": document} for document in documents))


def calibrate(*specs: str, tokenizer: Any = None, **options: Any) -> CalibrationSet:
    given = {"samples": 4, "length": 8, "seed": 0, **options}
    parsed = [parse_source(spec, weighted=True) for spec in specs]
    return calibration_windows(tokenizer or Numbers(), parsed, **given)


# --- labels and weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("code:3=/a/b.txt", DataSource("code", "/a/b.txt", 3)),
        ("code:3=hub:org/name:en@test", DataSource("code", "hub:org/name:en@test", 3)),
        ("code=/a/b:3=c.txt", DataSource("code", "/a/b:3=c.txt")),
        ("/a/b:3=c.txt", DataSource("b:3=c", "/a/b:3=c.txt")),
        ("C:\\a:3=b.txt", DataSource("C:\\a:3=b", "C:\\a:3=b.txt")),
        ("hub:org/name", DataSource("name", "hub:org/name")),
    ],
)
def test_weight_is_split_off_a_label_but_never_out_of_a_path(spec: str, source: DataSource) -> None:
    assert parse_source(spec, weighted=True) == source


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("=a.txt", "empty label"),
        (" =a.txt", "empty label"),
        (":2=a.txt", "empty label"),
        ("code=", "empty data source"),
        ("code:2=", "empty data source"),
        ("code:0=a.txt", "weight 0"),
        ("code:0.5=a.txt", "weight 0.5"),
        ("code:1,5=a.txt", "weight 1,5"),
    ],
)
def test_bad_label_or_weight_is_refused_with_a_hint(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_source(spec, weighted=True)
    assert caught.value.where and caught.value.hint


def test_weight_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(DataError, match="weight") as caught:
        parse_source("code:3=a.txt")
    assert caught.value.hint == "code=a.txt"


@given(st.integers(1, 200), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_shares_add_up_and_are_within_one_of_the_exact_share(
    samples: int, weights: list[int]
) -> None:
    whole = sum(weights)
    try:
        shares = split_samples(samples, weights)
    except DataError as error:
        least = int(error.hint.split()[1])
        assert samples < least
        assert min(split_samples(least, weights)) >= 1
        return
    assert sum(shares) == samples
    assert all(
        abs(share - samples * weight / whole) < 1
        for share, weight in zip(shares, weights, strict=True)
    )


def test_equal_weights_share_as_without_weights() -> None:
    assert split_samples(7, [1, 1, 1]) == split_samples(7, [5, 5, 5]) == [3, 2, 2]
    assert split_samples(8, [3, 1]) == [6, 2]


def test_weights_decide_how_many_samples_each_source_gives(tmp_path: Path) -> None:
    code = write(tmp_path / "a.txt", count(1, 400))
    books = write(tmp_path / "b.txt", count(1000, 400))
    found = calibrate(f"code:3={code}", f"books={books}", samples=8)
    assert found.counts == {"code": 6, "books": 2}
    assert [report.samples for report in found.sources] == [6, 2]


def test_sources_of_one_label_are_one_domain_with_a_report_each(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.txt", count(1 + 1000 * i, 400)) for i in range(3)]
    found = calibrate(f"code={paths[0]}", f"books={paths[1]}", f"code={paths[2]}", samples=7)
    assert found.counts == {"code": 5, "books": 2}
    assert [(r.label, r.source, r.samples) for r in found.sources] == [
        ("code", paths[0], 3), ("books", paths[1], 2), ("code", paths[2], 2),
    ]  # fmt: skip
    thousands = [int(row[0]) // 1000 for row in found.tokens]
    assert [("code", "books", "code")[i] for i in thousands] == list(found.labels)


# --- the report ------------------------------------------------------------------------------


def test_report_counts_what_was_read_and_what_was_drawn(tmp_path: Path) -> None:
    first = texts(tmp_path / "a.jsonl", count(1, 50), "  ", count(100, 49))
    second = write(tmp_path / "b.txt", count(1000, 77))
    found = calibrate(f"a={first}", f"b={second}", samples=5)
    a, b = found.sources
    assert (a.documents, a.duplicates, a.conversations) == (2, 0, 0)
    assert (a.available, a.windows, a.samples, a.tokens) == (50 + 1 + 49, 12, 3, 24)
    assert (b.available, b.windows, b.samples, b.tokens) == (77, 9, 2, 16)
    assert (a.replaced, a.repeated) == (0, 0)
    assert found.packing == "join"
    for report, part in ((a, found.tokens[:3]), (b, found.tokens[3:])):
        assert report.sha256 == hashlib.sha256(part.numpy().tobytes()).hexdigest()
        assert json.loads(json.dumps(vars(report))) == vars(report)


def test_set_without_reports_is_still_made() -> None:
    made = CalibrationSet(torch.zeros(1, 2), ("a",), {"a": 1}, "")
    assert (made.sources, made.packing) == ((), "join")


def test_tokens_without_duplicates_are_those_drawn_before_there_was_deduplication(
    tmp_path: Path,
) -> None:
    source = texts(tmp_path / "a.jsonl", *(count(1 + 100 * i, 37 + i) for i in range(9)))
    stream = [int(n) for text in load_texts(source) for n in [*text.split(), 0]][:-1]
    windows = torch.tensor(stream[: len(stream) // 8 * 8]).view(-1, 8)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randperm(len(windows), generator=generator)[:6].sort().values
    assert torch.equal(calibrate(f"a={source}", samples=6, seed=5).tokens, windows[chosen])


def test_embedded_text_calibrates_as_it_always_has() -> None:
    tokenizer = api.load_tokenizer("demo")
    found = api_texts.calibration_set(tokenizer, api_texts.sources(()), 64, 512, 0)
    assert found.counts == {"demo": 64}
    assert found.sha256 == "6a833a99d2d07a1651c1b9ed004862490ef5809966010b6bb5fdf1de278597de"
    assert found.sources[0].source == str(demo.calibration_text())


def test_more_samples_of_a_seed_hold_the_fewer(tmp_path: Path) -> None:
    specs = [f"a={write(tmp_path / 'a.txt', count(1, 500))}"]
    few, many = (calibrate(*specs, samples=n).tokens[:, 0].tolist() for n in (5, 20))
    assert set(few) < set(many)


# --- documents read twice --------------------------------------------------------------------


def test_copies_of_a_document_are_dropped_within_and_across_sources(tmp_path: Path) -> None:
    one, two, three = count(1, 40), count(100, 40), count(200, 40)
    first = texts(tmp_path / "a.jsonl", one, two, one.replace(" ", "\n \t"), f" {two}\n")
    second = texts(tmp_path / "b.jsonl", two, three)
    found = calibrate(f"a={first}", f"b={second}", samples=10)
    a, b = found.sources
    assert (a.documents, a.duplicates) == (4, 2)
    assert (b.documents, b.duplicates) == (2, 1)
    assert (a.available, b.available) == (81, 40)
    drawn = found.tokens[found.tokens > 0]
    assert len(drawn.unique()) == len(drawn)
    assert found.tokens[:5].max() < 200 <= found.tokens[5:].min()


def test_first_of_two_copies_counts_even_under_another_label(tmp_path: Path) -> None:
    shared, own = count(1, 80), count(500, 80)
    first = texts(tmp_path / "a.jsonl", shared)
    second = texts(tmp_path / "b.jsonl", shared, own)
    found = calibrate(f"a={first}", f"b={second}")
    assert found.tokens[:2].max() < 500 <= found.tokens[2:].min()


def test_source_of_nothing_but_copies_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", count(1, 400))
    with pytest.raises(DataError, match=r"every document \(1\) is a copy") as caught:
        calibrate(f"a={source}", f"b={source}")
    assert caught.value.where == source and caught.value.hint


def test_text_too_short_without_its_copies_says_so(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", *[count(1, 30)] * 9)
    with pytest.raises(DataError, match=r"it has 30 \(3 windows\); 8 of its 9 documents") as caught:
        calibrate(source)
    assert caught.value.where == source


@settings(deadline=None)
@given(st.text(alphabet=" \n\t\u2003ab日", max_size=40), st.integers(1, 7))
def test_digest_is_of_the_words_however_the_text_is_chunked(text: str, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "CHUNK", chunk)
        found = document_digest(text)
    assert found == hashlib.sha256(" ".join(text.split()).encode()).digest()[: dedup.KEY]


def test_half_a_surrogate_pair_is_refused_with_its_place(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": "a \\ud800 b"}\n')
    with pytest.raises(DataError, match="surrogate") as caught:
        calibrate(source, tokenizer=TOKENIZER)
    assert caught.value.where == f"{source}, document 2"


# --- windows drawn twice ---------------------------------------------------------------------


def test_equal_windows_are_replaced_while_there_are_others() -> None:
    windows = np.array([[1, 1]] * 6 + [[n, n] for n in range(2, 6)], np.int32)
    for seed in range(20):
        draw = draw_windows(windows, 5, seed, set())
        assert sorted(windows[draw.positions][:, 0]) == [1, 2, 3, 4, 5]
        assert draw.repeated == 0
        drawn = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:5]
        assert draw.replaced == max(0, int((drawn < 6).sum()) - 1)


def test_equal_windows_stay_when_there_are_no_others_and_are_counted() -> None:
    windows = np.array([[1, 1]] * 6 + [[2, 2]], np.int32)
    draw = draw_windows(windows, 5, 0, set())
    assert sorted(windows[draw.positions][:, 0]) == [1, 1, 1, 1, 2]
    assert len(draw.positions.unique()) == 5
    assert draw.repeated == 3
    assert draw.replaced == int(6 not in torch.randperm(
        7, generator=torch.Generator().manual_seed(0)
    )[:5])  # fmt: skip


def test_window_drawn_from_one_source_is_not_drawn_from_the_next(tmp_path: Path) -> None:
    block = count(1, 8)
    first = texts(tmp_path / "a.jsonl", f"{block} {count(100, 24)}")
    second = texts(tmp_path / "b.jsonl", f"{block} {count(200, 16)} {block}")
    found = calibrate(f"a={first}", f"b={second}", samples=6, length=8)
    assert found.sources[0].windows == 4
    assert len(found.tokens.unique(dim=0)) + sum(r.repeated for r in found.sources) == 6
    assert 200 in found.tokens[3:, 0] and 208 in found.tokens[3:, 0]


def test_repetitive_text_is_reported(tmp_path: Path) -> None:
    found = calibrate(write(tmp_path / "a.txt", f"{count(1, 8)} " * 50))
    report = found.sources[0]
    assert (report.repeated, report.replaced) == (3, 0)


# --- conversations ---------------------------------------------------------------------------


def expected(conversation: list[dict[str, str]]) -> list[int]:
    return TOKENIZER.apply_chat_template(conversation, tokenize=True, return_dict=False)


def stream(source: str, tokenizer: Any = TOKENIZER) -> list[int]:
    """All tokens of a source, in order."""
    n = calibrate(source, tokenizer=tokenizer, samples=1, length=1).sources[0].available
    found = calibrate(source, tokenizer=tokenizer, samples=1, length=n)
    return found.tokens.flatten().tolist()


def test_conversation_has_the_tokens_the_chat_template_gives_and_one_bos(tmp_path: Path) -> None:
    found = stream(rows(tmp_path / "a.jsonl", {"messages": TALK}))
    assert found == expected(TALK)
    assert found.count(BOS) == 1 and found.count(START) == found.count(END) == 2


def test_closed_conversations_follow_each_other_without_a_second_end_token(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "hello"}]
    source = rows(tmp_path / "a.jsonl", {"text": "abc"}, {"messages": TALK}, {"messages": other})
    text = TOKENIZER("abc", add_special_tokens=False)["input_ids"]
    assert stream(source) == [*text, END, *expected(TALK), *expected(other)]


def test_template_without_an_end_gets_the_separator(tmp_path: Path) -> None:
    plain = build_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    other = [{"role": "user", "content": "b"}]
    source = rows(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "a"}]},
                  {"messages": other})  # fmt: skip
    assert TOKENIZER.decode(stream(source, plain)) == "a<|end|>b"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"text": None, "messages": TALK},
        {"conversations": [{"from": "human", "value": "two plus two"},
                           {"from": "gpt", "value": "four"}]},
        {"conversations": TALK},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "two plus "}, "two"]},
                      {"role": "assistant", "content": "four", "name": None}]},
    ],
)  # fmt: skip
def test_every_spelling_of_a_conversation_reads_the_same(tmp_path: Path, row: Any) -> None:
    assert list(load_documents(rows(tmp_path / "a.jsonl", row))) == [TALK]


def test_tool_calls_reach_the_template(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
    found = list(load_documents(rows(tmp_path / "a.jsonl", {"messages": [call]})))
    assert found == [[{**call, "content": ""}]]


def test_row_with_text_is_never_rendered(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"text": "as it is", "messages": TALK})
    assert list(load_documents(source)) == ["as it is"]


def test_parquet_and_hub_conversations_read_like_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]

    class Hub:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
            return iter([{"messages": TALK}, {"conversations": shared}, {"text": None}])

    read = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    monkeypatch.setattr(sources, "require", lambda *_: None)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert list(load_documents("hub:org/name")) == [TALK, read, ""]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"messages": [TALK, None, []]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"conversations": [shared]}), tmp_path / "b.parquet")
    assert list(load_documents(str(tmp_path / "a.parquet"))) == [TALK]
    assert list(load_documents(str(tmp_path / "b.parquet"))) == [read]


def test_todays_date_changes_no_token(tmp_path: Path) -> None:
    dated = build_tokenizer(
        "\n{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ day }}: {{ messages[0]['content'] }}"
    )
    source = rows(tmp_path / "a.jsonl", {"messages": TALK})
    assert TOKENIZER.decode(stream(source, dated)) == "\n26 Jul 2024: two plus two"


def test_equal_conversations_are_read_once_and_counted(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": f"question {i % 5}"}] for i in range(9)]
    source = rows(tmp_path / "a.jsonl", {"text": "abc"}, *({"messages": t} for t in talks))
    report = calibrate(source, tokenizer=TOKENIZER).sources[0]
    assert (report.documents, report.duplicates, report.conversations) == (10, 4, 5)


@pytest.mark.parametrize("template", [None, "{% for"])
def test_conversation_without_a_usable_template_is_refused(
    tmp_path: Path, template: str | None
) -> None:
    source = rows(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(DataError, match="chat template") as caught:
        calibrate(source, tokenizer=build_tokenizer(template))
    assert caught.value.where.startswith(source) and caught.value.hint


def test_what_a_template_refuses_is_no_traceback(tmp_path: Path) -> None:
    strict = build_tokenizer("{{ raise_exception('roles must alternate') }}")
    source = rows(tmp_path / "a.jsonl", {"text": "abc"}, {"messages": TALK})
    with pytest.raises(DataError, match="roles must alternate") as caught:
        calibrate(source, tokenizer=strict)
    assert caught.value.where == f"{source}, document 2"
    assert "user, assistant" in caught.value.hint


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "not a list"),
        (["hello"], "not an object"),
        ([{"content": "hello"}], "no role"),
        ([{"role": 3, "content": "hello"}], "no role"),
        ([{"role": "user"}], "without text"),
        ([{"role": "user", "content": 3}], "without text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "without text"),
    ],
)
def test_damaged_conversation_is_refused_with_its_line(
    tmp_path: Path, messages: Any, message: str
) -> None:
    source = rows(tmp_path / "a.jsonl", {"text": "abc"}, {"messages": messages})
    with pytest.raises(DataError, match=message) as caught:
        list(load_documents(source))
    assert caught.value.where == f"{source}:2" and caught.value.hint


def test_text_reader_refuses_conversations_it_would_not_render(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text in field 'text': the rows are conversations"):
        list(load_texts(rows(tmp_path / "a.jsonl", {"messages": TALK})))


# --- packing ---------------------------------------------------------------------------------


def ids(*documents: list[int]) -> list[tuple[np.ndarray, bool]]:
    return [(np.array(document, np.int32), False) for document in documents]


def test_packed_windows_begin_with_documents_and_drop_what_a_cut_leaves() -> None:
    documents = ids([1, 2], [3, 4, 5, 6], [7], list(range(10, 21)), [8, 9], [30, 31, 32])
    windows, total = pack_documents(documents, 0, 5)
    assert windows.tolist() == [
        [1, 2, 0, 3, 4], list(range(10, 15)), list(range(15, 20)), [7, 0, 8, 9, 0],
    ]  # fmt: skip
    assert total == 2 + 1 + 4 + 1 + 11 + 1 + 2 + 1 + 3


def test_packing_without_an_end_token_puts_nothing_between() -> None:
    windows, total = pack_documents(ids([1, 2], [3, 4]), None, 3)
    assert (windows.tolist(), total) == ([[1, 2, 3]], 4)


def test_closed_document_is_followed_without_a_separator_in_both_packings() -> None:
    documents = [(np.array([1, 0], np.int32), True), *ids([2], [3, 4])]
    windows, _ = pack_documents(documents, 0, 5)
    assert windows.tolist() == [[1, 0, 2, 0, 3]]
    assert join_documents(documents, 0).tolist() == [1, 0, 2, 0, 3, 4]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 12))
def test_no_packed_window_begins_inside_a_short_document(sizes: list[int], length: int) -> None:
    starts = [1000 * (i + 1) for i in range(len(sizes))]
    documents = ids(*([*range(s, s + n)] for s, n in zip(starts, sizes, strict=True)))
    windows, total = pack_documents(documents, 0, length)
    assert windows.shape[1] == length and windows.size <= total
    for row in windows.tolist():
        size = sizes[row[0] // 1000 - 1]
        assert row[0] % 1000 % length == 0 if size >= length else row[0] % 1000 == 0
        assert size < length or len({n // 1000 for n in row}) == 1
    flat = [n for n in windows.flatten().tolist() if n]
    assert len(set(flat)) == len(flat)


def test_packing_is_asked_for_by_name_and_reported(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", *(count(1 + 100 * i, 11) for i in range(6)))
    found = calibrate(source, pack="documents")
    assert found.packing == "documents"
    assert all(first % 100 == 1 for first in found.tokens[:, 0].tolist())
    assert (found.sources[0].windows, found.sources[0].available) == (6, 66)
    assert calibrate(source).packing == "join"
    same = api_texts.calibration_set(
        Numbers(), api_texts.sources([source]), 4, 8, 0, pack="documents"
    )
    assert same.sha256 == found.sha256


def test_unknown_packing_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown packing 'dense'") as caught:
        calibrate(write(tmp_path / "a.txt", count(1, 99)), pack="dense")
    assert "join, documents" in caught.value.hint


# --- refused before work ---------------------------------------------------------------------


class Unused(Numbers):
    """Fails the test when anything is tokenised."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        raise AssertionError("text was tokenised before all sources were looked at")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such text"),
        ("a.txt", "", "empty"),
        ("a.jsonl", '{"body": "x"}\n', "no text in field"),
        ("a.jsonl", "no json\n", "not JSON"),
        ("a.jsonl", json.dumps({"messages": TALK}), "no chat template"),
        ("a.parquet", "no parquet", "parquet"),
    ],
)
def test_last_source_is_looked_at_before_the_first_is_read(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        write(tmp_path / name, content)
    good = write(tmp_path / "good.txt", count(1, 99))
    with pytest.raises(DataError, match=message) as caught:
        calibrate(f"a={good}", f"b={tmp_path / name}", tokenizer=Unused())
    assert caught.value.where.startswith(str(tmp_path / name)) and caught.value.hint


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 0}, {"samples": -3}])
def test_impossible_sizes_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    source = write(tmp_path / "a.txt", count(1, 99))
    with pytest.raises(DataError):
        calibrate(source, tokenizer=Unused(), **options)


def test_no_source_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no calibration text"):
        calibrate()


def test_documents_of_nothing_but_blanks_are_empty(tmp_path: Path) -> None:
    parsed = [DataSource("a", "given")]
    with pytest.raises(DataError, match="empty"):
        calibration_windows(Numbers(), parsed, samples=1, length=2, seed=0, load=lambda _: [" "])


def test_given_loader_serves_text_that_lies_in_no_file() -> None:
    parsed = [DataSource("a", "generated")]
    found = calibration_windows(
        Numbers(), parsed, samples=2, length=4, seed=0, load=lambda _: [count(1, 20)]
    )
    assert found.sources[0].source == "generated" and found.tokens.shape == (2, 4)
