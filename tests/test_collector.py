"""The collector, the memory plan and the refit at the edges that real models reach rarely."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitnest.api import summarise
from bitnest.calibrate.collector import Collector, add_moment, symmetric
from bitnest.formats import integer
from bitnest.manifest import SiteRecord
from bitnest.quantize import gptq as sweep
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.sites import Site


def collect(batches: list[list[torch.Tensor | None]]) -> Collector:
    modules = [nn.Linear(4, 4, bias=False) for _ in batches[0]]
    collector = Collector(
        [(f"experts.{i}", module) for i, module in enumerate(modules)], [], lambda: None
    )
    with collector, torch.no_grad():
        for batch in batches:
            for module, x in zip(modules, batch, strict=True):
                if x is not None:
                    module(x)
            collector.after_batch()
    return collector


def test_experts_without_tokens_in_the_first_batch_keep_hessians_of_their_own() -> None:
    a, b, c = torch.randn(10, 4), torch.randn(40, 4), torch.randn(50, 4)
    seen = collect([[torch.empty(0, 4), torch.empty(0, 4), None], [a, b, c]]).hessians
    assert [seen[f"experts.{i}"].tokens for i in range(3)] == [10, 40, 50]
    for i, x in enumerate((a, b, c)):
        assert torch.allclose(seen[f"experts.{i}"].mean(), x.T @ x / len(x), atol=1e-5)


def test_modules_that_read_one_tensor_share_one_hessian() -> None:
    x = torch.randn(6, 4)
    seen = collect([[x, x, x.clone()], [x, x, x.clone()]]).hessians
    assert seen["experts.0"] is seen["experts.1"]
    assert seen["experts.0"] is not seen["experts.2"]
    assert seen["experts.0"].tokens == 12


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_three_quarters_of_a_product_make_the_whole(width: int) -> None:
    x, w = torch.randn(50, width), torch.rand(50)
    total = torch.zeros(width, width)
    add_moment(total, x, w)
    expected = (x.double() * w.double()[:, None]).T @ x.double()
    assert torch.allclose(symmetric(total).double(), expected, atol=1e-4)


def test_refit_in_slices_of_rows_is_the_refit_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(2, 24, 64)
    x = torch.randn(2, 200, 64)
    h = x.transpose(1, 2) @ x / 200
    codec = BlockCodec(integer(3, 16))
    whole = sweep.gptq(w, h, codec)
    monkeypatch.setattr(sweep, "REFIT_BYTES", 4 * 16 * 2 * 5)  # five rows of 4 x 4 systems, twice
    sliced = sweep.gptq(w, h, codec)
    assert torch.allclose(whole.scales, sliced.scales, rtol=0.01)
    assert float(sliced.error.sum()) == pytest.approx(float(whole.error.sum()), rel=1e-3)


def test_an_expert_starved_in_one_projection_only_is_counted() -> None:
    def record(param: str, width: int) -> SiteRecord:
        name = f"model.layers.0.mlp.experts.0.{param}"
        site = Site(name, "expert", 0, 0, (32, width), "model.layers.0.mlp.experts", param)
        return SiteRecord(site, "int4-g16", 1, 0.0, 119, "packed")

    records = [record("gate_up_proj", 256), record("down_proj", 32)]
    manifest = {"files": {}, "recipe": {"min_tokens": None}, "source": {"bytes": 1}}
    artifact = SimpleNamespace(
        records=records, packed=lambda: records, manifest=manifest, path=Path()
    )
    result = summarise(artifact)  # type: ignore[arg-type]
    assert (result.starved, result.experts) == (1, 1)
