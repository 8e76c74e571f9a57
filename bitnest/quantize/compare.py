"""compare: how far every format is from a model's own weights, by kind of site, and why.

Every chosen site is rounded to nearest in every format, and nothing is changed in the model:

    QSNR     10 log10(sum w^2 / sum (w - w_hat)^2) in dB, more is better
    H error  tr(dW H dW^T) / tr(W H W^T), the share of its output energy a site would lose
    kappa    absmax / RMS of a block of weights, its crest factor: 1 .. sqrt(block)

kappa is measured as the weights are and after a Hadamard rotation of the block's own size. By
INT-vs-FP (Chen et al., 2025) integers beat floats of the same width where kappa is under a limit.
Blocks differ, so one kappa has to stand for many: an integer whose step is absmax / Q loses

    sum of n step^2 / 12 = sum of e kappa^2 / (12 Q^2)       e = sum w^2, n = length of a block

so it is the root of the mean kappa^2 weighted by e, the effective kappa. (The plain mean is smaller
and lets the integer win too often.) Its verdict stands beside the QSNRs measured. The limits were
derived for scales that cover the largest weight of a block, which is what `clip=False` measures.

Over the sites of a kind, relative noise and H error are means weighted by parameters; QSNR is the
mean noise in dB. Blocks without a weight other than zero have no kappa.

Left out: GPTQ (`compress` says what is left then), activations, figures for single sites, and the
one global scale that compress gives NV matrices which engines fuse: each has its own here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from bitnest.calibrate.collector import Collector, Routed, reference_experts
from bitnest.calibrate.stream import Stream
from bitnest.errors import CheckpointError, FormatError, RecipeError, UnsupportedModel
from bitnest.formats import DenseFormat, PackedFormat, parse_format
from bitnest.formats.catalogue import UNIFORM, base_family
from bitnest.kernels.experts import up_name
from bitnest.kernels.hadamard import rotate
from bitnest.quantize.block import ExpertInputs
from bitnest.quantize.compress import Job, Progress, Silent
from bitnest.quantize.memory import Budget, release
from bitnest.quantize.solve import Options, needs_statistics, solve, weighted_error
from bitnest.recipe import Rule
from bitnest.sites import KINDS, Site, is_experts

BLOCKS = (16, 32, 128)  # of which crest factors are measured
BINS = 4096  # of the histogram that holds them, from 1 to sqrt(block)
PER_KIND = 64
GOLDEN = (5**0.5 - 1) / 2
PAIRS = (
    ("mxint8", "mxfp8", 32, 7.55),
    ("mxint6", "mxfp6", 32, 1.96),
    ("mxint4", "mxfp4", 32, 2.04),
    ("nvint4", "nvfp4", 16, 2.39),
)  # integer, float, block, and the kappa under which INT-vs-FP says the integer wins


@dataclass(frozen=True)
class FormatScore:
    """One format on one kind of site.

    qsnr: dB, None if nothing was lost at all. h_error: None without inputs. bits_per_weight: of
    these sites, everything stored counted.
    """

    format: str
    family: str
    bits_per_weight: float
    qsnr: float | None
    h_error: float | None


@dataclass(frozen=True)
class Crest:
    """kappa over all blocks of a kind. rotated: after a Hadamard rotation of that block size.

    effective: the root of the mean of kappa^2, blocks weighted by their sum w^2, sites by
    parameters.
    """

    block: int
    rotated: bool
    blocks: int
    mean: float
    median: float
    p99: float
    effective: float


@dataclass(frozen=True)
class Verdict:
    """Integer against float at equal width.

    kappa: effective, of the blocks that share a scale. limit: of INT-vs-FP. says: its verdict, int
    or fp. measured: whose QSNR is higher. qsnr_gain: the integer's QSNR less the float's, dB.
    h_gain: the same of the H error, 10 log10(float / integer).
    """

    integer: str
    floating: str
    kappa: float
    limit: float
    says: str
    measured: str
    qsnr_gain: float
    h_gain: float | None


@dataclass(frozen=True)
class KindReport:
    """All formats on one kind of site.

    sites: measured, of `total`. starved: those whose H leans on the layer's inputs, their expert
    having seen too few. silent: those left out of the H error, because they saw no input or give
    no output.
    """

    kind: str
    sites: int
    total: int
    parameters: int
    starved: int
    silent: int
    scores: tuple[FormatScore, ...]
    crests: tuple[Crest, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Comparison:
    """A finished study. calibration: labels with their samples, None if no data was used."""

    model: str
    architecture: str
    clip: bool
    per_kind: int
    calibration: dict[str, int] | None
    length: int | None
    kinds: tuple[KindReport, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def parse_formats(names: Sequence[str], *, data: bool) -> list[PackedFormat]:
    """The formats spelt `names`, each once; the catalogue's uniform ones if there are none.

    data: whether there will be inputs to fit to.

    Raises:
        FormatError, RecipeError: no such format, or one that needs inputs.
    """
    found: dict[str, PackedFormat] = {}
    for name in names or UNIFORM:
        fmt = parse_format(name)
        if isinstance(fmt, DenseFormat):
            raise FormatError("dense weights have no error to compare", hint="leave it out")
        if not data and needs_statistics(fmt):
            raise RecipeError(
                f"'{fmt.name}' is fitted to inputs, and --no-data has none",
                hint="leave out --no-data, or this format",
            )
        found[fmt.name] = fmt
    return list(found.values())


def choose_sites(sites: Sequence[Site], pattern: str | None, per_kind: int) -> list[Site]:
    """At most `per_kind` sites of each kind, one of each projection at least, in the model's order.

    pattern: as in a recipe's rules; without one routers stay out. A kind's projections (q, k, up,
    down ...) are sampled alike; see `_spread`.

    Raises:
        RecipeError: no site matches.
    """
    if per_kind < 1:
        raise RecipeError(f"{per_kind} sites of a kind are nothing to measure")
    roles: dict[tuple[str, str], list[Site]] = {}
    for site in matching(sites, pattern):
        roles.setdefault((site.kind, site.name.rpartition(".")[2]), []).append(site)
    totals: Counter[str] = Counter()
    for (kind, _), own in roles.items():
        totals[kind] += len(own)
    chosen: set[str] = set()
    for (kind, _), own in roles.items():
        share = len(own) * min(per_kind, totals[kind]) // totals[kind]
        chosen.update(site.name for site in _spread(own, max(1, share)))
    return [site for site in sites if site.name in chosen]


def matching(sites: Sequence[Site], pattern: str | None) -> list[Site]:
    """The sites `choose_sites` chooses from.

    Raises:
        RecipeError: none.
    """
    if pattern is None:
        found = [site for site in sites if site.kind != "router"]
    else:
        matches = Rule(pattern, "dense").matcher()
        found = [site for site in sites if matches(site)]
    if not found:
        raise RecipeError(
            f"no site matches '{pattern or '*'}'",
            hint="bitnest inspect MODEL lists every site by name",
        )
    return found


def _spread(sites: list[Site], count: int) -> list[Site]:
    """`count` sites, layers at even steps; within them experts by the golden ratio, so that no
    step of one falls in with the number of the other."""
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    order = [layer for layer in sorted(layers) for _ in layers[layer]]
    taken: dict[str, Site] = {}
    for i in range(count):
        members = layers[order[int((i + 0.5) * len(sites) / count)]]
        place = int(len(members) * (i * GOLDEN % 1))
        while members[place % len(members)].name in taken:
            place += 1
        site = members[place % len(members)]
        taken[site.name] = site
    return list(taken.values())


def crest_factors(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """kappa and sum w^2 of every block of each row of (O, I), the last of which may be short.

    Blocks of zeros are left out. The sums are in units of the largest weight squared.
    """
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -columns % block)).unflatten(1, (-1, block))
    lengths = torch.full((padded.shape[1],), float(block), device=weight.device)
    lengths[-1] = (columns - 1) % block + 1
    peak = padded.abs().amax(2, keepdim=True)
    energy = (padded / peak).square_().sum(2)  # in units of the block's own largest: no underflow
    peak = peak.squeeze(2)
    there = peak > 0
    return (lengths / energy).sqrt()[there], (energy * (peak / peak.max()).square())[there]


class _CrestTally:
    """A histogram of kappa over [1, sqrt(block)], from which its statistics are read."""

    def __init__(self, block: int, rotated: bool) -> None:
        self.block, self.rotated = block, rotated
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.total = 0.0
        self.squares, self.numel = 0.0, 0  # kappa^2 weighted by energy, times weights; weights

    def add(self, weight: torch.Tensor) -> None:
        """Count the blocks of one matrix (O, I)."""
        w = rotate(weight, self.block) if self.rotated else weight
        kappa, energy = crest_factors(w, self.block)
        if not len(kappa):
            return
        place = (kappa - 1) * (BINS / (self.block**0.5 - 1))
        found = place.long().clamp_(0, BINS - 1)
        self.counts += torch.bincount(found, minlength=BINS).cpu()
        self.total += float(kappa.double().sum())
        energy = energy.double()
        self.squares += w.numel() * float((energy * kappa.square()).sum() / energy.sum())
        self.numel += w.numel()

    def result(self) -> Crest | None:
        """Its statistics; None of no block."""
        blocks = int(self.counts.sum())
        if blocks == 0:
            return None
        return Crest(
            block=self.block,
            rotated=self.rotated,
            blocks=blocks,
            mean=self.total / blocks,
            median=self._at(0.5),
            p99=self._at(0.99),
            effective=math.sqrt(self.squares / self.numel),
        )

    def _at(self, share: float) -> float:
        cumulative = self.counts.cumsum(0)
        wanted = share * int(cumulative[-1])
        place = int((cumulative < wanted).sum())
        inside = (wanted - int(cumulative[place] - self.counts[place])) / int(self.counts[place])
        return 1 + (place + inside) * (self.block**0.5 - 1) / BINS


@dataclass
class _Sum:
    """One format's sums over sites, weighted by parameters."""

    nbytes: int = 0
    noise: float = 0.0
    loss: float = 0.0


