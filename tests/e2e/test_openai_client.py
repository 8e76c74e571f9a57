"""`bitnest serve demo` as a process, spoken to by the real `openai` client.

The embedded model is compressed first, as `serve` does by itself, by rounding: GPTQ takes a minute.
Start-up, authentication, both endpoints whole and streamed, many clients at once, and the exit code
after a signal. Where texts are compared a float32 copy is served, because in bfloat16 two nearly
equal logits may change places with the size of the batch.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")

KEY = "test-key"
CACHE = Path(tempfile.mkdtemp(prefix="bitnest-e2e-"))  # the demo is compressed into it once
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
MESSAGES: list[Any] = [{"role": "user", "content": "Say something about the sea."}]


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    stderr: list[str]

    def client(self, **options: Any) -> Any:
        given = {"api_key": KEY, "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **given)


@contextmanager
def server(*options: str, model: str = "demo") -> Iterator[Running]:
    how = ["--cache-dir", str(CACHE), "--method", "rtn"] if model == "demo" else ["--dense"]
    command = [sys.executable, "-m", "bitnest", "serve", model, "--port", "0", *how, *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ) | {"HF_HUB_OFFLINE": "1"},
    )
    lines: list[str] = []
    assert process.stderr is not None
    pipe = process.stderr

    reader = threading.Thread(target=lambda: [lines.append(line) for line in pipe], daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"ready: (http://\S+)", "".join(lines))
            if found:
                yield Running(process, found[1], lines)
                return
            time.sleep(0.05)
        pytest.fail("the server did not become ready:\n" + "".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=10)
        reader.join(timeout=5)


@pytest.fixture(scope="module")
def float_demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    from bitnest.packed.loading import load_model, load_tokenizer

    directory = str(tmp_path_factory.mktemp("float") / "demo")
    load_model("demo", dtype="float32").save_pretrained(directory)
    load_tokenizer("demo").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def running(float_demo: str) -> Iterator[Running]:
    with server("--api-key", KEY, "--model-name", "demo", model=float_demo) as up:
        yield up


def test_ready_message_holds_a_curl_line_without_the_key(running: Running) -> None:
    said = "".join(running.stderr)
    assert f"curl {running.url}/v1/completions" in said
    assert KEY not in said
    assert running.url.startswith("http://127.0.0.1:")


def test_models_are_listed(running: Running) -> None:
    assert [m.id for m in running.client().models.list()] == ["demo"]


def test_completion_equals_generate(running: Running, float_demo: str) -> None:
    import torch

    from bitnest.packed.loading import load_model, load_tokenizer

    prompt = "It was a dark night, and the captain"
    answer = running.client().completions.create(
        model="demo", prompt=prompt, max_tokens=40, temperature=0
    )
    model, tokenizer = load_model(float_demo), load_tokenizer(float_demo)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=40)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_streamed_completion_equals_the_whole_one(running: Running) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "The sea", "max_tokens": 30, "seed": 4}
    whole = running.client().completions.create(**asked)
    chunks = list(
        running.client().completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].text for c in chunks if c.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason


def test_chat_whole_and_streamed_agree(running: Running) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": MESSAGES,
        "max_completion_tokens": 24,
        "temperature": 0.7,
        "seed": 2,
    }
    whole = running.client().chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(running.client().chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_many_clients_at_once_get_what_they_get_alone(running: Running) -> None:
    prompts = ["The ship", "She said that", "In the year", "A cat and a dog went", "No", "If only"]

    def ask(index: int) -> str:
        answer = running.client().completions.create(
            model="demo", prompt=prompts[index], max_tokens=12 + 4 * index, temperature=0
        )
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert together == [ask(index) for index in range(6)]


def test_errors_are_the_clients_own_exceptions(running: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        running.client(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        running.client().completions.create(model="gpt-9", prompt="a")
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        running.client().completions.create(model="demo", prompt="a", logprobs=1)
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        running.client().completions.create(model="demo", prompt="word " * 20000)
    assert caught.value.code == "context_length_exceeded"


def test_client_that_hangs_up_frees_its_place() -> None:
    with server("--max-pending", "1") as up:
        client = up.client()
        asked: dict[str, Any] = {"model": "demo", "prompt": "The sea", "max_tokens": 200}
        stream = client.completions.create(**asked, stream=True, temperature=1.5)
        next(iter(stream))
        stream.close()
        for _ in range(50):
            try:
                client.completions.create(model="demo", prompt="a", max_tokens=1)
                break
            except openai.InternalServerError as error:
                assert error.status_code == 503
                time.sleep(0.1)
        else:
            pytest.fail("the place was never given back")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("backend", ["continuous", "generate"])
def test_signal_ends_a_busy_server_with_code_0(sig: signal.Signals, backend: str) -> None:
    with server("--backend", backend) as up:
        with ThreadPoolExecutor(4) as pool:
            asked: dict[str, Any] = {"model": "demo", "prompt": "The sea", "max_tokens": 200}

            def stream() -> int:
                try:
                    return len(list(up.client().completions.create(**asked, stream=True)))
                except (openai.APIError, openai.APIConnectionError):
                    return -1

            jobs = [pool.submit(stream) for _ in range(4)]
            time.sleep(0.5)
            up.process.send_signal(sig)
            assert up.process.wait(timeout=20) == 0
            for job in jobs:
                job.result(timeout=10)
        time.sleep(0.2)
        assert "Traceback" not in "".join(up.stderr)


def test_port_in_use_is_one_message_and_code_2() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "bitnest.serve", "demo", "--port", port],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2
    assert "already in use" in done.stderr and "hint:" in done.stderr
    assert "Traceback" not in done.stderr
