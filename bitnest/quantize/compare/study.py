"""study: the loop over blocks and sites, one block in memory at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.collector import Collector, Routed, reference_experts
from bitnest.calibrate.stream import Stream
from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.formats import PackedFormat
from bitnest.kernels.experts import up_name
from bitnest.progress import Progress, Silent
from bitnest.quantize.block import ExpertInputs
from bitnest.quantize.compare.inputs import RowSample, Sampler, expert_rows
from bitnest.quantize.compare.measure import Measure
from bitnest.quantize.compare.scores import Comparison
from bitnest.quantize.compare.select import matching
from bitnest.quantize.compress import Job
from bitnest.quantize.memory import Budget, release
from bitnest.sites import KINDS, Site, is_experts

PER_KIND = 64


def compare(
    job: Job,
    formats: Sequence[PackedFormat],
    sites: Sequence[Site],
    *,
    pattern: str | None = None,
    per_kind: int = PER_KIND,
    clip: bool = True,
    gptq: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Measure `formats` on `sites`, which `choose_sites` chose by pattern and per_kind.

    Without job.calibration weights are all that is looked at, and only those of `sites` are read.
    clip: search the clipping of every scale, as compress does. gptq: give GPTQ's error too.

    Raises:
        BitnestError: NaN in the weights, or a model that cannot be streamed.
    """
    started = time.monotonic()
    progress = progress or Silent()
    budget = Budget.plan(job.skeleton, job.sites, job.memory)
    kinds = [site.kind for site in sites]
    measure = Measure(formats, kinds, half=half_of(job), clip=clip, gptq=gptq)
    study = _Study(job, sites, measure, progress)
    with torch.no_grad():
        if job.calibration is None:
            study.weights_only()
        else:
            progress.phase("checking weights", job.checkpoint.nbytes)
            job.checkpoint.scan(progress.step)
            study.with_inputs(job.calibration.tokens, budget)
    totals = Counter(site.kind for site in matching(job.sites, pattern))
    known = [kind for kind in KINDS if kind in measure.tallies]
    calibration = job.calibration
    return Comparison(
        model=str(job.checkpoint.path),
        architecture=type(job.skeleton.model).__name__,
        clip=clip,
        gptq=gptq,
        per_kind=per_kind,
        calibration=None if calibration is None else calibration.counts,
        length=None if calibration is None else calibration.tokens.shape[1],
        kinds=tuple(measure.tallies[kind].report(kind, totals[kind], gptq) for kind in known),
        seconds=time.monotonic() - started,
    )


def half_of(job: Job) -> torch.dtype:
    """Stored type of 16-bit scales."""
    return torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16


class _Study:
    """Feeds `measure` with every site's matrix and what it reads."""

    def __init__(
        self, job: Job, sites: Sequence[Site], measure: Measure, progress: Progress
    ) -> None:
        self.job, self.measure, self.progress = job, measure, progress
        self.skeleton = job.skeleton
        self.layers: dict[int, list[Site]] = {}
        for site in sites:
            self.layers.setdefault(site.layer, []).append(site)
        self.steps = len(sites) * len(measure.formats)

    def weights_only(self) -> None:
        """Measure with no inputs, reading one module at a time."""
        self.progress.phase("comparing formats", self.steps)
        for layer in sorted(self.layers):
            modules: dict[str, list[Site]] = {}
            for site in self.layers[layer]:
                modules.setdefault(site.module, []).append(site)
            for module, own in modules.items():
                self.skeleton.fill(module, dtype=self.job.compute, device=self.job.device)
                for site in own:
                    self._site(site, None)
                self.skeleton.drop(module)
            release()

    def with_inputs(self, tokens: torch.Tensor, budget: Budget) -> None:
        """Send `tokens` through block after block, measuring each with what it reads."""
        self.progress.phase("comparing formats", self.steps)
        try:
            stream = Stream(
                self.skeleton,
                tokens,
                dtype=self.job.compute,
                device=self.job.device,
                memory_limit=budget.hidden,
            )
            for layer in range(max(self.layers) + 1):
                prefix = f"{self.skeleton.prefix}.{layer}"
                self.progress.step(0, note=f"block {layer}")
                self.skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
                self._block(layer, prefix, stream)
                self.skeleton.drop(prefix)
                release()
        except UnsupportedModel as error:
            hint = error.hint.replace("--method rtn", "--no-data")
            raise UnsupportedModel(error.what, where=error.where, hint=hint) from error

    def _block(self, layer: int, prefix: str, stream: Stream) -> None:
        sites = self.layers.get(layer, [])
        block = self.skeleton.blocks[layer]
        modules = dict(block.named_modules(prefix=prefix))
        fused = {s.module for s in sites if is_experts(modules[s.module])}
        linears = [(name, modules[name]) for name in modules if name in {s.module for s in sites}]
        linears = [(name, module) for name, module in linears if name not in fused]
        collector = Collector(
            linears,
            [(name, modules[name]) for name in sorted(fused)],
            partial(Routed, stream.tokens, stream.allocate),
        )
        sampler = Sampler(linears, collector)
        if sites:
            with collector, sampler:
                stream.run(layer, keep=False, after_batch=collector.after_batch)
        self._linears([site for site in sites if site.module not in fused], collector, sampler)
        for name in sorted(fused):
            own = [site for site in sites if site.module == name]
            self._experts(own, modules[name], collector.routed.pop(name))
        if layer < max(self.layers):
            with reference_experts(m for m in block.modules() if is_experts(m)):
                stream.run(layer, keep=True)

    def _linears(self, sites: Sequence[Site], collector: Collector, sampler: Sampler) -> None:
        """Sites that are layers of their own; an input that several of a kind share, once."""
        known: set[tuple[str, int]] = set()
        for site in sites:
            seen = collector.hessians.get(site.module)
            self._site(site, seen.mean() if seen is not None and seen.tokens else None)
            sample: RowSample | None = sampler.samples.get(site.module)
            if sample is not None and (site.kind, id(sample)) not in known:
                known.add((site.kind, id(sample)))
                self.measure.inputs(site.kind, sample.rows)

    def _experts(self, sites: Sequence[Site], module: Any, routed: Routed) -> None:
        """Sites of one layer's fused experts; gate and up of an expert share one H."""
        inputs = ExpertInputs(*routed.join(), module, self.measure.options, self.job.device)
        together: dict[tuple[int, bool], list[Site]] = {}
        for site in sites:
            assert site.expert is not None
            together.setdefault((site.expert, site.param == "down_proj"), []).append(site)
        for (expert, down), own in together.items():
            hessian = inputs.hessian(expert, "down_proj" if down else up_name(module))
            for site in own:
                self._site(site, hessian, starved=inputs.count(expert) < site.shape[1])
            self.measure.inputs(own[0].kind, expert_rows(inputs, expert, down))

    def _site(self, site: Site, hessian: torch.Tensor | None, *, starved: bool = False) -> None:
        tally = self.measure.tallies[site.kind]
        tally.starved += starved
        heard = self.measure.weight(site.kind, self._weight(site), hessian, self.progress)
        tally.silent += not heard and self.job.calibration is not None

    def _weight(self, site: Site) -> torch.Tensor:
        """The site's matrix, (1, O, I) float32."""
        parameter = self.skeleton.model.get_parameter(site.path).data
        weight = site.view(parameter).float()[None]
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"'{site.name}' holds NaN or infinite values",
                where=str(self.job.checkpoint.path),
                hint="the checkpoint is damaged or training diverged",
            )
        return weight
