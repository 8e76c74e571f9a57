"""A killed compression continues where it was and ends with the bytes of one that was never killed.

Runs happen in child processes, started by forking so that a kill costs no import of torch. The
children sleep a little in every block, so that kills spread over the run and not only its end.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bitnest import api
from bitnest.artifact import Artifact, Writer
from bitnest.errors import ArtifactError, UnsupportedModel
from bitnest.workdir import partial_directory
from tests.tiny import Builder

BLOCKS = 6
OPTIONS: dict[str, Any] = {"format": "int4-g32", "samples": 4, "length": 32}
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model(tiny: Builder) -> Path:
    return tiny("mixtral", "deep", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "artifact"
    api.compress(model, out, data=[str(text)], **OPTIONS)
    return digests(out)


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in directory.iterdir()}


class Slow:
    """A progress that takes its time after every block."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.compressing = False

    def phase(self, name: str, total: int) -> None:
        self.compressing = name == "compressing"

    def step(self, amount: int = 1, note: str = "") -> None:
        if self.compressing and not note:  # a resumed block: nothing to wait for
            time.sleep(self.pause)


def child(model: Path, out: Path, text: Path, pause: float, options: dict[str, Any]) -> Any:
    def work() -> None:
        api.compress(model, out, data=[str(text)], progress=Slow(pause), **{**OPTIONS, **options})

    process = fork.Process(target=work)
    process.start()
    return process


def unfinished(model: Path, out: Path, text: Path, blocks: int = 2, **options: Any) -> Path:
    """Kill a run once `blocks` of its blocks are done; returns the partial directory."""
    partial = partial_directory(out)
    process = child(model, out, text, 0.05, options)
    while not (partial / "state" / f"block-{blocks - 1:05d}.json").exists():
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert partial.exists() and not out.exists()
    return partial


def kill_at_random(
    model: Path, text: Path, out: Path, whole: dict[str, str], kills: int, seed: int
) -> None:
    """Kill runs after random delays until `kills` have died, then let one finish."""
    rng = random.Random(seed)
    died = 0
    seen = set()
    start = time.monotonic()
    child(model, out.with_name("timed"), text, 0.02, {}).join()
    longest = time.monotonic() - start  # of an undisturbed run, on this machine as busy as it is
    shutil.rmtree(out.with_name("timed"))
    while died < kills:
        process = child(model, out, text, 0.02, {})
        process.join(rng.uniform(0.2 * longest, longest))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            died += 1
        process.join()
        state = partial_directory(out) / "state"
        if out.exists():  # finished before its kill: the bytes must be right, then start again
            assert digests(out) == whole
            shutil.rmtree(out)
        else:
            seen.add(len(list(state.glob("block-*.json"))))
            with pytest.raises(ArtifactError):
                Artifact.open(partial_directory(out) / "artifact")
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert digests(out) == whole
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert len(seen) > 1, "every kill struck at the same place"


