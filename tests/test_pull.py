"""Pulling artifacts from directories and from a hub: what is fetched, resumed, refined, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import bitnest
from bitnest import api
from bitnest.artifact import Artifact, is_artifact
from bitnest.cli import app
from bitnest.errors import ArtifactError, BitnestError, FormatError, RecipeError
from bitnest.export import places, pulling
from bitnest.export.places import Directory
from bitnest.manifest import MANIFEST
from bitnest.planes import plane_width
from tests.tiny import Builder

TOKENS = torch.arange(60)[None] % 50 * 6
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def artifact(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nested") / "small"
    api.compress(
        tiny("qwen3_moe"), out, format="nest248-g32", rules=["*.o_proj=int8-g32"],
        data=[str(text)], samples=2, length=32,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def plain(tiny: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    api.compress(tiny("llama"), out, format="int4-g128", method="rtn")
    return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read from directories that are pulled from, by file."""
    counted: dict[str, int] = {}
    whole = Directory.read

    def read(self: Directory, name: str, start: int) -> Generator[bytes]:
        for chunk in whole(self, name, start):
            counted[name] = counted.get(name, 0) + len(chunk)
            yield chunk

    monkeypatch.setattr(Directory, "read", read)
    return counted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def sizes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def flip(file: Path, place: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def biggest(artifact: Path) -> str:
    return max((n for n in sizes(artifact) if n.startswith("packed")), key=sizes(artifact).get)  # type: ignore[arg-type]


def test_pulled_at_a_width_gives_the_same_logits_bit_for_bit(
    artifact: Path, tmp_path: Path
) -> None:
    for bits, width in ((2, 2), (3, 2), (4, 4), (None, 8)):
        done = api.pull(artifact, tmp_path / str(bits), bits=bits)
        assert done.bits == width
        own = bitnest.load(done.artifact.path, bits=bits, dtype=torch.float32)
        assert torch.equal(
            logits(own), logits(bitnest.load(artifact, bits=bits, dtype=torch.float32))
        )
        there = {n for n in sizes(artifact) if (plane_width(n) or 0) <= width}
        assert sizes(done.artifact.path) == {n: sizes(artifact)[n] for n in there}
        assert done.fetched == sum(sizes(artifact)[n] for n in there - {MANIFEST})


def test_without_its_planes_a_width_is_refused_with_both_ways_out(
    artifact: Path, tmp_path: Path
) -> None:
    out = api.pull(artifact, tmp_path / "out", bits=4).artifact.path
    with pytest.raises(ArtifactError, match=r"packed.*\.w8\.safetensors' is missing") as caught:
        bitnest.load(out)
    assert "below 8 bits (--bits)" in caught.value.hint
    assert f"bitnest pull SOURCE -o {out}" in caught.value.hint
    found = CliRunner().invoke(app, ["inspect", str(out), "--verify"])
    assert isinstance(found.exception, ArtifactError)
    assert "all that is there matches" in found.exception.what


def test_refining_reads_only_the_missing_planes(
    artifact: Path, tmp_path: Path, reads: dict[str, int]
) -> None:
    out = tmp_path / "out"
    before: set[str] = set()
    for bits in (2, 4, 8):
        reads.clear()
        done = api.pull(artifact, out, bits=bits)
        reads.pop(MANIFEST)
        there = {n for n in sizes(artifact) if n != MANIFEST and (plane_width(n) or 0) <= bits}
        assert reads == {n: sizes(artifact)[n] for n in there - before}
        assert (done.fetched, done.present) == (
            sum(reads.values()),
            sum(sizes(artifact)[n] for n in before),
        )
        assert (set(done.files), done.kept) == (there - before, len(before))
        before = there
    assert contents(out) == contents(artifact)
    for bits in (None, 2):  # nothing more to do, nothing taken away
        assert api.pull(artifact, out, bits=bits).fetched == 0
    assert contents(out) == contents(artifact)


def break_after(monkeypatch: pytest.MonkeyPatch, files: int, error: BaseException) -> None:
    """The next pull fails in the middle of the file after so many whole ones."""
    whole, seen = Directory.read, []

    def read(self: Directory, name: str, start: int) -> Generator[bytes]:
        data = b"".join(whole(self, name, start))
        if name != MANIFEST:
            seen.append(name)
        if len(seen) > files:
            yield data[: len(data) // 2]
            raise error
        yield data

    monkeypatch.setattr(Directory, "read", read)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "no space left on device")])
