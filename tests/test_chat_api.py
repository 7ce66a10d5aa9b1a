"""The chat over the wire: `gradio_client` and MCP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client

from tests.chat_models import NASTY, pruned_model, tiny_chat_model
from tests.chat_server import served

import api  # isort: skip
import chat  # isort: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chat")
    base = tiny_chat_model(folder / "base")
    with served(pruned_model(base, folder / "pruned"), base) as address:
        yield address


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, verbose=False)


def test_endpoints_have_the_names_and_words_that_people_rely_on(client: Client) -> None:
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(found) == {"/chat", "/compare", "/about"}
    names = [one["parameter_name"] for one in found["/chat"]["parameters"]]
    assert names == ["message", "history", "system_prompt", "temperature", "top_p", "max_tokens", "seed"]
    assert [one["parameter_has_default"] for one in found["/chat"]["parameters"]] == [False] + [True] * 6
    assert found["/chat"]["returns"][0]["type"] == {"type": "string"}


def test_an_answer_is_streamed_and_seeded(client: Client) -> None:
    job = client.submit("ba be", max_tokens=200, seed=5, api_name="/chat")
    final = job.result(timeout=60)
    pieces = job.outputs()
    assert len(pieces) > 2
    assert all(final.startswith(piece.rstrip()) for piece in pieces)
    assert client.predict("ba be", max_tokens=200, seed=5, api_name="/chat") == final
    assert client.predict("ba be", max_tokens=200, seed=6, api_name="/chat") != final
    # To a program, HTML is text like any other.
    assert any(word in final for word in NASTY)


def test_history_and_system_prompt_reach_the_model(client: Client) -> None:
    def ask(**more: object) -> str:
        return client.predict("bi", temperature=0, max_tokens=20, api_name="/chat", **more)

    history = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": "bu"}]
    source = chat.models.source
    for more, said in (
        ({}, []),
        ({"history": history}, history),
        ({"system_prompt": "do"}, [{"role": "system", "content": "do"}]),
    ):
        ids = source.encode([*said, {"role": "user", "content": "bi"}])
        settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 20, "seed": 0}
        assert ask(**more) == list(chat.run(["pruned"], ids, settings))[-1][0]["text"]


def test_both_models_at_once(client: Client) -> None:
    found = client.predict("ba be", max_tokens=30, seed=5, api_name="/compare")
    assert set(found) == {"pruned", "dense"}
    assert found["pruned"]["text"] == client.predict("ba be", max_tokens=30, seed=5, api_name="/chat")
    assert found["dense"]["text"] != found["pruned"]["text"]
    for state in found.values():
        assert state["tokens"] == 30
        assert state["tokens_per_second"] > 0
        assert 0 < state["seconds_to_first_token"] < 10
    assert found["pruned"]["weights_bytes"] < found["dense"]["weights_bytes"]
    assert found["pruned"]["shared_bytes"] > 0.99 * found["pruned"]["weights_bytes"]
    # 6 and 8 layers of the same prompt and as many words.
    assert 8 * found["pruned"]["cache_bytes"] == 6 * found["dense"]["cache_bytes"]


def test_records_are_those_of_the_repository(client: Client) -> None:
    found = client.predict(api_name="/about")
    assert found["lineage"] == json.loads(Path(found["model"], "lineage.json").read_text())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"message": "x" * 100_000}, "100,000 characters, but the limit is 40,000"),
        ({"message": "ba", "system_prompt": "x" * 100_000}, "100,002 characters"),
        ({"message": "ba", "history": [{"role": "system", "content": "x" * 100_000}]}, "100,002 characters"),
        ({"message": "ba", "history": [{"role": "user", "content": "x" * 100_000}]}, "100,004 characters"),
        ({"message": "ba " * 10_000}, "has 10,004 tokens. The context is 4,096 tokens, of which 256 are reserved"),
    ],
)
def test_a_prompt_that_is_too_long_gets_a_clear_limit(client: Client, asked: dict, message: str) -> None:
    with pytest.raises(AppError, match=message.replace(".", r"\.")):
        client.predict(**asked, api_name="/chat")


@pytest.mark.parametrize(
    "asked",
    [
        {"message": 5},
        {"message": "ba", "history": ["x"]},
        {"message": "ba", "history": {"a": 1}},
        {"message": "ba", "history": [{"role": "user"}]},
        {"message": "ba", "history": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"message": "ba", "temperature": "x"},
    ],
)
def test_a_request_of_other_types_is_refused(client: Client, asked: dict) -> None:
    with pytest.raises(AppError, match="This is not a request that the API documents"):
        client.predict(**asked, api_name="/chat")


def test_a_long_history_takes_no_longer_than_what_fits_of_it(url: str) -> None:
    turns = [{"role": role, "content": ""} for role in ("user", "assistant")] * 200_000
    began = time.process_time()
    list(api.chat("ba", turns, max_tokens=3))
    assert time.process_time() - began < 10


def test_tools_over_mcp(url: str) -> None:
    async def use() -> tuple[dict, str, dict]:
        async with (
            streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            asked = await session.call_tool("chat", {"message": "ba be", "max_tokens": 9, "seed": 5})
            compared = await session.call_tool("compare", {"prompt": "ba be", "max_tokens": 9, "seed": 5})
            assert not asked.isError
            assert not compared.isError
            return tools, asked.content[0].text, compared.content[0].text

    tools, answer, both = asyncio.run(use())
    assert set(tools) == {"chat", "compare", "about"}
    assert "Ask the pruned model" in tools["chat"].description
    assert "The question" in tools["chat"].inputSchema["properties"]["message"]["description"]
    assert answer == Client(url, verbose=False).predict("ba be", max_tokens=9, seed=5, api_name="/chat")
    assert answer in both


def test_nobody_is_answered_while_the_weights_load(tmp_path: Path) -> None:
    # Last in this file: the page that the other tests use shares what is asked here.
    base = tiny_chat_model(tmp_path / "base")
    with served(base, loaded=False) as url:
        chat.models.done.wait(60)
        chat.models.sides.clear()
        chat.models.done = threading.Event()
        with pytest.raises(AppError, match="still loading"):
            Client(url, verbose=False).predict("ba", api_name="/chat")
