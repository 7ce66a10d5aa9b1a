"""The chat's parts, without a page: conversations that fit, seeded draws, shared tensors, HTML as text."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

import tests.chat_server  # noqa: F401 (makes the Space's files importable)
from tests.chat_models import TEMPLATE, pruned_model, tiny_chat_model
from tests.gguf_makers import misreads_gguf_tokenizers, smollm2
from tests.measure_models import byte_tokenizer

import answers  # isort: skip
import chat  # isort: skip
import page  # isort: skip
import source  # isort: skip
import weights  # isort: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "base", context=256)


@pytest.fixture(scope="module")
def pruned(base: Path) -> Path:
    return pruned_model(base, base.with_name("pruned"))


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return pruned_model(base, base.with_name("adapter"), "--adapter")


@pytest.fixture(scope="module")
def models(base: Path, pruned: Path) -> Any:
    found = load(pruned, base)
    assert found.error is None
    return found


def load(model: Path, base: Path | None = None) -> Any:
    found = weights.Models(source.Source(str(model), str(base) if base else None))
    found.load()
    return found


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


HOT = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24, "seed": 7}


def final(models: Any, roles: list[str], ids: list[int], **changed: Any) -> list[dict[str, Any]]:
    return list(answers.stream_answers([models.sides[role] for role in roles], models.source, ids, HOT | changed))[-1]


# --- conversations --------------------------------------------------------------------------------------


def test_history_comes_in_parts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = [
        {"role": "user", "content": parts, "metadata": None},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": [{"type": "text", "text": "four"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "five"}],
        },  # the answer was stopped before its first word
    ]
    assert chat.to_template_messages(said) == talk("one\ntwo", "three", "four\n\nfive")
    assert chat.text_of({"role": "assistant", "content": None}) == ""


@pytest.mark.parametrize("turns", [1, 3, 9, 41])
@pytest.mark.parametrize("system", ["", "be bi"])
def test_the_oldest_messages_make_room(pruned: Path, turns: int, system: str) -> None:
    found = source.Source(str(pruned))
    said = talk(*(f"ba be {'bi ' * 8}" for _ in range(turns)))
    before = [{"role": "system", "content": system}] if system else []
    ids, left_out = found.fit(before + said, 56)
    assert left_out % 2 == 0  # a question goes with its answer
    assert ids == found.encode(before + said[left_out:])
    assert len(ids) <= 256 - 56
    if left_out:
        assert len(found.encode(before + said[left_out - 2 :])) > 256 - 56
    else:
        assert turns < 41


def test_a_question_that_is_too_long_is_refused_with_its_length(pruned: Path) -> None:
    found = source.Source(str(pruned))
    with pytest.raises(source.Refused, match=r"has 504 tokens\. The context is 256 tokens, of which 56 are reserved"):
        found.fit(talk("ba " * 500), 56)
    with pytest.raises(source.Refused, match="has 500 tokens, but only 200 fit before 56 new ones"):
        found.fit_text("ba " * 500, 56)


def test_a_history_as_long_as_a_book_takes_no_time(pruned: Path) -> None:
    found = source.Source(str(pruned))
    counted = []
    encode = found.encode
    found.encode = lambda messages: counted.append(sum(len(m["content"]) for m in messages)) or encode(messages)
    ids, left_out = found.fit(talk("ba " * 1_000_000, "be", *["bi"] * 399), 56)
    assert left_out >= 2
    assert len(ids) <= 200
    assert sum(counted) < 100_000


def test_templates_without_a_default_make_no_chat(pruned: Path) -> None:
    found = source.Source(str(pruned))
    assert found.chats
    for templates, chats in (({"rag": TEMPLATE}, False), ({"rag": "", "default": TEMPLATE}, True)):
        found.tokenizer.chat_template = templates
        assert found.chats == chats


def test_a_template_without_a_system_role(pruned: Path) -> None:
    found = source.Source(str(pruned))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    found.tokenizer.chat_template = refusing
    system = [{"role": "system", "content": "be"}]
    assert found.encode(system + talk("ba", "bu", "bi")) == found.encode(talk("be\n\nba", "bu", "bi"))


# --- HTML -----------------------------------------------------------------------------------------------


@given(st.text("<>&;`abl/!#1 \n", max_size=60) | st.text(max_size=40))
@settings(max_examples=400, deadline=None)
def test_what_is_shown_is_what_was_meant(text: str) -> None:
    assert page.unescape_html(page.escape_html(text)) == text


@given(st.text("<>&;abl/!#1 \n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_nothing_outside_code_opens_a_tag(text: str) -> None:
    assert page.MARKUP.search(page.escape_html(text).replace("&lt;", ".").replace("&amp;", ".")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("a < b && c", "a < b && c"),
        ("&lt;", "&amp;lt;"),
        ("`<b>` <b>", "`<b>` &lt;b>"),
        ("``a ` <b>`` <b>", "``a ` <b>`` &lt;b>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("```html\n<b>\n\n<i>", "```html\n<b>\n\n<i>"),  # still being written
        ("a ` <b>", "a ` &lt;b>"),
        ("<!-- x", "&lt;!-- x"),
    ],
)
def test_html_loses_its_meaning_outside_code(text: str, expected: str) -> None:
    assert page.escape_html(text) == expected


def test_many_backticks_take_no_time() -> None:
    for text in ("`" * 40_000, "` `` ``` " * 4_000, "".join("`" * n + " " for n in range(280))):
        assert page.unescape_html(page.escape_html(text)) == text


# --- answers --------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_plain_transformers(models: Any) -> None:
    ids = models.source.encode(talk("ba be"))
    model = models.sides["pruned"].model
    loops = LogitsProcessorList([answers.NoRepeats(5, len(ids))])
    made = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, logits_processor=loops)[
        0, len(ids) :
    ]
    runs = [tuple(made[i : i + 5].tolist()) for i in range(20)]
    assert len(set(runs)) == len(runs)
    [state] = final(models, ["pruned"], ids, temperature=0)
    assert state["text"] == models.source.tokenizer.decode(made, skip_special_tokens=True)
    assert state["tokens"] == 24
    assert state["tokens_per_second"] > 0
    assert state["seconds_to_first_token"] > 0
    # Keys and values of 6 layers, for all tokens but the last: 2 heads of 8 numbers with 4 bytes each.
    assert state["cache_bytes"] == 2 * 6 * (len(ids) + 23) * 2 * 8 * 4


def test_stop_strings_of_the_model_end_an_answer(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.source, "tokenizer", byte_tokenizer())
    [whole] = final(models, ["pruned"], [40, 41, 42], temperature=0)
    third = whole["text"][2]
    monkeypatch.setattr(models.sides["pruned"].model.generation_config, "stop_strings", [third])
    [state] = final(models, ["pruned"], [40, 41, 42], temperature=0)
    assert state["text"] == whole["text"][: whole["text"].index(third) + 1]


def test_settings_of_the_model_that_an_answer_cannot_follow_are_left_out(models: Any) -> None:
    model = copy.copy(models.sides["pruned"].model)
    settings = {
        "exponential_decay_length_penalty": [5, 1.5],
        "dola_layers": "high",
        "cache_implementation": "quantized",
        "constraints": [1],
        "max_time": 1e-4,
        "bad_words_ids": [[token] for token in range(10, 120)],
    }
    model.generation_config = GenerationConfig.from_dict(settings)
    side = answers.Side("other", model)
    [state] = final(SimpleNamespace(sides={"other": side}, source=models.source), ["other"], [40, 41], temperature=0)
    assert state["tokens"] == HOT["max_tokens"]
    assert set(models.source.tokenizer(state["text"])["input_ids"]) <= {*range(10), *range(120, 128)}


def test_a_seed_decides_whatever_goes_on_beside(models: Any) -> None:
    ids = models.source.encode(talk("ba be"))
    alone = [final(models, ["pruned"], ids, seed=seed)[0]["text"] for seed in range(4)]
    assert len(set(alone)) == 4
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        found[seed] = final(models, ["pruned", "dense"], ids, seed=seed)[0]["text"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[seed] for seed in range(4)] == alone


def test_draws_have_the_probabilities_of_the_scores() -> None:
    scores = torch.tensor([[0.5, 1.5, -1.0, float("-inf"), 0.0]])
    draw = answers.GumbelSampler(3, torch.device("cpu"))
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[draw(None, scores).argmax()] += 1
    expected = scores.softmax(-1)[0]
    assert counts[3] == 0
    # Three standard errors of each share.
    assert ((counts / 4000 - expected).abs() <= 3 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_who_stops_listening_frees_the_model_within_a_prompt(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is one pass through all layers, which takes long where it is long."""
    side, seen = models.sides["pruned"], []
    second = side.model.model.layers[1]
    going = threading.Event()

    def slow(*_: Any) -> None:
        seen.append(1)
        going.set()
        threading.Event().wait(0.3)

    hook = second.register_forward_pre_hook(slow)
    third = side.model.model.layers[2].register_forward_pre_hook(lambda *_: seen.append(2), prepend=False)
    try:
        under_way = answers.stream_answers([side], models.source, models.source.encode(talk("ba")), HOT)
        next(under_way)
        assert going.wait(60)
        under_way.close()
    finally:
        hook.remove()
        third.remove()
    assert seen == [1]
    assert final(models, ["pruned"], models.source.encode(talk("ba")))[0]["tokens"] == 24


