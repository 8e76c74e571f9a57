"""What a person can get wrong: one screen with what, where and hint, status 2, nothing left behind.

Most cases call the command's own entry point in this process; a few run the real command.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnest import safetensors_io
from bitnest.cli import main
from bitnest.quantize import compress as engine
from tests.tiny import CONTEXT, Builder

SCREEN = 24  # lines


class Place(NamedTuple):
    """A scratch directory holding a copy of a model, and calibration text."""

    root: Path
    model: Path
    text: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def listing(self) -> dict[str, int]:
        return {
            str(p.relative_to(self.root)): p.stat().st_mtime_ns if p.is_file() else 0
            for p in sorted(self.root.rglob("*"))
            if p.name != "out" or p.is_file()
        }

    def command(self, *more: str, model: str | Path | None = None) -> list[str]:
        """The arguments of a small compression."""
        return [
            "compress", str(model or self.model), "-o", str(self.out), "--data", str(self.text),
            "--samples", "4", "--length", "32", *more,
        ]  # fmt: skip


@pytest.fixture
def place(tiny: Builder, text: Path, tmp_path: Path) -> Place:
    """A sharded Mixtral and text, to damage."""
    shutil.copytree(tiny("mixtral"), tmp_path / "model")
    shutil.copy(text, tmp_path / "words.txt")
    return Place(tmp_path, tmp_path / "model", tmp_path / "words.txt")


@pytest.fixture
def refused(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command that must fail as a person may expect; returns stderr."""

    def run(*arguments: str) -> str:
        before = place.listing()
        monkeypatch.setattr(sys, "argv", ["bitnest", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        written = capsys.readouterr()
        check(stop.value.code, written.out, written.err)
        assert place.listing() == before, "something was left behind"
        return written.err

    return run


def check(code: Any, out: str, err: str) -> None:
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) <= SCREEN
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "  hint: " in err or "  where: " in err, err


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bitnest", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def change_tensor(model: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Replace one expert's matrix; returns its name."""
    for file in shards(model):
        tensors = load_file(file)
        for name in tensors:
            if "experts" in name:
                tensors[name] = change(tensors[name])
                save_file(tensors, file, metadata={"format": "pt"})
                return name
    raise AssertionError


def edit_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# The checkpoint


def test_missing_shard(place: Place, refused: Callable[..., str]) -> None:
    victim = shards(place.model)[1]
    victim.unlink()
    err = refused(*place.command())
    assert victim.name in err and "missing" in err


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "last-byte"])
def test_truncated_shard(keep: int, place: Place, refused: Callable[..., str]) -> None:
    victim = shards(place.model)[-1]
    os.truncate(victim, keep if keep >= 0 else victim.stat().st_size + keep)
    assert victim.name in refused(*place.command())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_weights_of_a_type_that_is_not_16_or_32_bit_float(
    dtype: torch.dtype, place: Place, refused: Callable[..., str]
) -> None:
    name = change_tensor(place.model, lambda t: t.to(dtype))
    err = refused(*place.command())
    assert name in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite(
    value: float, method: str, place: Place, refused: Callable[..., str]
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, -1] = value
        return tensor

    name = change_tensor(place.model, spoil)
    err = refused(*place.command("--method", method))
    assert name in err and "NaN" in err


def test_weight_of_another_shape(place: Place, refused: Callable[..., str]) -> None:
    name = change_tensor(place.model, lambda t: t[:, :-1].contiguous())
    assert name in refused(*place.command())


@pytest.mark.timeout(60)
def test_activations_that_overflow_do_not_hang(place: Place, refused: Callable[..., str]) -> None:
    for file in shards(place.model):
        tensors = {name: tensor * 1e20 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert "block 0" in refused(*place.command())


def test_index_names_a_tensor_the_shard_lacks(place: Place, refused: Callable[..., str]) -> None:
    victim = shards(place.model)[0]
    tensors = load_file(victim)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, victim, metadata={"format": "pt"})
    err = refused(*place.command())
    assert name in err and victim.name in err


