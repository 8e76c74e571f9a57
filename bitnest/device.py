"""Choosing the device to compute on, with an error a person understands when it is not there."""

from __future__ import annotations

import torch

from bitnest.errors import RecipeError


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; for None a GPU if there is one, else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hint = "cpu, cuda, cuda:1 ...; leave --device out to take a GPU if there is one"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"unknown device '{name}'", hint=hint) from error
    if device.type not in {"cpu", "cuda"}:
        raise RecipeError(f"bitnest does not compute on '{name}'", hint=hint)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RecipeError(f"no device '{name}': this machine shows {count} GPUs", hint=hint)
    return device