def test_an_error_while_answering_is_raised_and_holds_nothing_up(models: Any) -> None:
    hook = models.sides["dense"].model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            final(models, ["pruned", "dense"], [5, 6])
    finally:
        hook.remove()
    assert final(models, ["pruned", "dense"], [5, 6])[1]["tokens"] == 24


# --- weights --------------------------------------------------------------------------------------------


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8, 24)[None], use_cache=False).logits


@pytest.mark.parametrize("form", ["pruned", "adapter"])
def test_what_both_models_have_is_there_once(form: str, base: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(form)
    found = load(folder, base if form == "pruned" else None)
    pruned, dense = found.sides["pruned"], found.sides["dense"]
    plain = [AutoModelForCausalLM.from_pretrained(one) for one in (request.getfixturevalue("pruned"), base)]
    assert torch.equal(logits(pruned.model), logits(plain[0]))
    assert torch.equal(logits(dense.model), logits(plain[1]))
    together = pruned.weights_bytes + dense.weights_bytes - pruned.shared_bytes
    own = {"pruned": 0, "adapter": weights.weights_size(str(folder))}[form]
    rotary = 2 * 16  # each model keeps the little that is computed and no parameter
    assert dense.weights_bytes <= together <= dense.weights_bytes + own + rotary


def test_tensors_that_differ_stay_apart(base: Path, pruned: Path, tmp_path: Path) -> None:
    healed = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        healed.model.layers[5].mlp.down_proj.weight.add_(0.01)
    healed.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "lineage.json"):
        (tmp_path / name).write_bytes((pruned / name).read_bytes())
    found = load(tmp_path, base)
    size = healed.model.layers[5].mlp.down_proj.weight.nbytes
    assert found.sides["pruned"].weights_bytes - found.sides["pruned"].shared_bytes == pytest.approx(size, abs=256)
    assert torch.equal(logits(found.sides["pruned"].model), logits(healed))


