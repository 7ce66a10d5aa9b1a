"""Numbers are bound to what was measured: weights, config, tokenizer, template, generation settings, and an adapter's base."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.files.hub import HubFile, Repo
from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from hf_layerprune.measure.store import Store
from hf_layerprune.measure.subject import identify
from hf_layerprune.records.fingerprints import (
    base_of_adapter,
    compute_identity,
    fingerprint,
    has_tokenizer,
    hash_hub_files,
    holds_weights,
    identity_from_hashes,
    is_inert,
    is_model_file,
    is_part,
    uncached_weights_hash,
)
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.locked import locked
from hf_layerprune.records.metrics import Metrics

from .measure_models import write_model
from .publish_records import measure_by_hand
from .test_verify_attacks import BEHAVIOUR, CONFIG, write_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("identity")
    write_base(place / "base")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "2,5"]) == 0
    small = ["--drop-layers", "2,5", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(place / "base"), str(place / "adapter"), *small]) == 0
    measure_by_hand(place / "cut")
    return place


@pytest.fixture
def cut(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "cut", tmp_path / "model"))


CHANGES: dict[str, Callable[[Path], object]] = {
    **{name: change for name, (change, _) in BEHAVIOUR.items()},
    **{name: change for name, change in CONFIG.items() if name not in ("auto_map", "quantization_config")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_of_what_was_edited_since(cut: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = compute_identity(cut)
    CHANGES[change](cut)
    after = compute_identity(cut)
    assert before.weights == after.weights
    assert before.digest != after.digest
    assert main(["card", str(cut)]) == 1
    assert "changed since it was measured" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"with another .*--force"):
        Store(identify(cut))
    assert Store(identify(cut), force=True).metrics.results == []


def test_the_base_of_an_adapter_is_part_of_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = Path(shutil.copytree(place / "base", tmp_path / "base")), tmp_path / "adapter"
    shutil.copytree(place / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    measure_by_hand(adapter)
    assert main(["card", str(adapter)]) == 0
    before = identify(adapter).identity
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    after = identify(adapter).identity
    assert (before.weights, before.adapter) == (after.weights, after.adapter)
    assert after.changed_since(before.parts) == ["base"]
    capsys.readouterr()
    assert main(["card", str(adapter)]) == 1
    assert "base of the model changed since it was measured" in capsys.readouterr().err


def test_a_pickled_adapter_is_not_measured(place: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").rename(adapter / "stray.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors, and pickled weights"):
        identify(adapter)


def test_an_adapter_without_a_base_is_named(place: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"adapter is an adapter that does not name its base; merge it first"):
        identify(adapter)


def test_numbers_of_models_that_are_not_in_the_history(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics.load(cut)
    metrics.models["e" * 64] = next(iter(metrics.models.values())) | {"name": "a stranger"}
    metrics.write(cut)
    assert main(["card", str(cut)]) == 1
    err = capsys.readouterr().err
    assert "holds numbers of a stranger (eeeeeeeeeeee), which are not in the history of this model" in err


def test_hidden_files_are_no_part_of_a_model(cut: Path) -> None:
    """macOS puts them beside each file on a disk of another system."""
    before = fingerprint(cut), uncached_weights_hash(cut), compute_identity(cut)
    for name in ("config.json", "model.safetensors"):
        (cut / f"._{name}").write_bytes(b"\0\5\26\7")
    assert (fingerprint(cut), uncached_weights_hash(cut), compute_identity(cut)) == before


def test_adapters_that_are_each_others_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("one", "other")
    for name, base in zip(names, reversed(names), strict=True):
        shutil.copytree(place / "adapter", tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / base)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert main(["eval", str(tmp_path / "one"), "--text", "self"]) == 1
    assert "is an adapter, not a model" in capsys.readouterr().err


def test_the_base_of_an_adapter_may_be_an_adapter(place: Path, tmp_path: Path) -> None:
    """Its own base counts, too: all three are loaded."""
    shutil.copytree(place / "adapter", tmp_path / "first")
    shutil.copytree(place / "adapter", tmp_path / "second")
    shutil.copytree(place / "base", tmp_path / "base")
    for name, base in (("first", "base"), ("second", "first")):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / base)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    before = compute_identity(tmp_path / "second")
    assert compute_identity(tmp_path / "second") == before
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other weights")
    assert compute_identity(tmp_path / "second") != before


def test_answers_are_those_to_the_same_prompts(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = write_model(tmp_path / "model")
    tasks, answers = tmp_path / "tasks", tmp_path / "answers"
    tasks.mkdir()
    rows = [{"query": f"what is {n}?", "choices": ["one", "two"], "gold": n % 2} for n in range(4)]
    (tasks / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measure() -> int:
        evaluate(EvalRequest(str(model), tasks_from=tasks, answers=answers,
                             output=tmp_path / "numbers.json", force=True))  # fmt: skip
        return len(list(answers.iterdir()))

    assert measure() == 1
    assert measure() == 1
    (tasks / "asked.yaml").write_text('doc_to_text: "Well: {{query}}"\n')
    assert measure() == 2


def _add(folder: Path, number: int, together: Any) -> None:
    own, names = compute_identity(folder).weights, [f"{number}.{again}" for again in range(5)]

    def add_number(name: str, metrics: Metrics | None) -> Metrics:
        assert metrics is not None
        result: dict[str, Any] = {"weights": own, "kind": "accuracy", "task": f"task{name}", "metric": "acc",
                                  "value": 0.5, "date": "2026-11-25", "versions": {}}  # fmt: skip
        metrics.add(results=[result])
        return metrics

    together.wait(120)
    for name in names:
        Lineage.update(folder, lambda lineage, name=name: lineage.base.update({f"note{name}": 1}))
    together.wait(120)
    for name in names:
        Metrics.update(folder / "metrics.json", partial(add_number, name))


def test_processes_that_write_at_once_lose_nothing(cut: Path) -> None:
    context = get_context("fork")
    together = context.Barrier(6)
    workers = [context.Process(target=_add, args=(cut, number, together)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 6
    tasks = {one["task"] for one in Metrics.load(cut).results}
    names = {f"{number}.{again}" for number in range(6) for again in range(5)}
    assert {f"task{name}" for name in names} <= tasks
    assert {f"note{name}" for name in names} <= Lineage.load(cut).base.keys()
    assert not list(cut.glob(".*.lock"))


def test_stores_that_are_open_at_once_keep_each_others_numbers(cut: Path) -> None:
    """`eval` and `bench` at the same time."""
    one, other = Store(identify(cut)), Store(identify(cut))
    for store, task in ((one, "first"), (other, "second"), (one, "third")):
        weights = compute_identity(cut).weights
        store.add(results=[{"weights": weights, "kind": "accuracy", "task": task, "metric": "acc", "value": 0.5}])
    assert {"piqa", "first", "second", "third"} <= {record["task"] for record in Metrics.load(cut).results}


def test_a_lock_that_is_held(cut: Path) -> None:
    with locked(cut / "metrics.json"):
        pass
    context = get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold() -> None:
        with locked(cut / "metrics.json"):
            ready.set()
            done.wait(60)

    worker = context.Process(target=hold)
    worker.start()
    assert ready.wait(60)
    with (
        pytest.raises(CheckpointError, match=r"has been locked by another process"),
        locked(cut / "metrics.json", timeout=0.2),
    ):
        pass
    done.set()
    worker.join(60)


def test_all_that_a_tokenizer_of_transformers_reads_is_part_of_a_model() -> None:
    sources = "".join(path.read_text() for path in Path(transformers.__file__).parent.rglob("*token*.py"))
    tables = re.findall(r"VOCAB_FILES_NAMES = {(.*?)}", sources, re.DOTALL)
    names = {name for table in tables for name in re.findall(r': "([^"]+)"', table)}
    assert {"tokenizer.json", "spiece.model"} <= names
    versioned = {"tokenizer.model.v3", "tokenizer.mm.model.v3", "tokenizer.4.0.0.json"}
    assert not [name for name in names | versioned if not is_part(name)]


@pytest.mark.parametrize(
    ("name", "inert", "read", "part"),
    [
        ("lineage.json", True, False, False), ("sub/lineage.json", False, False, False), ("recipe.yaml", True, False, False),
        ("NOTES.MD", True, False, False), ("photo.JPG", True, False, False), ("photo.jpeg", True, False, False),
        ("assets/plot.png", True, False, False), ("assets/code.py", False, False, False), ("docs/plot.png", False, False, False),
        ("LICENSE.Apache", True, False, True), ("Tongyi LICENSE.gguf", False, True, False), ("NOTICE.safetensors", False, True, False),
        ("LICENSE.jinja", False, True, False), (".git/config", True, False, False), ("sub/._config.json", True, False, False),
        ("additional_chat_templates/tool.jinja", False, True, True), ("additional_chat_templates/.tool.jinja", False, True, True),
        ("additional_chat_templates/README.md", False, True, False), ("chat_template.jinja", False, True, True),
        ("MODEL.GGUF", False, True, False), ("sub/model.safetensors", False, False, False), ("modeling.py", False, True, False),
        ("spiece.model", False, True, True), ("._spiece.model", True, False, False), ("sub/tool.jinja", False, False, False),
        *((f"model.{end}", False, False, False) for end in "bin pt pth ckpt h5 msgpack onnx npz npy pkl pickle".split()),
    ],
)  # fmt: skip
def test_which_files_may_change_how_a_model_behaves(name: str, inert: bool, read: bool, part: bool) -> None:
    assert (is_inert(name), is_model_file(name), is_part(name)) == (inert, read, part)
    if name.lower().endswith((".gguf", ".safetensors")):
        assert holds_weights(name)


def test_a_file_of_another_name_is_another_part() -> None:
    hashes = {"vocab.json": "a" * 64, "tokenizer_config.json": "b" * 64, "model.safetensors": "c" * 64}
    before = identity_from_hashes(hashes)
    assert identity_from_hashes(dict(reversed(hashes.items()))) == before  # the Hub may list them in another order
    for old, new in (("vocab.json", "vocab.txt"), ("model.safetensors", "model-00001-of-00001.safetensors")):
        assert identity_from_hashes({{old: new}.get(name, name): one for name, one in hashes.items()}) != before


def test_neither_records_nor_folders_are_hashed_as_a_base(cut: Path) -> None:
    before = fingerprint(cut)
    assert {"config.json", "model.safetensors"} <= before.keys()
    (cut / "metrics.json").write_text("{}")
    (cut / "runs.json").mkdir()
    assert fingerprint(cut) == before


def test_weights_that_are_changed_in_place(cut: Path) -> None:
    """The clock of some file systems is too coarse to show it."""
    path = cut / "model.safetensors"
    before, status = uncached_weights_hash(cut), path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert uncached_weights_hash(cut) != before


class Listed(Repo):
    """A repository whose files are in a folder."""

    def get(self, name: str) -> Path:
        return Path(self.name) / name


def test_hashes_of_files_on_the_hub(tmp_path: Path) -> None:
    """Those of weights are as the Hub lists them; what it lists without one is hashed, as is all that is in a cache."""
    names = ["additional_chat_templates/tool.jinja", "config.json", "model.safetensors", "small.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    true = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    files = {name: HubFile(1) for name in names} | {"model.safetensors": HubFile(1, "a" * 64)}
    repo = Listed(str(tmp_path), "b" * 40, files)
    assert hash_hub_files(repo, names) == (true | {"model.safetensors": "a" * 64}, tmp_path)
    assert hash_hub_files(replace(repo, offline="no network"), names) == (true, tmp_path)
    assert hash_hub_files(repo, ["model.safetensors"])[0] == {"model.safetensors": "a" * 64}


def test_what_is_a_tokenizer() -> None:
    for name in ("tokenizer.json", "vocab.txt", "tekken.json", "spiece.model", "qwen.tiktoken"):
        assert has_tokenizer(["config.json", name])
    assert not has_tokenizer(["config.json", "merges.txt"])


def test_the_parts_of_an_identity() -> None:
    names = {"config": "config.json", "generation": "generation_config.json", "adapter": "adapter_config.json",
             "template": "chat_template.jinja", "tokenizer": "tokenizer.json"}  # fmt: skip
    hashes = {name: name for name in names.values()} | {"model.safetensors": "w"}
    whole = identity_from_hashes(hashes)
    for part, name in names.items():
        assert identity_from_hashes(hashes | {name: "other"}).changed_since(whole.parts) == [part]
        lacks = identity_from_hashes({one: hash_ for one, hash_ in hashes.items() if one != name})
        assert lacks.changed_since(whole.parts) == whole.changed_since(lacks.parts) == [part]
    weights_alone = identity_from_hashes({"model.gguf": "w"})
    assert weights_alone.parts == {}
    assert weights_alone.changed_since(None) == whole.changed_since(None) == ["identity"]


def test_the_commit_of_an_adapters_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, pinned, recorded = ("abc"[i] * 40 for i in range(3))
    repo = tmp_path / "cache" / "models--org--base"
    for path, text in (("refs/main", cached), (f"snapshots/{cached}/config.json", "{}")):
        (repo / path).parent.mkdir(parents=True)
        (repo / path).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for fields, base in (
        ({}, f"org/base@{cached}"),
        ({"revision": "main", "base_commit": recorded}, f"org/base@{cached}"),
        ({"revision": "other"}, "org/base@other"),
        ({"base_commit": recorded}, f"org/base@{recorded}"),
        ({"revision": pinned, "base_commit": recorded}, f"org/base@{pinned}"),
        ({"base_model_name_or_path": "/gone/base"}, "/gone/base@None"),
        ({"base_model_name_or_path": "gone--base"}, "gone--base@None"),  # which the client refuses
        ({"base_model_name_or_path": None}, None),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"} | fields))
        assert base_of_adapter(tmp_path) == base


def test_a_broken_link_is_no_model_file(cut: Path) -> None:
    (cut / "tokenizer.model").symlink_to(cut / "gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a broken link or not a file"):
        compute_identity(cut)
