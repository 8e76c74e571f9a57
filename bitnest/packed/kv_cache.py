"""KVCache: a transformers cache that keeps old keys and values quantised.

    cache = open_cache(model, "int4")
    model.generate(ids, past_key_values=cache)

Every layer holds the latest tokens as they came (`recent`) and older ones as codes (`stored`).
An entry is quantised once, when its group leaves the window, from the values that came, and never
again: `update` only appends. A few new tokens attend to the codes as they are stored, where there
is a kernel (`packed/kv_attention.py`); otherwise reading turns all codes of the layer into keys and
values of the model's type, for as long as the layer computes: what stays in memory is codes.

Integers take keys before rotary embedding. The cache is given them after it, so it turns them back
by the layer's own rotation (`packed/rotary.py`) at positions that it counts itself, and turns them
forth again when they are read. Counting takes the first token for position 0. Rows with left
padding start elsewhere, by an offset p that is the same for all their tokens: what is quantised is
then R(-p) k instead of k, each pair of channels turned by one angle for all tokens. Channels are
still constant over tokens where they were, and turning forth undoes exactly what turning back did.
8-bit floats are kept as they come, as engines do.

What a pass sees of its own tokens: as they came, however many there are, as attention over a prompt
runs before anything is stored. With `strict`, as they will be stored: every query of the pass then
sees tokens beyond the window quantised, which is what an evaluation by long passes must measure.
Passes of one token see the same either way, but for a window of 0.

Beams are reordered on the codes. `crop` takes back what is still in the window, or whole groups;
what was quantised stays so, and the window is shorter until as many tokens came again.
Refused: families whose layers keep other things than keys and values (state spaces, latents,
indexers), and encoder-decoder models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    get_layer_types_and_kwargs,
)

from bitnest.errors import BitnestError, UnsupportedModel
from bitnest.formats.kv import KVFormat, parse_kv
from bitnest.kernels import kv as kernels
from bitnest.kernels.cpu.attention import Held
from bitnest.packed import kv_attention
from bitnest.packed.rotary import Rotation, find_rotations

Scales = Mapping[int, tuple[float, float]]
"""Layer -> scale of its keys and of its values, in 8-bit floats; 1 where there is none."""

WINDOWED = ("sliding_attention", "chunked_attention")


class KVLayer(CacheLayerMixin):
    """One layer's cache.

    sliding: tokens that the layer attends to, itself included; None: all. rotation: of its keys,
    None to take them as they come. scales: of keys and values in 8-bit floats. strict: see above.
    defers: few new tokens may read codes later (`packed/kv_attention.py`).
    """

    is_compileable = False
    keys: Any  # the recent ones; so are `values`
    values: Any

    def __init__(
        self,
        fmt: KVFormat,
        *,
        sliding: int | None = None,
        rotation: Rotation | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        strict: bool = False,
        defers: bool = False,
    ) -> None:
        super().__init__()
        self.defers = defers
        self.fmt, self.sliding, self.scales, self.strict = fmt, sliding, scales, strict
        self.rotation = rotation if fmt.integer else None
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0  # tokens that ever came
        self.folded = 0  # of them the oldest, quantised
        self.start = 0  # of these the oldest, dropped behind a sliding window
        self._stored: dict[str, torch.Tensor] = {}

    @property
    def is_sliding(self) -> bool:
        """Whether it forgets tokens."""
        return self.sliding is not None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the latest tokens can be taken back."""
        return self.sliding is None and (self.fmt.window > 0 or self.fmt.group == 1)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take types and shapes from the first keys (B, H, n, D) and values (B, H, n, E)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.widths = key_states.shape[-1], value_states.shape[-1]
        self.keys = key_states[:, :, :0].clone()
        self.values = value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys (B, H, n, D) and values (B, H, n, E); all that the pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self.cumulative_length, key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += new
        due = self._due()
        own = before // self.fmt.group * self.fmt.group
        self._fold(due if self.strict else min(due, own))
        seen = self._defer(new) if self.defers and new <= kv_attention.QUERIES else self._read(new)
        self._fold(due)
        self._forget()
        return seen

    def _due(self) -> int:
        """Tokens that ought to be quantised now. A sliding window inside the 16-bit one holds no
        token for long enough."""
        if self.sliding is not None and self.fmt.window >= self.sliding - 1:
            return 0
        return self.fmt.folded(self.cumulative_length)

    def _fold(self, due: int) -> None:
        """Quantise until `due` tokens are, which is a whole number of groups."""
        count = due - self.folded
        if count <= 0:
            return
        self._append(self._quantized(self.keys[:, :, :count], self.values[:, :, :count]))
        self.folded = due
        # copies: a view would keep the whole tensor in memory
        self.keys = self.keys[:, :, count:].clone()
        self.values = self.values[:, :, count:].clone()

    def _quantized(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        fmt = self.fmt
        if not fmt.integer:
            return {
                "keys": kernels.quantize_fp8(keys, fmt.element, self.scales[0]),
                "values": kernels.quantize_fp8(values, fmt.element, self.scales[1]),
            }
        x = keys.float()
        if self.rotation is not None:
            x = self.rotation.turn(x, self.folded, back=True)
        k = kernels.quantize_keys(x.contiguous(), fmt.bits, fmt.group)
        v = kernels.quantize_values(values, fmt.bits)
        return {
            "keys": k.codes, "key_scale": k.scale, "key_low": k.low,
            "values": v.codes, "value_scale": v.scale, "value_low": v.low,
        }  # fmt: skip

    def _append(self, parts: Mapping[str, torch.Tensor]) -> None:
        for name, part in parts.items():
            have = self._stored.get(name)
            self._stored[name] = part.clone() if have is None else torch.cat([have, part], dim=2)

    def _read(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the model's type, of a sliding layer what `new` queries attend to."""
        keys, values = self.keys, self.values
        if self._stored:
            old_keys, old_values = self._decoded()
            keys = torch.cat([old_keys.to(self.dtype), keys], dim=-2)
            values = torch.cat([old_values.to(values.dtype), values], dim=-2)
        if self.sliding is not None:
            visible = self.sliding - 1 + new
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    def _defer(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, not decoded before something other than the kernel needs it."""
        if not self._stored or self.device.type != "cpu":
            return self._read(new)
        now = copy.copy(self)  # tensors are replaced, never written to
        now._stored = dict(self._stored)
        held = Held(
            self.fmt, now._stored, self.keys, self.values, self.start, self.rotation, self.scales,
            self.sliding,
        )  # fmt: skip
        visible = (
            held.visible if self.sliding is None else min(held.visible, self.sliding - 1 + new)
        )
        return kv_attention.defer(held, visible, lambda: now._read(new))

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        fmt, part = self.fmt, self._stored
        if not fmt.integer:
            keys = kernels.dequantize_fp8(part["keys"], fmt.element, self.scales[0])
            return keys, kernels.dequantize_fp8(part["values"], fmt.element, self.scales[1])
        stored = kernels.Codes(part["keys"], part["key_scale"], part["key_low"])
        keys = kernels.dequantize_keys(stored, fmt.bits, fmt.group, self.widths[0])
        if self.rotation is not None:
            keys = self.rotation.turn(keys, self.start)
        stored = kernels.Codes(part["values"], part["value_scale"], part["value_low"])
        return keys, kernels.dequantize_values(stored, fmt.bits, self.widths[1])

    def _forget(self) -> None:
        """Drop what no later token attends to: whole groups, or 16-bit tokens where all are."""
        if self.sliding is None:
            return
        if self.fmt.window >= self.sliding - 1:
            kept = min(self.keys.shape[-2], self.sliding - 1)
            first = self.keys.shape[-2] - kept
            self.keys = self.keys[:, :, first:].clone()
            self.values = self.values[:, :, first:].clone()
            return
        group = self.fmt.group
        gone = max(0, self.cumulative_length - (self.sliding - 1)) // group * group
        count = min(self.folded, gone) - self.start
        if count > 0:
            for name, tensor in self._stored.items():
                rows = count // group if name in ("key_scale", "key_low") else count
                self._stored[name] = tensor[:, :, rows:].clone()
            self.start += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` with that many tokens returns."""
        if self.sliding is None:
            return self.cumulative_length + query_length, 0
        offset = max(self.cumulative_length - self.sliding + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_seq_length(self) -> int:
        """Tokens that came."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens that it can hold, -1 for any number."""
        return -1 if self.sliding is None else self.sliding

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens; a negative number, as transformers wants it.

        Raises:
            BitnestError: they are quantised in groups that would have to be cut, or gone.
        """
        count = abs(tokens_to_remove)
        if tokens_to_remove > 0:
            raise BitnestError(f"crop({tokens_to_remove})", hint="a negative number of tokens")
        if count == 0 or not self.is_initialized:
            return
        left = self.cumulative_length - count
        if self.sliding is not None and self.cumulative_length >= self.sliding:
            raise BitnestError("a layer with a sliding window has forgotten what came before")
        if left < self.folded and left % self.fmt.group:
            raise BitnestError(
                f"cannot take back {count} tokens: quantised groups of {self.fmt.group} stay whole",
                hint=f"a window of more tokens, such as {self.fmt.element}-w{count}",
            )
        kept = max(0, left - self.folded)
        self.keys, self.values = self.keys[:, :, :kept].clone(), self.values[:, :, :kept].clone()
        if left < self.folded:
            for name, tensor in self._stored.items():
                rows = left // self.fmt.group if name in ("key_scale", "key_low") else left
                self._stored[name] = tensor[:, :, :rows].clone()
            self.folded = left
        self.cumulative_length = left

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self._stored = {name: change(tensor) for name, tensor in self._stored.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows of the batch in the order `beam_idx`."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows of the batch."""
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Refuse.

        Raises:
            BitnestError: always.
        """
        raise BitnestError("a quantised cache is not offloaded", hint="it is small: leave it there")

    def prefetch(self) -> None:
        """There is nothing to bring back."""

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        if not self.is_initialized:
            return []
        return [self.keys, self.values, *self._stored.values()]


class KVCache(Cache):
    """The cache of one batch of sequences; `open_cache` makes one."""

    def __init__(
        self,
        config: Any,
        fmt: KVFormat,
        rotations: Sequence[Rotation | None],
        *,
        scales: Scales | None = None,
        strict: bool = False,
        defers: bool = False,
    ) -> None:
        check_family(config)
        self.fmt = fmt
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        layers: list[Any] = [
            DummyLayer()
            if kind == "dummy"
            else KVLayer(
                fmt,
                sliding=own.get("sliding_window"),
                rotation=rotations[number] if number < len(rotations) else None,
                scales=(scales or {}).get(number, (1.0, 1.0)),
                strict=strict,
                defers=defers and kind != "chunked_attention",
            )
            for number, (kind, own) in enumerate(zip(kinds, options, strict=True))
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, by storages and not by what views show of them."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in self.layers if isinstance(layer, KVLayer) for tensor in layer.tensors()
        }  # fmt: skip
        return sum(storages.values())


def check_family(config: Any) -> None:
    """Refuse families that keep other things than keys and values of every head.

    Raises:
        UnsupportedModel: this is one.
    """
    inner = config.get_text_config(decoder=True)
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "an encoder-decoder model has two caches"
    elif getattr(inner, "kv_lora_rank", None):
        why = "multi-head latent attention keeps latents, or keys that are rotated in part"
    else:
        kinds = set(get_layer_types_and_kwargs(inner)[0])
        odd = sorted(kinds - {"full_attention", "dummy", *WINDOWED})
        why = f"layers of type {', '.join(odd)} keep other states" if odd else None
    if why is not None:
        raise UnsupportedModel(
            f"the KV cache of this family cannot be quantised: {why}",
            where=type(config).__name__,
            hint="leave out --kv, or --kv none",
        )


def open_cache(
    model: Any,
    fmt: KVFormat | str,
    *,
    scales: Scales | None = None,
    strict: bool = False,
) -> KVCache:
    """An empty cache for `model`, for one batch of sequences.

    fmt: the format or its name. scales: of keys and values in 8-bit floats, 1 where there are none,
    which is what engines take then, too. strict: see the module.

    Raises:
        UnsupportedModel: see `check_family`.
        FormatError: no such format.
    """
    fmt = parse_kv(fmt) if isinstance(fmt, str) else fmt
    check_family(model.config)
    rotations = find_rotations(model) if fmt.integer else ()
    defers = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if defers:
        kv_attention.install()
    return KVCache(model.config, fmt, rotations, scales=scales, strict=strict, defers=defers)
