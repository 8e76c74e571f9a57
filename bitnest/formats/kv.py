"""KVFormat: how keys and values of past tokens are kept while a model generates.

    fp8 (fp8_e4m3), fp8_e5m2    8-bit floats, one scale per tensor: of a layer's keys, its values
    int8, int4                  integers with a scale and a lowest value
      -gN                       tokens that share the scales of a key channel (default: 128)
    -wN                         latest tokens kept in 16 bits (default: 128 of integers, 0 of fp8)

Integers are asymmetric, x ~ low + scale q with q from 0 to 2^b - 1, scale and low in float16:

    keys      per head and channel, before rotary embedding, over N neighbouring tokens
    values    per token and head, over the head's channels

as keys have channels that are large for all tokens, and values do not (KIVI, Liu et al. 2024; keys
before the rotation: KVQuant, Hooper et al. 2024). KIVI quantises keys after it, KVQuant with one
calibrated scale for all tokens; groups of tokens before the rotation are [ours].

Tokens leave the window in whole groups: of n tokens the oldest max(0, n - w) // g * g are
quantised, so the latest w to w + g - 1 are 16 bits wide. With heads H, key and value channels D, E
a quantised token takes, in a layer, H (ceil(D b / 8) + 4 D / g + ceil(E b / 8) + 4) bytes in
integers, H (D + E) in 8-bit floats; the two scales of a layer's 8-bit floats are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bitnest.errors import FormatError

FLOATS = ("fp8_e4m3", "fp8_e5m2")
INTEGERS = {"int8": 8, "int4": 4}
ALIASES = {"fp8": "fp8_e4m3"}
NONE = "none"  # the model's own 16-bit cache
KV_GROUP = 128
KV_WINDOW = 128
SCALE_BYTES = 4  # a scale and a lowest value, float16
GROUPS = (8, 1024)
WINDOWS = (0, 1 << 20)
HINT = "fp8, fp8_e5m2, int8 or int4, the integers with -g128 and all with -w128 behind"


@dataclass(frozen=True)
class KVFormat:
    """How a cache is stored; see above. group: 1 for floats.

    Raises:
        FormatError: no such format.
    """

    element: str
    group: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        if self.element not in (*FLOATS, *INTEGERS):
            raise FormatError(f"unknown KV format '{self.element}'", hint=HINT)
        least, most = GROUPS if self.integer else (1, 1)
        if not least <= self.group <= most:
            raise FormatError(
                f"groups of {self.group} tokens in {self.element}",
                hint=f"-g{least} to -g{most}" if self.integer else "8-bit floats have no groups",
            )
        if not WINDOWS[0] <= self.window <= WINDOWS[1]:
            raise FormatError(f"a window of {self.window} tokens", hint="-w0 to -w1048576")

    @property
    def integer(self) -> bool:
        """Whether codes are integers with scales of their own."""
        return self.element in INTEGERS

    @property
    def bits(self) -> int:
        """Of one code."""
        return INTEGERS.get(self.element, 8)

    @property
    def name(self) -> str:
        """The spelling with every default filled in; `parse_kv` reads it back."""
        group = f"-g{self.group}" if self.integer else ""
        return f"{self.element}{group}" + (f"-w{self.window}" if self._says_window else "")

    @property
    def _says_window(self) -> bool:
        return self.integer or self.window > 0

    def folded(self, tokens: int) -> int:
        """Of `tokens` tokens how many, the oldest, are quantised."""
        return max(0, tokens - self.window) // self.group * self.group

    def spans(self, tokens: int, sliding: int | None = None) -> tuple[int, int]:
        """Tokens that a layer's cache holds quantised, and in 16 bits, after `tokens` tokens.

        sliding: tokens that the layer attends to, itself included; None: all. Groups go once no
        later token attends to any of theirs. A sliding window that the 16-bit one covers is kept in
        16 bits.
        """
        folded = self.folded(tokens)
        if sliding is None:
            return folded, tokens - folded
        if self.window >= sliding - 1:
            return 0, min(tokens, sliding - 1)
        gone = max(0, tokens - (sliding - 1)) // self.group * self.group
        return folded - min(folded, gone), tokens - folded

    def nbytes(
        self,
        tokens: int,
        heads: int,
        keys: int,
        values: int,
        *,
        sliding: int | None = None,
        itemsize: int = 2,
    ) -> int:
        """Bytes of one sequence of `tokens` tokens in one layer, scales counted.

        heads: of keys and values. keys, values: channels of a head. itemsize: bytes of a value in
        the window. sliding: see `spans`.
        """
        folded, recent = self.spans(tokens, sliding)
        codes = -(-keys * self.bits // 8) + -(-values * self.bits // 8)
        total = folded * codes + recent * (keys + values) * itemsize
        if self.integer:
            total += (folded // self.group * keys + folded) * SCALE_BYTES
        return heads * total


def parse_kv(name: str) -> KVFormat:
    """The format spelt `name`.

    Raises:
        FormatError: not one.
    """
    element, *options = name.strip().split("-")
    element = ALIASES.get(element, element)
    if element not in (*FLOATS, *INTEGERS):
        raise FormatError(f"unknown KV format '{name}'", hint=HINT)
    integer = element in INTEGERS
    found: dict[str, int] = {}
    for option in options:
        match = re.fullmatch(r"([gw])([0-9]{1,7})", option)
        if match is None or match[1] in found:
            raise FormatError(f"KV format '{name}': '{option}' says nothing", hint=HINT)
        found[match[1]] = int(match[2])
    group = found.get("g", KV_GROUP if integer else 1)
    if "g" in found and not integer:
        raise FormatError(
            f"KV format '{name}': 8-bit floats have no groups",
            hint="leave out -g; one scale serves all tokens",
        )
    return KVFormat(element, group, found.get("w", KV_WINDOW if integer else 0))


def read_kv(name: str | None) -> KVFormat | None:
    """The same where `none`, or nothing, is the model's own 16-bit cache.

    Raises:
        FormatError: neither.
    """
    return None if name is None or name.strip() == NONE else parse_kv(name)


def recorded_kv(config: Any) -> KVFormat | None:
    """The format that the artifact with this config.json (a mapping) or transformers
    configuration asks for, None if it asks for none.

    Raises:
        FormatError: one that this bitnest does not know.
    """
    if not isinstance(config, dict):
        config = {"quantization_config": getattr(config, "quantization_config", None)}
    inner = config.get("quantization_config")
    name = inner.get("kv") if isinstance(inner, dict) else getattr(inner, "kv", None)
    return read_kv(name or None)
