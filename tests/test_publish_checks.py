"""What is refused before anything is pushed, and what a dry run says. No Hub is asked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.files.hub import Repo
from hf_layerprune.publish.card.writing import EVAL_MARK, record_declarations, write_card
from hf_layerprune.publish.hub import leaks, push as push_module
from hf_layerprune.publish.hub.push import plan_push
from hf_layerprune.publish.hub.upload import PushError, UploadResult
from hf_layerprune.publish.requests import CardRequest, PushRequest, VerifyRequest
from hf_layerprune.publish.verify.places import Base
from hf_layerprune.records.licences import TABLE, DeclaredLicence
from hf_layerprune.records.names import base_name, hub_base, is_local

from .folders import snapshot
from .publish_records import measure_by_hand
from .test_verify_attacks import forge
from .tiny_models import tiny_model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has everything."""
    place = tmp_path_factory.mktemp("checks")
    tiny_model("llama").save_pretrained(place / "base", max_shard_size="100KB")
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (place / "base" / "LICENSE").write_text("The MIT License\n")
    (place / "base" / "tokenizer.json").write_text("{}")
    assert main(["prune", str(place / "base"), str(place / "out"), "--drop", "2"]) == 0
    record_declarations(CardRequest(place / "out", base_model="org/base"))
    measure_by_hand(place / "out")
    write_card(place / "out")
    return place / "out"


@pytest.fixture
def folder(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "out"))


def refusals(folder: Path, repo_id: str = "org/small", **request: Any) -> str:
    return " | ".join(check.text for check in plan_push(PushRequest(folder, repo_id, **request)).refusals)


