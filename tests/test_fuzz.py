"""Whatever a file holds, a command ends with exit code 0, 1 or 2 and one line: never a traceback, never a question.

A few cases of each kind of file run with the other tests; `make fuzz` (`pytest -m fuzz`) runs 2,000 of each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_layerprune.cli import main

from . import fuzz
from .measure_models import byte_tokenizer, write_gguf, write_model, write_tasks

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}{{ message['content'] }}{% if not loop.last %}"
    "{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- a\nbase_model: org/name\n---\n\n# A model\n\nWords.\n"
CHAT = [{"role": "user", "content": "Where does the river run?"}, {"role": "assistant", "content": "Down the hill."}]
CASES = int(os.environ.get("HF_LAYERPRUNE_FUZZ_CASES", "2000"))
SECONDS = int(os.environ.get("HF_LAYERPRUNE_FUZZ_SECONDS", "120"))  # for one case on a busy machine


def _model(folder: Path) -> Path:
    write_model(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 2, "top_p": 0.9}))
    return folder


class Sound:
    """Sound files of every kind, and the commands that read them."""

    def __init__(self, root: Path) -> None:
        from peft import LoraConfig, get_peft_model

        from hf_layerprune.runtime.loading import load_base

        self.root = root
        self.base = _model(root / "base")
        text = root / "text.txt"
        text.write_text("The river rises in spring and people walk along the valley. " * 20)
        (root / "rows.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} " + "river " * 40}) + "\n" for i in range(4))
        )
        (root / "chats.jsonl").write_text("".join(json.dumps({"text": CHAT}) + "\n" for _ in range(4)))
        self.text = ["--text", str(text), "--length", "32", "--windows", "1", "--quiet"]
        self.rank = ["--criterion", "block_influence", "--calibration-samples", "2", "--calibration-length", "32"]
        write_tasks(root / "tasks", questions=2)
        (root / "tasks" / "asked.yaml").write_text(
            'doc_to_text: "Q: {{query}}\\nA:"\ntarget_delimiter: " "\ndescription: "Answer."\nmetadata:\n  version: 1\n'
        )
        self.pruned = root / "pruned"
        assert main(["prune", str(self.base), str(self.pruned), "--drop", "2"]) == 0
        assert main(["eval", str(self.pruned), "--base", str(self.base), *self.text]) == 0
        assert main(["card", str(self.pruned)]) == 0
        self.lora = root / "lora"
        get_peft_model(load_base(self.base), LoraConfig(target_modules=["q_proj"])).save_pretrained(self.lora)
        byte_tokenizer().save_pretrained(self.lora)
        self.adapter = root / "adapter"
        assert main(["prune", str(self.base), str(self.adapter), "--drop", "2", "--adapter"]) == 0
        self.sharded = root / "sharded"
        load_base(self.base).save_pretrained(self.sharded, max_shard_size="60KB")
        byte_tokenizer().save_pretrained(self.sharded)
        self.gguf = root / "gguf"
        self.gguf.mkdir()
        write_gguf(self.gguf / "model.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


Words = list[str]
# By kind of file: where it lies, how it is damaged, and the commands that read it, of `{}` and `{out}`.
Kind = tuple[Callable[[Sound], Path], Callable[[bytes], st.SearchStrategy[bytes]], Callable[[Sound], list[Words]]]


def _json(data: bytes) -> st.SearchStrategy[bytes]:
    return fuzz.damaged_json(data.decode())


def _gguf(data: bytes) -> st.SearchStrategy[bytes]:
    return fuzz.damaged_gguf(data, data.index(b"blk.3.ffn_norm") + 40)


KINDS: dict[str, Kind] = {
    "config.json": (
        lambda s: s.base / "config.json",
        _json,
        lambda s: [["inspect", "{}"], ["prune", "{}", "{out}"], ["eval", "{}", *s.text], ["prune", "{}", "{out}", "--adapter"]],
    ),
    "generation_config.json": (
        lambda s: s.base / "generation_config.json",
        _json,
        lambda s: [
            ["prune", "{}", "{out}"],
            ["eval", "{}", *s.text],
            ["bench", "{}", "--batch-sizes", "1", "--prompt-lengths", "4", "--new-tokens", "2", "--repeats", "1",
             "--load-repeats", "0", "--quiet"],
        ],
    ),
    "tokenizer.json": (lambda s: s.base / "tokenizer.json", _json, lambda s: [["eval", "{}", *s.text]]),
    "tokenizer_config.json": (
        lambda s: s.base / "tokenizer_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["prune", "{}", "{out}"]],
    ),
    "chat_template.jinja": (
        lambda s: s.base / "chat_template.jinja",
        lambda data: fuzz.damaged_template(data.decode()),
        lambda s: [["rank", "{}", *s.rank, "--calibration", str(s.root / "chats.jsonl")]],
    ),
    "model.safetensors.index.json": (
        lambda s: s.sharded / "model.safetensors.index.json",
        _json,
        lambda s: [["prune", "{}", "{out}"], ["eval", "{}", *s.text], ["prune", "{}", "{out}", "--adapter"]],
    ),
    "model.safetensors": (
        lambda s: s.base / "model.safetensors",
        fuzz.damaged_safetensors,
        lambda s: [["prune", "{}", "{out}"], ["eval", "{}", *s.text]],
    ),
    "model.gguf": (
        lambda s: s.gguf / "model.gguf",
        _gguf,
        lambda s: [["inspect", "{}/model.gguf"], ["prune", "{}/model.gguf", "{out}.gguf", "--drop", "1"]],
    ),
    "lineage.json": (
        lambda s: s.pruned / "lineage.json",
        _json,
        lambda s: [["verify", "{}"], ["verify", "{}", "--accept-trained"], ["card", "{}"], ["eval", "{}", *s.text]],
    ),
    "metrics.json": (
        lambda s: s.pruned / "metrics.json",
        _json,
        lambda s: [["card", "{}"], ["eval", "{}", *s.text]],
    ),
    "adapter_config.json": (
        lambda s: s.lora / "adapter_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["card", "{}"]],
    ),
    "adapter_config.json of ours": (
        lambda s: s.adapter / "adapter_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["card", "{}"], ["verify", "{}"]],
    ),
    "README.md": (
        lambda s: s.pruned / "README.md",
        lambda data: fuzz.damaged_yaml(data.decode()),
        lambda s: [["card", "{}"], ["prune", "{}", "{out}"]],
    ),
    "asked.yaml": (
        lambda s: s.root / "tasks" / "asked.yaml",
        lambda data: fuzz.damaged_yaml(data.decode()),
        lambda s: [["eval", str(s.base), "--tasks-from", "{}", "--tasks", "asked", "--text", "none", "--quiet",
                    "--output", "{out}.json"]],
    ),
    "asked.jsonl": (
        lambda s: s.root / "tasks" / "asked.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["eval", str(s.base), "--tasks-from", "{}", "--tasks", "asked", "--text", "none", "--quiet",
                    "--output", "{out}.json"]],
    ),
    "calibration rows": (
        lambda s: s.root / "rows.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["rank", str(s.base), *s.rank, "--calibration", "{}/rows.jsonl"]],
    ),
    "calibration chats": (
        lambda s: s.root / "chats.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["rank", str(s.base), *s.rank, "--calibration", "{}/chats.jsonl"]],
    ),
}  # fmt: skip


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a command took more than {SECONDS} s")


def check(sound: Sound, kind: str, data: st.DataObject, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One damaged file, one command."""
    where, damage, commands = KINDS[kind]
    path = where(sound)
    content = data.draw(damage(path.read_bytes()))
    words = data.draw(st.sampled_from(commands(sound)))
    shutil.rmtree(work, ignore_errors=True)
    if path.parent == sound.root:
        (work / "in").mkdir(parents=True)
    else:
        shutil.copytree(path.parent, work / "in")
    (work / "in" / path.name).write_bytes(content)
    words = [word.replace("{}", str(work / "in")).replace("{out}", str(work / "out")) for word in words]
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("hf-layerprune: ")]
    assert code in (0, 1, 2), err
    assert "Traceback" not in err
    assert "internal error" not in err, err[-500:]
    assert "took more than" not in err, err[-500:]
    assert len(said) == 1 if code and words[0] != "verify" else len(said) <= 1, (code, err)
    assert "\x1b" not in out + err.replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> str:
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", refuse)


# Ranking takes seconds, so fewer of what only it reads run with the other tests.
SLOW = {"chat_template.jinja", "calibration rows", "calibration chats"}


def run(sound: Sound, kind: str, cases: int, work: Path, capsys: pytest.CaptureFixture[str], *, same: bool) -> None:
    """Try out many damaged files; with `same`, those that every run tries out."""

    @settings(
        max_examples=cases, derandomize=same, database=None, report_multiple_bugs=False, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        check(sound, kind, data, work, capsys)

    one()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_breaks_a_command(sound: Sound, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(sound, kind, 8 if kind in SLOW else 50, tmp_path / "work", capsys, same=True)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_breaks_a_command_at_length(
    sound: Sound, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sound, kind, CASES, tmp_path / "work", capsys, same=False)
