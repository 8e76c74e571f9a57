"""analyze: one pass over the model that ends in Statistics; one decoder block in memory at a time.

    1. Fisher, if importance is by gradients: forwards and backwards over some windows (`fisher`)
    2. for every block: observe all windows (`observe`), solve every site in every candidate format
       (`sensitivity`), if formats of inputs are asked for send the windows through again
       (`input_errors`), send probes (`probes`) and samples on, store, free
    3. KL of the probes, by the model's own head (`tail`), on windows that no Hessian has seen

Embedding and head are one unit more (`ends`). It is scored after the blocks, or before them if a
probe changes an end: what such a probe's first block reads must be known, and a tied matrix is
fitted to what the head reads, so all samples go through the model once more.

Statistics are of the uncompressed model: every block sees what it sees in the original. A killed
run resumes at the last finished block; finished blocks are replayed, Fisher and probes read back.

Experts' Hessians of one block are summed in as many passes as memory asks for, up to MAX_PASSES;
beyond that their diagonal has to do, which is said in the header ("hessian") and at info level.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnest import __version__
from bitnest.calibrate.blocks import block_tensors, weight_figures
from bitnest.calibrate.collector import reference_experts
from bitnest.calibrate.cover import Drawn
from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.end_weights import EndWeights
from bitnest.calibrate.ends import (
    Ends,
    end_record,
    lookups,
    observe_head,
    reads_head,
    score_ends,
)
from bitnest.calibrate.fisher import IMPORTANCE, Fisher, measure_fisher
from bitnest.calibrate.input_errors import InputErrors, InputScored, bases_of, energy_orders
from bitnest.calibrate.observe import COVER, Observer
from bitnest.calibrate.probes import Measured, Probes, draw_plans, group_plans, widths
from bitnest.calibrate.sensitivity import Scored, Sensitivity, sample_rows
from bitnest.calibrate.stream import Stream
from bitnest.calibrate.tail import open_tail
from bitnest.errors import RecipeError
from bitnest.formats import PackedFormat
from bitnest.formats.inputs import InputFormat
from bitnest.packed.rounding import Between, each_input
from bitnest.progress import Progress, Silent
from bitnest.quantize.compress import Job
from bitnest.quantize.memory import Budget, release
from bitnest.quantize.solve import Options
from bitnest.recipe import PRUNERS
from bitnest.safetensors_io import entry, read_header, read_tensor, write_file
from bitnest.sites import Site, is_experts, is_tied
from bitnest.statistics import Statistics, StatisticsWriter, finished_statistics
from bitnest.workdir import storage_error, write_text

log = logging.getLogger(__name__)

HESSIAN_BYTES = 1 << 30  # of one pass's expert Hessians without --memory
MAX_PASSES = 8
FATE_TOKENS = 16384  # that fates of experts are measured on, about
BLOCK_WINDOWS = 16  # that the model is measured on without a block
HELD = "/held"  # keeps windows that Hessians do not see in batches of their own
HESSIANS = ("auto", "full", "diagonal")


@dataclass(frozen=True)
class Analysis:
    """What is measured, besides usage.

    formats: candidates for every site but routers. importance: kl or loss (gradients), probes (KL
    of one perturbed block and kind at a time), none. fisher_windows, probe_windows: in all, as many
    of each label. probes: random plans measured. hessian: full, diagonal, or auto. keep_hessians:
    store them. fates: of experts, whose errors are measured (`prune/experts/fates`); with drop
    among them whole blocks are measured too (`prune/block_fates`). inputs: candidate formats of
    what matrices read (`input_errors`).
    """

    formats: tuple[PackedFormat, ...]
    importance: str = "kl"
    fisher_windows: int = 24
    probes: int = 16
    probe_windows: int = 16
    hessian: str = "auto"
    keep_hessians: bool = False
    fates: tuple[str, ...] = ()
    inputs: tuple[InputFormat, ...] = ()

    def __post_init__(self) -> None:
        known = (*IMPORTANCE, "probes", "none")
        if self.importance not in known:
            raise RecipeError(f"unknown importance '{self.importance}'", hint=", ".join(known))
        if self.hessian not in HESSIANS:
            raise RecipeError(f"unknown kind of Hessian '{self.hessian}'", hint=", ".join(HESSIANS))
        if self.keep_hessians and self.hessian == "diagonal":
            raise RecipeError("diagonal Hessians are kept anyway", hint="leave out one of the two")
        if min(self.fisher_windows, self.probe_windows) < 1 or self.probes < 0:
            raise RecipeError(
                f"{self.fisher_windows} windows for gradients, {self.probe_windows} for "
                f"{self.probes} probes",
                hint="--fisher-windows and --probe-windows from 1, --probes from 0",
            )
        if self.fates and self.importance == "none":
            raise RecipeError("without importance no fate of an expert has a loss",
                              hint="leave out --importance none")  # fmt: skip
        if self.inputs and self.importance == "none":
            raise RecipeError("without importance no format of inputs has a loss",
                              hint="leave out --importance none, or --inputs")  # fmt: skip
        if self.inputs and not bases_of(self.formats):
            raise RecipeError(
                f"what inputs lose beside {self.formats[0].name} is not known before it is solved",
                hint="a --format without @awq, and with @perm last",
            )
        if not self.formats and (self.importance != "none" or self.probes):
            raise RecipeError(
                "nothing to be sensitive to: no candidate format",
                hint="name one, or measure usage only: --importance none",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = {**asdict(self), "formats": [fmt.name for fmt in self.formats]}
        found["fates"], found["inputs"] = list(self.fates), [fmt.name for fmt in self.inputs]
        unused = {key for key in ("fates", "inputs") if not found[key]}
        return {key: value for key, value in found.items() if key not in unused}


def analyze(
    job: Job,
    analysis: Analysis,
    out: Path,
    *,
    drawn: Drawn | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Statistics:
    """Measure `job`'s model on job.calibration, into the directory `out`.

    drawn: what of the calibration was added for coverage.

    Raises:
        BitnestError: before work for whatever can be known then.
    """
    assert job.calibration is not None
    progress = progress or Silent()
    budget = Budget.plan(job.skeleton, job.sites, job.memory)
    progress.phase("checking weights", job.checkpoint.nbytes)
    fingerprint = _fingerprint(job, analysis, job.checkpoint.scan(progress.step))
    done = finished_statistics(out, fingerprint)
    if done is not None:
        return done
    writer = StatisticsWriter(out, fingerprint, job.units)
    try:
        finished = writer.begin(fresh=fresh)
        with torch.no_grad():
            return _Run(job, job.calibration, analysis, writer, budget, drawn, progress).run(
                finished
            )
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        writer.close()


class _Run:
    """The three stages."""

    def __init__(
        self,
        job: Job,
        calibration: CalibrationSet,
        analysis: Analysis,
        writer: StatisticsWriter,
        budget: Budget,
        drawn: Drawn | None,
        progress: Progress,
    ) -> None:
        self.job, self.calibration, self.analysis = job, calibration, analysis
        self.writer, self.budget, self.progress = writer, budget, progress
        self.drawn = drawn
        self.skeleton = job.skeleton
        self.labels = list(dict.fromkeys(calibration.labels))
        self.numbers = [self.labels.index(label) for label in calibration.labels]
        recipe = job.recipe
        half = torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16
        self.options = Options(
            recipe.method, recipe.damp, recipe.weighting, recipe.min_tokens, recipe.clip, half,
            prune=recipe.prune,
        )  # fmt: skip
        self.sites = [site for site in job.sites if site.kind != "router"]
        self.plans = self._plans()
        chosen = [plan for plan, _ in self.plans]
        tied = is_tied(job.skeleton)
        self.ends = EndWeights(job.ends, analysis.formats, chosen, tied=tied)
        self.full, self.passes = self._plan_hessians()
        self.held = self._held_out()
        self.fisher: Fisher | None = None

    def run(self, finished: int) -> Statistics:
        """From the block number `finished` on."""
        started = time.monotonic()
        fates = self._fates()
        if self.analysis.importance in IMPORTANCE:
            self.fisher = self._fisher()
        count = len(self.skeleton.blocks)
        early = self.ends.wanted
        if early:
            self._ends_first()
        stream = self._stream(list(range(len(self.numbers))), singles=True)
        probes = self._probes(stream)
        finished = min(finished, count)
        if finished and not self._restore(probes, finished - 1):
            finished = 0
        if not finished:
            probes.begin(self.calibration.tokens)
        self.progress.phase("analyzing", count)
        for layer in range(count):
            prefix = f"{self.skeleton.prefix}.{layer}"
            if layer >= finished:
                self.skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
                release()
                self._block(layer, prefix, stream, probes)
            self._pass(layer, stream, filled=layer >= finished)
            self.progress.step(note="" if layer >= finished else "resumed")
        if self.ends.sites and not early and not self.writer.done(count):
            self._score_ends(stream)
        measured = self._measure(stream, probes)
        header = self._header(probes, measured, time.monotonic() - started)
        return self.writer.finish({**header, **fates})

    def _stream(self, samples: Sequence[int], *, singles: bool = False) -> Stream:
        return Stream(
            self.skeleton,
            self.calibration.tokens[list(samples)],
            dtype=self.job.compute,
            device=self.job.device,
            memory_limit=self.budget.hidden,
            labels=[
                f"{self.calibration.labels[i]}{HELD if i in self.held else ''}" for i in samples
            ],
            singles=singles,
        )

    def _windows(self, count: int, *, last: bool) -> list[int]:
        """Up to `count` sample numbers, ascending: the last or first of every label but `cover`,
        as many of each, one at least."""
        numbers = [n for n, d in enumerate(self.labels) if d != COVER or len(self.labels) == 1]
        share = max(1, count // len(numbers))
        chosen: list[int] = []
        for number in numbers:
            own = [i for i, n in enumerate(self.numbers) if n == number]
            chosen.extend(own[-share:] if last else own[:share])
        return sorted(chosen)

    def _held_out(self) -> frozenset[int]:
        """Windows that probes are measured on and Hessians do not see: the last of every label, a
        quarter of them at most. Probes fitted to their own windows would look too good."""
        if not self.analysis.probes and self.analysis.importance != "probes":
            return frozenset()
        counts = [self.numbers.count(n) // 4 for n in range(len(self.labels))]
        chosen = self._windows(self.analysis.probe_windows, last=True)
        kept: list[int] = []
        for number, most in enumerate(counts):
            own = [i for i in chosen if self.numbers[i] == number]
            kept.extend(own[len(own) - min(most, len(own)) :])
        return frozenset(kept)

    # ---- fates

    def _fates(self) -> dict[str, Any]:
        """What is known of fates, for the header; read back if an earlier run measured it."""
        kinds = self.analysis.fates
        if not kinds:
            return {}
        file = self.writer.state / "fates.json"
        length = self.calibration.tokens.shape[1]
        part = self._part(self._windows(max(1, FATE_TOKENS // length), last=False))
        where: dict[str, Any] = {
            "dtype": self.job.compute, "device": self.job.device, "progress": self.progress,
        }  # fmt: skip
        found: dict[str, Any] = {"kinds": list(kinds), "layers": []}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))["fates"]
        elif any(site.expert is not None for site in self.sites):
            from bitnest.prune.experts.fates import measure_fates

            found["layers"] = measure_fates(self.skeleton, part, kinds, **where)
            write_text(file, json.dumps({"fates": found}))
            release()
        if "drop" in kinds and "blocks" not in found:
            from bitnest.prune.block_fates import measure_blocks

            found["blocks"] = measure_blocks(
                self.skeleton, part, self._part(self._windows(BLOCK_WINDOWS, last=True)),
                self.labels, memory_limit=self.budget.hidden, **where,
            )  # fmt: skip
            write_text(file, json.dumps({"fates": found}))
            release()
        return {"fates": found}

    def _part(self, samples: Sequence[int]) -> CalibrationSet:
        """Some of the windows."""
        labels = [self.calibration.labels[i] for i in samples]
        return replace(
            self.calibration, tokens=self.calibration.tokens[list(samples)], labels=tuple(labels),
            counts={label: labels.count(label) for label in dict.fromkeys(labels)},
        )  # fmt: skip

    # ---- Fisher

    def _fisher(self) -> Fisher:
        file = self.writer.state / "fisher.safetensors"
        if file.exists():
            tensors = {name: read_tensor(info) for name, info in read_header(file).items()}
            return Fisher(tensors, tensors.pop("predictions"))
        self.progress.phase("importance by gradients", 2 * len(self.skeleton.blocks))
        samples = self._windows(self.analysis.fisher_windows, last=False)
        stream = self._stream(samples)
        fisher = measure_fisher(
            stream,
            self.calibration.tokens[samples],
            [self.numbers[i] for i in samples],
            len(self.labels),
            kind=self.analysis.importance,
            seed=self.job.recipe.seed,
            progress=self.progress,
        )
        tensors = {"predictions": fisher.predictions, **fisher.rows}
        write_file(file, [entry(name, value) for name, value in tensors.items()])
        release()
        return fisher

    # ---- ends

    def _ends_first(self) -> None:
        """Score the ends before the blocks, or read back what an earlier run found."""
        file, count = self.writer.state / "ends.safetensors", len(self.skeleton.blocks)
        if file.exists() and self.writer.done(count):
            self.ends.load(file)
            return
        stream = None
        if any(reads_head(site, self.ends.tied) for site in self.ends.sites):
            self.progress.phase("what the head reads", count)
            stream = self._stream(list(range(len(self.numbers))))
            for layer in range(count):
                self._pass(layer, stream)
                self.progress.step()
        self._score_ends(stream)
        self.ends.save(file)

    def _pass(self, layer: int, stream: Stream, *, filled: bool = False) -> None:
        """Send all samples through a block. filled: whether it holds its weights."""
        prefix = f"{self.skeleton.prefix}.{layer}"
        if not filled:
            self.skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
            release()
        modules = self.skeleton.blocks[layer].modules()
        with reference_experts(m for m in modules if is_experts(m)):
            stream.run(layer, keep=True)
        self.skeleton.drop(prefix)
        release()

    def _score_ends(self, stream: Stream | None) -> None:
        """Score and store the ends. stream: has passed all blocks; None if no end reads."""
        ends, skeleton, analysis = self._see_ends(stream), self.skeleton, self.analysis

        def matrix(site: Site) -> torch.Tensor:
            return skeleton.read(site.path)

        scored = list(score_ends(
            ends, matrix, analysis.formats, self.options, self.fisher, self.budget.ends,
            self.job.device, self.ends.keep,
        )) if analysis.formats else []  # fmt: skip
        record, tensors = end_record(
            ends, len(skeleton.blocks), matrix, scored, self.fisher,
            keep_hessians=analysis.keep_hessians, formats=len(analysis.formats),
        )  # fmt: skip
        self.writer.write_block(len(skeleton.blocks), record, tensors)
        release()

    def _see_ends(self, stream: Stream | None) -> Ends:
        model, tokens, count = self.skeleton.model, self.calibration.tokens, len(self.labels)
        table = model.get_input_embeddings()
        reader = next((s for s in self.ends.sites if reads_head(s, self.ends.tied)), None)
        read = None
        if reader is not None:
            assert stream is not None
            read = observe_head(
                stream, tokens, self.numbers, count,
                held=self.held, full=self.full, reader=reader.module,
            )  # fmt: skip
        return Ends(
            sites=self.ends.sites,
            tied=self.ends.tied,
            head=self.skeleton.path_of(model.get_output_embeddings()) or "",
            table=self.skeleton.path_of(table) or "",
            tokens=lookups(tokens, self.numbers, count, table.weight.shape[0]),
            read=read,
        )

    # ---- blocks

    def _block(self, layer: int, prefix: str, stream: Stream, probes: Probes) -> None:
        block = self.skeleton.blocks[layer]
        modules = dict(block.named_modules(prefix=prefix))
        sites = [site for site in self.sites if site.layer == layer]
        observer = self._observer(block, prefix, sites, stream.tokens)
        sensitivity = Sensitivity(
            self.analysis.formats, self.options, self.fisher, self._parameter, probes.offer
        )
        scored: dict[str, Scored] = {}
        with observer:
            for number, chosen in enumerate(self._expert_parts(modules)):
                observer.first_pass = number == 0
                observer.experts = chosen.__contains__
                self._observe(layer, stream, observer)
                release()
                for item in self._score(sites, modules, observer, sensitivity, chosen, number == 0):
                    scored[item.site.name] = item
                for sums in observer.fused.values():
                    if not self.analysis.keep_hessians:
                        sums.hessians.clear()
        inputs = self._input_losses(layer, modules, sites, observer, stream)
        probes.advance(layer)
        self._save_probes(probes, layer)
        weights = weight_figures(sites, self._parameter)
        record, tensors = block_tensors(
            layer, sites, modules, observer, scored, weights, self._fisher_rows(prefix),
            keep_hessians=self.analysis.keep_hessians, formats=len(self.analysis.formats),
            rounded=inputs,
        )  # fmt: skip
        self.writer.write_block(layer, record, tensors)
        if layer:
            self._probe_file(layer - 1).unlink(missing_ok=True)

    def _observer(
        self, block: nn.Module, prefix: str, sites: Sequence[Site], tokens: int
    ) -> Observer:
        widths = [site.shape[1] for site in sites if site.expert is not None]
        return Observer(
            block,
            prefix,
            labels=len(self.labels),
            full=self.full,
            weighting=self.job.recipe.weighting,
            sample=sample_rows(tokens, widths, self.options.min_tokens),
        )

    def _input_losses(
        self,
        layer: int,
        modules: Mapping[str, nn.Module],
        sites: Sequence[Site],
        observer: Observer,
        stream: Stream,
    ) -> dict[str, InputScored]:
        """What rounding their inputs costs the block's sites; nothing if it was not asked for."""
        analysis = self.analysis
        if not analysis.inputs:
            return {}
        errors = InputErrors(
            analysis.inputs, bases_of(analysis.formats), len(self.labels), sites,
            energy_orders(sites, observer), self._parameter, self.job.recipe.static,
        )  # fmt: skip
        if errors.has_static:
            self._look(layer, modules, sites, stream, errors, errors.weigh)
            errors.settle()
        self._look(layer, modules, sites, stream, errors, errors.look)
        return errors.scored(sites, self.fisher, observer)

    def _look(
        self,
        layer: int,
        modules: Mapping[str, nn.Module],
        sites: Sequence[Site],
        stream: Stream,
        errors: InputErrors,
        between: Between,
    ) -> None:
        with each_input(modules, sites, between):
            for part in stream.batches():
                if part.start not in self.held:
                    errors.label = self.numbers[part.start]
                    stream.forward_checked(layer, part)

    def _observe(self, layer: int, stream: Stream, observer: Observer) -> None:
        length = self.calibration.tokens.shape[1]
        for part in stream.batches():
            fit = part.start not in self.held
            observer.before_batch(self.numbers[part.start], part.start * length, fit=fit)
            stream.forward_checked(layer, part)
            observer.after_batch()

    def _score(
        self,
        sites: Sequence[Site],
        modules: Mapping[str, nn.Module],
        observer: Observer,
        sensitivity: Sensitivity,
        chosen: Sequence[int],
        first: bool,
    ) -> Iterator[Scored]:
        if not self.analysis.formats:
            return
        if first:
            linears = [s for s in sites if not is_experts(modules[s.module])]
            yield from sensitivity.linears(linears, observer)
        for name, sums in observer.fused.items():
            own = [site for site in sites if site.module == name]
            rows = torch.cat(observer.rows[name])
            numbers = [e for e in chosen if any(s.expert == e for s in own)]
            chunk = self.budget.expert_chunk(own)
            for start in range(0, len(numbers), chunk):
                part = numbers[start : start + chunk]
                yield from sensitivity.experts(own, modules[name], sums, rows, part)

    def _expert_parts(self, modules: Mapping[str, nn.Module]) -> list[range]:
        """Experts whose Hessians are summed in each pass."""
        counts = [int(m.num_experts) for m in modules.values() if is_experts(m)]  # type: ignore[arg-type]
        experts = max(counts, default=1)
        size = math.ceil(experts / self.passes) if self.full else experts
        return [range(start, min(start + size, experts)) for start in range(0, experts, size)]

    def _plan_hessians(self) -> tuple[bool, int]:
        """Whether full Hessians are summed, and in how many passes over a block's experts.

        What must fit are those of all labels, of every input of a block at once and of as many
        experts as one pass takes, and the copies while one input's are solved.
        """
        analysis, limit = self.analysis, self.budget.hessians
        if analysis.hessian == "diagonal" or not (analysis.formats or analysis.keep_hessians):
            return False, 1
        inputs, experts = self._hessian_bytes()
        if limit is None:
            limit = HESSIAN_BYTES + inputs
        passes = math.ceil(experts / (limit - inputs)) if inputs < limit else MAX_PASSES + 1
        passes = max(1, passes)
        if passes <= MAX_PASSES:
            return True, passes
        need = (inputs + experts / MAX_PASSES) / 2**20
        if analysis.hessian == "full":
            log.warning("full Hessians take %.0f MiB and more, past the memory", need)
            return True, MAX_PASSES
        if analysis.keep_hessians:
            raise RecipeError(
                f"memory does not allow the full Hessians that are to be kept: {need:.0f} MiB",
                hint="--hessian full to sum them all the same, more --memory, or diagonals",
            )
        log.warning("full Hessians would take %.0f MiB: diagonals are summed instead", need)
        return False, 1

    def _hessian_bytes(self) -> tuple[int, int]:
        """Of the block that needs most: its linear layers' inputs, its experts' inputs."""
        copies = 4 * (len(self.labels) + 1)
        linears: dict[int, dict[tuple[str, int], int]] = {}
        experts: dict[int, dict[tuple[str, int, bool], int]] = {}
        for site in self.sites:
            width = site.shape[1]
            if site.param == "weight" or site.expert is None:
                shared = (site.module.rpartition(".")[0], width)
                linears.setdefault(site.layer, {})[shared] = copies * width**2
            else:
                own = (site.module, site.expert, site.param == "down_proj")
                experts.setdefault(site.layer, {})[own] = copies * width**2
        inputs = max((sum(i.values()) + max(i.values()) for i in linears.values()), default=0)
        return inputs, max((sum(own.values()) for own in experts.values()), default=0)

    def _parameter(self, site: Site) -> torch.Tensor:
        return self.skeleton.model.get_parameter(site.path).data

    def _fisher_rows(self, prefix: str) -> dict[str, torch.Tensor]:
        rows = self.fisher.rows if self.fisher is not None else {}
        return {name: t for name, t in rows.items() if name.startswith(prefix + ".")}

    # ---- probes

    def _plans(self) -> list[tuple[dict[str, int], bool]]:
        """Plans to be measured, and whether each perturbs one group."""
        formats, seed = self.analysis.formats, self.job.recipe.seed
        drawn = draw_plans(self.sites, formats, self.analysis.probes, seed)
        plans = [(plan, False) for plan in drawn]
        if self.analysis.importance == "probes":
            plans += [(plan, True) for plan in group_plans(self.sites, _middle(formats))]
        return plans

    def _probes(self, stream: Stream) -> Probes:
        plans = [plan for plan, _ in self.plans]
        samples = self._windows(self.analysis.probe_windows, last=True)
        return Probes(stream, plans, samples, self._parameter, self.budget.hidden, self.ends)

    def _probe_file(self, layer: int) -> Path:
        return self.writer.state / f"probes-{layer:05d}.safetensors"

    def _save_probes(self, probes: Probes, layer: int) -> None:
        write_file(self._probe_file(layer), probes.entries())

    def _restore(self, probes: Probes, layer: int) -> bool:
        """Read the probes' states after block `layer`; False if they are not there."""
        file = self._probe_file(layer)
        if not file.exists():
            return False
        for name, info in read_header(file).items():
            probes.restore(int(name), read_tensor(info))
        return True

    def _measure(self, stream: Stream, probes: Probes) -> list[list[Measured]]:
        if not probes.plans:
            return []
        self.progress.phase("measuring probes", probes.rounds)
        with open_tail(stream) as tail:
            return probes.measure(tail, self.calibration.tokens, self.numbers, self.progress.step)

    # ---- the header

    def _header(
        self, probes: Probes, measured: list[list[Measured]], seconds: float
    ) -> dict[str, Any]:
        job, calibration = self.job, self.calibration
        hashes = calibration.hashes()
        names = [site.name for site in self.sites]
        importance = None
        if self.fisher is not None:
            importance = {
                "kind": self.analysis.importance,
                "predictions": self.fisher.predictions.tolist(),
            }
        elif self.analysis.importance == "probes":
            counts = [0] * len(self.labels)
            for sample in probes.samples:
                counts[self.numbers[sample]] += calibration.tokens.shape[1] - 1
            importance = {"kind": "probes", "predictions": counts}
        return {
            "bitnest": __version__,
            "model": job.checkpoint.path.resolve().name,
            "source": {
                "sha256": self.writer.fingerprint["source"],
                "bytes": job.checkpoint.nbytes,
                "parameters": sum(math.prod(t.shape) for t in job.checkpoint.tensors.values()),
                **job.checkpoint.origin(),
            },
            "architecture": type(self.skeleton.model).__name__,
            "labels": self.labels,
            "data": [vars(report) for report in calibration.sources],
            "samples": [
                {
                    "label": label,
                    "length": calibration.tokens.shape[1],
                    "fitted": i not in self.held,
                    "sha256": hashes[i],
                }
                for i, label in enumerate(calibration.labels)
            ],
            "tokens": calibration.tokens.numel(),
            "length": calibration.tokens.shape[1],
            "formats": [fmt.name for fmt in self.analysis.formats],
            **_input_header(self.analysis),
            "hessian": "full" if self.full else "diagonal",
            "importance": importance,
            "options": self.writer.fingerprint["options"],
            "method": job.recipe.method if self.full else "rtn",
            "min_tokens": job.recipe.min_tokens,
            "compute": self.writer.fingerprint["compute"],
            "probes": [
                {
                    "plan": [plan.get(name) for name in names],
                    "measured": [vars(item) for item in found],
                    "group": group,
                }
                for (plan, group), found in zip(self.plans, measured, strict=True)
            ],
            "drawn": None if self.drawn is None else self.drawn.to_json(),
            "seed": job.recipe.seed,
            "seconds": seconds,
            "fingerprint": self.writer.fingerprint,
        }


