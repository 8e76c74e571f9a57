"""Fixtures that several test files share: tiny checkpoints and text to calibrate on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # some tests fork, which a pool of OpenMP threads does not survive
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from tests import gpu_mode  # noqa: F401 - chooses how Triton runs before anything imports it
from tests.tiny import Builder, make_tokenizer, words

WORKER_BYTES = 3 << 29  # of one process with torch, transformers and what a test loads


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: as many as there are cores for this process, and memory.

    The plugin itself asks psutil, which counts the machine's cores, granted or not.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    granted = min(cores or 1, math.ceil(cpu_quota(Path("/sys/fs/cgroup/cpu.max"))))
    return max(1, min(granted, free_bytes(Path("/proc/meminfo")) // WORKER_BYTES))


def cpu_quota(file: Path) -> float:
    """Cores that a control group may use; a large number where there is no limit."""
    quota, _, period = (file.read_text() if file.exists() else "max 1").partition(" ")
    return 1e6 if quota == "max" else int(quota) / int(period)


def free_bytes(file: Path) -> int:
    """Memory that is free or can be freed; a large number where it is not known."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 1 << 50


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
