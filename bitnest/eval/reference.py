"""The base, kept between models without keeping the base: hidden states and its head.

After the base's pass its final hidden states lie in float32, in memory or, above `LIMIT` bytes, in
a temporary file that vanishes with the process. Each model is then compared with logits made from
them anew. A base that cannot be streamed has its logits stored instead, which takes vocab / hidden
times the space, so the disk is asked first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from bitnest.errors import BitnestError
from bitnest.eval.logits import Full, Head, Logits, Streamed

LIMIT = 256 << 20


def storage(rows: int, width: int) -> torch.Tensor:
    """(rows, width) float32, zero; on disk above `LIMIT` bytes.

    Raises:
        BitnestError: the disk has no room.
    """
    nbytes = 4 * rows * width
    if nbytes <= LIMIT:
        return torch.zeros(rows, width)
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise BitnestError(
            f"the base's outputs take {nbytes:,} bytes, {free:,} are free",
            where=place,
            hint="fewer windows or texts, or set TMPDIR to a larger disk",
        )
    with tempfile.TemporaryFile(dir=place) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(rows, width)))


@dataclass
class Reference:
    """The base's outputs on every text.

    head: its head, or None if `stored` holds logits. stored: one (predictions, width) per text.
    device: where logits are made.
    """

    head: Head | None
    device: torch.device
    stored: list[torch.Tensor]

    def keep(self, text: int, rows: slice, logits: Logits, predictions: int) -> None:
        """Store the outputs behind `logits` as rows `rows` of text number `text`."""
        assert isinstance(logits, Streamed | Full)
        values = logits.hidden if isinstance(logits, Streamed) else logits.values
        if text == len(self.stored):
            self.stored.append(storage(predictions, values.shape[1]))
        self.stored[text][rows] = values.float().cpu()

    def logits(self, text: int, rows: slice) -> Logits:
        """The base's logits of these rows."""
        values = self.stored[text][rows]
        return Full(values, self.device) if self.head is None else Streamed(values, self.head)

    @property
    def vocab(self) -> int:
        """Vocabulary entries."""
        return self.logits(0, slice(0, 1)).vocab
