"""compress: a checkpoint becomes an artifact, one decoder block in memory at a time.

For each block: fill it from the checkpoint, send the calibration samples through it while the
collector watches, solve every site, store the packed weights, send the samples through the
quantised block, free it. Round-to-nearest needs no samples and skips those passes. Embedding and
head are one unit more at the end (`ends`), which costs nothing while both stay dense.

Everything that can be refused is refused before the first block: formats, rules, calibration text,
NaN in the weights, disk space, the output's place. A killed run resumes at the last finished block:
finished blocks are read back, decoded and replayed, and since everything is deterministic the bytes
come out the same. Runs with other inputs, versions or thread counts do not resume each other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitnest import __version__
from bitnest.artifact import Artifact, Writer, finished_with, site_tensors
from bitnest.calibrate.collector import Collector, Routed, reference_experts
from bitnest.calibrate.data import CalibrationSet
from bitnest.calibrate.stream import Stream
from bitnest.checkpoint import Checkpoint
from bitnest.device import choose_device
from bitnest.errors import ArtifactError, PlanError, RecipeError, StatisticsError
from bitnest.formats import AnyFormat, CodedFormat, DenseFormat, FateFormat, parse_format, widths
from bitnest.formats.inputs import InputFormat, parse_inputs
from bitnest.kernels.decode import decode
from bitnest.kernels.encode import implementation
from bitnest.kernels.inputs import Magnitudes
from bitnest.manifest import FORMAT_VERSION, SiteRecord
from bitnest.packed.rounding import Between, Rounder, each_input, rounding
from bitnest.planes import plane_width, split_streams
from bitnest.progress import Progress, Silent
from bitnest.quantize.advice import Advice, Witness
from bitnest.quantize.block import BlockSolver, Solved
from bitnest.quantize.ends import check_ends, end_tensors, head_moment, slice_rows
from bitnest.quantize.folding import FoldedCheckpoint, Folding, Skipped, fold_view, skipped_of
from bitnest.quantize.folding.store import load, save
from bitnest.quantize.memory import Budget, release
from bitnest.quantize.solve import Options, needs_statistics
from bitnest.recipe import Recipe, resolved
from bitnest.safetensors_io import Entry, TensorInfo, entry, read_header
from bitnest.sites import Site, find_sites, is_experts, is_tied
from bitnest.skeleton import Skeleton
from bitnest.workdir import partial_directory, storage_error

if TYPE_CHECKING:
    from bitnest.calibrate.expect import Expected
    from bitnest.calibrate.slopes import Sensitivity
    from bitnest.plan import Plan

ALGORITHM = 2  # raised when the same inputs would give other bytes than an earlier version


@dataclass(frozen=True)
class Job:
    """All inputs of one run, checked.

    calibration: tokens to calibrate on, None for rtn. memory: bytes the process may use, or None.
    compute: type of the block's weights and hidden states while samples pass through it; Hessians
    and the solver are float32 always. expected: what statistics predict, for the manifest. plan:
    that the recipe's rules come from. asked: the resolved recipe, None for that of `recipe` alone.
    inputs: what inputs are rounded to, of sites that round them.
    folding: what is folded into the weights first; the checkpoint is a view for it then.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    sites: list[Site]
    formats: dict[str, AnyFormat]
    recipe: Recipe
    calibration: CalibrationSet | None
    device: torch.device
    memory: int | None
    compute: torch.dtype = torch.float32
    expected: Expected | None = None
    plan: Plan | None = None
    asked: Mapping[str, Any] | None = None
    inputs: Mapping[str, InputFormat] = field(default_factory=dict)
    folding: Folding | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one value in the source."""
        return self.checkpoint.dtype.itemsize

    def block_sites(self, layer: int) -> list[Site]:
        """Sites of one block; those of the ends are the block's after the last."""
        return [site for site in self.sites if site.layer == layer]

    @property
    def ends(self) -> list[Site]:
        """Embedding and head, as far as they are sites."""
        return self.block_sites(len(self.skeleton.blocks))

    @property
    def units(self) -> int:
        """Blocks, and one more for the ends."""
        return len(self.skeleton.blocks) + bool(self.ends)

    @property
    def packed_ends(self) -> list[Site]:
        """Ends that do not stay dense."""
        return [s for s in self.ends if not isinstance(self.formats[s.name], DenseFormat)]

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What is known of it, where widths will be chosen by it: in nested artifacts."""
        nested = any(widths(fmt) for fmt in self.formats.values())
        return self.expected.sensitivity if self.expected is not None and nested else None

    def slopes(self, site: Site) -> tuple[float, ...]:
        """What a unit of a site's error costs, by text; empty where nobody will ask or knows."""
        known = self.sensitivity
        if known is None or isinstance(self.formats[site.name], DenseFormat):
            return ()
        return known.slopes.get(site.name, ())

    @property
    def reads_tail(self) -> bool:
        """Whether an end is fitted to what the head reads."""
        packed = self.packed_ends
        heads = [s for s in packed if s.kind == "head" or is_tied(self.skeleton)]
        return self.calibration is not None and bool(heads)


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    memory: int | None = None,
    compute: str = "auto",
) -> Job:
    """Build the skeleton, find the sites and give each its format; nothing is read or written yet.

    compute: float32, bfloat16, or auto: bfloat16 for a bfloat16 checkpoint on a GPU. (On a CPU each
    expert's token count is a new shape to compile for: no faster, and twice the memory.)

    Raises:
        UnsupportedModel, RecipeError, FormatError.
    """
    skeleton = Skeleton.build(checkpoint, trust_remote_code=trust_remote_code)
    sites = find_sites(skeleton)
    checkpoint.check_sites(sites)
    formats = recipe.formats(sites, checkpoint.dtype.itemsize)
    chosen = choose_device(device)
    dtype = _compute_type(compute, checkpoint, chosen)
    inputs = recipe.input_formats(sites, formats)
    return Job(
        checkpoint, skeleton, sites, formats, recipe, None, chosen, memory, dtype, inputs=inputs
    )