def test_weights_the_model_needs_are_nowhere(place: Place, refused: Callable[..., str]) -> None:
    edit_json(place.model / "config.json", num_hidden_layers=3)
    assert "lacks" in refused(*place.command())


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\xff"])
def test_corrupted_config(content: str, place: Place, refused: Callable[..., str]) -> None:
    (place.model / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused(*place.command())


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_corrupted_index(content: str, place: Place, refused: Callable[..., str]) -> None:
    (place.model / "model.safetensors.index.json").write_text(content)
    refused(*place.command())


def test_no_config(place: Place, refused: Callable[..., str]) -> None:
    (place.model / "config.json").unlink()
    assert "config.json" in refused(*place.command())


@pytest.mark.parametrize("kind", ["starfish", None, ""])
def test_unknown_architecture(kind: str | None, place: Place, refused: Callable[..., str]) -> None:
    edit_json(place.model / "config.json", model_type=kind, architectures=["StarfishForCausalLM"])
    refused(*place.command())


def test_impossible_config_value(place: Place, refused: Callable[..., str]) -> None:
    edit_json(place.model / "config.json", hidden_size="wide")
    refused(*place.command())


def test_no_tokenizer(place: Place, refused: Callable[..., str]) -> None:
    for file in place.model.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(*place.command())


def test_damaged_tokenizer(place: Place, refused: Callable[..., str]) -> None:
    (place.model / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(*place.command())


def test_tokenizer_of_a_larger_vocabulary(place: Place, refused: Callable[..., str]) -> None:
    """Token numbers beyond the embedding would crash in the middle of the embedding lookup."""
    file = place.model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: v + (1000 if v else 0) for k, v in vocabulary.items()}
    file.write_text(json.dumps(content))
    assert "vocabulary" in refused(*place.command())


def test_pickle_only(place: Place, refused: Callable[..., str]) -> None:
    for file in (*shards(place.model), place.model / "model.safetensors.index.json"):
        file.unlink()
    (place.model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle" in refused(*place.command())


def test_no_weights(place: Place, refused: Callable[..., str]) -> None:
    for file in (*shards(place.model), place.model / "model.safetensors.index.json"):
        file.unlink()
    assert "no safetensors weights" in refused(*place.command())


def test_already_quantised(place: Place, refused: Callable[..., str]) -> None:
    edit_json(place.model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantised" in refused(*place.command())


def test_artifact_as_checkpoint(place: Place, refused: Callable[..., str]) -> None:
    from bitnest import api

    api.compress(place.model, place.root / "artifact", method="rtn")
    assert "already a bitnest artifact" in refused(*place.command(model=place.root / "artifact"))


def test_remote_code_without_permission(place: Place, refused: Callable[..., str]) -> None:
    ran = place.root / "ran"
    (place.model / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_json(
        place.model / "config.json",
        model_type="starfish",
        auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"},
    )
    assert "--trust-remote-code" in refused(*place.command())
    assert not ran.exists()


def test_remote_tokenizer_is_never_run_unasked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = place.root / "ran"
    (place.model / "tok.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_json(
        place.model / "tokenizer_config.json",
        tokenizer_class="Starfish",
        auto_map={"AutoTokenizer": ["tok.Starfish", None]},
    )
    monkeypatch.setattr(sys, "argv", ["bitnest", *place.command("-q")])
    with pytest.raises(SystemExit):
        main()  # the plain tokenizer.json may do instead, the code may not
    assert not ran.exists()


def test_no_such_directory(place: Place, refused: Callable[..., str]) -> None:
    assert "no such model" in refused(*place.command(model=place.root / "nothing"))


def test_file_as_model(place: Place, refused: Callable[..., str]) -> None:
    assert "is a file" in refused(*place.command(model=place.text))


def test_hub_id_without_network(place: Place) -> None:
    before = place.listing()
    environment = {
        **os.environ,
        "HF_HOME": str(place.root.parent / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = run_command(*place.command(model="nobody/nothing"), env=environment)
    check(done.returncode, done.stdout, done.stderr)
    assert "nobody/nothing" in done.stderr
    offline = run_command(
        *place.command(model="nobody/nothing"), env={**environment, "HF_HUB_OFFLINE": "1"}
    )
    check(offline.returncode, offline.stdout, offline.stderr)
    assert place.listing() == before


# The text


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_text(content: bytes, place: Place, refused: Callable[..., str]) -> None:
    place.text.write_bytes(content)
    assert "empty" in refused(*place.command())


def test_text_too_short(place: Place, refused: Callable[..., str]) -> None:
    place.text.write_text("only a few words")
    err = refused(*place.command())
    assert "too short" in err and "128 tokens" in err


def test_text_that_is_not_utf8(place: Place, refused: Callable[..., str]) -> None:
    place.text.write_bytes(b"gr\xfc\xdfe " * 500)
    assert "UTF-8" in refused(*place.command())


def test_missing_text(place: Place, refused: Callable[..., str]) -> None:
    place.text.unlink()
    assert str(place.text) in refused(*place.command())


def test_length_beyond_the_context(place: Place, refused: Callable[..., str]) -> None:
    assert f"{CONTEXT}" in refused(*place.command("--length", str(CONTEXT + 1)))


# The output


def test_output_directory_not_empty(place: Place, refused: Callable[..., str]) -> None:
    place.out.mkdir()
    (place.out / "precious.txt").write_text("kept")
    assert "in the way" in refused(*place.command())
    assert (place.out / "precious.txt").read_text() == "kept"


def test_output_is_a_file(place: Place, refused: Callable[..., str]) -> None:
    place.out.write_text("kept")
    assert "in the way" in refused(*place.command())


def test_output_below_a_file(place: Place, refused: Callable[..., str]) -> None:
    refused(*place.command("-o", str(place.text / "out")))


def test_output_over_the_model_itself(place: Place, refused: Callable[..., str]) -> None:
    assert "in the way" in refused(*place.command("-o", str(place.model)))


def test_disk_too_small_is_seen_before_work(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "bytes of disk" in refused(*place.command())


@pytest.mark.parametrize("after", [0, 1000, 60_000])
def test_disk_that_fills_up_while_writing(
    after: int, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is whole may stay to be resumed; a file cut short may not, nor an artifact."""
    written = 0
    file_bytes = safetensors_io._file_bytes

    def filling(*arguments: Any) -> Iterator[memoryview]:
        nonlocal written
        for chunk in file_bytes(*arguments):
            written += len(chunk)
            if written > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield chunk

    before = place.listing()
    monkeypatch.setattr(sys, "argv", ["bitnest", *place.command()])
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "_file_bytes", filling)
        with pytest.raises(SystemExit) as stop:
            main()
    streams = capsys.readouterr()
    check(stop.value.code, streams.out, streams.err)
    assert "No space left" in streams.err
    assert not place.out.exists()
    assert not list(place.root.rglob("*.tmp"))
    if after < 60_000:
        assert place.listing() == before
    with pytest.raises(SystemExit) as stop:
        main()  # there is space again
    assert stop.value.code == 0 and (place.out / "bitnest.json").exists()


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "bitnest-test", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_real_full_disk_while_writing(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space check is blinded, so that the kernel itself says the disk is full."""
    usage = shutil.disk_usage(place.root)
    with tmpfs(place.root / "small", "16k"):  # not even one block fits
        monkeypatch.setattr(engine.shutil, "disk_usage", lambda _: usage)
        assert "No space left" in refused(*place.command("-o", str(place.root / "small" / "out")))
        assert not any((place.root / "small").iterdir())


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_real_small_disk_before_writing(place: Place, refused: Callable[..., str]) -> None:
    with tmpfs(place.root / "small", "64k"):
        assert "bytes of disk" in refused(*place.command("-o", str(place.root / "small" / "out")))
        assert not any((place.root / "small").iterdir())


def obey_permissions() -> None:
    """Root reads everything; give up the two capabilities that let it."""
    if os.getuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("victim", ["shard", "config", "text", "output"])
def test_permission_denied(victim: str, place: Place) -> None:
    target, mode = {
        "shard": (shards(place.model)[0], 0),
        "config": (place.model / "config.json", 0),
        "text": (place.text, 0),
        "output": (place.root, 0o555),
    }[victim]
    before = place.listing()
    os.chmod(target, mode)
    done = run_command(*place.command(), preexec_fn=obey_permissions)
    os.chmod(target, 0o755)
    if done.returncode == 0:
        pytest.skip("permissions cannot be taken from this user")
    check(done.returncode, done.stdout, done.stderr)
    assert "ermission denied" in done.stderr and str(target) in done.stderr
    assert place.listing() == before


# The options


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "0"],
        ["--bits", "17"],
        ["--bits", "0.5"],
        ["--bits", "3", "--size", "1MB"],
        ["--size", "1KB"],
        ["--size", "large"],
        ["--max-kl", "0"],
        ["--max-kl", "-1"],
        ["--min-agreement", "120%"],
        ["--min-agreement", "most"],
        ["--bits", "3", "--context", "100"],
        ["--policy", "luck"],
        ["--target", "abacus"],
        ["--candidate", "int9-g128"],
        ["--plan", "nowhere.yaml"],
        ["--recipe", "nowhere.yaml"],
        ["--group", "64", "--size", "1MB"],
        ["--bits", "-4"],
        ["--bits", "nan"],
        ["--bits", "inf"],
        ["--group", "7"],
        ["--group", "0"],
        ["--group", "256"],
        ["--format", "int9-g128"],
        ["--format", "float4"],
        ["--format", "int4-g0128x"],
        ["--format", "int4-g32", "--bits", "4"],
        ["--format", "int4-g32", "--group", "32"],
        ["--method", "magic"],
        ["--damp", "0"],
        ["--damp", "2"],
        ["--expert-weighting", "loud"],
        ["--min-tokens", "-1"],
        ["--rule", "no equals sign"],
        ["--rule", "*=int0-g128"],
        ["--rule", "re:(=int4-g32"],
        ["--rule", "kind:eggs=int4-g32"],
        ["--rule", "*.nothing.*=int8-g32"],
        ["--keep", "*.nothing.*"],
        ["--memory", "lots"],
        ["--memory", "1MiB"],
        ["--device", "abacus"],
        ["--device", "cuda:99"],
        ["--samples", "100000"],
    ],
    ids=" ".join,
)
def test_impossible_options(options: list[str], place: Place, refused: Callable[..., str]) -> None:
    err = refused(*place.command(*options))
    assert "hint: " in err


@pytest.mark.parametrize("options", [["--bits", "four"], ["--samples", "0"], ["--nonsense"]])
def test_options_that_do_not_parse(options: list[str], place: Place) -> None:
    done = run_command(*place.command(*options))
    assert done.returncode == 2
    assert options[0] in done.stderr and "--help" in done.stderr
    assert "Traceback" not in done.stderr
    assert not place.out.exists()


def test_the_real_command_ends_with_status_two(place: Place) -> None:
    before = place.listing()
    done = run_command(*place.command("--bits", "0"))
    check(done.returncode, done.stdout, done.stderr)
    assert done.stderr.splitlines()[-1].startswith("  hint: ")
    assert place.listing() == before


# Opening what is not there


@pytest.mark.parametrize("verb", ["inspect", "eval", "export"])
def test_other_verbs_refuse_what_they_cannot_open(
    verb: str, place: Place, refused: Callable[..., str]
) -> None:
    missing = str(place.root / "nothing")
    more = ["-o", str(place.out)] if verb == "export" else []
    refused(verb, missing, *more)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"format_version": 99}', "[]"])
@pytest.mark.parametrize("verb", ["inspect", "export"])
def test_damaged_manifest(
    verb: str, content: str, place: Place, refused: Callable[..., str]
) -> None:
    (place.model / "bitnest.json").write_text(content)
    more = ["-o", str(place.out)] if verb == "export" else []
    refused(verb, str(place.model), *more)