def warnings(folder: Path, repo_id: str = "org/small", **request: Any) -> str:
    checks = plan_push(PushRequest(folder, repo_id, **request)).checks
    return " | ".join(check.text for check in checks if check.level == "warning")


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "optimizer.pt").write_bytes(b"\x80")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    before = snapshot(folder)
    assert main(["push", str(folder), "org/small", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("README.md", "assets/layers.png", "config.json", "lineage.json", "metrics.json", "LICENSE"):
        assert f" {name}\n" in out
    assert "left out  optimizer.pt: may hold a pickle" in out
    assert "left out  checkpoint-5/model.safetensors: in a folder that is not part" in out
    assert "licence: MIT License" in out
    assert "ready to push; nothing was pushed" in out
    assert snapshot(folder) == before


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_weights_that_were_changed(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = refusals(folder)
    assert "are not those in lineage.json" in found
    assert "was measured on other weights" in found
    assert str(folder) in found  # as the user knows it


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda f: [path.unlink() for path in f.glob("*.safetensors*")], "has no weights; a card without weights"),
    (lambda f: next(f.glob("*-00001-*.safetensors")).unlink(), "does not exist; is the download complete?"),
    (lambda f: (f / "extra.safetensors").write_bytes(next(f.glob("*.safetensors")).read_bytes()), "does not use"),
    (lambda f: next(f.glob("*.safetensors")).write_bytes(b"1234567890"), "not a valid safetensors file"),
    (lambda f: (f / "vocab.txt").symlink_to(f / "nowhere"), "is a link, and only files"),
    (lambda f: ((f / "README.md").unlink(), (f / "README.md").mkdir()), "README.md is a folder"),
    (lambda f: os.mkfifo(f / "vocab.txt"), "is a device or a pipe, and only files"),
    (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    (lambda f: edit_config(f, architectures=[1]), "config.json has an unexpected value at architectures/0"),
])  # fmt: skip
def test_broken_folders(folder: Path, break_it: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    break_it(folder)
    assert main(["push", str(folder), "org/small", "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert "Traceback" not in captured.err


def test_records_that_were_edited(folder: Path) -> None:
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["entries"][0]["settings"]["drop_layers"] = [5, 6, 7]
    lineage["entries"][0]["layers"]["left"] = 5
    (folder / "lineage.json").write_text(json.dumps(lineage))
    assert "disagree on the number of layers; one of them was edited" in refusals(folder)


@pytest.mark.parametrize(
    ("fields", "repo_id", "message"),
    [
        ({"license": None}, "org/small", "declares no licence"),
        ({"license": "unknown"}, "org/small", "declares no licence"),
        ({"license": "other"}, "org/small", "declares no licence"),
        ({"license": "cc-by-nd-4.0"}, "org/small", "forbids sharing a changed copy"),
        ({"license": "llama3.1"}, "org/small", "the model's name must begin with “Llama”"),
        ({"license": "llama3"}, "org/Llama-small", "the model's name must begin with “Llama 3”"),
        ({"license": "llama3.2"}, "llama/Small-Llama", "the model's name must begin with “Llama”"),
    ],
)
def test_licences_that_refuse(folder: Path, fields: dict[str, Any], repo_id: str, message: str) -> None:
    edit_base(folder, fields)
    assert message in refusals(folder, repo_id)
    levels = {one.level for one in plan_push(PushRequest(folder, repo_id)).checks if one.name == "licence"}
    assert levels == {"refusal"}


def edit_base(folder: Path, fields: dict[str, Any]) -> None:
    lineage = json.loads((folder / "lineage.json").read_text())
    lineage["base"] |= fields
    (folder / "lineage.json").write_text(json.dumps(lineage))


def test_licences_that_allow(folder: Path) -> None:
    edit_base(folder, {"license": "llama3.1"})
    (folder / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    assert refusals(folder, "org/Llama-small") == ""  # the push writes the NOTICE file
    assert "NOTICE" in plan_push(PushRequest(folder, "org/Llama-small")).contents.files
    assert not (folder / "NOTICE").exists()
    (folder / "LICENSE").unlink()
    assert "a copy of it must accompany the model" in refusals(folder, "org/Llama-small")
    assert refusals(folder, "org/Llama-small", private=True) == ""
    edit_base(folder, {"license": "mit"})  # which does not insist on a file
    assert refusals(folder) == ""
    assert "a copy of it must accompany the model" in warnings(folder)
    (folder / "LICENSE").write_text("META LLAMA 3 COMMUNITY LICENSE AGREEMENT")
    edit_base(folder, {"license": "llama3"})
    assert refusals(folder, "org/Llama-3-small") == ""
    edit_base(folder, {"license": "other", "license_name": "qwen-research"})
    (folder / "LICENSE").write_text("Qwen RESEARCH LICENSE AGREEMENT")
    assert refusals(folder) == ""
    assert "no commercial use" in warnings(folder)
    edit_base(folder, {"license": "other", "license_name": "house rules", "license_link": "https://example.org/l"})
    assert refusals(folder) == ""
    assert "house rules: its conditions are not listed here; read it (https://example.org/l)" in warnings(folder)
    edit_base(folder, {"license": None, "license_name": None, "license_link": None})
    assert refusals(folder, private=True) == ""
    assert "declares no licence" in warnings(folder, private=True)


def test_every_licence_of_the_table() -> None:
    for key, row in TABLE.items():
        found = DeclaredLicence.from_base(
            {"license": key} if key.count("-") < 2 else {"license": "other", "license_name": key}
        )
        assert found.row is row
        assert found.known
        assert row.title
        assert row.forbidden or row.duties or key == "cc0-1.0"
        assert all(duty.endswith(".") for duty in row.duties)
        if row.built_with:
            assert any(row.built_with in duty or "built using" in duty for duty in row.duties), key
        if row.prefix:
            assert any(f"“{row.prefix}”" in duty for duty in row.duties)
        if row.non_commercial:
            assert any("No commercial use" in duty for duty in row.duties)
    assert (
        DeclaredLicence.from_base({"license": "other", "license_name": "Tongyi Qianwen LICENSE AGREEMENT"}).row
        is not None
    )
    for name, row in (
        ("Meta Llama 3 Community License Agreement", "llama3"), ("llama-3.1-community-license", "llama3.1"), ("Llama 4 Community", "llama4"),
        ("gemma-terms-of-use", "gemma"), ("deepseek-license", "deepseek"),
    ):  # fmt: skip
        for declared in ("other", "unknown"):
            assert DeclaredLicence.from_base({"license": declared, "license_name": name}).row is TABLE[row]
    assert DeclaredLicence.from_base({"license": "Apache 2.0"}) == DeclaredLicence.from_base({"license": "apache-2.0"})
    assert DeclaredLicence.from_base({"license": "apache-2.0", "license_name": "its own"}).row is TABLE["apache-2.0"]
    assert DeclaredLicence.from_base({"license_name": "deepseek"}).row is TABLE["deepseek"]


SECRETS = {
    "Hugging Face Token": "hf_" + "aB3" * 12,
    "GitHub Token": "ghp_" + "a1B2" * 9,
    "AWS Access Key": "AKIA" + "ABCDEFGH12345678",
    "Google API Key": "AIza" + "x" * 35,
    "OpenAI or Anthropic Key": "sk-ant-" + "a1" * 20,
    "Slack Token": "xoxb-" + "1234567890-abcdefghij",
    "Weights & Biases Key": "WANDB_API_KEY=" + "0a" * 20,
    "Private Key": "-----BEGIN RSA PRIVATE KEY-----",
    "Bearer Token": "Authorization: Bearer " + "abc.DEF-" * 4,
    "Basic Auth Credentials": "https://me:hunter2@example.org/x",
    "Stripe Access Key": "sk_live_" + "a1B2c3" * 4,
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w",
}
TOKEN = SECRETS["Hugging Face Token"]


def secrets_in(path: Path) -> list[tuple[int, str]]:
    return [(leak.line, leak.what) for leak in leaks.find_secrets(path.parent, [path.name])]


def test_secrets_stay_home(folder: Path) -> None:
    key = SECRETS["AWS Access Key"]
    (folder / "vocab.txt").write_text("one\n" * 4_000 + f"key = '{key}'\n")
    message = refusals(folder)
    assert "vocab.txt line 4001 contains what looks like a secret (AWS Access Key)" in message
    assert key not in message


@pytest.mark.parametrize("what", SECRETS)
def test_secrets_of_all_kinds(tmp_path: Path, what: str) -> None:
    (tmp_path / "notes.txt").write_text(f"a line\nkey = '{SECRETS[what]}'\n")
    assert set(secrets_in(tmp_path / "notes.txt")) == {(2, what)}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig"])
def test_secrets_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "README.md").write_bytes(f"Größe\n{TOKEN}\n".encode(encoding))
    assert secrets_in(tmp_path / "README.md") == [(2, "Hugging Face Token")]


@pytest.mark.parametrize("text", [
    json.dumps({"hub": {"token": TOKEN}}),
    json.dumps({"log": f"line\n{TOKEN}\tend"}),
    json.dumps(json.dumps({"log": f"line\n{TOKEN}"})),
    json.dumps({"token": TOKEN}).replace("hf_", "\\u0068f_"),
    f"<b>{TOKEN}</b>",
    f"url=https://huggingface.co/?token={TOKEN}&x=1",
    f"({TOKEN})",
])  # fmt: skip
def test_secrets_wherever_they_hide(tmp_path: Path, text: str) -> None:
    for name in ("tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / name).write_text(text)
        assert secrets_in(tmp_path / name) == [(1, "Hugging Face Token")]


def test_secrets_in_the_header_of_weights(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(path), path, metadata={"format": "pt", "run": TOKEN})
    assert f"{path.name} line 1 contains what looks like a secret (Hugging Face Token)" in refusals(folder)
    for name in ("model.safetensors", "curve.png"):  # but not after it, nor in pictures
        (folder / name).write_bytes((2).to_bytes(8, "little") + b"{}" + TOKEN.encode())
        assert secrets_in(folder / name) == []


@pytest.mark.parametrize(("name", "text"), [
    ("kaggle.json", '{"username": "me", "key": "0123456789abcdef0123456789abcdef"}'),
    ("prod.env", "DB_PASSWORD=hunter2-and-more\n"),
    ("id_ed25519", "-----BEGIN OPENSSH PRIVATE KEY-----\n"),
    ("settings.py", "aws_secret = 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzzzz'\n"),
])  # fmt: skip
def test_what_only_the_user_named_is_scanned_by_everything(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert refusals(folder) == ""
    assert name in plan_push(PushRequest(folder, "org/small")).contents.left_out
    assert f"{name} line 1 contains what looks like a secret" in refusals(folder, include=(name,))


def test_what_is_no_secret(folder: Path) -> None:
    """Hashes of the records, tensor names, and words of a vocabulary, among them those of code."""
    words = ["hf_hub", "hf_transfer", "sk-learn", "APIClientFactory", "://", "password", "secret_key", "AKIA", "eyJ"]
    words += [f"{a}{b}" for a in words for b in words]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"{index:064x}" for index in range(2000))])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}, indent=1))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    forge(folder)  # a model with this tokenizer
    measure_by_hand(folder)
    text = (folder / "metrics.json").read_text()
    assert len(json.loads(text)["weights"]) == 64
    assert refusals(folder) == ""
    (folder / "notes.md").write_text("Trained on the first 200 questions, by 8.8.8.8; see https://example.org/c@d.\n")
    assert refusals(folder, include=("notes.md",)) == ""