@dataclass
class _KindSums:
    """What is gathered of one kind. numel: of all sites. heard: of those with inputs. sounding: of
    those that are not all zero."""

    formats: dict[str, _Sum]
    sites: int = 0
    numel: int = 0
    sounding: int = 0
    heard: int = 0
    starved: int = 0
    silent: int = 0
    crests: list[_CrestTally] = field(
        default_factory=lambda: [_CrestTally(b, r) for b in BLOCKS for r in (False, True)]
    )

    def report(self, kind: str, total: int, formats: Sequence[PackedFormat]) -> KindReport:
        """Means of the sums."""
        scores = tuple(self._score(fmt) for fmt in formats)
        crests = tuple(found for tally in self.crests if (found := tally.result()) is not None)
        return KindReport(
            kind=kind,
            sites=self.sites,
            total=total,
            parameters=self.numel,
            starved=self.starved,
            silent=self.silent,
            scores=scores,
            crests=crests,
            verdicts=tuple(verdicts(scores, crests)),
        )

    def _score(self, fmt: PackedFormat) -> FormatScore:
        own = self.formats[fmt.name]
        noise = own.noise / self.sounding if self.sounding else 0.0
        return FormatScore(
            format=fmt.name,
            family=base_family(fmt),
            bits_per_weight=8 * own.nbytes / self.numel,
            qsnr=-10 * math.log10(noise) if noise > 0 else None,
            h_error=own.loss / self.heard if self.heard else None,
        )


