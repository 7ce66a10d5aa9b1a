"""Push models to the Hub, also one that fails, and load them from there; `test_publish_hub.py` runs this in its own
process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.folders import snapshot
from tests.hub_server import HubServer
from tests.publish_child import TOKEN, cli, files, finish, hurry, start

READER = "hf_reads_only_and_may_propose_0000"
FOUND: dict[str, dict[str, Any]] = {}
SCENARIOS: list[Callable[[HubServer, Path, dict[str, Any]], None]] = []


def scenario(run: Callable[[HubServer, Path, dict[str, Any]], None]) -> Callable:
    """Register a function that stores its findings in `out`."""
    SCENARIOS.append(run)
    return run


def head(hub: HubServer, repo: str) -> str:
    """The newest commit."""
    return hub.repos[repo].at("main").id


def stored(hub: HubServer) -> int:
    """The number of files that were uploaded to storage."""
    return sum(one.method == "PUT" and one.status == 200 for one in hub.log)


@scenario
def push_and_load(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = place / "model"
    out["first"] = cli("push", folder, "org/model")
    out["same"] = files(hub, "org/model") == snapshot(folder)
    out["names"] = sorted(files(hub, "org/model"))
    out["parent"] = hub.repos["org/model"].at(hub.repos["org/model"].at("main").parent).title
    out["card"] = files(hub, "org/model")["README.md"].decode()
    before = head(hub, "org/model")
    hub.reset()
    out["second"] = cli("push", folder, "org/model")
    out["again"] = [head(hub, "org/model") == before, stored(hub)]
    out["json"] = cli("push", folder, "org/model", "--json")[1]
    # Load it with transformers.
    model, here = (AutoModelForCausalLM.from_pretrained(name).eval() for name in ("org/model", folder))
    ids = torch.tensor([[1, 5, 9, 17, 33, 60]])
    out["logits"] = bool(torch.equal(model(ids).logits, here(ids).logits))
    out["words"] = len(AutoTokenizer.from_pretrained("org/model"))


@scenario
def push_what_misses(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(place / "model", place / "gated"))
    before = snapshot(folder)
    out["unknown"] = cli("push", folder, "org/gated", "--require", "piqua>=0.5")
    out["missed"] = cli("push", folder, "org/gated", "--require", "piqa>=0.6,acc>=0.5,piqa:acc>=0.3")
    out["untouched"] = [snapshot(folder) == before, "org/gated" in hub.repos]
    out["not measured"] = cli("push", folder, "org/gated", "--require", "kl<=1", "--allow-miss")
    out["allowed"] = cli("push", folder, "org/gated", "--require", "piqa>=0.6", "--allow-miss")
    out["card"] = files(hub, "org/gated")["README.md"].decode()
    out["recorded"] = json.loads((folder / "metrics.json").read_text())["requirements"]
    out["own"] = cli("push", folder, "org/gated", "--require", "none")


@scenario
def verify_what_was_pushed(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    from huggingface_hub import try_to_load_from_cache

    # As on another machine, with an empty cache and without the folder.
    shutil.rmtree(place / "home", ignore_errors=True)
    hub.reset()
    out["yes"] = cli("verify", "org/model")
    weights = [one for one in hub.log if one.path.endswith(".safetensors")]
    out["of the model"] = sum(one.sent for one in weights if "/org/model/" in one.path)
    out["of the base"] = sum(one.sent for one in weights if "/org/base/" in one.path)
    out["kept"] = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors"))
    commit = head(hub, "org/model")
    _tamper(hub, place)
    out["no"] = cli("verify", "org/model")
    out["old"] = cli("verify", "org/model", "--revision", commit)
    name = next(name for name in sorted(files(hub, "org/base")) if name.endswith(".safetensors"))
    blob = Path(try_to_load_from_cache("org/base", name, revision=head(hub, "org/base"))).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    out["damaged"] = cli("verify", "org/model", "--revision", commit)
    blob.write_bytes(data)
    shutil.rmtree(place / "tampered")
    cli("push", place / "model", "org/model")


def _tamper(hub: HubServer, place: Path) -> None:
    """Flip a bit of a weight file on the Hub, and make the records match."""
    from huggingface_hub import HfApi

    from hf_layerprune.records.fingerprints import fingerprint, weights_hash
    from hf_layerprune.records.lineage import Lineage

    folder = Path(shutil.copytree(place / "model", place / "tampered"))
    path = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    lineage = Lineage.load(folder)
    lineage.entries[-1]["weights"] = weights_hash(fingerprint(folder))
    lineage.write(folder)
    HfApi().upload_folder(repo_id="org/model", folder_path=folder)


@scenario
def a_cut_of_a_gguf_file(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    from tests.measure_models import write_gguf

    file = write_gguf(place / "small.gguf")
    cli("prune", file, place / "unpacked", "--drop-layers", "1")
    how = ["--repair", "magnitude", "--calibration-samples", "4", "--calibration-length", "32"]
    cli("prune", file, place / "repaired", "--drop-layers", "1", *how)
    for name in ("unpacked", "repaired"):
        cli("card", place / name, "--base-model", "org/packed", "--force")
    out["push"] = cli("push", place / "unpacked", "org/unpacked")
    HfApi().create_repo("org/packed")
    out["missing"] = cli("verify", "org/unpacked")
    suggested = cli("push", place / "repaired", "org/repaired")[1].rpartition("next: hf-layerprune ")[2].split()
    out["suggested"] = suggested, cli(*(file if word == file.name else word for word in suggested))
    HfApi().upload_file(repo_id="org/packed", path_in_repo=file.name, path_or_fileobj=file)
    file.unlink()
    out["verify"] = cli("verify", "org/unpacked")


@scenario
def a_newer_model(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """Push other weights in fewer files, then only new numbers."""
    older, folder = place / "older", place / "model"
    cli("push", folder, "org/next")
    hub.reset()
    out["first"] = cli("push", older, "org/next")
    out["same"] = files(hub, "org/next") == snapshot(older)
    metrics = json.loads((older / "metrics.json").read_text())
    metrics["results"][1]["value"] = 0.42
    (older / "metrics.json").write_text(json.dumps(metrics))
    hub.reset()
    out["numbers"] = cli("push", older, "org/next")
    out["stored"] = [one.path.rpartition("/")[2] for one in hub.log if one.method == "PUT"]
    out["card"] = "42.0" in files(hub, "org/next")["README.md"].decode()
    from huggingface_hub import HfApi

    strays = ("added_tokens.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "notes.txt", "a/b.json")
    for name in strays:
        HfApi().upload_file(repo_id="org/next", path_in_repo=name, path_or_fileobj=b"{}")
    out["strays"] = cli("push", older, "org/next")
    out["left"] = sorted(set(files(hub, "org/next")).intersection(strays))


@scenario
def somebody_is_faster(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """Between the look at what is there and the commit."""
    from huggingface_hub import HfApi

    real = HfApi.preupload_lfs_files

    def late(api: HfApi, *args: Any, **more: Any) -> None:
        HfApi.preupload_lfs_files = real
        api.upload_file(repo_id="org/busy", path_in_repo="config.json", path_or_fileobj=b"{}")
        real(api, *args, **more)

    HfApi.preupload_lfs_files = late
    out["push"] = cli("push", place / "model", "org/busy")
    out["files"] = sorted(files(hub, "org/busy"))


@scenario
def branches_and_proposals(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    folder = place / "model"
    out["branch"] = cli("push", folder, "org/side", "--revision", "try/1")
    out["main"] = sorted(files(hub, "org/side"))
    out["side"] = files(hub, "org/side", "try/1") == snapshot(folder)
    out["branch again"] = cli("push", folder, "org/side", "--revision", "try/1")
    from huggingface_hub import HfApi

    from hf_layerprune.publish.hub import upload

    card = files(hub, "org/side", "try/1")["README.md"] + b"\nOf this branch.\n"
    HfApi().upload_file(repo_id="org/side", path_in_repo="README.md", path_or_fileobj=card, revision="try/1")
    cli("push", shutil.copytree(folder, place / "side"), "org/side", "--revision", "try/1")
    out["of the branch"] = files(hub, "org/side", "try/1")["README.md"] == card
    cli("push", shutil.copytree(folder, place / "of main"), "org/side")
    card = files(hub, "org/side")["README.md"] + b"\nOf main.\n"
    HfApi().upload_file(repo_id="org/side", path_in_repo="README.md", path_or_fileobj=card)
    cli("push", place / "of main", "org/side", "--revision", "try/2")  # which starts as main
    out["of a new branch"] = files(hub, "org/side", "try/2")["README.md"] == card

    cli("push", place / "older", "org/open")
    before = head(hub, "org/open")
    hub.tokens[READER] = None

    # A user without write permission opens a pull request.
    api = HfApi(token=READER)
    job = upload.UploadJob("org/open", {"config.json": folder / "config.json"}, create_pr=True, message="Mine")
    out["reader"] = upload.prepare_upload(job, api)().pull_request
    out["proposed"] = cli("push", folder, "org/open", "--create-pr")
    out["proposed again"] = cli("push", folder, "org/open", "--create-pr")
    out["another proposed"] = cli("push", place / "side", "org/open", "--create-pr")
    out["untouched"] = head(hub, "org/open") == before
    out["pulls"] = sorted(hub.repos["org/open"].pulls)
    hub.repos["org/open"].merge(2)
    out["merged"] = files(hub, "org/open") == snapshot(folder)
    out["nothing to do"] = cli("push", folder, "org/open")
    out["what is proposed"] = cli("push", place / "side", "org/open")
    out["of a closed one"] = cli("push", folder, "org/open", "--create-pr", "--overwrite-card")
    out["of nothing"] = cli("push", folder, "org/absent", "--create-pr")
    out["no branch"] = cli("push", folder, "org/open", "--revision", "refs/pr/9")


@scenario
def private(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    folder = place / "model"
    out["made"] = cli("push", folder, "org/secret", "--private")
    out["private"] = "org/secret" in hub.private
    out["again"] = cli("push", folder, "org/secret", "--private")
    out["seen"] = cli("verify", "org/secret")
    out["public"] = cli("push", folder, "org/model", "--private")


@scenario
def two_authors(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """Somebody edits the card on its page."""
    from huggingface_hub import HfApi

    api, folder = HfApi(), Path(shutil.copytree(place / "model", place / "shared"))
    cli("push", folder, "org/shared")

    def edit(old: str, new: str) -> None:
        text = files(hub, "org/shared")["README.md"].decode()
        assert old in text
        api.upload_file(
            repo_id="org/shared", path_in_repo="README.md", path_or_fileobj=text.replace(old, new).encode()
        )

    edit("end summary -->\n", "end summary -->\n\nTry it on poems.\n")
    edit("tags:\n", "widget:\n- text: Hi\ntags:\n- poems\n")
    out["unchanged"] = cli("push", folder, "org/shared")
    out["kept"] = files(hub, "org/shared")["README.md"].decode()
    out["taken over"] = (folder / "README.md").read_bytes() == files(hub, "org/shared")["README.md"]
    with (folder / "README.md").open("a") as card:
        card.write("\nMeasured at home.\n")
    out["added here"] = cli("push", folder, "org/shared")
    out["of both"] = files(hub, "org/shared")["README.md"].decode()
    edit("poems.", "long poems.")
    out["both"] = cli("push", folder, "org/shared")
    edit("long poems.", "poems.")
    edit("text: Hi", "text: Hello")
    out["field"] = cli("push", folder, "org/shared")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("- text: Hi\n", "- text: Hi\n- text: Hello\n"))
    out["field combined"] = cli("push", folder, "org/shared")
    edit("## Limits\n", "## Limits\n\n- None.\n")
    before = head(hub, "org/shared")
    out["inside"] = cli("push", folder, "org/shared")
    out["safe"] = head(hub, "org/shared") == before
    out["overwritten"] = cli("push", folder, "org/shared", "--overwrite-card")
    out["after"] = files(hub, "org/shared")["README.md"].decode()
    api.upload_file(repo_id="org/shared", path_in_repo="README.md", path_or_fileobj=b"# A\0\n")
    out["not text"] = cli("push", folder, "org/shared")


@scenario
def their_own_card(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """A repository with a card of its own, and one with an unfilled template."""
    from huggingface_hub import HfApi, ModelCard, ModelCardData

    from hf_layerprune.publish.card.writing import EVAL_MARK

    api = HfApi()
    for name, text in (
        ("org/mine", "---\nthumbnail: x.png\n---\n# Mine\n\nWords.\n"),
        ("org/plain", str(ModelCard.from_template(ModelCardData()))),
    ):
        api.create_repo(name)
        api.upload_file(repo_id=name, path_in_repo="README.md", path_or_fileobj=text.encode())
        api.upload_file(repo_id=name, path_in_repo="photo.jpg", path_or_fileobj=b"\xff\xd8\0")
        api.upload_file(repo_id=name, path_in_repo=".eval_results/theirs.yaml", path_or_fileobj=b"[]\n")
        api.upload_file(
            repo_id=name, path_in_repo=".eval_results/ours.yaml", path_or_fileobj=f"{EVAL_MARK}[]\n".encode()
        )
        api.upload_file(repo_id=name, path_in_repo="USE_POLICY.md", path_or_fileobj=b"No poems.\n")
        folder = Path(shutil.copytree(place / "model", place / name.replace("/", "-")))
        if name == "org/mine":
            (folder / "README.md").unlink(missing_ok=True)
        else:
            with (folder / "README.md").open("a") as card:
                card.write("\nMeasured at home.\n")
        out[name] = cli("push", folder, name)
        out[f"{name} card"] = files(hub, name)["README.md"].decode()
        others = {"photo.jpg", "USE_POLICY.md", ".eval_results/theirs.yaml", ".eval_results/ours.yaml"}
        out[f"{name} others"] = sorted(others & files(hub, name).keys())


@scenario
def the_libraries_push(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """`model.push_to_hub` into a repository that has our card."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    import hf_layerprune  # noqa: F401  (tells PEFT of the method)
    from hf_layerprune.records.declared import split_front_matter

    cli("push", place / "model", "org/libs")
    before = files(hub, "org/libs")["README.md"].decode()
    model = AutoModelForCausalLM.from_pretrained("org/libs")
    model.push_to_hub("org/libs")
    after = files(hub, "org/libs")["README.md"].decode()
    out["model"] = [
        split_front_matter(before)[0] == split_front_matter(after)[0],
        split_front_matter(before)[1] == split_front_matter(after)[1],
    ]
    out["verified"] = cli("verify", "org/libs")

    adapter = place / "adapter"
    code = cli("prune", "org/base", adapter, "--drop", "2", "--adapter", "--tune-layers", "1")
    out["adapter"] = [code, cli("push", adapter, "org/small", "--adapter-only")]
    before = files(hub, "org/small")["README.md"].decode()
    out["names"] = sorted(files(hub, "org/small"))
    loaded = AutoPeftModelForCausalLM.from_pretrained("org/small")
    out["layers"] = loaded.get_base_model().config.num_hidden_layers
    out["small"] = cli("verify", "org/small")
    loaded.push_to_hub("org/small")
    after = files(hub, "org/small")["README.md"].decode()
    out["peft"] = [
        split_front_matter(before)[0] == split_front_matter(after)[0],
        split_front_matter(before)[1] == split_front_matter(after)[1],
    ]


