"""The OpenAI-compatible server: what it answers, what it refuses, and that the text is the model's.

The model is a random four-expert Qwen3-MoE, the tokenizer is trained here on a few lines (byte
level, so most random tokens are pieces of characters). Everything runs in this process, without a
port. Expected texts come from a copy of the model: a served model must not be run by anyone else.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bitnest.errors import BitnestError, MissingExtra, TargetError, UnsupportedModel
from bitnest.serve import engine_vllm
from bitnest.serve.backend import BackendStopped, Deliver, Job, Update
from bitnest.serve.backend_continuous import ContinuousBackend
from bitnest.serve.cache import cached_artifact, cached_export
from bitnest.serve.run import listen, unapplied_defaults
from bitnest.serve.sampling import Sampling, pick_tokens, uniform
from bitnest.serve.server import create_app
from bitnest.serve.text import Detokenizer, StopWatch

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café Ωμέγα, 日本語 🙂🙃",
    "a b c d",
] * 8
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = ["the fox", "a", "naïve café, the quick brown dog jumps", "日本語 🙂 lazy"]
NAME = "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    made = Qwen3MoeForCausalLM(config).eval()
    # With end-of-sequence out of reach every answer has the length asked for.
    made.lm_head.weight.data[tokenizer.eos_token_id] = 0.0
    return made


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return copy.deepcopy(model)


@pytest.fixture(scope="module", params=["continuous", "generate"])
def client(
    request: pytest.FixtureRequest, model: Any, twin: Any, tokenizer: Any
) -> Iterator[TestClient]:
    # The twin is made first: some releases serve with another attention implementation set.
    app = create_app(model, tokenizer, model_name=NAME, backend=request.param, cache_tokens=2048)
    with TestClient(app, raise_server_exceptions=True) as opened:
        yield opened


def post(client: TestClient, path: str = "/v1/completions", **body: Any) -> Any:
    return client.post(path, json={"model": NAME, **body})


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = post(client, **body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    text = post(client, path, stream=True, **body).text
    events = [line[len("data: ") :] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def reference(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# The answer is the model's


def test_greedy_answer_equals_generate(client: TestClient, twin: Any, tokenizer: Any) -> None:
    for prompt in PROMPTS:
        body = complete(client, prompt=prompt, max_tokens=24, temperature=0)
        assert body["choices"][0]["text"] == reference(twin, tokenizer, prompt, 24)
        assert body["choices"][0]["finish_reason"] == "length"
        length = len(tokenizer(prompt)["input_ids"])
        assert body["usage"] == {
            "prompt_tokens": length,
            "completion_tokens": 24,
            "total_tokens": length + 24,
        }


def test_concurrent_answers_do_not_mix(client: TestClient, twin: Any, tokenizer: Any) -> None:
    def one(index: int) -> str:
        sampled = index >= len(PROMPTS)  # half the batch samples: the greedy half must not notice
        body = complete(
            client,
            prompt=PROMPTS[index % len(PROMPTS)],
            max_tokens=10 + 7 * (index % len(PROMPTS)),
            temperature=1.0 if sampled else 0,
        )
        return body["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(8)))
    for index, prompt in enumerate(PROMPTS):
        assert texts[index] == reference(twin, tokenizer, prompt, 10 + 7 * index)


def test_list_of_prompts_gives_one_choice_each(
    client: TestClient, twin: Any, tokenizer: Any
) -> None:
    body = complete(client, prompt=PROMPTS, max_tokens=8, temperature=0)
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    for choice, prompt in zip(body["choices"], PROMPTS, strict=True):
        assert choice["text"] == reference(twin, tokenizer, prompt, 8)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    assert (
        complete(client, prompt=ids[0], max_tokens=8, temperature=0)["choices"][0]["text"]
        == (body["choices"][0]["text"])
    )
    by_ids = complete(client, prompt=ids, max_tokens=8, temperature=0)
    assert [c["text"] for c in by_ids["choices"]] == [c["text"] for c in body["choices"][:2]]


def test_streamed_text_equals_the_whole_answer(client: TestClient) -> None:
    for prompt in PROMPTS:
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 40, "temperature": 1.3, "seed": 5}
        whole = complete(client, **asked)
        chunks = stream(client, **asked, stream_options={"include_usage": True})
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        pieces = [c["choices"][0] for c in chunks[:-1]]
        assert "".join(p["text"] for p in pieces) == whole["choices"][0]["text"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert len({c["id"] for c in chunks}) == 1


def test_stop_string_straddling_tokens_is_never_emitted(client: TestClient) -> None:
    free = complete(client, prompt="the fox", max_tokens=60, temperature=0)["choices"][0]["text"]
    stop = free[20:26]
    expected = free[: free.index(stop)]
    body = complete(client, prompt="the fox", max_tokens=60, temperature=0, stop=stop)
    assert body["choices"][0]["text"] == expected
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 60
    chunks = stream(client, prompt="the fox", max_tokens=60, temperature=0, stop=["\0\0", stop])
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_end_of_sequence_says_stop_and_is_not_text(
    client: TestClient, model: Any, twin: Any, tokenizer: Any
) -> None:
    weight = model.lm_head.weight.data
    kept = weight[tokenizer.eos_token_id].clone()
    try:
        out = twin(**tokenizer("the fox", return_tensors="pt"), output_hidden_states=True)
        weight[tokenizer.eos_token_id] = out.hidden_states[-1][0, -1] * 100  # certain to win
        body = complete(client, prompt="the fox", max_tokens=9, temperature=0)
    finally:
        weight[tokenizer.eos_token_id] = kept
    assert body["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert body["usage"]["completion_tokens"] == 1


def test_seed_repeats_and_another_seed_differs(client: TestClient) -> None:
    def text(**body: Any) -> str:
        return complete(client, prompt="a b", max_tokens=30, **body)["choices"][0]["text"]

    assert text(seed=7) == text(seed=7)
    assert text(seed=7) != text(seed=8)
    assert text() != text()
    greedy = text(temperature=0)
    assert text(seed=7, top_p=0.0) == greedy  # only the likeliest token is left
    assert text(seed=7, top_k=1) == greedy
    assert text(seed=7, temperature=1e-6) == greedy


def test_seed_gives_one_text_on_both_backends(model: Any, tokenizer: Any) -> None:
    texts = []
    for backend in ("continuous", "generate"):
        own = copy.deepcopy(model)
        app = create_app(own, tokenizer, model_name=NAME, backend=backend, cache_tokens=1024)  # type: ignore[arg-type]
        with TestClient(app) as client:
            body = complete(client, prompt="the dog", max_tokens=20, seed=3, top_p=0.9, top_k=50)
            texts.append(body["choices"][0]["text"])
    assert texts[0] == texts[1]


def test_chat_uses_the_template(client: TestClient, twin: Any, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b"}]
    expected = reference(twin, tokenizer, "<|system|>be brief<|user|>a b<|assistant|>", 12)
    asked: dict[str, Any] = {"messages": messages, "temperature": 0, "max_completion_tokens": 12}
    body = post(client, "/v1/chat/completions", **asked).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == expected
    parts = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, messages[1]]
    asked["messages"] = parts
    chunks = stream(client, "/v1/chat/completions", **asked)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected


def test_chat_without_limit_ends_at_the_context(client: TestClient) -> None:
    body = post(
        client, "/v1/chat/completions", messages=[{"role": "user", "content": "x " * 95}], seed=1
    ).json()
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "logit_bias": {"1": 5}}, "logit_bias"),
        ({"prompt": "a", "min_p": 0.1}, "min_p"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens"),
        ({"prompt": "a", "temperature": 2.5}, "temperature"),
        ({"prompt": "a", "top_p": -0.1}, "top_p"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5, 100000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "a b " * 300}, "prompt"),
        ({"prompt": "a", "max_tokens": 256}, "max_tokens"),
        ({}, "prompt"),
    ],
)
def test_bad_input_is_400_and_names_the_parameter(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    response = post(client, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_parameters_at_their_neutral_value_are_accepted(client: TestClient) -> None:
    neutral = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "logit_bias": {}}
    complete(client, prompt="a", max_tokens=1, user="someone", frequency_penalty=0.0, **neutral)


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_body_that_is_not_an_object_is_400(client: TestClient, raw: bytes) -> None:
    response = client.post("/v1/completions", content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_unknown_model_and_unknown_path_are_404(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "other", "prompt": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/v1/models/tiny").json()["id"] == NAME
    assert "message" in client.get("/v2/nothing").json()["error"]


def test_bad_conversations_are_400(client: TestClient) -> None:
    for messages in (
        [],
        ["hi"],
        [{"content": "no role"}],
        [{"role": "user"}],
        [{"role": "bad", "content": "refused by the template"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{}]}],
    ):
        response = post(client, "/v1/chat/completions", messages=messages)
        assert response.status_code == 400, messages
    tools = [{"type": "function", "function": {"name": "f"}}]
    ask = [{"role": "user", "content": "a"}]
    assert post(client, "/v1/chat/completions", messages=ask, tools=tools).status_code == 400


class SlowBackend:
    """Gives one token every few milliseconds, for ever: to look at a server under way."""

    name = "slow"
    max_context = None

    def __init__(self) -> None:
        self.running: dict[str, Deliver] = {}
        self.cancelled: list[str] = []
        self._alive = False

    def start(self) -> None:
        self._alive = True
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while self._alive:
            for deliver in list(self.running.values()):
                deliver(Update(tokens=(70,)))
            time.sleep(0.005)

    def submit(self, job: Job, deliver: Deliver) -> None:
        if not self._alive:
            raise BackendStopped("it died")
        self.running[job.id] = deliver

    def cancel(self, job_id: str) -> None:
        if self.running.pop(job_id, None) is not None:
            self.cancelled.append(job_id)

    def alive(self) -> bool:
        return self._alive

    def stop(self) -> None:
        self._alive = False


def test_without_chat_template_a_conversation_is_400(model: Any, tokenizer: Any) -> None:
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with TestClient(create_app(model, tokenizer, model_name=NAME, backend=SlowBackend())) as c:
            ask = [{"role": "user", "content": "a"}]
            response = post(c, "/v1/chat/completions", messages=ask)
    finally:
        tokenizer.chat_template = kept
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"


def test_api_key_guards_everything_but_health(model: Any, tokenizer: Any) -> None:
    app = create_app(model, tokenizer, model_name=NAME, api_key="sécret", backend=SlowBackend())
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            response = client.get("/v1/models", headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", content=b"{").status_code == 401  # before parsing
        right = {"Authorization": "Bearer sécret".encode()}
        assert client.get("/v1/models", headers=right).json()["data"][0]["id"] == NAME


async def ask_and_leave(app: Any, body: dict[str, Any], after: int) -> list[dict[str, Any]]:
    """Speak ASGI to `app` and disconnect after `after` messages, or after 0.3 s without any."""
    sent: list[dict[str, Any]] = []
    left = asyncio.Event()
    raw = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if raw:
            return raw.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) >= after:
            left.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [],
    }
    asyncio.get_running_loop().call_later(0.3, left.set)
    await asyncio.wait_for(app(scope, receive, send), 10)
    return sent


@pytest.mark.parametrize("streaming", [True, False])
def test_client_that_leaves_cancels_its_generation(
    model: Any, tokenizer: Any, streaming: bool
) -> None:
    backend = SlowBackend()
    app = create_app(model, tokenizer, model_name=NAME, backend=backend)
    body = {"model": NAME, "prompt": "a", "max_tokens": 200, "stream": streaming}
    backend.start()
    asyncio.run(ask_and_leave(app, body, after=4))
    backend.stop()
    assert len(backend.cancelled) == 1
    assert not backend.running


def test_full_queue_is_503_and_leaves_no_request_behind(model: Any, tokenizer: Any) -> None:
    backend = SlowBackend()
    app = create_app(model, tokenizer, model_name=NAME, backend=backend, max_pending=2)
    with TestClient(app) as client:
        response = post(client, prompt=["a", "b", "c"], max_tokens=5)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_full"
        assert response.headers["retry-after"]
        assert not backend.running


def test_while_shutting_down_new_requests_are_503_and_running_ones_end(
    model: Any, tokenizer: Any
) -> None:
    app = create_app(model, tokenizer, model_name=NAME, backend=SlowBackend())
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, client, prompt="a", max_tokens=200)
        service = app.state.service
        for _ in range(500):
            if service._running:
                break
            time.sleep(0.01)
        service.closing = True
        assert post(client, prompt="a").status_code == 503
        assert client.get("/health").status_code == 503
        service.end_all()
        assert running.result(timeout=5).status_code == 503


def test_dead_generation_thread_is_503_not_a_hang(model: Any, tokenizer: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of something")

    own = copy.deepcopy(model)
    app = create_app(own, tokenizer, model_name=NAME, backend="continuous", cache_tokens=1024)
    with TestClient(app) as client:
        complete(client, prompt="a", max_tokens=2)
        own.forward = broken
        response = post(client, prompt="a", max_tokens=2)
        assert response.status_code == 500
        assert "out of something" in response.json()["error"]["message"]
        for _ in range(300):
            if client.get("/health").status_code == 503:
                break
            time.sleep(0.01)
        assert post(client, prompt="a", max_tokens=2).status_code == 503


def test_more_tokens_than_the_cache_holds_are_still_the_models(
    model: Any, twin: Any, tokenizer: Any
) -> None:
    own = copy.deepcopy(model)
    app = create_app(own, tokenizer, model_name=NAME, cache_tokens=256)  # one page of the cache
    with TestClient(app) as client:
        body = complete(client, prompt=PROMPTS, max_tokens=150, temperature=0)
    for choice, prompt in zip(body["choices"], PROMPTS, strict=True):
        assert choice["text"] == reference(twin, tokenizer, prompt, 150)


def test_family_that_fails_in_its_first_forward_is_refused_at_start() -> None:
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    backend = ContinuousBackend(DeepseekV3ForCausalLM(config).eval(), (), cache_tokens=256)
    with pytest.raises(UnsupportedModel, match="continuous batching") as caught:
        backend.start()
    assert "--backend generate" in caught.value.hint
    assert not backend.alive()


def test_error_in_one_generate_call_spares_the_next(model: Any, tokenizer: Any) -> None:
    app = create_app(model, tokenizer, model_name=NAME, backend="generate")
    with TestClient(app) as client:
        model.generate = None
        try:
            assert post(client, prompt="a", max_tokens=2).status_code == 500
        finally:
            del model.generate
        assert model.generation_config.max_new_tokens is None  # the model is as it was
        complete(client, prompt="a", max_tokens=2)


# Sampling, by hand


def test_pick_tokens_follows_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()  # sorted: token 0 (0.5), 2 (0.3), 1 (0.2)
    for u, token in [(0.0, 0), (0.49, 0), (0.51, 2), (0.79, 2), (0.81, 1), (0.999999, 1)]:
        assert pick_tokens(logits, [Sampling(1.0)], [u]).item() == token
    # top-k 2 leaves 0.625 and 0.375; top-p 0.6 of those is the first alone, 0.7 is both
    for top_p, u, token in [(1.0, 0.62, 0), (1.0, 0.63, 2), (0.6, 0.99, 0), (0.7, 0.99, 2)]:
        assert pick_tokens(logits, [Sampling(1.0, top_p, 2)], [u]).item() == token
    # temperature 0.5 squares: 0.25, 0.09, 0.04 of 0.38
    for u, token in [(0.65, 0), (0.66, 2), (0.89, 2), (0.90, 1)]:
        assert pick_tokens(logits, [Sampling(0.5)], [u]).item() == token


def test_rows_of_a_batch_are_picked_independently() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 40, generator=generator)
    samplings = [Sampling(t, p, k) for t, p, k in [(1, 1, 0), (0.3, 0.5, 9), (2, 0.9, 3)]] + [
        Sampling(1e-6),
        Sampling(1.0, 0.0),
    ]
    us = [uniform(3, row) for row in range(5)]
    together = pick_tokens(logits, samplings, us)
    alone = [pick_tokens(logits[r : r + 1], [samplings[r]], [us[r]]).item() for r in range(5)]
    assert together.tolist() == alone
    assert together[3:].tolist() == logits[3:].argmax(-1).tolist()


def test_sampled_frequencies_match_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.6, 0.3])
    us = [uniform(11, position) for position in range(4000)]
    picked = pick_tokens(p.log().repeat(4000, 1), [Sampling(1.0)] * 4000, us)
    assert torch.allclose(torch.bincount(picked) / 4000, p, atol=0.03)


# Text


def test_streamed_pieces_never_break_a_character(tokenizer: Any) -> None:
    text = "naïve 日本語 🙂🙃 한국어 🚀 end"  # the last ones are not in the vocabulary
    ids = tokenizer(text)["input_ids"]
    detokenizer = Detokenizer(tokenizer, prompt=tokenizer("the")["input_ids"])
    pieces = [detokenizer.push(token) for token in ids]
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_bytes_that_are_no_character_come_out_as_the_tokenizer_decodes_them(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(1, len(tokenizer), (60,), generator=generator).tolist()
        detokenizer = Detokenizer(tokenizer, prompt=[])
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_leading_space_of_a_sentencepiece_token_is_kept() -> None:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁hello", -1.0), ("▁world", -1.0)], 0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert Detokenizer(wrapped, prompt=[1]).push(2) == " world"


def test_stop_watch_holds_back_only_what_may_become_a_stop() -> None:
    watch = StopWatch(["END", "EXIT"])
    assert [watch.push(piece) for piece in ["a E", "N", "x E", "X", "I", "T more"]] == (
        ["a ", "", "ENx ", "", "", ""]
    )
    assert watch.stopped
    assert watch.push("later") == ""
    open_end = StopWatch(["END"])
    assert open_end.push("the EN") + open_end.finish() == "the EN"
    repeated = StopWatch(["aab"])
    assert "".join(repeated.push(c) for c in "aaaab") == "aa"


# Port, defaults, cache, vLLM


def test_port_in_use_says_so() -> None:
    taken = listen("127.0.0.1", 0)
    try:
        with pytest.raises(BitnestError, match="already in use") as caught:
            listen("127.0.0.1", taken.getsockname()[1])
        assert "--port" in caught.value.hint
    finally:
        taken.close()


def test_defaults_that_are_not_applied_are_named(model: Any) -> None:
    from transformers import GenerationConfig

    assert unapplied_defaults(model.generation_config) == []
    assert unapplied_defaults(GenerationConfig(repetition_penalty=1.05, temperature=0.6)) == [
        "repetition_penalty"
    ]


def test_models_own_sampling_is_the_default() -> None:
    from transformers import GenerationConfig

    from bitnest.serve.service import default_sampling

    own = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    assert default_sampling(own) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert default_sampling(GenerationConfig(temperature=0.6)) == {"temperature": 1.0}


def source_directory(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"a": 1}')
    (path / "model.safetensors").write_bytes(b"12345")
    return path


def test_cache_builds_once_even_when_two_ask(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")
    built: list[Path] = []

    def build(target: Path) -> None:
        time.sleep(0.2)
        built.append(target)
        target.mkdir()
        (target / "bitnest.json").write_text("{}")

    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda _: cached_artifact(source, {"bits": 4}, build, root=tmp_path / "c"),
                range(2),
            )
        )
    assert found[0] == found[1] == built[0]
    assert len(built) == 1
    assert cached_artifact(source, {"bits": 3}, build, root=tmp_path / "c") != found[0]
    (source / "model.safetensors").write_bytes(b"123456")
    assert cached_artifact(source, {"bits": 4}, build, root=tmp_path / "c") != found[0]
    assert len(built) == 3


def test_half_built_cache_entry_is_never_used(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")

    def dies(target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    def lies(target: Path) -> None:
        target.mkdir(exist_ok=True)

    def works(target: Path) -> None:
        (target / "bitnest.json").write_text("{}")

    with pytest.raises(KeyboardInterrupt):
        cached_artifact(source, {}, dies, root=tmp_path / "c")
    with pytest.raises(BitnestError, match=r"bitnest\.json"):
        cached_artifact(source, {}, lies, root=tmp_path / "c")
    assert (cached_artifact(source, {}, works, root=tmp_path / "c") / "bitnest.json").exists()


def test_interrupted_export_is_built_again(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")

    def export(target: Path, fail: bool) -> None:
        target.mkdir(parents=True)  # refuses what an earlier run left
        (target / "config.json").write_text("{}")
        if fail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_export(source, {}, lambda out: export(out, True), root=tmp_path / "c")
    done = cached_export(source, {}, lambda out: export(out, False), root=tmp_path / "c")
    assert [path.name for path in done.iterdir()] == ["config.json"]
    assert cached_export(source, {}, lambda out: export(out, True), root=tmp_path / "c") == done


def test_vllm_missing_or_given_an_artifact_is_told(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")
    with pytest.raises(MissingExtra, match="vllm"):
        engine_vllm.serve_with_vllm(source, vllm_bin=str(tmp_path / "nothing"))
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "bitnest"}}')
    with pytest.raises(TargetError, match="bitnest"):
        engine_vllm.serve_with_vllm(source, vllm_bin="/bin/true")


def test_vllm_gets_its_arguments_and_the_key_stays_off_the_command_line(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")
    fake = tmp_path / "vllm"
    fake.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/args\necho $VLLM_API_KEY > {tmp_path}/key\nexit 7\n'
    )
    fake.chmod(0o755)
    code = engine_vllm.serve_with_vllm(
        source, port=8123, api_key="k", extra_args=["--enforce-eager"], vllm_bin=str(fake)
    )
    assert code == 7
    args = (tmp_path / "args").read_text()
    assert args.startswith(f"serve {source} --host 127.0.0.1 --port 8123 ")
    assert "--enforce-eager" in args and "key" not in args
    assert (tmp_path / "key").read_text() == "k\n"
