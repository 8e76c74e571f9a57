"""extend: more candidate formats for statistics that kept their Hessians; the model is not run.

    bitnest analyze MODEL -o A --keep-hessians
    bitnest analyze MODEL --reuse A --format nvfp4 --format mxfp4 -o B

B is A with the new formats appended: usage, importance and probes are A's, the new formats are
solved against A's Hessians. A block's weights are in memory at a time. Statistics with diagonal
Hessians need nothing kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnest.calibrate.blocks import EXPERT_SUMS, read_moments
from bitnest.calibrate.ends import Ends, score_ends
from bitnest.calibrate.fisher import Fisher
from bitnest.calibrate.observe import ExpertSums, Input
from bitnest.calibrate.sensitivity import Scored, Sensitivity
from bitnest.errors import StatisticsError
from bitnest.formats import PackedFormat
from bitnest.progress import Progress
from bitnest.quantize.compress import Job
from bitnest.quantize.memory import Budget, release
from bitnest.quantize.solve import Options
from bitnest.sites import Site, is_tied
from bitnest.statistics import Statistics, StatisticsWriter, finished_statistics, is_ends
from bitnest.statistics.header import HEADER
from bitnest.workdir import sha256_file, storage_error


@dataclass(frozen=True)
class Stored:
    """What `Sensitivity` needs of an observed block."""

    inputs: dict[str, Input]
    labels: int


def extend(
    job: Job,
    statistics: Statistics,
    formats: Sequence[PackedFormat],
    out: Path,
    *,
    fresh: bool,
    progress: Progress,
) -> Statistics:
    """`statistics` with `formats` appended to its candidates, into the directory `out`.

    Raises:
        StatisticsError: of another model, without Hessians, damaged, or with one of the formats
            already.
    """
    _check(statistics, formats)
    statistics.verify()
    progress.phase("checking weights", job.checkpoint.nbytes)
    source = job.checkpoint.scan(progress.step)
    if statistics.header["source"]["sha256"] != source:
        raise StatisticsError(
            "the statistics are of another model: its weights differ",
            where=str(statistics.path),
            hint="bitnest analyze this model",
        )
    compute = str(job.compute).removeprefix("torch.")
    if statistics.header["compute"] != compute:
        raise StatisticsError(
            f"the statistics were computed in {statistics.header['compute']}, not {compute}",
            where=str(statistics.path),
            hint=f"--compute {statistics.header['compute']}",
        )
    fingerprint = {
        "source": source,
        "reuses": sha256_file(statistics.path / HEADER),
        "formats": [fmt.name for fmt in formats],
    }
    done = finished_statistics(out, fingerprint)
    if done is not None:
        return done
    writer = StatisticsWriter(out, fingerprint, len(statistics.layers))
    try:
        first = writer.begin(fresh=fresh)
        progress.phase("scoring formats", len(statistics.layers))
        progress.step(first)
        scorer = _Scorer(job, statistics, formats)
        for layer in range(first, len(statistics.layers)):
            with torch.no_grad():
                tensors = scorer.tensors(layer)
            record = {k: v for k, v in statistics.layers[layer].items() if k != "file"}
            writer.write_block(layer, record, tensors)
            progress.step()
        names = [*statistics.formats, *(fmt.name for fmt in formats)]
        options = {**statistics.header["options"], "formats": names}
        kept = {
            k: v for k, v in statistics.header.items() if k not in {"version", "layers", "files"}
        }
        header = {**kept, "formats": names, "options": options, "fingerprint": fingerprint}
        return writer.finish(header)
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        writer.close()


def _check(statistics: Statistics, formats: Sequence[PackedFormat]) -> None:
    known = [fmt.name for fmt in formats if fmt.name in statistics.formats]
    if known or not formats:
        raise StatisticsError(
            f"'{known[0]}' is a candidate already" if known else "no format to add",
            where=str(statistics.path),
            hint="name --format once for every new one",
        )
    full = statistics.header["hessian"] == "full"
    if full and not statistics.header["options"]["keep_hessians"]:
        raise StatisticsError(
            "these statistics did not keep their Hessians",
            where=str(statistics.path),
            hint="bitnest analyze with --keep-hessians once, or again with all formats",
        )
    if not statistics.formats:
        raise StatisticsError(
            "these statistics hold usage only",
            where=str(statistics.path),
            hint="bitnest analyze with a --format or two",
        )


class _Scorer:
    """Scores blocks from what is stored of them."""

    def __init__(self, job: Job, statistics: Statistics, formats: Sequence[PackedFormat]) -> None:
        self.job, self.statistics = job, statistics
        self.budget = Budget.plan(job.skeleton, job.sites, job.memory)
        asked = statistics.header["options"]
        half = torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16
        options = Options(
            asked["method"], asked["damp"], asked["weighting"], asked["min_tokens"],
            asked["clip"], half, prune=statistics.prune,
        )  # fmt: skip
        self.sensitivity = Sensitivity(
            formats, options, None, self._parameter, lambda _site, _number, _weight: None
        )

    def tensors(self, layer: int) -> dict[str, torch.Tensor]:
        """All of the block's tensors, with the new formats' errors and losses appended."""
        statistics, skeleton = self.statistics, self.job.skeleton
        sites = statistics.sites_of(layer)
        if is_ends(statistics.layers[layer]):
            scored = {item.site.name: item for item in self._score_ends(layer, sites)}
        else:
            prefix = f"{skeleton.prefix}.{layer}"
            skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
            self.sensitivity.fisher = self._fisher(layer)
            scored = {item.site.name: item for item in self._score(layer, sites)}
            skeleton.drop(prefix)
        release()
        found = {name: statistics.read(layer, name) for name in statistics.names(layer)}
        own = [scored[site.name] for site in sites]
        if own:
            error = torch.stack([item.error for item in own]).float()
            found["sites.error"] = torch.cat([found["sites.error"], error], dim=1)
        if "sites.loss" in found:
            loss = torch.stack([item.loss for item in own if item.loss is not None])
            found["sites.loss"] = torch.cat([found["sites.loss"], loss], dim=1)
        return found

    def _score_ends(self, layer: int, sites: Sequence[Site]) -> Iterator[Scored]:
        skeleton, model = self.job.skeleton, self.job.skeleton.model
        inputs = self._inputs(layer)
        ends = Ends(
            sites=sites,
            tied=is_tied(skeleton),
            head=skeleton.path_of(model.get_output_embeddings()) or "",
            table=skeleton.path_of(model.get_input_embeddings()) or "",
            tokens=self.statistics.read(layer, "lookups"),
            read=next(iter(inputs.values()), None),
        )
        return score_ends(
            ends, lambda site: skeleton.read(site.path), self.sensitivity.formats,
            self.sensitivity.options, self._fisher(layer), self.budget.ends, self.job.device,
        )  # fmt: skip

    def _inputs(self, layer: int) -> dict[str, Input]:
        """What linear layers were observed to read, by the name of each input."""
        statistics, inputs = self.statistics, {}
        for i, item in enumerate(statistics.layers[layer]["inputs"]):
            moments = read_moments(statistics, layer, f"inputs.{i}")
            hessian = self._hessian(layer, f"inputs.{i}.hessian")
            weight = moments.tokens.double()
            if statistics.has(layer, f"inputs.{i}.weight"):
                weight = statistics.read(layer, f"inputs.{i}.weight")
            inputs[item["name"]] = Input(list(item["readers"]), moments, hessian, weight)
        return inputs

    def _score(self, layer: int, sites: Sequence[Site]) -> Iterator[Scored]:
        statistics, record = self.statistics, self.statistics.layers[layer]
        fused = {item["name"] for item in record["experts"]}
        inputs = self._inputs(layer)
        linears = [site for site in sites if site.module not in fused]
        yield from self.sensitivity.linears(linears, Stored(inputs, len(statistics.labels)))
        for i, item in enumerate(record["experts"]):
            own = [site for site in sites if site.module == item["name"]]
            module = self.job.skeleton.model.get_submodule(item["name"])
            sums = self._sums(layer, f"experts.{i}", item)
            rows = statistics.read(layer, f"experts.{i}.rows")
            numbers = sorted({site.expert for site in own if site.expert is not None})
            chunk = self.budget.expert_chunk(own)
            for start in range(0, len(numbers), chunk):
                part = numbers[start : start + chunk]
                yield from self.sensitivity.experts(own, module, sums, rows, part)

    def _sums(self, layer: int, prefix: str, item: dict[str, Any]) -> ExpertSums:
        read = self.statistics.read
        sums: dict[str, Any] = {
            name: read(layer, f"{prefix}.{name}")
            if self.statistics.has(layer, f"{prefix}.{name}")
            else None
            for name in EXPERT_SUMS
        }
        up, down = (self._hessian(layer, f"{prefix}.hessian.{key}") for key in ("up", "down"))
        hessians = {}
        if up is not None and down is not None:
            hessians = {e: (up[:, e], down[:, e]) for e in range(item["experts"])}
        return ExpertSums(
            top_k=item["top_k"],
            full=bool(hessians),
            up=read_moments(self.statistics, layer, f"{prefix}.up"),
            down=read_moments(self.statistics, layer, f"{prefix}.down"),
            hessians=hessians,
            **sums,
        )

    def _hessian(self, layer: int, name: str) -> torch.Tensor | None:
        if not self.statistics.has(layer, name):
            return None
        return self.statistics.read(layer, name).to(self.job.device)

    def _fisher(self, layer: int) -> Fisher | None:
        importance = self.statistics.header["importance"]
        if importance is None or importance["kind"] == "probes":
            return None
        rows = {
            name.removeprefix("fisher."): self.statistics.read(layer, name)
            for name in self.statistics.names(layer)
            if name.startswith("fisher.")
        }
        return Fisher(rows, torch.tensor(importance["predictions"]))

    def _parameter(self, site: Site) -> torch.Tensor:
        return self.job.skeleton.model.get_parameter(site.path).data
