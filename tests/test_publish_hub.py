"""A model's way over the Hub: pushed by one commit, read back by the libraries, proven, edited by people, proposed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hf_layerprune.records.declared import split_front_matter

from .publish_child import run_child
from .publish_faults import CASES, Case

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All scenarios of `publish_flow.py`, and that none of them let the token into any log."""
    return run_child("tests.publish_flow", tmp_path_factory.mktemp("flow"))


def test_one_commit_has_everything(found: Found) -> None:
    out = found["push_and_load"]
    assert out["first"][0] == 0
    assert re.search(r"pushed 14 files: http://127.0.0.1:\d+/org/model\s", out["first"][1])
    assert out["same"]  # the folder got the card and the records that were published
    assert {"README.md", "lineage.json", "metrics.json", "config.json", "tokenizer.json", "LICENSE"} <= {*out["names"]}
    assert {"assets/layers.png", "assets/accuracy.png", "model.safetensors.index.json"} <= {*out["names"]}
    assert out["parent"] == "initial commit"
    fields, body = split_front_matter(out["card"])
    assert (fields["base_model"], fields["license"], fields["language"]) == ("org/base", "mit", ["en"])
    assert 'model = "org/model"' in body
    assert "hf-layerprune verify org/model" in body


def test_a_model_that_misses_what_is_required_of_it(found: Found) -> None:
    out = found["push_what_misses"]
    assert out["unknown"][0] == 2
    assert "known are piqa, " in out["unknown"][1]
    assert out["not measured"][0] == 2
    assert "kl<=1 is required, but not measured; run hf-layerprune eval MODEL --base BASE" in out["not measured"][1]
    code, text = out["missed"]
    missed = [line.partition(";")[0] for line in text.splitlines() if "is missed" in line]
    assert (code, missed) == (
        1, ["hf-layerprune: piqa>=0.6 is missed: 0.4", "hf-layerprune: acc>=0.5 is missed: 0.4 (piqa)"],
    )  # fmt: skip
    assert out["untouched"] == [True, False]
    assert out["allowed"][0] == 0
    assert "| `piqa>=0.6` | 0.400 | **no** |" in out["card"]
    assert "It was published all the same, with `--allow-miss`." in out["card"]
    assert out["recorded"] == [{"require": "piqa>=0.6", "met": False, "measured": [{"value": 0.4}]}]
    assert out["own"][0] == 1  # also without another word about it
    assert "piqa>=0.6 is missed: 0.4" in out["own"][1]


def test_a_second_push_changes_nothing(found: Found) -> None:
    out = found["push_and_load"]
    assert out["second"][0] == 0
    assert "nothing has changed" in out["second"][1]
    assert out["again"] == [True, 0]
    assert sorted(json.loads(out["json"])) == ["added", "commit", "pull_request", "removed", "url", "warnings"]


def test_the_libraries_load_it(found: Found) -> None:
    assert found["push_and_load"]["logits"]
    assert found["push_and_load"]["words"] == 128
    assert found["the_libraries_push"]["layers"] == 6  # PEFT, an adapter


def test_verify_downloads_nothing_of_the_weights(found: Found) -> None:
    out = found["verify_what_was_pushed"]
    assert out["yes"][0] == 0
    assert "57 are the base's, to the last bit" in out["yes"][1]
    # Both are read from the Hub client's cache, whose files are links.
    assert "ok   card      README.md shows what the records say" in out["yes"][1]
    assert "ok   metrics" in out["yes"][1]
    # Of the model the hashes that the Hub lists are enough; of the base, what stays of it is hashed.
    assert out["of the model"] == 0
    assert out["of the base"] >= out["kept"] - 20_000


def test_a_gguf_file_is_found_in_its_repository(found: Found) -> None:
    out = found["a_cut_of_a_gguf_file"]
    assert out["verify"][0] == 0, out["verify"][1]
    assert out["push"][1].endswith("small.gguf\n")
    assert "org/packed has no small.gguf; give the file with --base" in out["missing"][1]
    words, (code, said) = out["suggested"]
    assert (words[-3:], code) == (["--base", "small.gguf", "--accept-trained"], 0), said


def test_verify_says_what_was_tampered_with(found: Found) -> None:
    out = found["verify_what_was_pushed"]
    assert out["no"][0] == 1
    assert "self_attn.v_proj.weight differs from the base's" in out["no"][1]
    assert "metrics.json was measured on other weights" in out["no"][1]
    assert out["old"][0] == 0  # the commit before
    assert (
        out["damaged"][0] == 1
    )  # a file of the base in the cache, whose name there is the hash of what it should hold
    assert "does not match its hash" in out["damaged"][1]