# What is published.


def test_only_what_is_allowed_is_published(folder: Path) -> None:
    names = (
        "kaggle.json", "_netrc", "prod.env", "server.key", "id_rsa", "wandb.json", "notes.txt", "train.py", "LICENSE.key",
        "assets/photo.png", ".eval_results/mine.yaml", "data/rows.jsonl", "config.json.bak", ".netrc", "tokenizer.bak",
    )  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "LICENSE.Apache").write_text("Apache License")
    before = snapshot(folder)
    contents = plan_push(PushRequest(folder, "org/small")).contents
    assert set(names) == set(contents.left_out)
    assert {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "LICENSE.Apache",
        "lineage.json",
        "metrics.json",
        "README.md",
    } <= set(contents.files)
    contents = plan_push(PushRequest(folder, "org/small", include=("train.py", "assets/photo.png"))).contents
    assert {"train.py", "assets/photo.png"} == set(names) & set(contents.files)
    assert snapshot(folder) == before


@pytest.mark.parametrize(("name", "message"), [
    ("absent.txt", "there is no such file"),
    ("../secret.txt", "there is no such file"),
    ("optimizer.pt", "may hold a pickle"),
])  # fmt: skip
def test_what_include_can_not_name(folder: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "secret.txt").write_text("x")
    (folder / "optimizer.pt").write_bytes(b"x")
    assert main(["push", str(folder), "org/small", "--dry-run", "--include", name]) == 1
    assert f"--include {name}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "config.json", "tokenizer.json", "assets", "additional_chat_templates", "notes.txt"],
)
def test_links_are_not_followed(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside) if (folder / name).exists() else outside.write_text("mine")
    (folder / name).symlink_to(outside)
    before = snapshot(tmp_path)
    assert main(["push", str(folder), "org/small", "--dry-run", "--include", name]) == 1
    error = capsys.readouterr().err
    assert "a link" in error
    assert error.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_link_that_was_put_there_after_the_files_were_listed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = push_module.list_contents

    def swapped(*args: Any) -> Any:
        found = listed(*args)
        (folder / "tokenizer.json").rename(tmp_path / "private")
        (folder / "tokenizer.json").symlink_to(tmp_path / "private")
        return found

    monkeypatch.setattr(push_module, "list_contents", swapped)
    with pytest.raises(CheckpointError, match=r"tokenizer.json became a link while it was read"):
        plan_push(PushRequest(folder, "org/small"))


