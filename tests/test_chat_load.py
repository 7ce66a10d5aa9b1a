"""The chat under load: many clients at once, clients that leave, a full queue, and a hundred turns."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from gradio_client import Client

from tests.chat_models import pruned_model, tiny_chat_model
from tests.chat_server import answers_under_way, served

import chat  # isort: skip
import page  # isort: skip

pytestmark = pytest.mark.processes
RUN = [sys.executable, "-c", "import sys; from hf_layerprune.cli import main; sys.exit(main())", "chat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_chat_model(folder / "base")
    pruned_model(folder / "base", folder / "pruned")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder / "pruned", folder / "base") as address:
        yield address


def soon(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for something, and say how long it took."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds
        time.sleep(0.005)
    return time.perf_counter() - start


def test_a_client_that_cancels_frees_the_model_within_a_second(url: str) -> None:
    client = Client(url, verbose=False)
    job = client.submit("ba", max_tokens=1024, api_name="/chat")
    soon(lambda: len(job.outputs()) > 1, 30)
    assert answers_under_way() == 1
    job.cancel()
    assert soon(lambda: answers_under_way() == 0, 1) < 1


@pytest.mark.parametrize("endpoint", ["chat", "compare"])
def test_a_client_whose_connection_breaks_frees_the_model_within_a_second(url: str, endpoint: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as http:
        payload = (
            {"data": ["ba", [], "", 1.0, 1.0, 1024, 3]} if endpoint == "chat" else {"data": ["ba", "", 1, 1, 1024, 3]}
        )
        event = http.post(f"gradio_api/call/{endpoint}", json=payload).json()["event_id"]
        with http.stream("GET", f"gradio_api/call/{endpoint}/{event}") as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            assert answers_under_way() == {"chat": 1, "compare": 2}[endpoint]
        # The connection is closed here, with most of the answer to come.
        assert soon(lambda: answers_under_way() == 0, 1) < 1


def test_twenty_clients_get_their_own_answers(url: str) -> None:
    with ThreadPoolExecutor(20) as pool:
        clients = list(pool.map(lambda _: Client(url, verbose=False), range(20)))
        jobs = [
            one.submit(f"ba {'be ' * n}", max_tokens=24, seed=n, api_name="/chat") for n, one in enumerate(clients)
        ]
        most = 0
        while not all(job.done() for job in jobs):
            most = max(most, answers_under_way())
            time.sleep(0.002)
    assert 1 < most <= page.AT_ONCE
    for n, job in enumerate(jobs):
        ids = chat.models.source.encode([{"role": "user", "content": f"ba {'be ' * n}"}])
        settings = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 24, "seed": n}
        alone = list(chat.run(["pruned"], ids, settings))[-1][0]["text"]
        pieces = job.outputs()
        assert pieces[-1] == alone
        assert all(alone.startswith(piece.rstrip()) for piece in pieces)


def test_the_queue_is_bounded(url: str) -> None:
    most = page.AT_ONCE + page.MAX_WAITING
    with httpx.Client(base_url=url, timeout=60) as http:
        held, codes = [], []
        for n in range(most + 8):
            body = {"data": ["ba", [], "", 1.0, 1.0, 1024, n], "fn_index": 0, "session_hash": f"session{n}"}
            answer = http.post("gradio_api/queue/join", json=body)
            codes.append(answer.status_code)
            if answer.status_code == 200:
                held.append((f"session{n}", answer.json()["event_id"]))
        assert codes.count(503) >= 1
        assert set(codes) == {200, 503}
        assert page.MAX_WAITING <= codes.count(200) <= most + 4
        assert "full" in answer.text.lower()
        for session, event in reversed(held):
            http.post("gradio_api/cancel", json={"session_hash": session, "fn_index": 0, "event_id": event})
        soon(lambda: answers_under_way() == 0, 20)
    assert Client(url, verbose=False).predict("ba", max_tokens=3, seed=1, api_name="/chat")


def heed_ctrl_c() -> None:
    """A process in the background is made to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_chat_and_a_hundred_turns(folder: Path) -> None:
    pruned = folder / "pruned"
    # The base is named nowhere: the history of the model knows it.
    env = os.environ | {"MAX_CONTEXT": "512", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*RUN, str(pruned)], stdout=subprocess.PIPE, text=True, env=env, preexec_fn=heed_ctrl_c
    ) as process:
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            client = Client(url, verbose=False, httpx_kwargs={"timeout": 60})  # a busy machine is no leak
            assert client.predict(api_name="/about")["model"] == str(pruned)
            server = psutil.Process(process.pid)
            said: list[dict[str, str]] = []
            used = []
            for turn in range(100):
                answer = client.predict(f"ba be {turn}", said, max_tokens=3, seed=turn, api_name="/chat")
                said += [{"role": "user", "content": f"ba be {turn}"}, {"role": "assistant", "content": answer or "-"}]
                used.append(server.memory_info().rss)
            print(f"resident after 30 turns {used[29] / 1e6:.1f} MB, after 100 {used[-1] / 1e6:.1f} MB")
            assert used[-1] < 1.02 * used[29]
            assert server.num_threads() < 40
            both = client.predict("ba", max_tokens=3, api_name="/compare")
            assert both["dense"]["weights_bytes"] > both["pruned"]["weights_bytes"]
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    assert process.returncode == 130