@scenario
def verify_fails_clearly(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo("org/empty")
    out["absent"] = cli("verify", "org/absent")
    out["empty"] = cli("verify", "org/empty")
    out["revision"] = cli("verify", "org/model", "--revision", "nope")
    hub.gated.add("org/model")
    hub.writers, hub.tokens = {}, {READER: []}
    import os

    os.environ["HF_TOKEN"] = READER
    out["gated"] = cli("verify", "org/model")
    os.environ["HF_TOKEN"] = TOKEN
    hub.writers, hub.tokens = {TOKEN: None}, {}
    hub.gated.clear()
    hub.fail_after(2000, ".safetensors", 3)
    out["cut off"] = cli("verify", "org/model")
    hub.reset()


@scenario
def bases_that_mislead(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """A commit that only a pull request has, and adapters that are put on another base than the one that is compared."""
    from huggingface_hub import HfApi

    from hf_layerprune.records.lineage import Lineage
    from tests.test_verify_attacks import edit_json, forge, train, write_base

    api, base = HfApi(), write_base(place / "dense")
    for repo in ("org/dense", "evil/dense"):
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=base)
        train(base, "model.layers.0.mlp.up_proj.weight")  # evil's is another
    first = head(hub, "org/dense")
    api.upload_folder(repo_id="org/dense", folder_path=base, create_pr=True)
    proposed = hub.repos["org/dense"].pulls["refs/pr/1"]
    for name, revision in ("first", first), ("proposed", proposed):
        cli("prune", "org/dense", place / name, "--drop-layers", "2,5", "--revision", revision)
        out[name] = cli("verify", place / name)

    lineage = Lineage.load(place / "proposed")
    lineage.base["commit"] = "refs/pr/1"
    lineage.write(place / "proposed")
    out["proposed by name"] = cli("verify", place / "proposed")

    def adapter(name: str, told: dict[str, Any], base: dict[str, Any] | None = None) -> None:
        folder = shutil.copytree(place / "small", place / name)
        edit_json("adapter_config.json", **told)(folder)
        lineage = Lineage.load(folder)
        lineage.base |= base or {}
        lineage.write(folder)
        forge(folder)
        out[name] = cli("verify", folder)

    cli("prune", "org/dense", place / "small", "--drop-layers", "2,5", "--adapter")
    adapter("untouched", {})
    adapter("no revision", {"revision": None})
    evil = {"base_model_name_or_path": "evil/dense", "base_commit": head(hub, "evil/dense"), "revision": None}
    adapter("hashes of another base", evil, {"id": "evil/dense", "commit": head(hub, "evil/dense")})
    out["hashes of another base"] = cli("verify", place / "hashes of another base", "--base", "org/dense")
    adapter("a revision of its own", {"revision": "refs/pr/1"})
    adapter("a second name", {"base_model_name_or_path": "evil/dense"}, {"hub_id": "evil/dense"})
    evil = {"base_model_name_or_path": "evil/dense", "base_commit": None}
    adapter("a name for a copy", evil, {"id": "evil/dense", "commit": None, "hub_id": "org/dense"})
    api.upload_file(repo_id="org/dense", path_in_repo="README.md", path_or_fileobj=b"# Dense\n")
    out["a new card"] = cli("verify", place / "small")
    out["not the newest"] = cli("verify", place / "first")
    hub.repos["org/dense"].merge(1)
    out["a new main branch"] = cli("verify", place / "small")
    out["no revision, and a new main branch"] = cli("verify", place / "no revision")


@scenario
def words_that_fail(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    import os

    folder = place / "model"
    del os.environ["HF_TOKEN"]
    out["no token"] = cli("push", folder, "org/none")
    os.environ["HF_TOKEN"] = "hf_schön"
    out["push without a real token"] = cli("push", folder, "org/none")
    out["inspect without a real token"] = cli("inspect", "org/none")
    out["verify without a real token"] = cli("verify", "org/none")
    os.environ["HF_TOKEN"] = TOKEN
    out["refused"] = cli("push", folder, "a name")
    from hf_layerprune.publish.hub.push import PushError, push
    from hf_layerprune.publish.requests import PushRequest

    hub.tokens[READER] = None
    try:
        push(PushRequest(folder, "org/none", token=READER))
    except PushError as error:
        out["another token"] = 1, str(error)
    out["left alone"] = sorted(hub.repos.keys() & {"org/none"})


@scenario
def no_network(hub: HubServer, place: Path, out: dict[str, Any]) -> None:
    """The last scenario, since the Hub stays down."""
    hub.__exit__()
    before = snapshot(place / "model")
    out["push"] = cli("push", place / "model", "org/model")
    out["folder"] = snapshot(place / "model") == before
    out["verify"] = cli("verify", "org/model")


def main() -> None:
    """Run all scenarios, in order."""
    hub, place = start()
    from tests import publish_faults, publish_multimodal
    from tests.publish_models import pruned_from_hub

    hurry()
    FOUND["faults"] = publish_faults.run_all(hub, place)
    FOUND["multimodal"] = publish_multimodal.run_all(hub, place / "multimodal")
    pruned_from_hub(hub, place, "model", drop=2)
    pruned_from_hub(hub, place, "older", drop=6)
    for run in SCENARIOS:
        run(hub, place, FOUND.setdefault(run.__name__, {}))
    finish(FOUND)


if __name__ == "__main__":
    main()
