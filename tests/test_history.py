"""What a lineage says of the layers that are left, of what each stage changed, and of the form of the model."""

from __future__ import annotations

from typing import Any

import pytest

from hf_layerprune.errors import CheckpointError
from hf_layerprune.publish.card.commands import list_commands
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage


def cut(*drop: int, of: int | None = 8, **more: Any) -> dict[str, Any]:
    layers = {} if of is None else {"layers": {"base": of, "left": of - len(drop)}}
    return {"stage": "prune", "settings": {"drop_layers": [*drop]}} | layers | more


def stage(name: str, *changed: str, **settings: Any) -> dict[str, Any]:
    return {"stage": name, "settings": settings, "changed_tensors": [*changed]}


def form(name: str) -> dict[str, Any]:
    return cut(0) | {"layers": {}, "settings": {"drop_layers": [0], "form": name}}


@pytest.mark.parametrize(("entries", "expected"), [
    ([], "model"),
    ([form("adapter")], "adapter"),
    ([form("model"), form("adapter")], "adapter"),
    ([form("adapter"), form("model")], "model"),
    ([form("adapter"), form("model"), stage("heal", form="adapter")], "adapter"),
    ([form("adapter"), stage("heal")], "adapter"),
    ([form("model"), stage("train", form="adapter")], "model"),
])  # fmt: skip
def test_the_last_stage_that_names_a_form_decides(entries: list[dict[str, Any]], expected: str) -> None:
    assert read_history(Lineage({}, [cut(), *entries])).form == expected


def test_layers_and_tensors_are_followed_through_several_cuts() -> None:
    entries = [
        cut(1, repair={"changed_tensors": ["h.0.w", "h.6.w"]}),
        stage("heal", "h.3.w", "h.4.w", "h.6.w", "head.weight"),
        cut(0, 4, of=7),
        stage("heal", "h.1.w"),
        cut(2, of=None, repair={"changed_tensors": []}),
    ]
    history = read_history(Lineage({}, entries))
    assert (history.num_base_layers, history.kept, history.dropped) == (8, (2, 3, 6, 7), (0, 1, 4, 5))
    assert [one.name for one in history.stages] == ["prune", "repair", "heal", "prune", "heal", "prune"]
    changed = [sorted(one.changed) for one in history.stages]
    assert changed == [[], ["h.3.w"], ["h.3.w", "head.weight"], [], ["h.1.w"], []]
    assert [one.name for one in history.since_last_cut] == ["prune"]
    assert history.layers_changed("heal") == {3, 7}
    assert history.changed() == {"h.3.w": ["repair", "heal"], "head.weight": ["heal"], "h.1.w": ["heal"]}


def test_layers_of_other_stacks_are_not_the_decoder_s() -> None:
    names = ["vision_tower.encoder.layers.1.w", "audio.layers.9.w", "language_model.layers.2.w"]
    history = read_history(Lineage({}, [cut(7), stage("heal", *names), cut(1, of=7)]))
    assert history.changed() == {name.replace("2.w", "1.w"): ["heal"] for name in names}
    assert history.layers_changed("heal") == {2}


def test_the_prefix_that_a_stage_recorded_tells_decoder_layers_from_others() -> None:
    names = ["encoder.layers.2.w", "lm.layers.h", "lm.speech.layers.2.w", "lm.speech.layers.2.x.layers.1.w"]
    trained = stage("heal", *names) | {"layers": {"prefix": "lm.speech.layers."}}
    history = read_history(Lineage({}, [cut(7), trained, cut(1, of=7)]))
    assert sorted(history.changed()) == [name.replace("speech.layers.2", "speech.layers.1") for name in names]
    assert history.layers_changed("heal") == {2}


@pytest.mark.parametrize(("entries", "message"), [
    ([stage("heal")], "does not say how many layers the base has"),
    ([cut(1, of=None)], r"drops layers \[1\] of \?, and 0 were left"),
    ([cut(8)], r"drops layers \[8\] of 8, and 8 were left"),
    ([cut(1), cut(7, of=None)], r"drops layers \[7\] of \?, and 7 were left"),
    ([cut(1), cut(1)], r"drops layers \[1\] of 8, and 7 were left"),
    ([cut(1, layers={"base": 8, "left": 8})], "says that 8 layers were left and drops all but 7"),
    ([cut(1), stage("heal") | {"layers": {"left": 6}}], "does not say which layers were dropped"),
])  # fmt: skip
def test_a_history_that_contradicts_itself(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_history(Lineage({}, entries))


def test_commands_of_several_cuts_with_training_before_and_between() -> None:
    entries = [stage("train", "h.0.w"), cut(1), stage("train", "h.0.w"), cut(2, of=7), cut(of=6)]
    assert list_commands(read_history(Lineage({"id": "org/base", "commit": "a" * 7}, entries))) == [
        "hf-layerprune prune org/base pruned --drop-layers 1 --revision aaaaaaa",
        "# Here, the model was trained with other software.",
        "hf-layerprune prune pruned pruned-again --drop-layers 2",
    ]