def test_killed_at_random_moments_ends_with_the_same_bytes(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    kill_at_random(model, text, tmp_path / "artifact", whole, kills=6, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_ends_with_the_same_bytes(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    for seed in range(1, 4):
        kill_at_random(model, text, tmp_path / f"a{seed}" / "artifact", whole, 20, seed)


@pytest.mark.parametrize("blocks", range(1, BLOCKS + 1))
def test_resumed_after_each_block_ends_with_the_same_bytes(
    blocks: int, model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    partial = unfinished(model, out, text, blocks)
    first = partial / "artifact" / f"packed-00001-of-{BLOCKS:05d}.safetensors"
    before = first.stat().st_mtime_ns
    os.link(first, tmp_path / "kept")
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert digests(out) == whole
    assert (tmp_path / "kept").samefile(out / first.name), "the first block was done again"
    assert (out / first.name).stat().st_mtime_ns == before


def test_command_killed_by_signal_resumes_from_the_command_line(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    command = [sys.executable, "-m", "bitnest", "compress", str(model), "-o", str(out)]
    command += ["--format", "int4-g32", "--data", str(text), "--samples", "4", "--length", "32"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(partial_directory(out).glob("state/block-*")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "next: bitnest eval" in done.stderr
    kept = digests(out)
    manifest = json.loads((out / "bitnest.json").read_text())
    assert manifest["fingerprint"]["threads"] >= 1
    kept.pop("bitnest.json")
    assert kept == {k: v for k, v in whole.items() if k != "bitnest.json"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "int3-g32"}, "recipe"),
        ({"seed": 1}, "recipe, calibration"),
        ({"samples": 5}, "calibration"),
        ({"method": "rtn"}, "recipe"),
        ({"memory": 8 << 30}, "memory"),
    ],
)
def test_other_inputs_do_not_resume_and_are_named(
    change: dict[str, Any], named: str, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    partial = unfinished(model, out, text)
    before = {p: p.stat().st_mtime_ns for p in partial.rglob("*") if p.is_file()}
    with pytest.raises(ArtifactError) as caught:
        api.compress(model, out, data=[str(text)], **{**OPTIONS, **change})
    for word in named.split(", "):
        assert word in caught.value.what
    assert "--fresh" in caught.value.hint
    after = {p: p.stat().st_mtime_ns for p in partial.rglob("*") if p.is_file()}
    assert {k.name: v for k, v in before.items() if k.name != "lock"} == {
        k.name: v for k, v in after.items() if k.name != "lock"
    }
    api.compress(model, out, data=[str(text)], **{**OPTIONS, **change}, fresh=True)
    Artifact.open(out).verify()
    assert not partial.exists()


def test_changed_weights_do_not_resume(
    model: Path, text: Path, tiny: Builder, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "model"
    shutil.copytree(model, source)
    out = tmp_path / "artifact"
    unfinished(source, out, text)
    shard = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    tensors[max(tensors)].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="source"):
        api.compress(source, out, data=[str(text)], **OPTIONS)


def test_fresh_starts_over_with_the_same_inputs(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    partial = unfinished(model, out, text)
    first = partial / "artifact" / f"packed-00001-of-{BLOCKS:05d}.safetensors"
    first.write_bytes(b"damaged after it was finished")
    api.compress(model, out, data=[str(text)], fresh=True, **OPTIONS)
    assert digests(out) == whole


@pytest.mark.parametrize("fresh", [False, True])
def test_second_process_is_refused_and_does_not_disturb_the_first(
    fresh: bool, model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    process = child(model, out, text, 0.3, {})
    while not list(partial_directory(out).glob("state/block-*.json")):
        assert process.is_alive()
        time.sleep(0.002)
    with pytest.raises(ArtifactError, match="another process") as caught:
        api.compress(model, out, data=[str(text)], fresh=fresh, **OPTIONS)
    assert caught.value.hint
    process.join()
    assert process.exitcode == 0
    assert digests(out) == whole


def test_same_command_on_a_finished_artifact_changes_nothing(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    first = api.compress(model, out, data=[str(text)], **OPTIONS)
    times = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    again = api.compress(model, out, data=[str(text)], **OPTIONS)
    assert {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == times
    assert again.groups == first.groups
    with pytest.raises(ArtifactError, match="in the way"):
        api.compress(model, out, data=[str(text)], **{**OPTIONS, "format": "int3-g32"})
    assert digests(out) == whole


def test_killed_between_renaming_and_tidying_is_a_finished_run(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    api.compress(model, out, data=[str(text)], **OPTIONS)
    (partial_directory(out) / "state").mkdir(parents=True)
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert not partial_directory(out).exists()
    assert digests(out) == whole


def test_half_written_artifact_never_opens(model: Path, text: Path, tmp_path: Path) -> None:
    work = unfinished(model, tmp_path / "artifact", text, BLOCKS - 1) / "artifact"
    with pytest.raises(ArtifactError, match="not a bitnest artifact"):
        Artifact.open(work)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(work)


@pytest.mark.parametrize("victim", ["packed-00002-of-00006.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_artifact_with_a_damaged_file_never_opens(
    victim: str, damage: str, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    api.compress(model, out, data=[str(text)], **OPTIONS)
    if damage == "missing":
        (out / victim).unlink()
    else:
        os.truncate(out / victim, (out / victim).stat().st_size // 2)
    with pytest.raises(ArtifactError, match=victim):
        Artifact.open(out)
    with pytest.raises((ArtifactError, OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)


def test_flipped_bit_is_found_by_verify(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert api.inspect(out, verify=True)["verified"] == len(list(out.iterdir())) - 1
    file = out / "packed-00003-of-00006.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        Artifact.open(out).verify()
    with pytest.raises(ArtifactError, match="checksum"):
        api.inspect(out, verify=True)


def test_failure_before_the_first_block_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnest.quantize import compress

    def refuse(*_: Any, **__: Any) -> None:
        raise UnsupportedModel("found out late")

    monkeypatch.setattr(compress, "Stream", refuse)
    with pytest.raises(UnsupportedModel):
        api.compress(model, tmp_path / "deep" / "er" / "out", data=[str(text)], **OPTIONS)
    assert not any(tmp_path.iterdir())


def test_failure_after_a_block_keeps_it(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"
    write = Writer.write_block

    def full(self: Writer, block: int, *rest: Any) -> None:
        if block == 3:
            raise OSError(28, "No space left on device")
        write(self, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_block", full)
        with pytest.raises(ArtifactError, match="No space left") as caught:
            api.compress(model, out, data=[str(text)], **OPTIONS)
    assert "resumes" in caught.value.hint
    assert len(list(partial_directory(out).glob("state/block-*.json"))) == 3
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert digests(out) == whole


def test_block_damaged_after_the_kill_is_done_again(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = unfinished(model, out, text)
    packed = next((partial / "artifact").glob("packed-00001-*"))
    data = bytearray(packed.read_bytes())
    data[-5] ^= 0xFF
    packed.write_bytes(data)
    api.compress(model, out, data=[str(text)], **OPTIONS)
    assert digests(out) == whole


def test_damaged_record_of_the_inputs_is_an_error_with_a_way_out(
    model: Path, text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (unfinished(model, out, text) / "state" / "inputs.json").write_text('{"half')
    with pytest.raises(ArtifactError) as caught:
        api.compress(model, out, data=[str(text)], **OPTIONS)
    assert "--fresh" in caught.value.hint
    api.compress(model, out, data=[str(text)], fresh=True, **OPTIONS)
    assert digests(out) == whole
