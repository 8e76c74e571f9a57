"""The error of weights, of inputs and of the KV cache, each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitnest import api
from bitnest.errors import BitnestError
from tests.tiny import Builder

QUICK: dict[str, Any] = {"samples": 4, "length": 32}
SHORT: dict[str, Any] = {"window": 32, "windows": 2}


@pytest.fixture(scope="module")
def both(tiny: Builder, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "both"
    api.compress(tiny("qwen3_moe"), out, data=[str(text)], format="int4-g32@perm",
                 inputs="int4-g32", kv="int4-w0", **QUICK)  # fmt: skip
    return out


def kl(row: Any) -> float:
    return float(row.scores[0].kl.mean)


def test_parts_are_what_artifacts_of_one_part_lose(
    both: Path, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    base = tiny("qwen3_moe")
    report = api.evaluate([both], against=base, data=[str(text)], split=True, **SHORT)
    names = [row.model.partition(": ")[2] for row in report.rows]
    assert names[2:4] == ["weights alone", "inputs alone"] and names[4].startswith("kv int4")
    whole, weights, inputs, cache = map(kl, report.rows[1:])
    assert whole > max(weights, inputs, cache) > 0
    api.compress(base, tmp_path / "w", data=[str(text)], format="int4-g32@perm", **QUICK)
    alone = api.evaluate([tmp_path / "w", base], against=base, data=[str(text)], **SHORT)
    # weights of later blocks were fitted to what rounded inputs gave: not quite the same
    assert weights == pytest.approx(kl(alone.rows[1]), rel=0.3)
    with_cache = api.evaluate([base], against=base, kv=["int4-w0"], data=[str(text)], **SHORT)
    assert cache == pytest.approx(kl(with_cache.rows[1]), rel=1e-6)
    api.compress(base, tmp_path / "i", data=[str(text)], format="int8-g32@perm",
                 inputs="int4-g32", **QUICK)  # fmt: skip
    fine = api.evaluate([tmp_path / "i"], against=base, data=[str(text)], **SHORT)
    assert inputs == pytest.approx(kl(fine.rows[1]), rel=0.1)


def test_what_has_no_parts_is_refused(
    both: Path, tiny: Builder, text: Path, tmp_path: Path
) -> None:
    base = tiny("qwen3_moe")
    api.compress(base, tmp_path / "w", data=[str(text)], format="int8-channel", **QUICK)
    for models, against, more in (
        ([both], None, {}),
        ([both], both, {}),
        ([tmp_path / "w"], base, {}),
        ([both], base, {"without": ["0:1"]}),
    ):
        with pytest.raises(BitnestError) as caught:
            api.evaluate(models, against=against, data=[str(text)], split=True, **SHORT, **more)
        assert caught.value.hint


def test_inputs_of_a_folded_artifact_are_not_looked_for_in_the_base(
    tiny: Builder, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny("qwen3_moe")
    api.compress(base, tmp_path / "f", data=[str(text)], format="int8-channel", inputs="int4-g32",
                 fold=["smooth-free=0.5"], **QUICK)  # fmt: skip
    report = api.evaluate([tmp_path / "f"], against=base, data=[str(text)], split=True, **SHORT)
    assert [row.model.partition(": ")[2] for row in report.rows] == ["", "", "weights alone"]
    assert "folded" in caplog.text