def test_the_dense_side_is_off_where_it_has_no_room(
    base: Path, pruned: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = weights.weights_size(str(pruned))
    monkeypatch.setattr(weights, "free_bytes", lambda: int(1.5 * size))
    found = load(pruned, base)
    assert set(found.sides) == {"pruned"}
    assert found.error is None
    assert "base as well needs" in found.no_dense
    assert set(load(adapter).sides) == {"pruned"}
    monkeypatch.setattr(weights, "free_bytes", lambda: size)
    found = load(pruned, base)
    assert not found.sides
    assert "pruned needs" in found.error
    assert "are free here" in found.error


def test_a_container_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = weights.free_bytes()
    assert machine > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("file 5\nanon 400000\n")
    monkeypatch.setattr(weights, "CONTAINER", tmp_path)
    assert weights.free_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert weights.free_bytes() > 600_000


@pytest.mark.parametrize("damage", ["weights", "config", "base", "nothing there"])
def test_a_model_that_cannot_be_loaded_says_why(pruned: Path, tmp_path: Path, damage: str) -> None:
    for path in pruned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if damage == "weights":
        (tmp_path / "model.safetensors").write_bytes(b"nonsense")
        assert f"{tmp_path} can't be loaded: " in load(tmp_path).error
    elif damage == "config":
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(source.CannotLoad, match="can't be loaded: "):
            source.Source(str(tmp_path))
    elif damage == "base":
        (tmp_path / "config.json").unlink()
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
        with pytest.raises(source.CannotLoad, match="names no base"):
            source.Source(str(tmp_path))
    else:
        with pytest.raises(source.CannotLoad, match="nobody/nothing can't be loaded: "):
            source.Source("nobody/nothing")


def test_weights_that_are_missing_or_too_many_are_an_error(pruned: Path, tmp_path: Path) -> None:
    """transformers only warns of them, and would answer with random numbers."""
    folder = Path(shutil.copytree(pruned, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.2.mlp.up_proj.weight"
    more = tensors | {"model.layers.9.mlp.up_proj.weight": tensors[gone].clone()}
    fewer = {name: tensor for name, tensor in tensors.items() if name != gone}
    for changed, message in ((fewer, f"lacks {gone}"), (more, "has model.layers.9.mlp.up_proj.weight")):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = load(folder)
        assert message in loaded.error
        assert not loaded.sides
    # What another part of a checkpoint brings is not the language model's.
    save_file(
        tensors | {"vision.blocks.0.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert load(folder).error is None


@pytest.mark.parametrize("named", ["by the config", "by the index", "by the index that the config names"])
def test_a_pickle_is_not_read(pruned: Path, tmp_path: Path, named: str) -> None:
    """transformers reads any file that a config or an index names."""
    folder = Path(shutil.copytree(pruned, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "model.safetensors").rename(folder / "unused.safetensors")
    chosen = "adapter_model.bin" if named == "by the config" else "model.safetensors.index.json"
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "adapter_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if named != "by the index":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": chosen}))
    assert "which is not a .safetensors file beside its config" in load(folder).error


def test_a_pickled_adapter_is_not_read(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "pickled weights (.bin) are not read" in load(folder).error


@pytest.mark.skipif(misreads_gguf_tokenizers(), reason="this transformers misreads the tokenizer in a GGUF file")
def test_a_gguf_file_has_its_own_name() -> None:
    assert source.Source(str(smollm2())).records.name == smollm2().name
