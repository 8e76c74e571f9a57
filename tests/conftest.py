"""Fixtures that several test files share: tiny checkpoints and text to calibrate on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # some tests fork, which a pool of OpenMP threads does not survive
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from tests.tiny import Builder, make_tokenizer, words


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text of a few thousand tokens."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(words(3000), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Builder:
    """Makes pico checkpoints: `tiny("mixtral")` is a directory that every command opens."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(text.read_text(encoding="utf-8"))
    return Builder(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a directory of its own: some commands put things into the current one."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