def test_weights_that_change_after_the_checks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the model is made again while a push is under way."""
    name = sorted(folder.glob("*.safetensors"))[0].name

    class Hub:
        endpoint = "https://hub"

        def hf_hub_download(self, *args: Any, **where: Any) -> str:
            raise EntryNotFoundError("no card there")

        def repo_info(self, *args: Any, **where: Any) -> Any:
            return SimpleNamespace(sha="0", private=False)

        def list_repo_tree(self, *args: Any, **where: Any) -> list[Any]:
            tensors = load_file(folder / name)
            save_file({key: value + 1 for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})
            return []

        def preupload_lfs_files(self, *args: Any, **where: Any) -> None:
            pass

    monkeypatch.setattr(push_module, "log_in", lambda token: Hub())
    monkeypatch.setattr("hf_layerprune.publish.hub.upload._check_card", lambda *args: None)
    with pytest.raises(PushError, match=f"^{name} was changed while it was being pushed; run the command again$"):
        push_module.push(PushRequest(folder, "org/small"))


def test_what_a_push_changes_in_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Our card, records and outdated results; nothing that came or changed while the push was under way."""
    late = ("README.md", "assets/accuracy.png", "tokenizer.json")
    others = {".eval_results/mine.yaml", "assets/photo.png", "notes.txt"}
    kept = others | {".eval_results/late.yaml", "assets/curve.png"}
    (folder / ".eval_results").mkdir(exist_ok=True)
    (folder / ".eval_results" / "old.yaml").write_text(f"{EVAL_MARK}[]\n")
    (folder / "assets" / "accuracy.png").unlink()
    for name in others:
        (folder / name).write_text("[]\n")

    def commit() -> UploadResult:
        (folder / ".eval_results" / "late.yaml").write_text(f"{EVAL_MARK}[]\n")
        (folder / "assets" / "curve.png").write_text("drawn late, for records that came late")
        (folder / "README.md").write_text("Mine, written late.\n")
        (folder / "assets" / "accuracy.png").write_text("drawn late")
        (folder / "tokenizer.json").write_text("{ }")
        return UploadResult("https://hub", "0" * 40)

    monkeypatch.setattr(push_module, "log_in", lambda token: None)
    monkeypatch.setattr(push_module, "_download", lambda *args: None)
    monkeypatch.setattr(push_module, "ensure_repository", lambda job, api: None)
    monkeypatch.setattr(push_module, "prepare_upload", lambda job, api: commit)
    before = set(snapshot(folder)) | kept
    push_module.push(PushRequest(folder, "org/small"))
    after = snapshot(folder)
    assert before - set(after) == {".eval_results/old.yaml"}
    assert b"org/small" in after["lineage.json"]
    assert [after[name] for name in late] == [b"Mine, written late.\n", b"drawn late", b"{ }"]
    assert all(f"{folder / name} was changed while it was being pushed" in caplog.text for name in late)


