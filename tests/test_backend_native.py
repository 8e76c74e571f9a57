"""Serving by the C runtime: the model's greedy tokens, prefixes kept, jobs ended, and who serves.

Texts are compared in float32, with a float32 cache; the model is that of tests/test_serve.py in
little. A copy of it gives what is expected.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from test_serve import NAME, PROMPTS, complete, model, reference, stream, tokenizer  # noqa: F401

from bitnest.errors import UnsupportedModel
from bitnest.kernels.cpu.runtime import runtime
from bitnest.packed.native_model import NativeModel
from bitnest.serve.backend import Job, Update
from bitnest.serve.backend_continuous import ContinuousBackend
from bitnest.serve.backend_generate import GenerateBackend
from bitnest.serve.backend_native import NativeBackend
from bitnest.serve.sampling import Sampling
from bitnest.serve.server import create_app, make_backend

pytestmark = pytest.mark.skipif(runtime() is None, reason="no C compiler")


class Counting:
    """A native model that says which tokens it was given."""

    def __init__(self, native: NativeModel) -> None:
        self.native, self.given = native, []  # type: NativeModel, list[list[int]]

    def cache(self) -> Any:
        return self.native.cache()

    def forward(self, tokens: list[int], cache: Any) -> torch.Tensor:
        self.given.append(list(tokens))
        return self.native.forward(tokens, cache)


class Run:
    """One job, waited for."""

    def __init__(self, backend: NativeBackend, prompt: list[int], tokens: int, **rest: Any) -> None:
        self.tokens: list[int] = []
        self.error: str | None = None
        self.ended = threading.Event()
        self.first = threading.Event()
        self.id = f"{id(self)}"
        sampling = Sampling(**{"temperature": 0.0, **rest})
        backend.submit(
            Job(id=self.id, prompt=tuple(prompt), max_tokens=tokens, sampling=sampling), self.take
        )

    def take(self, update: Update) -> None:
        self.tokens += update.tokens
        self.first.set()
        if update.finished or update.error:
            self.error = update.error
            self.ended.set()

    def wait(self) -> list[int]:
        assert self.ended.wait(60)
        return self.tokens


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:  # noqa: F811
    return copy.deepcopy(model)


@pytest.fixture
def backend(model: Any) -> Iterator[NativeBackend]:  # noqa: F811
    native: Any = Counting(NativeModel.of(model, cache=torch.float32, planes=3))
    made = NativeBackend(model, native, ())
    made.start()
    yield made
    made.stop()
    assert not made.alive()


def greedy(twin: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = twin.generate(
        ids, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_answers_over_http_are_those_of_generate(model: Any, twin: Any, tokenizer: Any) -> None:  # noqa: F811
    native = NativeModel.of(model, cache=torch.float32, planes=3)
    ends = (tokenizer.eos_token_id,)
    app = create_app(model, tokenizer, model_name=NAME, backend=NativeBackend(model, native, ends))
    with TestClient(app) as client:
        for prompt in PROMPTS:
            body = complete(client, prompt=prompt, max_tokens=24, temperature=0)
            assert body["choices"][0]["text"] == reference(twin, tokenizer, prompt, 24)
            assert body["usage"]["completion_tokens"] == 24
        asked = {"prompt": "the fox", "max_tokens": 30, "temperature": 1.2, "seed": 5}
        whole = complete(client, **asked)["choices"][0]["text"]
        assert complete(client, **asked)["choices"][0]["text"] == whole
        pieces = [c["choices"][0]["text"] for c in stream(client, **asked)]
        assert "".join(pieces) == whole


def test_next_turn_pays_for_new_tokens_only(backend: NativeBackend, twin: Any) -> None:
    given: list[list[int]] = backend._native.given  # type: ignore[attr-defined]
    first = [5, 9, 13, 40, 2]
    answer = Run(backend, first, 6).wait()
    assert answer == greedy(twin, first, 6)
    assert given == [first, *([token] for token in answer[:-1])]
    given.clear()
    second = [*first, *answer, 77, 78]
    assert Run(backend, second, 4).wait() == greedy(twin, second, 4)
    assert given[0] == [answer[-1], 77, 78]  # the last token had not gone through the model
    given.clear()
    other = [*first[:3], 99]  # parts ways within the prompt
    assert Run(backend, other, 3).wait() == greedy(twin, other, 3)
    assert given[0] == [99]
    given.clear()
    assert Run(backend, other, 3).wait() == greedy(twin, other, 3)
    assert given[0] == [99]  # the same again: the last token runs


def test_seeds_do_not_depend_on_what_is_kept(backend: NativeBackend) -> None:
    runs = [Run(backend, [3, 4, 5], 12, temperature=1.0, seed=7).wait() for _ in range(2)]
    assert runs[0] == runs[1]


def test_cancelled_jobs_end_and_the_next_one_runs(backend: NativeBackend, twin: Any) -> None:
    long = Run(backend, [5, 6, 7], 100_000)
    assert long.first.wait(60)
    waiting = Run(backend, [8, 9], 5)
    backend.cancel(waiting.id)
    backend.cancel(long.id)
    backend.cancel("unknown")
    assert 0 < len(long.wait()) < 100_000
    waiting.ended.wait(0.2)
    assert waiting.tokens == []
    assert Run(backend, [5, 6, 7, 1], 5).wait() == greedy(twin, [5, 6, 7, 1], 5)


def test_a_failed_step_ends_its_job_only(
    backend: NativeBackend, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Run(backend, [5, 100_000], 3)
    bad.wait()
    assert bad.error is not None and "vocabulary" in bad.error
    assert Run(backend, [5, 6], 3).wait() == greedy(twin, [5, 6], 3)


def test_end_of_sequence_ends(model: Any, twin: Any) -> None:  # noqa: F811
    prompt = [5, 9, 13]
    wanted = greedy(twin, prompt, 8)
    native = NativeModel.of(model, cache=torch.float32, planes=3)
    made = NativeBackend(model, native, (wanted[2],))
    made.start()
    found = Run(made, prompt, 8).wait()
    made.stop()
    assert found == wanted[: wanted.index(wanted[2]) + 1]


def test_who_serves(model: Any, tokenizer: Any) -> None:  # noqa: F811
    said: list[str] = []
    assert isinstance(make_backend("auto", model, tokenizer, say=said.append), NativeBackend)
    assert said == []
    assert isinstance(make_backend("continuous", model, tokenizer), ContinuousBackend)
    assert type(make_backend("generate", model, tokenizer)) is GenerateBackend
    other = copy.deepcopy(model)
    handle = other.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert isinstance(make_backend("auto", other, tokenizer, say=said.append), ContinuousBackend)
    assert len(said) == 1 and "model.layers.1.mlp has hooks" in said[0]
    with pytest.raises(UnsupportedModel, match="hooks"):
        make_backend("native", other, tokenizer)
    handle.remove()
    other.model.layers[0].mlp.forward = lambda x: x
    assert isinstance(make_backend("auto", other, tokenizer, say=said.append), ContinuousBackend)
    assert "logits" in said[1]