def verdicts(scores: Sequence[FormatScore], crests: Sequence[Crest]) -> Iterator[Verdict]:
    """INT-vs-FP's verdict on every pair that was measured, beside the measurement."""
    by_name = {score.format: score for score in scores}
    kappas = {(crest.block, crest.rotated): crest.effective for crest in crests}
    for integer, small_float, block, limit in PAIRS:
        for rotated, suffix in ((False, ""), (True, f"@had{block}")):
            a, b = by_name.get(integer + suffix), by_name.get(small_float + suffix)
            if a is None or b is None or a.qsnr is None or b.qsnr is None:
                continue
            kappa, gain = kappas[block, rotated], a.qsnr - b.qsnr
            h_gain = 10 * math.log10(b.h_error / a.h_error) if a.h_error and b.h_error else None
            yield Verdict(
                integer=a.format,
                floating=b.format,
                kappa=kappa,
                limit=limit,
                says="int" if kappa < limit else "fp",
                measured="int" if gain > 0 else "fp",
                qsnr_gain=gain,
                h_gain=h_gain,
            )


def compare(
    job: Job,
    formats: Sequence[PackedFormat],
    sites: Sequence[Site],
    *,
    pattern: str | None = None,
    per_kind: int = PER_KIND,
    clip: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Measure `formats` on `sites`, which `choose_sites` chose by pattern and per_kind.

    Without job.calibration weights are all that is looked at, and only those of `sites` are read.
    clip: search the clipping of every scale, as compress does.

    Raises:
        BitnestError: NaN in the weights, or a model that cannot be streamed.
    """
    started = time.monotonic()
    progress = progress or Silent()
    budget = Budget.plan(job.skeleton, job.sites, job.memory)
    study = _Study(job, formats, sites, clip, progress)
    with torch.no_grad():
        if job.calibration is None:
            study.weights_only()
        else:
            progress.phase("checking weights", job.checkpoint.nbytes)
            job.checkpoint.scan(progress.step)
            study.with_inputs(job.calibration.tokens, budget)
    totals = Counter(site.kind for site in matching(job.sites, pattern))
    known = [kind for kind in KINDS if kind in study.sums]
    calibration = job.calibration
    return Comparison(
        model=str(job.checkpoint.path),
        architecture=type(job.skeleton.model).__name__,
        clip=clip,
        per_kind=per_kind,
        calibration=None if calibration is None else calibration.counts,
        length=None if calibration is None else calibration.tokens.shape[1],
        kinds=tuple(study.sums[kind].report(kind, totals[kind], formats) for kind in known),
        seconds=time.monotonic() - started,
    )


class _Study:
    """The loop over blocks and sites."""

    def __init__(
        self,
        job: Job,
        formats: Sequence[PackedFormat],
        sites: Sequence[Site],
        clip: bool,
        progress: Progress,
    ) -> None:
        self.job, self.formats, self.progress = job, formats, progress
        self.skeleton = job.skeleton
        half = torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16
        self.options = Options(method="rtn", clip=clip, half=half)
        self.layers: dict[int, list[Site]] = {}
        for site in sites:
            self.layers.setdefault(site.layer, []).append(site)
        self.steps = len(sites) * len(formats)
        self.sums: dict[str, _KindSums] = {}

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
                    self._measure(site, None)
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
        linears = {s.module for s in sites} - fused
        collector = Collector(
            [(name, modules[name]) for name in modules if name in linears],
            [(name, modules[name]) for name in sorted(fused)],
            partial(Routed, stream.tokens, stream.allocate),
        )
        if sites:
            with collector:
                stream.run(layer, keep=False, after_batch=collector.after_batch)
        for site in sites:
            if site.module in linears:
                seen = collector.hessians.get(site.module)
                self._measure(site, seen.mean() if seen is not None and seen.tokens else None)
        for name in sorted(fused):
            own = [site for site in sites if site.module == name]
            self._experts(own, modules[name], collector.routed.pop(name))
        if layer < max(self.layers):
            with reference_experts(m for m in block.modules() if is_experts(m)):
                stream.run(layer, keep=True)

    def _experts(self, sites: Sequence[Site], module: Any, routed: Routed) -> None:
        """Sites of one layer's fused experts; gate and up of an expert share one H."""
        inputs = ExpertInputs(*routed.join(), module, self.options, self.job.device)
        together: dict[tuple[int, bool], list[Site]] = {}
        for site in sites:
            assert site.expert is not None
            together.setdefault((site.expert, site.param == "down_proj"), []).append(site)
        for (expert, down), own in together.items():
            hessian = inputs.hessian(expert, "down_proj" if down else up_name(module))
            for site in own:
                self._measure(site, hessian, starved=inputs.count(expert) < site.shape[1])

    def _measure(self, site: Site, hessian: torch.Tensor | None, *, starved: bool = False) -> None:
        weight = self._weight(site)
        sums = self.sums.setdefault(
            site.kind, _KindSums({fmt.name: _Sum() for fmt in self.formats})
        )
        for tally in sums.crests:
            tally.add(weight[0])
        energy = float(weight.square().sum(dtype=torch.float64))
        h = None if hessian is None else hessian[None]
        output = 0.0 if h is None else float(weighted_error(weight, h).double().sum())
        sums.sites += 1
        sums.numel += site.numel
        sums.sounding += site.numel if energy > 0 else 0
        sums.heard += site.numel if output > 0 else 0
        sums.starved += starved
        sums.silent += output <= 0 and self.job.calibration is not None
        for fmt in self.formats:
            found, nbytes = self._round(weight, h, fmt)
            miss = weight - found
            own = sums.formats[fmt.name]
            own.nbytes += nbytes
            if energy > 0:
                noise = float(miss.square().sum(dtype=torch.float64))
                own.noise += site.numel * noise / energy
            if h is not None and output > 0:
                loss = float(weighted_error(miss, h).double().sum())
                own.loss += site.numel * max(loss, 0.0) / output
            self.progress.step()

    def _round(
        self, weight: torch.Tensor, h: torch.Tensor | None, fmt: PackedFormat
    ) -> tuple[torch.Tensor, int]:
        """The weight (1, O, I) as `fmt` decodes it, and its bytes."""
        if not needs_statistics(fmt):
            h = None
        elif h is None:  # no input ever seen: all channels alike
            h = torch.eye(weight.shape[2], device=weight.device)[None]
        result = solve(weight, h, fmt, self.options)
        rows, columns = weight.shape[1:]
        if fmt.fixed_size:
            return result.weight, fmt.nbytes((rows, columns))
        stored = result.store(0, slice(0, rows))
        return result.weight, sum(t.numel() * t.element_size() for t in stored.values())

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