def test_a_push_from_a_folder_that_is_read_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_bytes(path: Path, *args: Any, **more: Any) -> None:
        raise CheckpointError(f"could not write {path}: Read-only file system; write elsewhere")

    monkeypatch.setattr(push_module, "log_in", lambda token: None)
    monkeypatch.setattr(push_module, "_download", lambda *args: None)
    monkeypatch.setattr(push_module, "ensure_repository", lambda job, api: None)
    monkeypatch.setattr(push_module, "prepare_upload", lambda job, api: lambda: UploadResult("https://hub", "0" * 40))
    monkeypatch.setattr(push_module, "write_bytes", write_bytes)
    assert push_module.push(PushRequest(folder, "org/small")).model.url == "https://hub"
    assert f"the model is on the Hub, but its new card and records are not in {folder}: could not write" in caplog.text


def test_a_name_that_is_not_utf_8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(os.fsencode(folder) + b"/caf\xe9.json", "wb"):
        pass
    assert main(["push", str(folder), "org/small", "--dry-run"]) == 0
    assert "left out  caf\ufffd.json: not part of the model" in capsys.readouterr().out


def test_an_adapter_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json beside config.json" in refusals(folder)


def test_paths_of_somebodys_disk(folder: Path) -> None:
    edit_base(folder, {"id": "/home/alice/models/llama", "hub_id": None})
    assert "names the base by a path on your disk, /home/alice/models/llama" in refusals(folder)
    record_declarations(CardRequest(folder, base_model="org/base"))
    assert refusals(folder) == ""
    (folder / "LICENSE").write_text("see /home/alice/work\n")
    assert "LICENSE line 1 reveals the path /home/alice" in warnings(folder)