def _input_header(analysis: Analysis) -> dict[str, Any]:
    """Candidate formats of inputs and the bases they were measured in, where there are any."""
    if not analysis.inputs:
        return {}
    names, bases = [fmt.name for fmt in analysis.inputs], list(bases_of(analysis.formats))
    return {"inputs": {"formats": names, "bases": bases}}


def _middle(formats: Sequence[PackedFormat]) -> int:
    """The format that groups are perturbed with: the second coarsest width if there are three."""
    order = widths(formats) or [0]
    return order[min(1, len(order) - 1)]


def _fingerprint(job: Job, analysis: Analysis, source: str) -> dict[str, Any]:
    import transformers

    assert job.calibration is not None
    return {
        "source": source,
        "calibration": job.calibration.sha256,
        "labels": list(job.calibration.labels),
        "ends": [site.name for site in job.ends],
        "options": {
            **analysis.to_json(),
            "method": job.recipe.method,
            "damp": job.recipe.damp,
            "weighting": job.recipe.weighting,
            "min_tokens": job.recipe.min_tokens,
            "clip": job.recipe.clip,
            **({} if job.recipe.prune == PRUNERS[0] else {"prune": job.recipe.prune}),
        },
        "seed": job.recipe.seed,
        "memory": job.memory,
        "device": job.device.type,
        "compute": str(job.compute).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