def test_verify_is_not_misled_about_the_base(found: Found) -> None:
    out = found["bases_that_mislead"]
    assert out["first"][0] == out["not the newest"][0] == 0
    for name in ("proposed", "proposed by name"):
        assert out[name][0] == 1
        assert "in none of its branches and tags: it may be from a pull request" in out[name][1]
    for name in ("untouched", "no revision", "a new card", "a new main branch"):
        assert out[name][0] == 0, out[name]
    for name, message in {
        "a revision of its own": "at refs/pr/1, where model.safetensors is not as at ",
        "hashes of another base": "names the base evil/dense at the main branch, where model.safetensors is not as ",
        "a second name": "names the base 'evil/dense', and lineage.json says 'org/dense'",
        "a name for a copy": "names the base 'evil/dense', and lineage.json says 'org/dense'",
        "no revision, and a new main branch": "at the main branch, where model.safetensors is not as at ",
    }.items():
        code, said = out[name]
        assert (code, message in said) == (1, True), said


def test_what_does_not_belong_to_the_new_model_goes(found: Found) -> None:
    out = found["a_newer_model"]
    assert out["first"][0] == 0
    assert "removed model-00001-of-00003.safetensors" in out["first"][1]
    assert out["same"]
    # New numbers need no new weights.
    assert "pushed 4 files" in out["numbers"][1]
    assert len(out["stored"]) == 2  # pictures
    assert out["card"]
    # What loaders would read beside the new model goes; what people have put there stays.
    gone = ("added_tokens.json", "chat_template.jinja", "additional_chat_templates/x.jinja")
    assert all(name in out["strays"][1].partition("removed ")[2] for name in gone)
    assert out["left"] == ["a/b.json", "notes.txt"]


def test_a_push_does_not_undo_what_somebody_else_did_meanwhile(found: Found) -> None:
    code, said = found["somebody_is_faster"]["push"]
    assert (code, "somebody else changed org/busy in the meantime" in said) == (1, True), said
    assert found["somebody_is_faster"]["files"] == ["config.json"]


def test_a_branch(found: Found) -> None:
    out = found["branches_and_proposals"]
    assert "/org/side/tree/try/1" in out["branch"][1]
    assert out["branch"][1].endswith("next: hf-layerprune verify org/side --revision try/1\n")
    assert out["main"] == []
    assert out["side"]
    assert "nothing has changed" in out["branch again"][1]
    assert out["of the branch"]
    assert out["of a new branch"]
    assert "no such branch or pull request; check --revision" in out["no branch"][1]


def test_a_pull_request(found: Found) -> None:
    out = found["branches_and_proposals"]
    assert out["reader"].endswith("/org/open/discussions/1")
    assert "/org/open/discussions/2" in out["proposed"][1]
    assert "nothing has changed" in out["proposed again"][1]
    assert "/org/open/discussions/3" in out["another proposed"][1]
    assert out["untouched"]
    assert out["pulls"] == ["refs/pr/1", "refs/pr/2", "refs/pr/3"]
    assert out["merged"]
    assert "nothing has changed" in out["nothing to do"][1]
    assert "pushed " in out["what is proposed"][1]
    assert "/org/open/discussions/4" in out["of a closed one"][1]
    assert "there is no model org/absent to open a pull request for" in out["of nothing"][1]


def test_private(found: Found) -> None:
    out = found["private"]
    assert out["made"][0] == 0
    assert out["private"]
    assert "nothing has changed" in out["again"][1]
    assert out["seen"][0] == 0
    assert out["public"][0] == 1
    assert "org/model exists and is public, but --private was given" in out["public"][1]


def test_what_people_write_on_the_page_stays(found: Found) -> None:
    out = found["two_authors"]
    assert out["unchanged"][0] == 0
    fields, body = split_front_matter(out["kept"])
    assert "Try it on poems." in body
    assert fields["widget"] == [{"text": "Hi"}]
    assert fields["tags"][-1] == "poems"
    assert out["taken over"]  # into the folder's card, too
    assert out["added here"][0] == 0
    assert "Try it on poems." in out["of both"]
    assert out["of both"].endswith("Measured at home.\n")
    assert out["both"][0] == 1
    assert "combine them in the folder" in out["both"][1]
    assert out["field"][0] == 1
    assert "differ in widget; combine them in the folder" in out["field"][1]
    assert out["field combined"][0] == 0
    assert split_front_matter(out["after"])[0]["widget"] == [{"text": "Hi"}, {"text": "Hello"}]
    assert out["not text"][1].startswith("hf-layerprune: README.md of org/shared is not UTF-8")