def test_a_file_that_was_changed_is_published_only_by_name(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"changed": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("Not published.\n")
    (folder / "LICENSE").rename(folder / "COPYING")
    (folder / "metrics.json").unlink()
    found = refusals(folder)
    assert "tokenizer.json was changed since prune wrote the model, so verify would say NO; restore it, or" in found
    assert "was added since prune wrote the model, so verify would say NO; remove it, or publish it as it is" in found
    assert "with --include chat_template.jinja" in found
    assert "notes.txt" not in found
    named = ("tokenizer.json", "chat_template.jinja", "notes.txt")
    assert refusals(folder, include=named) == ""
    found = warnings(folder, include=named)
    assert all(f"{name} was" in found for name in named)
    assert "must accompany" not in found
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing since prune wrote the model, so verify would say NO; restore it" in refusals(
        folder
    )


def test_a_file_of_the_last_stage_that_only_its_name_publishes(folder: Path) -> None:
    (folder / "quantization_config.json").write_text("{}")
    (folder / "metrics.json").unlink()
    forge(folder)
    assert "publish it with --include quantization_config.json" in refusals(folder)
    assert refusals(folder, include=("quantization_config.json",)) == ""


def test_adapters(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = pruned.parent / "base"
    assert main(["prune", str(base), str(tmp_path / "whole" / "adapter"), "--drop", "2", "--adapter"]) == 0
    adapter = tmp_path / "whole" / "adapter"
    assert not (adapter / "README.md").exists()  # PEFT's template
    assert (adapter / "LICENSE").read_text() == "The MIT License\n"
    record_declarations(CardRequest(adapter, base_model="org/base"))
    assert "make the adapter from the base's Hub id" in refusals(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    assert "adapter_config.json was changed since prune wrote the model" in refusals(adapter)
    gguf = json.dumps(config | {"base_model_name_or_path": "org/base.gguf"})
    (adapter / "adapter_config.json").write_text(gguf)
    assert "publish a whole model instead, made without --adapter" in refusals(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    forge(adapter)
    assert refusals(adapter) == ""
    files = plan_push(PushRequest(tmp_path / "whole", "org/small", adapter_only=True)).contents.files
    assert {"adapter_model.safetensors", "adapter_config.json", "lineage.json", "README.md"} <= set(files)
    assert main(["push", str(pruned), "org/small", "--adapter-only", "--dry-run"]) == 1
    assert "holds no adapter" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)  # which PEFT loads in place of the one on the Hub
    assert "which nobody else can load" in refusals(adapter)
    (tmp_path / "org" / "base").rmdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"1234567890")
    forge(adapter)
    assert "not a valid safetensors file" in refusals(adapter)


@pytest.mark.parametrize(
    "repo_id",
    [
        "small",
        "a/b/c",
        "org/..",
        "org/x.",
        "org/x-",
        "org/x--y",
        "org/x..y",
        "org/x.git",
        "org/a b",
        "-/x",
        "org-/x",
        "org/é",
        "",
    ],
)
def test_names_that_are_none(folder: Path, repo_id: str) -> None:
    assert "is not a Hub id" in refusals(folder, repo_id)


@pytest.mark.parametrize(
    ("base", "named", "on_hub", "local"),
    [
        ({"id": "org/base"}, "org/base", None, False),
        ({"id": "small", "commit": "c"}, "small", "small", False),
        ({"id": "/home/me/base", "hub_id": "org/base"}, "base", "org/base", True),
        ({"id": "/home/me/base", "hub_id": "no id"}, "base", None, True),
        ({"id": "./base", "hub_id": 7}, "base", None, True),
        ({"id": "C:\\models\\base"}, "base", None, True),
        ({}, "the base", None, False),
    ],
)
def test_what_a_base_is_called(base: dict[str, Any], named: str, on_hub: str | None, local: bool) -> None:
    assert (base_name(base), hub_base(base), is_local(base)) == (named, on_hub, local)


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file.gguf", "is a GGUF file, which has no records"),
        ("file.txt", "is a file"),
        ("absent", "does not exist"),
        ("empty", "has no lineage.json"),
    ):
        assert main(["push", str(tmp_path / name), "org/x", "--dry-run"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_without_measurements_it_can_be_pushed_and_says_so(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    assert refusals(folder) == ""
    assert "the card will say that nothing was measured" in warnings(folder)


def test_what_others_need_to_load_it(folder: Path) -> None:
    assert warnings(folder) == ""
    (folder / "train.py").write_text("")
    assert "train.py is code" in warnings(folder, include=("train.py",))
    (folder / "tokenizer.json").unlink()
    assert "the folder has no tokenizer" in warnings(folder)


def test_a_file_that_was_there_when_it_was_measured_but_is_not_published(folder: Path) -> None:
    """Measuring again alone would not help."""
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics.json").unlink()
    measure_by_hand(folder)
    assert "which lacks notes.txt: remove that file and measure again, or publish it with --include" in refusals(
        folder
    )
    assert refusals(folder, include=("notes.txt",)) == ""


@pytest.mark.parametrize("words", [
    ["push", "{folder}", TOKEN],
    ["push", "{folder}", "org/small", "--space", TOKEN],
    ["push", "{folder}", "org/small", "--space", "org/chat", "--space-secret", TOKEN],
    ["push", "{folder}", "org/small", "--include", TOKEN],
    ["push", "{folder}", "org/small", "--token", TOKEN],
    ["push", TOKEN, "org/small"],
    ["push", "{folder}", f"{TOKEN}/x y"],
    ["card", "{folder}", "--base-model", f"{TOKEN}/x y"],
    [TOKEN],
])  # fmt: skip
def test_a_token_given_in_place_of_something_else_is_not_repeated(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([word.format(folder=folder) for word in words])
    except SystemExit as error:
        code = int(str(error.code))
    captured = capsys.readouterr()
    assert code != 0
    assert captured.err
    assert TOKEN not in captured.out + captured.err


def test_no_object_shows_its_token(tmp_path: Path) -> None:
    """As in a traceback or a log."""
    made = (
        PushRequest(tmp_path, "org/small", token=TOKEN),
        VerifyRequest("org/small", token=TOKEN),
        Repo("org/small", "0" * 40, {}, token=TOKEN),
        Base("org/base", None, {}, token=TOKEN),
    )
    assert all(one.token == TOKEN and TOKEN not in repr(one) for one in made)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_a_dry_run_shows_a_file_name_on_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / f"notes\n        ok  secrets: {TOKEN}\x1b[31m").write_text("")
    assert main(["push", str(folder), "org/small", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert r"notes\n        ok  secrets: hf_***\x1b[31m: not part of the model" in out
    assert TOKEN not in out