def test_a_run_that_breaks_off_goes_on_where_it_stopped(
    error: BaseException, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for files in (0, 3, 7):
        with pytest.MonkeyPatch.context() as broken:
            break_after(broken, files if files != 3 else 2, error)
            with pytest.raises((KeyboardInterrupt, ArtifactError)):
                api.pull(artifact, out)
        assert not is_artifact(out)
        halves = [file for file in out.glob(".*.part") if file.name != f".{MANIFEST}.part"]
        assert len(halves) == 1 and halves[0].stat().st_size > 0
    had = sum(f.stat().st_size for f in out.iterdir() if f.name != f".{MANIFEST}.part")
    done = api.pull(artifact, out)
    assert done.present == had
    assert done.fetched == sum(sizes(artifact).values()) - sizes(artifact)[MANIFEST] - had
    assert contents(out) == contents(artifact)


def test_a_killed_process_leaves_no_artifact_and_resumes(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, sys\n"
        "from bitnest.export import pulling\n"
        "count = 0\n"
        "def kill(stream):\n"
        "    global count\n"
        "    count += 1\n"
        "    stream.flush()\n"
        "    if count == 5: os.kill(os.getpid(), 9)\n"
        "pulling._to_disk = kill\n"
        "pulling.pull(*sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, artifact, out], check=False)
    assert done.returncode == -9
    assert not is_artifact(out) and len(list(out.iterdir())) > 3
    assert api.pull(artifact, out).kept == 3  # the fourth is whole, but not yet under its name
    assert contents(out) == contents(artifact)


def test_killed_while_refining_stays_loadable(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = api.pull(artifact, tmp_path / "out", bits=2).artifact.path
    wanted = logits(bitnest.load(artifact, bits=2))
    for files in range(4):
        with pytest.MonkeyPatch.context() as broken:
            break_after(broken, 0 if files else 1, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                api.pull(artifact, out)
        assert torch.equal(logits(bitnest.load(out, bits=2)), wanted)
    api.pull(artifact, out)
    assert contents(out) == contents(artifact)


def test_a_corrupt_part_is_thrown_away_and_named(artifact: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", biggest(artifact)
    data = bytearray((artifact / name).read_bytes())
    data[100] ^= 1
    with pytest.MonkeyPatch.context() as broken:
        break_after(broken, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            api.pull(artifact, out)
    (out / f".{name}.part").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=f"'{name}' does not match its checksum") as caught:
        api.pull(artifact, out)
    assert "same command" in caught.value.hint
    assert not (out / f".{name}.part").exists() and not (out / name).exists()
    api.pull(artifact, out)
    assert contents(out) == contents(artifact)


def test_a_part_of_a_file_that_is_whole_is_removed(artifact: Path, tmp_path: Path) -> None:
    out, name = api.pull(artifact, tmp_path / "out").artifact.path, biggest(artifact)
    (out / f".{name}.part").write_bytes(b"left")
    assert api.pull(artifact, out).fetched == 0
    assert contents(out) == contents(artifact)


def test_a_part_longer_than_its_file_starts_over(artifact: Path, tmp_path: Path) -> None:
    out, name = api.pull(artifact, tmp_path / "out", bits=2).artifact.path, biggest(artifact)
    (out / name).unlink(missing_ok=True)
    (out / f".{name}.part").write_bytes((artifact / name).read_bytes() + b"more")
    api.pull(artifact, out)
    assert contents(out) == contents(artifact)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
@pytest.mark.parametrize("pattern", ["packed-00001-*.w4.*", "packed-00002-of-*2.safe*", "config.*"])
def test_pulling_again_mends(damage: str, pattern: str, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifact, out)
    victim = next(out.glob(pattern))
    if damage == "flipped":
        flip(victim)
        found = CliRunner().invoke(app, ["inspect", str(out), "--verify"])
        assert isinstance(found.exception, ArtifactError)
        assert f"'{victim.name}' does not match" in found.exception.what
        assert f"bitnest pull SOURCE -o {out}" in found.exception.hint
    elif damage == "short":
        os.truncate(victim, victim.stat().st_size - 8)
    else:
        victim.unlink()
    done = api.pull(artifact, out)
    assert done.files == (victim.name,)
    assert contents(out) == contents(artifact)
    done.artifact.verify()


def test_a_damaged_manifest_is_mended_where_nothing_can_be_lost(
    artifact: Path, plain: Path, tmp_path: Path
) -> None:
    out = api.pull(artifact, tmp_path / "out", bits=2).artifact.path
    (out / MANIFEST).write_bytes(b"{")
    before = contents(out)
    with pytest.raises(ArtifactError, match="manifest is damaged"):
        api.pull(plain, out)
    assert contents(out) == before
    assert api.pull(artifact, out, bits=2).fetched == 0
    Artifact.open(out)
    (out / MANIFEST).write_bytes(b"{")
    flip(out / "config.json")
    with pytest.raises(ArtifactError, match="manifest is damaged"):
        api.pull(artifact, out)


def test_verify_names_every_damaged_file(artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifact, out)
    victims = sorted(out.glob("packed-*.w4.*"))
    for victim in victims:
        flip(victim)
    next(out.glob("packed-00001-*.w8.*")).unlink()  # what is missing hides nothing
    with pytest.raises(ArtifactError, match="do not match their checksums") as caught:
        api.inspect(out, verify=True)
    assert len(victims) == 2 and all(f"'{v.name}'" in caught.value.what for v in victims)


def test_what_is_not_nested_is_pulled_whole(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing in this artifact is nested"):
        api.pull(plain, tmp_path / "out", bits=4)
    assert not any(tmp_path.iterdir())
    done = api.pull(plain, tmp_path / "out")
    assert done.bits is None and contents(tmp_path / "out") == contents(plain)


def test_refusals_come_before_anything_is_written(
    artifact: Path, plain: Path, tiny: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refused(
        kind: type[BitnestError], match: str, source: Any = artifact, **options: Any
    ) -> str:
        with pytest.raises(kind, match=match) as caught:
            api.pull(source, out, **options)
        return caught.value.hint

    assert refused(ArtifactError, "not a bitnest artifact", tiny("llama"))
    assert refused(ArtifactError, "no such directory", tmp_path / "nothing")
    assert refused(ArtifactError, "is a file", artifact / MANIFEST)
    refused(FormatError, "nested from 2", bits=1)
    monkeypatch.setattr(
        pulling.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 99)
    )
    assert "--bits" in refused(ArtifactError, "99 are free")
    monkeypatch.undo()
    lacking = tmp_path / "lacking"
    shutil.copytree(artifact, lacking)
    next(lacking.glob("*.w8.*")).unlink()
    assert "fewer bits" in refused(ArtifactError, r"w8.* is missing at the source", lacking)
    assert not out.exists()

    for content in ({"notes.txt": b"mine"}, {"config.json": b"{}", "model.safetensors": b""}):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, data in content.items():
            (out / name).write_bytes(data)
        refused(ArtifactError, "in the way")
        assert contents(out) == content
    shutil.rmtree(out)
    shutil.copytree(plain, out)
    assert "another -o" in refused(ArtifactError, "another fingerprint")
    assert contents(out) == contents(plain)
    shutil.rmtree(out)
    api.slice_artifact(artifact, out, 2)
    before = contents(out)
    refused(ArtifactError, "cut or changed since")
    assert contents(out) == before
    with pytest.raises(ArtifactError, match="one directory"):
        api.pull(artifact, artifact)


def test_an_unfinished_pull_of_something_else_is_kept(
    artifact: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as broken:
        break_after(broken, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            api.pull(artifact, out)
    before = contents(out)
    with pytest.raises(ArtifactError, match="unfinished pull of something else"):
        api.pull(plain, out)
    assert contents(out) == before
    (out / f".{MANIFEST}.part").write_bytes((artifact / MANIFEST).read_bytes()[:50])
    api.pull(artifact, out)  # killed while it wrote whose files these are
    assert contents(out) == contents(artifact)


def test_two_pulls_into_one_directory(artifact: Path, tmp_path: Path) -> None:
    text = (artifact / MANIFEST).read_bytes()
    with pulling._begun(tmp_path / "out", text), pytest.raises(ArtifactError, match="another proc"):
        api.pull(artifact, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "a/b", "..", ".", "", "a\\b", ".ssh", "c:evil", "a\0b", MANIFEST,
     "BitNest.json", "..\\evil", "a\nb"],
)  # fmt: skip
def test_a_hostile_manifest_writes_nowhere(name: str, artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "deep" / "source"
    shutil.copytree(artifact, source)
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    (source / MANIFEST).write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="no name of a file beside it"):
        api.pull(source, tmp_path / "deep" / "out")
    with pytest.raises(ArtifactError, match="no name of a file beside it"):
        api.slice_artifact(source, tmp_path / "deep" / "sliced", 2)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "entry", [None, {}, {"bytes": -1, "sha256": "0" * 64}, {"bytes": True, "sha256": "0" * 64},
              {"bytes": 5, "sha256": "x"}, {"bytes": "5", "sha256": "0" * 64}],
)  # fmt: skip
def test_a_senseless_manifest_is_refused(entry: Any, artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(artifact, source)
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["files"]["config.json"] = entry
    (source / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="incomplete"):
        api.pull(source, tmp_path / "out")
    manifest["files"].pop(next(n for n in manifest["files"] if n.startswith("packed-00001")))
    manifest["files"]["config.json"] = {"bytes": 1, "sha256": "0" * 64}
    (source / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="incomplete"):
        api.pull(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_narrower_widths_come_first(artifact: Path, tmp_path: Path) -> None:
    order = [plane_width(name) or 0 for name in api.pull(artifact, tmp_path / "out").files]
    assert order == sorted(order) and set(order) == {0, 4, 8}


def test_the_command(artifact: Path) -> None:
    done = CliRunner().invoke(app, ["pull", str(artifact), "--bits", "2"])
    assert done.exit_code == 0, done.output
    assert Path("small").is_dir()  # by the source's name
    nbytes = sum(sizes(Path("small")).values()) - sizes(artifact)[MANIFEST]
    assert f"fetched: {nbytes:,} bytes" in done.stdout and "at up to 2 bits" in done.stdout
    assert "eval" in done.stderr and "--bits 2" in done.stderr
    again = CliRunner().invoke(app, ["pull", str(artifact), "-o", "small", "--json", "-q"])
    found = json.loads(again.stdout)
    assert again.stderr == ""
    assert (found["bits"], found["present_bytes"]) == (8, nbytes)
    assert found["fetched_bytes"] == sum(sizes(artifact)[n] for n in found["fetched_files"])
    assert all(plane_width(name) in {4, 8} for name in found["fetched_files"])
    assert contents(Path("small")) == contents(artifact)


# The hub


@dataclass
class Repository:
    """A hub of one repository, `org/small`, and what went over the wire.

    cut: bytes after which each answer breaks off. ranges: whether they are honoured. refuse: the
    X-Error-Code, and status, of every answer. elsewhere: packed files are served by another host.
    """

    root: Path
    endpoint: str = ""
    cut: int | None = None
    ranges: bool = True
    refuse: tuple[int, str] | None = None
    elsewhere: bool = False
    commit: str | None = COMMIT
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    leaked: bool = False


class Handler(BaseHTTPRequestHandler):
    repo: Repository
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bool) -> None:
        repo = self.repo
        *head, kind, revision, name = self.path.strip("/").split("/")
        asked = self.headers.get("Range", "")
        repo.asked.append((self.command, f"{revision}/{name}", asked))
        if repo.refuse is not None:
            return self.fail(*repo.refuse)
        if kind == "cdn":
            repo.leaked |= "Authorization" in self.headers
        elif head != ["org", "small"]:
            return self.fail(401, "RepoNotFound")
        if revision not in {"main", "v1", COMMIT}:
            return self.fail(404, "RevisionNotFound")
        file = repo.root / name
        if not file.is_file():
            return self.fail(404, "EntryNotFound")
        if kind == "resolve" and repo.elsewhere and name.startswith("packed"):
            self.send_response(302)
            port = repo.endpoint.rpartition(":")[2]
            self.send_header("Location", f"http://localhost:{port}/cdn/{revision}/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = file.read_bytes()
        start = int(asked[6:].partition("-")[0]) if asked and repo.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"etag"')
        if repo.commit:
            self.send_header("X-Repo-Commit", repo.commit)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            part = data[start:]
            if repo.cut is not None and name != MANIFEST and len(part) > repo.cut:
                part = part[: repo.cut]
                self.close_connection = True
            self.wfile.write(part)
            repo.sent += len(part)


@pytest.fixture
def hub(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    repo = Repository(artifact)
    handler = type("Own", (Handler,), {"repo": repo})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    repo.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", repo.endpoint + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(places, "PAUSE", 0.01)
    yield repo
    server.shutdown()
    server.server_close()


def fetched(repo: Repository) -> set[str]:
    return {place.partition("/")[2] for method, place, _ in repo.asked if method == "GET"}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_from_the_hub_at_one_commit(hub: Repository, elsewhere: bool, tmp_path: Path) -> None:
    hub.elsewhere = elsewhere
    done = api.pull("org/small", tmp_path / "out", bits=2)
    assert hub.asked[0] == ("HEAD", f"main/{MANIFEST}", "")
    assert {place.partition("/")[0] for _, place, _ in hub.asked[1:]} == {COMMIT}
    assert fetched(hub) == {n for n in sizes(hub.root) if not plane_width(n) or ".w2." in n}
    own, whole = (bitnest.load(p, bits=2) for p in (done.artifact.path, hub.root))
    assert torch.equal(logits(own), logits(whole))
    hub.asked.clear()
    api.pull("org/small@v1", tmp_path / "out")
    assert hub.asked[0] == ("HEAD", f"v1/{MANIFEST}", "")
    assert all(plane_width(n) in {4, 8} for n in fetched(hub) - {MANIFEST})
    assert contents(tmp_path / "out") == contents(hub.root)
    assert not hub.leaked  # the token is the hub's, no other host's


def test_a_connection_that_breaks_is_taken_up_again(hub: Repository, tmp_path: Path) -> None:
    hub.cut = sizes(hub.root)[biggest(hub.root)] // 3
    api.pull("org/small", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(hub.root)
    assert hub.sent == sum(sizes(hub.root).values())  # every byte once
    assert sum(bool(asked) for _, _, asked in hub.asked) >= 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_is_continued_by_a_range(hub: Repository, ranges: bool, tmp_path: Path) -> None:
    hub.ranges = ranges
    out, name = tmp_path / "out", biggest(hub.root)
    api.pull("org/small", out)
    half = sizes(hub.root)[name] // 2
    (out / f".{name}.part").write_bytes((out / name).read_bytes()[:half])
    (out / name).unlink()
    hub.asked.clear()
    done = api.pull("org/small", out)
    assert hub.asked[-1] == ("GET", f"{COMMIT}/{name}", f"bytes={half}-")
    assert (done.fetched, done.files) == (sizes(hub.root)[name] - half, (name,))
    assert contents(out) == contents(hub.root)


def test_a_hub_that_gives_nothing_is_given_up_and_leaves_nothing(
    hub: Repository, tmp_path: Path
) -> None:
    hub.cut = 0
    with pytest.raises(ArtifactError, match="cannot reach the hub") as caught:
        api.pull("org/small", tmp_path / "deep" / "out")
    assert "same command continues" in caught.value.hint
    assert sum(method == "GET" for method, _, _ in hub.asked) == 1 + places.TRIES
    assert not any(tmp_path.iterdir())
    hub.cut = None
    api.pull("org/small", tmp_path / "deep" / "out")
    assert contents(tmp_path / "deep" / "out") == contents(hub.root)


def refuse(status: int, code: str) -> Callable[[Repository], None]:
    return lambda repo: setattr(repo, "refuse", (status, code))


@pytest.mark.parametrize(
    ("source", "break_it", "match", "hint"),
    [
        ("org/other", None, "no such model", "HF_TOKEN"),
        ("org/small@nope", None, "no revision 'nope'", "branch"),
        ("org/small", refuse(403, "GatedRepo"), "must be granted", "HF_TOKEN"),
        ("org/small", refuse(500, ""), "answered 500", "tries again"),
        ("org/small", lambda repo: setattr(repo, "commit", None), "which commit", "HF_ENDPOINT"),
        ("org/small", lambda repo: setattr(repo, "root", Path()), "not a bitnest", "compress"),
        ("org/sm all", None, "no hub id", "org/name"),
        ("org/small@", None, "no such directory", "revision"),
    ],
)
def test_what_the_hub_refuses_is_told(
    source: str, break_it: Any, match: str, hint: str, hub: Repository, tmp_path: Path
) -> None:
    if break_it is not None:
        break_it(hub)
    with pytest.raises(ArtifactError, match=match) as caught:
        api.pull(source, tmp_path / "out")
    assert hint in caught.value.hint
    assert not any(tmp_path.iterdir())


def test_a_repository_that_lacks_a_file(hub: Repository, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(hub.root, lacking)
    next(lacking.glob("*.w8.*")).unlink()
    hub.root = lacking
    with pytest.raises(ArtifactError, match=r"w8.*is missing there") as caught:
        api.pull("org/small", tmp_path / "out")
    assert "fewer bits" in caught.value.hint
    api.pull("org/small", tmp_path / "out", bits=4)  # takes over what came


def test_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    for endpoint, match in (
        ("http://127.0.0.1:9", "cannot reach the hub"),
        ("nonsense", "is no address"),
        ("http://[1", "is no address"),
    ):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(ArtifactError, match=match):
            api.pull("org/small", tmp_path / "out")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE"):
        api.pull("org/small", tmp_path / "out")
    assert not any(tmp_path.iterdir())