def test_what_people_write_inside_is_not_lost(found: Found) -> None:
    out = found["two_authors"]
    assert out["inside"][0] == 1
    assert "was changed inside a section that hf-layerprune writes (limits)" in out["inside"][1]
    assert "--overwrite-card" in out["inside"][1]
    assert out["safe"]
    assert out["overwritten"][0] == 0
    assert "- None." not in out["after"]
    assert "Try it on poems." in out["after"]


def test_a_card_that_was_there_before(found: Found) -> None:
    out = found["their_own_card"]
    assert out["org/mine"][0] == out["org/plain"][0] == 0
    fields, body = split_front_matter(out["org/mine card"])
    assert fields["thumbnail"] == "x.png"
    assert body.endswith("# Mine\n\nWords.\n")
    assert "More Information Needed" not in out["org/plain card"]
    assert out["org/plain card"].endswith("Measured at home.\n")
    assert out["org/mine others"] == [".eval_results/theirs.yaml", "USE_POLICY.md", "photo.jpg"]


def test_push_to_hub_of_the_libraries_leaves_our_card(found: Found) -> None:
    out = found["the_libraries_push"]
    assert out["model"] == [True, True]
    assert out["peft"] == [True, True]
    # What they pushed is not what the records tell of, and verify says so.
    assert out["verified"][0] == 1
    assert "they were changed since" in out["verified"][1]


def test_an_adapter(found: Found) -> None:
    out = found["the_libraries_push"]
    assert [code for code, _ in out["adapter"]] == [0, 0]
    assert {"adapter_config.json", "adapter_model.safetensors", "lineage.json", "README.md"} <= {*out["names"]}
    assert not any(name.startswith("model") for name in out["names"])
    assert out["small"][0] == 0
    assert "11 are the base's" in out["small"][1]


@pytest.mark.parametrize(("scenario", "what", "message"), [
    ("words_that_fail", "no token", "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
    ("words_that_fail", "push without a real token", "the Hub token has characters that no token has; copy it again"),
    ("words_that_fail", "inspect without a real token", "the Hub token has characters that no token has; copy it again"),
    ("words_that_fail", "verify without a real token", "the Hub token has characters that no token has; copy it again"),
    ("words_that_fail", "refused", "'a name' is not a Hub id"),
    ("words_that_fail", "another token", "this token may only read"),
    ("no_network", "push", "can't reach the Hub"),
    ("no_network", "verify", "can't reach the Hub for org/model"),
    ("verify_fails_clearly", "absent", "org/absent is neither a folder here nor on the Hub, unless it is private"),
    ("verify_fails_clearly", "empty", "org/empty has no lineage.json"),
    ("verify_fails_clearly", "revision", "org/model has no revision 'nope'"),
    ("verify_fails_clearly", "gated", "org/model is gated; ask for access on its page"),
])  # fmt: skip
def test_clear_errors(found: Found, scenario: str, what: str, message: str) -> None:
    code, said = found[scenario][what]
    assert code == 1
    assert message in said
    assert "schön" not in said
    assert "Traceback" not in said


def test_nothing_is_left_where_nothing_was_pushed(found: Found) -> None:
    assert found["words_that_fail"]["left alone"] == []
    assert found["no_network"]["folder"]  # the model's own folder is as it was
    assert found["verify_fails_clearly"]["cut off"][0] == 0  # a broken connection is taken up again


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_push_never_half_happens(found: Found, case: Case) -> None:
    """The Hub fails in every way, and main shows the old state or the whole new one."""
    outcome = found["faults"][case.name]
    if case.error:
        assert re.search(case.error, outcome["error"]), outcome["error"]
        assert len(outcome["error"]) < 500
        assert "\n" not in outcome["error"]
        assert outcome["old or new"]
        assert outcome["commits"] <= (1 if "done, but" in case.name else 0)
    else:
        assert outcome["error"] == ""
        assert outcome["commits"] == 1
    if case.name == "the card's YAML is refused":
        assert not outcome["stored"]
    # Then, with nothing failing any more: all of it, by one commit in all, and nothing sent that was there.
    assert outcome["the same"]
    assert outcome["commits in all"] == 1
    assert outcome["sent twice"] == 0
    assert outcome["seconds"] < 15


def test_a_multimodal_model_is_pushed_verified_and_read_back(found: Found) -> None:
    out = found["multimodal"]
    for command in ("prune", "card", "push", "verify"):
        assert out[command][0] == 0, out[command][1]
    assert out["beside"] == [True] * 4
    assert "README.md" in out["names"]
    assert "to the last bit" in out["verify"][1]
    assert out["logits"]
    assert out["class"] == "LlavaForConditionalGeneration"
    card, *uses = out["use"]
    assert card[0] == 0, card[1]
    assert uses == [["image-text-to-text", True]] * 2  # what the cards name, and whether their code runs