def _compute_type(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if name not in {"auto", "float32", "bfloat16"}:
        raise RecipeError(f"unknown compute type '{name}'", hint="auto, float32 or bfloat16")
    fits = checkpoint.dtype == torch.bfloat16
    if name == "bfloat16" and not fits:
        raise RecipeError(
            "calibrating in bfloat16 would round this checkpoint's weights",
            where=str(checkpoint.path),
            hint="leave out --compute",
        )
    if name == "auto":
        name = "bfloat16" if fits and device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def run(
    job: Job,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    advise: Callable[[Advice | Skipped], None] | None = None,
) -> tuple[Artifact, float]:
    """Carry out `job` into the directory `out`; returns the artifact and the seconds it took.

    advise: is told, early on, what would do better than a sparse format; without it nothing is
    measured for that.

    Raises:
        BitnestError: before work for whatever can be known then; during work for a full disk.
    """
    if any(isinstance(fmt, FateFormat) for fmt in job.formats.values()):
        raise AssertionError("a job with experts that are gone must be reduced first")
    started = time.monotonic()
    progress = progress or Silent()
    budget = Budget.plan(job.skeleton, job.sites, job.memory)
    check_ends(job.packed_ends, job.formats, budget)
    if job.folding is not None:
        Budget.check_folding(job.skeleton, job.memory)
    progress.phase("checking weights", job.checkpoint.nbytes)
    source_hash = job.checkpoint.scan(progress.step)
    if job.expected is not None and job.expected.source != source_hash:
        raise StatisticsError(
            "the statistics are of another model: its weights differ",
            where=str(job.checkpoint.path),
            hint="bitnest analyze this model, or leave out --statistics",
        )
    if job.plan is not None and job.plan.source not in {"", source_hash}:
        raise PlanError(
            f"the plan is of another model ('{job.plan.model}'): its weights differ",
            where=str(job.checkpoint.path),
            hint="plan for this model, or empty the plan's 'source'",
        )
    fingerprint = _fingerprint(job, source_hash)
    done = finished_with(out, fingerprint)
    if done is not None:
        return done, time.monotonic() - started
    files = job.units if job.packed_ends else len(job.skeleton.blocks)
    writer = Writer(out, fingerprint, job.units, files)
    _check_space(job, out)
    try:
        finished = writer.begin(fresh=fresh)
        with _deterministic():
            job = _folded(job, writer.state, fingerprint, budget, progress, advise)
            _Run(job, writer, budget, progress, advise).blocks(finished)
        progress.phase("writing dense tensors", 1)
        artifact = writer.finish(
            job.checkpoint.path,
            artifact_config(job),
            dense_entries(job),
            _manifest(job, fingerprint),
        )
        progress.step()
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        writer.close()
    return artifact, time.monotonic() - started


def _folded(
    job: Job,
    state: Path,
    fingerprint: dict[str, Any],
    budget: Budget,
    progress: Progress,
    advise: Callable[[Advice | Skipped], None] | None,
) -> Job:
    """The job with its folds, chosen now or by the run that this one resumes. state: where they are
    kept until the artifact is whole. Packed tensors are handed on as exact as they are."""
    if job.folding is None:
        return job
    view = job.checkpoint
    assert isinstance(view, FoldedCheckpoint)
    key = job.folding.key(fingerprint)
    known = load(state, key)
    if known is None:
        folded = fold_view(view, job.skeleton, job.folding, device=job.device,
                           hidden=budget.hidden, progress=progress)  # fmt: skip
        save(state, key, folded.changes, folded.record)
    else:
        folded = replace(view, changes=known[0], record=known[1])
    skipped = skipped_of(dict(folded.record))
    if skipped is not None and advise is not None:
        advise(skipped)
    dense = set(dense_names(job))
    folded = folded.keeping(name for name in folded.tensors if name not in dense)
    exact = all(change.exact for own in folded.changes.values() for change in own)
    return replace(
        job,
        checkpoint=folded,
        skeleton=replace(job.skeleton, checkpoint=folded),
        compute=job.compute if exact else torch.float32,  # what 16 bit does not hold is not rounded
    )


class _Run:
    """The loop over blocks."""

    def __init__(
        self,
        job: Job,
        writer: Writer,
        budget: Budget,
        progress: Progress,
        advise: Callable[[Advice], None] | None = None,
    ) -> None:
        self.job, self.writer, self.budget, self.progress = job, writer, budget, progress
        self.skeleton = job.skeleton
        recipe = job.recipe
        half = torch.float16 if job.checkpoint.dtype == torch.float16 else torch.bfloat16
        options = Options(
            recipe.method, recipe.damp, recipe.weighting, recipe.min_tokens, recipe.clip,
            half, recipe.width_weights, recipe.prune,
        )  # fmt: skip
        self.options = options
        self.advise = advise
        self.witness = None if advise is None else Witness(job.sites, job.formats, options)
        self.solver = BlockSolver(job.formats, options, self._parameter, self.witness)
        self.stream: Stream | None = None

    def _parameter(self, site: Site) -> torch.Tensor:
        return self.skeleton.model.get_parameter(site.path).data

    def blocks(self, finished: int) -> None:
        """Do every block from `finished` on, then the ends; replay the blocks before it."""
        count = len(self.skeleton.blocks)
        if finished == self.job.units:
            return
        self.progress.phase("compressing", self.job.units)
        if self.job.calibration is not None:
            self.stream = Stream(
                self.skeleton,
                self.job.calibration.tokens,
                dtype=self.job.compute,
                device=self.job.device,
                memory_limit=self.budget.hidden,
            )
        for layer in range(count):
            prefix = f"{self.skeleton.prefix}.{layer}"
            if layer < finished:
                if self.stream is not None:
                    self._replay(layer, prefix)
                self.progress.step(note=f"block {layer} resumed")
                continue
            self.skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
            release()
            solved = list(self._solve(layer, prefix))
            rounders = self._rounders(layer, solved)
            self._store(layer, solved, rounders)
            if self.advise is not None and self.witness is not None and layer == self.witness.layer:
                for advice in self.witness.found():
                    self.advise(advice)
            release()
            if self.stream is not None and self._read_after(layer):
                self._propagate(layer, rounders)
            self.skeleton.drop(prefix)
            self.progress.step()
        if self.job.ends:
            release()
            self._store(count, list(self._ends()), {})
            self.progress.step()

    def _read_after(self, layer: int) -> bool:
        """Whether anything reads what block `layer` gives."""
        return layer + 1 < len(self.skeleton.blocks) or self.job.reads_tail

    def _ends(self) -> Iterator[Solved]:
        """Solve embedding and head, which are read as they are stored and never filled."""
        job = self.job
        seen = None
        if job.reads_tail:
            assert self.stream is not None and job.calibration is not None
            seen = head_moment(self.stream, job.calibration.tokens)
        for site in job.ends:
            fmt = job.formats[site.name]
            if isinstance(fmt, DenseFormat):
                yield Solved(site, fmt, {}, 0.0, None)
                continue
            fits = site.kind == "head" or is_tied(self.skeleton)
            hessian = seen.mean() if seen is not None and fits else None
            rows = slice_rows(fmt, site.shape, self.budget.ends)
            matrix = self.skeleton.read(site.path)
            tensors, (*narrower, error) = end_tensors(matrix, hessian, fmt, self.options, rows)
            tokens = None if seen is None or hessian is None else seen.tokens
            yield Solved(site, fmt, tensors, error, tokens, tuple(narrower))

    def _solve(self, layer: int, prefix: str) -> Iterator[Solved]:
        sites = self.job.block_sites(layer)
        if self.stream is None:
            yield from self.solver.weights_only(sites)
            return
        modules = dict(self.skeleton.blocks[layer].named_modules(prefix=prefix))
        fused = {s.module for s in sites if is_experts(modules[s.module])}
        linears = [s for s in sites if s.module not in fused]
        collector = Collector(
            [(s.module, modules[s.module]) for s in linears],
            [(name, modules[name]) for name in sorted(fused)],
            partial(Routed, self.stream.tokens, self.stream.allocate),
        )
        with collector:
            self.stream.run(layer, keep=False, after_batch=collector.after_batch)
        release()
        yield from self.solver.linears(linears, collector)
        collector.hessians.clear()
        for name in sorted(fused):
            own = [site for site in sites if site.module == name]
            chunk = self.budget.expert_chunk(own)
            routed = collector.routed.pop(name)
            release()
            yield from self.solver.experts(own, modules[name], routed, chunk, self.job.device)

    def _rounders(self, layer: int, solved: Sequence[Solved]) -> dict[str, Rounder]:
        """How inputs of a block's sites are rounded, static scales measured in the block as it is
        now, with its packed weights."""
        found: dict[str, Rounder] = {}
        for item in solved:
            inputs = self.job.inputs.get(item.site.name)
            if inputs is not None and isinstance(item.fmt, CodedFormat):
                found[item.site.name] = Rounder(inputs, item.fmt, basis_tensors(item.tensors))
        measured = [s for s in found if found[s].inputs.has_static]
        if not measured:
            return found
        if self.stream is None:
            raise AssertionError("static scales of inputs need a calibration text")
        seen = {name: Magnitudes() for name in measured}

        def look(site: Site, x: torch.Tensor) -> torch.Tensor:
            if site.name in seen:
                seen[site.name].add(found[site.name].stored(x))
            return x

        self._run_block(layer, look, keep=False)
        for name, magnitudes in seen.items():
            scale = magnitudes.scale(found[name].inputs, self.job.recipe.static, name)
            found[name] = replace(found[name], static=scale)
        return found

    def _store(self, layer: int, solved: Sequence[Solved], rounders: Mapping[str, Rounder]) -> None:
        records, entries = [], []
        for item, tensors in _with_dense_experts(solved, self._parameter, self.job):
            parts = [entry(f"{item.site.name}.{key}", value) for key, value in tensors.items()]
            nbytes = sum(part.nbytes for part in parts) or item.fmt.nbytes(item.site.shape)
            _check_size(item, nbytes)
            file = self.writer.packed_name(layer) if parts else ""
            rounder = rounders.get(item.site.name)
            records.append(
                SiteRecord(
                    item.site,
                    item.fmt.name,
                    nbytes,
                    item.error,
                    item.tokens,
                    file,
                    item.narrower,
                    self.job.slopes(item.site),
                    "" if rounder is None else rounder.inputs.name,
                    None if rounder is None else rounder.static,
                )
            )
            entries.extend(parts)
        self.writer.write_block(layer, records, entries)

    def _replay(self, layer: int, prefix: str) -> None:
        """Send the samples through a block finished earlier, with the weights it was given."""
        assert self.stream is not None
        if not self._read_after(layer):
            return
        self.skeleton.fill(prefix, dtype=self.job.compute, device=self.job.device)
        records = [r for r in self.writer.block_records(layer) if r.file or r.format == "zero"]
        headers: dict[str, TensorInfo] = {}
        for file in sorted({f for r in records for f in r.files(parse_format(r.format))}):
            infos, width = read_header(self.writer.work / file), plane_width(file)
            headers.update(infos if width is None else split_streams(records, width, infos))
        rounders: dict[str, Rounder] = {}
        for record in records:
            fmt = parse_format(record.format)
            if not isinstance(fmt, DenseFormat):
                tensors = site_tensors(record, headers)
                weight = decode(tensors, fmt, record.site.shape)
                record.site.view(self._parameter(record.site)).copy_(weight)
                if record.inputs:
                    inputs, own = parse_inputs(record.inputs), basis_tensors(tensors)
                    rounders[record.site.name] = Rounder(inputs, fmt, own, record.input_scale)
        self._propagate(layer, rounders)
        self.skeleton.drop(prefix)

    def _propagate(self, layer: int, rounders: Mapping[str, Rounder]) -> None:
        """Send the samples on as the packed block would, inputs rounded."""
        self._run_block(layer, rounding(rounders) if rounders else None, keep=True)

    def _run_block(self, layer: int, between: Between | None, *, keep: bool) -> None:
        """Send the samples through a block. between: put before its matrices (`each_input`). keep:
        what comes out is what the next block reads."""
        assert self.stream is not None
        block, prefix = self.skeleton.blocks[layer], f"{self.skeleton.prefix}.{layer}"
        with ExitStack() as stack:
            stack.enter_context(reference_experts(m for m in block.modules() if is_experts(m)))
            if between is not None:
                modules = dict(block.named_modules(prefix=prefix))
                sites = self.job.block_sites(layer)
                stack.enter_context(each_input(modules, sites, between))
            self.stream.run(layer, keep=keep)


def basis_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a site's stored tensors those that say its basis."""
    return {name: tensors[name] for name in ("channels", "order") if name in tensors}


def _check_size(item: Solved, nbytes: int) -> None:
    """The size arithmetic of formats is what plans rely on: a wrong one must not pass."""
    promised = item.fmt.nbytes(item.site.shape)
    if nbytes != promised if item.fmt.fixed_size else nbytes > promised:
        raise AssertionError(f"{item.site.name}: {nbytes} bytes, {item.fmt.name} says {promised}")


def _with_dense_experts(
    solved: Sequence[Solved], parameter: Callable[[Site], torch.Tensor], job: Job
) -> Iterator[tuple[Solved, dict[str, torch.Tensor]]]:
    """Stored tensors of each site. An expert kept dense beside packed ones travels with them."""
    packed = {item.site.module for item in solved if not isinstance(item.fmt, DenseFormat)}
    for item in solved:
        tensors = item.tensors
        if isinstance(item.fmt, DenseFormat) and item.site.module in packed:
            values = item.site.view(parameter(item.site))
            tensors = {"weight": values.to(job.checkpoint.dtype).contiguous()}
        yield item, tensors


def dense_names(job: Job) -> list[str]:
    """Checkpoint tensors that the artifact keeps as they are, in name order."""
    by_module: dict[str, set[str]] = {}
    for site in job.sites:
        if not isinstance(job.formats[site.name], DenseFormat):
            by_module.setdefault(site.module, set()).add(site.path)
    gone: set[str] = set()
    for site in job.sites:
        if site.module in by_module:
            gone.update(job.skeleton.sources[site.path].names)
    return sorted(name for name in job.checkpoint.tensors if name not in gone)


def packed_bytes(job: Job) -> int:
    """Bytes of all packed tensors: exact, or the most where the size depends on values."""
    modules = {
        site.module for site in job.sites if not isinstance(job.formats[site.name], DenseFormat)
    }
    return sum(
        job.formats[site.name].nbytes(site.shape) for site in job.sites if site.module in modules
    )


def dense_entries(job: Job) -> list[Entry]:
    from bitnest.safetensors_io import DTYPES

    entries = []
    for name in dense_names(job):
        info = job.checkpoint.tensors[name]
        values = _reader(job.checkpoint, name)
        entries.append(Entry(name, DTYPES[info.dtype], info.shape, values))
    return entries


def _reader(checkpoint: Checkpoint, name: str) -> Callable[[], torch.Tensor]:
    return lambda: checkpoint.read(name)


def artifact_config(job: Job) -> dict[str, Any]:
    """The source's config.json with what transformers needs to find bitnest."""
    return {
        **job.checkpoint.config,
        "quantization_config": {
            "quant_method": "bitnest",
            "format_version": FORMAT_VERSION,
            "format": job.recipe.format,
            **({"kv": job.recipe.kv} if job.recipe.kv else {}),
        },
    }


def _fingerprint(job: Job, source_hash: str) -> dict[str, Any]:
    import transformers

    calibration, expected = job.calibration, job.expected
    return {
        **({} if expected is None else {"statistics": expected.statistics}),
        **({} if job.folding is None else {"fold": job.folding.to_json()}),
        "source": source_hash,
        "config": job.checkpoint.config,
        "recipe": _brief(job.recipe),
        "calibration": None if calibration is None else calibration.sha256,
        "algorithm": ALGORITHM,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": job.device.type,
        "compute": str(job.compute).removeprefix("torch."),
        "threads": torch.get_num_threads() if job.device.type == "cpu" else 0,
        "memory": job.memory,
        "encoder": implementation(),
    }


def _brief(recipe: Recipe) -> dict[str, Any]:
    """The recipe with a checksum for its rules, which may be thousands."""
    values = recipe.to_json()
    return {**values, "rules": hashlib.sha256(json.dumps(values["rules"]).encode()).hexdigest()}


def _manifest(job: Job, fingerprint: dict[str, Any]) -> dict[str, Any]:
    calibration = job.calibration
    return {
        "bitnest": __version__,
        "source": {
            "name": job.checkpoint.path.resolve().name,
            "sha256": fingerprint["source"],
            "bytes": job.checkpoint.nbytes,
            "parameters": sum(_numel(info.shape) for info in job.checkpoint.tensors.values()),
            **job.checkpoint.origin(),
        },
        "architecture": type(job.skeleton.model).__name__,
        "recipe": job.recipe.to_json(),
        **({"kv": job.recipe.kv} if job.recipe.kv else {}),
        "resolved": resolved(job.recipe) if job.asked is None else job.asked,
        "calibration": None
        if calibration is None
        else {
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "length": calibration.tokens.shape[1],
            "sources": calibration.counts,
        },
        **({} if job.expected is None else {"predicted": job.expected.to_json()}),
        **({} if job.sensitivity is None else {"sensitivity": job.sensitivity.to_json()}),
        **({} if job.plan is None else {"plan": job.plan.summary()}),
        "fingerprint": fingerprint,
    }


def draft_manifest(job: Job, source_hash: str) -> dict[str, Any]:
    """The manifest but for sites and files, of weights with that hash."""
    return _manifest(job, _fingerprint(job, source_hash))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


def _check_space(job: Job, out: Path) -> None:
    need = packed_bytes(job)
    need += sum(job.checkpoint.tensors[name].nbytes for name in dense_names(job))
    need += len(job.sites) * 1000 + (4 << 20)  # manifest, headers, tokenizer
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    partial = partial_directory(out)
    have = shutil.disk_usage(place).free
    have += sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    if have < need:
        raise ArtifactError(
            f"the artifact needs {need:,} bytes of disk, {have:,} are free",
            where=str(place),
            hint="free space, choose another -o, or fewer --bits",
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Gradients off, deterministic kernels where torch has a choice."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def wants_calibration(job: Job) -> bool:
    """Whether the run needs text: any method but rtn does, and rtn in formats fitted to inputs."""
    packed = [fmt for fmt in job.formats.values() if not isinstance(fmt, DenseFormat)]
    static = any(inputs.has_static for inputs in job.inputs.values())
    return job.recipe.method != "rtn" or static or any(map(needs_statistics, packed))


def with_expectation(job: Job, expected: Expected | None) -> Job:
    """The same job with what statistics predict of it."""
    return replace(job, expected=expected)


def with_calibration(job: Job, calibration: CalibrationSet | None) -> Job:
    """The same job with its calibration tokens."""
    return replace(job, calibration=calibration)
