"""Perplexity, KL divergence against a base, agreement and size, of several models side by side.

Every text is cut into windows that do not overlap, spread evenly over it (`calibrate.data`); within
a window every token but the first is predicted. The base runs first and leaves its final
hidden states behind (`reference`); then one model after the other is loaded, compared and dropped,
so one model is in memory at a time. With `without`, each is measured again with experts switched
off (`eval.without`) before it is dropped. All checks that need no weights come before any are
loaded.

Left out: zero-shot tasks, and texts tokenised by different vocabularies (their perplexities per
token cannot be compared).
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitnest.calibrate.data import load_texts, parse_source, token_windows
from bitnest.checkpoint import resolve_model
from bitnest.device import choose_device
from bitnest.errors import BitnestError, CheckpointError, DataError
from bitnest.eval.divergence import Tokens, compare
from bitnest.eval.logits import (
    Full,
    Head,
    Logits,
    Streamed,
    not_a_number,
    open_head,
    own_logits,
    record,
)
from bitnest.eval.reference import Reference
from bitnest.eval.report import EvalReport, Row, Text, score
from bitnest.eval.settings import artifact_kv, check_caches, read_caches, read_settings
from bitnest.eval.size import count_parameters
from bitnest.eval.split import base_parts, check_split, has_parts, rounded_inputs
from bitnest.eval.without import Switch, find_switches, parse_without, switched_off
from bitnest.formats.kv import KVFormat
from bitnest.lora import name_with
from bitnest.packed.adapters import Adapters
from bitnest.packed.loading import load_model, load_tokenizer
from bitnest.packed.modules import hold_decoded, inputs_unrounded
from bitnest.packed.widths import set_bits

if TYPE_CHECKING:
    from bitnest.progress import Progress

__all__ = ["EvalReport", "evaluate"]

DTYPES = ("float32", "bfloat16", "float16")
SELECTION = "spread"


def evaluate(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    lora: Sequence[str] = (),
    against_lora: Sequence[str] = (),
    data: Sequence[str],
    without: Sequence[str] = (),
    window: int = 256,
    windows: int = 64,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    bits: Sequence[int] = (),
    sizes: Sequence[int] = (),
    kv: Sequence[str] = (),
    split: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure `models` on the texts `data`, and against the base `against` where one is named.

    models, against: artifacts, checkpoints, hub ids or `demo`. lora: adapters, PATH or PATH:scale,
    put on each of `models` (`packed.adapters`). against_lora: on the base. data: `[label=]source`.
    without: `LAYER:EXPERT[,EXPERT...]`; each gives every one of `models` a further row, measured
    with these experts switched off (`eval.without` says what that means). One model alone is then
    the base of its own rows; several without `against` have perplexity only. bits: widths at which
    nested artifacts are read, a row for each that they have; others have one row. sizes: bytes that
    a nested artifact's weights may take, a row for each. kv: formats of the KV cache that the text
    goes through (`formats.kv`), or `none`, a row for each; without any, what each artifact asks
    for; the base has none, and one model alone is then its own. split: further rows for the parts
    of an artifact's error: weights, inputs and cache by themselves (`eval.split`). window, windows:
    tokens in a window, windows per text. batch_size: windows per forward pass (packed models decode
    their weights once per pass). dtype: compute type. device: None means CUDA where there is one,
    as when compressing. The base is the first row.

    Raises:
        BitnestError: models that cannot be compared (vocabulary), a window longer than a model's
            context, a model that computes NaN, options out of range, experts to
            switch off that are not there.
        UnsupportedModel: experts whose gates cannot be reached.
        DataError: a text that is missing or too short, two texts of one label.
        CheckpointError, ArtifactError: a model that cannot be opened.
    """
    _check_options(models, window, windows, batch_size, dtype)
    if (bits or sizes) and without:
        said = "--bits" if bits else "--size"
        raise BitnestError(f"{said} and --without are measured apart", hint="leave out one")
    beside = {"--bits": bits, "--size": sizes, "--without": without, "--lora": lora}
    if split and (apart := [option for option, own in beside.items() if own]):
        raise BitnestError(f"--split and {apart[0]} are measured apart", hint="leave out one")
    offs = parse_without(without)
    caches = read_caches(kv)
    device = choose_device(None if device is None else str(device))
    given = [model for model in (against, *models) if model is not None]
    paths = [resolve_model(model) for model in given]
    loras = [*([against_lora] if against is not None else []), *([lora] * len(models))]
    pairs = zip(_names(given, paths), loras, strict=True)
    names = [name_with(name, own) for name, own in pairs]
    if against_lora and against is None:
        raise BitnestError("--against-lora without a base", hint="--against MODEL")
    adapters = [
        Adapters.of(path, own, trust_remote_code=trust_remote_code)
        for path, own in zip(paths, loras, strict=True)
    ]
    for name, path in zip(names, paths, strict=True):
        _check_context(name, path, window, trust_remote_code)
    formats = [caches or [artifact_kv(path)] for path in paths]
    if against is not None:
        formats[0] = [None]
    elif len(models) == 1 and any(formats[0]):
        formats[0] = list(dict.fromkeys([None, *formats[0]]))
    check_caches(paths, formats, trust_remote_code)
    if split:
        check_split(None if against is None else paths[0], paths[1:], formats[1:])
    switches = [
        find_switches(offs, name, path, trust_remote_code=trust_remote_code)
        for name, path in zip(names[-len(models) :], paths[-len(models) :], strict=True)
    ]
    if against is not None:
        switches.insert(0, ())
    chosen = read_settings(paths, bits, sizes)
    if against is not None:  # whole, whatever it is
        chosen[0] = read_settings(paths[:1], (), ())[0]
    tokenizers = [load_tokenizer(path, trust_remote_code=trust_remote_code) for path in paths]
    _check_vocabulary(names, paths, tokenizers)
    texts, tokens = _read(tokenizers[0], data, window, windows)

    based = against is not None or (len(models) == 1 and bool(offs or any(formats[0])))
    reference: Reference | None = None
    rows: list[Row] = []
    parameters = count_parameters(paths[0])

    def measure(
        model: Any, name: str, title: str, nbytes: int, switch: Switch, cache: KVFormat | None
    ) -> Row:
        """One row; the first of a base is kept for the others to be compared with."""
        nonlocal reference
        hold_decoded(model)
        head = open_head(model, tokens[0], name)
        title = title if cache is None else f"{title}, kv {cache.name}"
        if progress is not None:
            progress.phase(f"measure {title}", sum(text.windows for text in texts))
        is_base = based and not rows
        kept = Reference(head, model.device, []) if is_base else None
        with switched_off(model, switch):
            found = _measure(
                model, head, title, tokens, batch_size, reference, kept, progress, cache
            )
        if is_base:
            reference = kept
        scores = tuple(score(text, result) for text, result in zip(texts, found, strict=True))
        per_weight = 8 * nbytes / counted if counted else None
        streamed, spelt = head is not None, "" if cache is None else cache.name
        return Row(title, is_base, nbytes, counted, per_weight, streamed, scores,
                   switch.experts, spelt)  # fmt: skip

    def parts_on_base(number: int) -> list[Row]:
        """What the base loses with the inputs and the cache of another model."""
        parts = base_parts(paths[number], formats[number])
        if not parts:
            return []
        base = load_model(paths[0], dtype=dtype, device=device, lora=loras[0],
                          trust_remote_code=trust_remote_code)  # fmt: skip
        found = []
        for part in parts:
            rounds = rounded_inputs(base, paths[number]) if part.inputs else nullcontext()
            with rounds:
                row = measure(base, names[0], f"{names[number]}: {part.said}", rows[0].nbytes,
                              Switch(), part.kv)  # fmt: skip
            found.append(replace(row, model=f"{names[number]}: {part.said}"))
        return found

    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        first, adapted = chosen[number][0], adapters[number]
        model = load_model(
            path, dtype=dtype, device=device, bits=first.widths, lora=loras[number],
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        counted = parameters if based else count_parameters(path)
        for setting, switch, cache in [
            *((own, Switch(), c) for own in chosen[number] for c in formats[number]),
            *((first, s, c) for s in switches[number] for c in formats[number]),
        ]:
            if setting is not first:
                set_bits(model, setting.widths)
            nbytes = setting.nbytes + (0 if adapted is None else adapted.nbytes)
            title = f"{name} without {switch.label}" if switch.modules else name
            title = f"{name} {setting.said}" if setting.said else title
            rows.append(measure(model, name, title, nbytes, switch, cache))
        if split and number > 0 and has_parts(path, formats[number]):
            with inputs_unrounded(model):
                rows.append(measure(model, name, f"{name}: weights alone", nbytes, Switch(), None))
        del model
        gc.collect()
        if split and number > 0:
            rows += parts_on_base(number)
    return EvalReport(names[0] if based else None, dtype, texts, tuple(rows))


def _measure(
    model: Any,
    head: Head | None,
    name: str,
    tokens: Sequence[torch.Tensor],
    batch_size: int,
    reference: Reference | None,
    kept: Reference | None,
    progress: Progress | None,
    kv: KVFormat | None = None,
) -> list[Tokens]:
    """Per-token results of one model on every text; `kept` takes its outputs if it is the base."""
    results = []
    for number, windows in enumerate(tokens):
        labels = windows[:, 1:].flatten()
        parts: list[Tokens] = []
        for rows, logits in _logits(model, head, windows, batch_size, kv):
            base = None if reference is None else reference.logits(number, rows)
            if base is not None and base.vocab != logits.vocab:
                raise _other_vocabulary(name, f"{logits.vocab} logits, the base has {base.vocab}")
            part = compare(logits, labels[rows], base)
            if not all(v.isfinite().all() for v in (part.nll, part.kl) if v is not None):
                raise not_a_number(name)
            parts.append(part)
            if kept is not None:
                kept.keep(number, rows, logits, len(labels))
            if progress is not None:
                progress.step((rows.stop - rows.start) // (windows.shape[1] - 1))
        results.append(_join(parts))
    return results


def _logits(
    model: Any,
    head: Head | None,
    tokens: torch.Tensor,
    batch_size: int,
    kv: KVFormat | None = None,
) -> Iterator[tuple[slice, Logits]]:
    """Logits of all predictions, batch by batch, with the rows they are; tokens (N, T)."""
    per_window = tokens.shape[1] - 1
    step = 1 if head is None else batch_size
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        rows = slice(start * per_window, (start + len(part)) * per_window)
        if head is None:
            yield rows, Full(own_logits(model, part, kv)[:, :-1].flatten(0, 1), model.device)
        else:
            yield rows, Streamed(record(model, part, kv)[:, :-1].flatten(0, 1), head)


def _join(parts: Sequence[Tokens]) -> Tokens:
    kl = [part.kl for part in parts if part.kl is not None]
    same = [part.same for part in parts if part.same is not None]
    return Tokens(
        torch.cat([part.nll for part in parts]),
        torch.cat(kl) if kl else None,
        torch.cat(same) if same else None,
    )


def _read(
    tokenizer: Any, data: Sequence[str], window: int, windows: int
) -> tuple[tuple[Text, ...], list[torch.Tensor]]:
    sources = [parse_source(spec) for spec in data]
    labels = [source.label for source in sources]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DataError(
            f"two texts are called '{twice}'", hint="label them: --data one=PATH --data two=PATH"
        )
    texts, tokens = [], []
    for source in sources:
        found = token_windows(
            tokenizer,
            load_texts(source.source),
            window=window,
            count=windows,
            selection=SELECTION,
            where=source.source,
        )
        digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        texts.append(
            Text(source.label, source.source, windows, window, SELECTION,
                 windows * (window - 1), digest)
        )  # fmt: skip
        tokens.append(found)
    return tuple(texts), tokens


def _check_options(
    models: Sequence[str | Path], window: int, windows: int, batch_size: int, dtype: str
) -> None:
    if not models:
        raise BitnestError("no model to evaluate", hint="name at least one")
    if dtype not in DTYPES:
        raise BitnestError(f"unknown compute type '{dtype}'", hint="one of: " + ", ".join(DTYPES))
    for option, value, least in (
        ("window", window, 2), ("windows", windows, 1), ("batch-size", batch_size, 1),
    ):  # fmt: skip
        if value < least:
            raise BitnestError(f"--{option} {value}: must be {least} or more")


def _names(given: Sequence[str | Path], paths: Sequence[Path]) -> list[str]:
    """Short names where they are unique, else what the user typed."""
    short = [str(g) if not Path(g).expanduser().is_dir() else p.resolve().name
             for g, p in zip(given, paths, strict=True)]  # fmt: skip
    distinct = {name: len({p.resolve() for n, p in zip(short, paths, strict=True) if n == name})
                for name in short}  # fmt: skip
    return [name if distinct[name] == 1 else str(g) for name, g in zip(short, given, strict=True)]


def _check_context(name: str, path: Path, window: int, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot read the configuration: {first}",
            where=str(path / "config.json"),
            hint="fetch it again, or upgrade transformers for a new model type",
        ) from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise BitnestError(
            f"--window {window} is more than the context of '{name}', {limit} tokens",
            where=str(path),
            hint=f"--window {limit} or less",
        )


def _check_vocabulary(
    names: Sequence[str], paths: Sequence[Path], tokenizers: Sequence[Any]
) -> None:
    def content(path: Path) -> bytes | None:
        file = path / "tokenizer.json"
        return file.read_bytes() if file.exists() else None

    first = content(paths[0])
    vocabulary = tokenizers[0].get_vocab()
    for name, path, tokenizer in zip(names[1:], paths[1:], tokenizers[1:], strict=True):
        if first is not None and content(path) == first:
            continue
        if tokenizer.get_vocab() != vocabulary:
            raise _other_vocabulary(name, f"its tokens are not those of '{names[0]}'")


def _other_vocabulary(name: str, detail: str) -> BitnestError:
    return BitnestError(
        f"'{name}' has another vocabulary: {detail}",
        where=name,
        hint="only models of one tokenizer can be compared per token",
    )
