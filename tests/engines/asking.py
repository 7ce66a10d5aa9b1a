"""Ask an engine in its own environment, and judge what it answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from . import models
from .environments import ENGINES, HOME, python_of

TOLERANCE = 2e-3  # nats; float32 on both sides
SAME, UNSUPPORTED, WRONG, REFUSED = "same", "unsupported", "wrong", "refused"
_SECONDS = 900  # for one model


def ask(engine: str, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Let an engine answer; a model that takes the process down costs only its own answer.

    Args:
        engine (`str`): Of `ENGINES`.
        jobs (`list[dict[str, Any]]`): `name`, `path`, `prompt` and `count` of each.

    Returns:
        `dict[str, dict[str, Any]]`: By name, `tokens` and `logprobs`, or an `error`.
    """
    answers: dict[str, dict[str, Any]] = {}
    folder, script = HOME / engine, Path(__file__).parent / ENGINES[engine].script
    todo, lines, log = folder / "jobs.json", folder / "answers.jsonl", folder / "log.txt"
    while left := [job for job in jobs if job["name"] not in answers]:
        todo.write_text(json.dumps(left))
        lines.write_text("")
        program = ["node"] if script.suffix == ".mjs" else [str(python_of(engine))]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
        with log.open("w") as output:
            command = [*program, str(script), str(todo), str(lines)]
            limit = _SECONDS * len(left)
            done = subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=output, timeout=limit)
        started = ""
        for line in map(json.loads, lines.read_text().splitlines()):
            started = line["name"]
            if "started" not in line:
                answers[started] = line
        if not started:
            tail = (log.read_text().strip().splitlines() or ["no message"])[-1]
            return answers | {job["name"]: {"error": f"{engine} does not start: {tail}"} for job in left}
        answers.setdefault(started, {"error": f"the process ended with {done.returncode}; see {log}"})
    return answers


def ask_server(name: str, which: str) -> dict[str, Any]:
    """Let vLLM's OpenAI-compatible server answer for one model.

    Args:
        name (`str`): The model, which has its tokenizer.
        which (`str`): `"dense"` or `"cut"`.

    Returns:
        `dict[str, Any]`: As from [`ask`]. The server sends text: its tokens are those of transformers if they spell it.
    """
    from transformers import AutoTokenizer

    folder, expected = models.make(name)[which], models.reference(name, which)
    script = Path(__file__).parent / "ask_server.py"
    words = [str(folder), json.dumps(models.prompt_of(name)), str(models.COUNT)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PATH"] = f"{HOME / 'vllm' / 'bin'}{os.pathsep}{env['PATH']}"
    command = [str(python_of("vllm")), str(script), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SECONDS)
    answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": done.stderr.strip()[-200:]}
    if "error" in answer:
        return answer
    spelt = AutoTokenizer.from_pretrained(folder).decode(expected["tokens"])
    tokens = expected["tokens"] if spelt == answer["text"] else [-1] * models.COUNT
    return {"tokens": tokens, "logprobs": answer["logprobs"]}


def matches(reference: dict[str, Any], answer: dict[str, Any], tolerance: float = TOLERANCE) -> bool:
    """Whether an engine answers as transformers does.

    Args:
        reference (`dict[str, Any]`): `tokens`, `logprobs` and `leads`.
        answer (`dict[str, Any]`): `tokens` and `logprobs`, or an `error`.
        tolerance (`float`): How far log-probabilities may be apart; two tokens closer than that may change places.

    Returns:
        `bool`: `True` if it does.
    """
    if "error" in answer or len(answer["tokens"]) != len(reference["tokens"]):
        return False
    if models.difference(reference, answer) > tolerance:
        return False
    pairs = zip(reference["tokens"], answer["tokens"], strict=True)
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    return first is None or reference["leads"][first] <= tolerance


def judge(
    cut: tuple[dict[str, Any], dict[str, Any]],
    dense: tuple[dict[str, Any], dict[str, Any]] | None,
    tolerance: float = TOLERANCE,
) -> tuple[str, float | None, str]:
    """Tell a wrong cut from a model that the engine does not run correctly even whole.

    Args:
        cut (`tuple[dict[str, Any], dict[str, Any]]`): What transformers and the engine answer on the cut model.
        dense (`tuple[dict[str, Any], dict[str, Any]]`, *optional*): The same of the uncut model.
        tolerance (`float`): As in [`matches`].

    Returns:
        `tuple[str, float | None, str]`: The outcome, the difference in nats, and a note.
    """
    if matches(*cut, tolerance):
        return SAME, models.difference(*cut), ""
    if dense is None:
        raise ValueError("the cut does not match, so the uncut model must be asked too")
    if not matches(*dense, tolerance):
        return (
            UNSUPPORTED,
            None,
            dense[1].get("error") or f"the uncut model is off by {models.difference(*dense):.2g} nats",
        )
    return WRONG, None, cut[1].get("error") or f"off by {models.difference(*cut):.2g} nats; the uncut model is right"
