"""Options: declared once, checked where they are declared, and the same everywhere that they are asked for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from hf_layerprune import CutError, LayerDropConfig
from hf_layerprune.measure.requests import BenchRequest, EvalRequest
from hf_layerprune.options import CutOptions, add_options, copy_fields, option_fields, options_from_args, to_arguments
from hf_layerprune.publish.requests import PushRequest, VerifyRequest
from hf_layerprune.stages.requests import AdviseRequest, InspectRequest, PruneRequest, RankRequest

from .options_page import PAGE, page

BAD = [
    ("drop", math.nan), ("drop", -1), ("drop", 0), ("drop", True), ("drop", "0.25"), ("drop", 1.5), ("drop", 10**7),
    ("drop", 10**5000), ("drop", math.inf), ("drop_layers", [3.7, 4.2]), ("drop_layers", "34"),
    ("drop_layers", [True, 4]), ("drop_layers", [-1]), ("drop_layers", 3), ("drop_layers", [10**9]),
    ("drop_layers", {"3": 4}), ("drop_layers", [math.nan]), ("drop_layers", [[3]]), ("criterion", "vibes"),
    ("criterion", 3), ("variant", "mine"), ("repair", "glue"), ("steps", 0), ("steps", 1.0),
    ("steps", 10**9), ("protect_first", -1), ("protect_first", "2"), ("protect_last", 1.5), ("contiguous", "yes"),
    ("contiguous", None), ("calibration", ""), ("calibration", "x" * 40_000), ("calibration", 3),
    ("calibration_samples", 0), ("calibration_samples", 10**9), ("calibration_length", math.nan), ("seed", -1),
    ("seed", 2**70), ("tune_layers", "all"), ("tune_layers", -1), ("tune_layers", 1.5), ("tune_layers", [1.5]),
    ("tune_lm_head", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{n}" for n, (name, _) in enumerate(BAD)])
def test_refused_with_one_line(name: str, value: Any) -> None:
    for make in (LayerDropConfig, lambda **words: PruneRequest("base", "output", **words)):
        with pytest.raises(CutError, match=name) as caught:
            make(**{name: value})
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 400


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=3)), max_size=4),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(option_fields(CutOptions))), values, max_size=3))
def test_accepted_as_declared_or_refused(settings: dict[str, Any]) -> None:
    try:
        options = CutOptions(**settings)
    except CutError:
        return
    again = copy_fields(CutOptions, options)
    assert again == options
    assert options.drop_layers is None or all(type(i) is int for i in options.drop_layers)


def test_a_config_that_is_changed_later_is_checked_before_it_prunes() -> None:
    from peft import get_peft_model

    from .tiny_models import tiny_model

    config = LayerDropConfig(tune_lm_head=False)
    config.drop = math.nan
    with pytest.raises(CutError, match="drop=nan"):
        get_peft_model(tiny_model("llama"), config)


def test_a_command_line_gives_what_the_request_has() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, PruneRequest)
    assert options_from_args(parser.parse_args(["base", "output"]), PruneRequest) == PruneRequest("base", "output")
    said = parser.parse_args(["b", "o", "--drop-layers", "2-3,5", "--no-tune-lm-head", "--tune-layers", "cut"])
    request = options_from_args(said, PruneRequest)
    assert (request.drop_layers, request.tune_lm_head, request.tune_layers) == ([2, 3, 5], False, "cut")
    parser = argparse.ArgumentParser()
    add_options(parser, RankRequest)
    assert options_from_args(parser.parse_args(["base"]), RankRequest) == RankRequest("base")
    assert "auto" not in RankRequest("base").criteria
    assert RankRequest("base", criteria=["all", "auto", "kl"]).criteria[-1] == "auto"


def test_paths_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command gets them in full: it may be another program's, or the shell would not replace a quoted `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    request = EvalRequest("m", tasks_from=Path("~/tasks"), answers="~/answers", history=["~/a", "b"])
    assert (request.tasks_from, request.answers) == (tmp_path / "tasks", tmp_path / "answers")
    assert request.history == (tmp_path / "a", Path("b"))
    with pytest.raises(CutError, match=r"^answers='~nobody-here/x' starts with ~ and the name of a user who does not"):
        EvalRequest("m", answers=Path("~nobody-here/x"))


def test_help_is_in_groups_and_names_options_as_flags() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, PruneRequest, exclusive=("drop", "drop_layers"))
    said = " ".join(parser.format_help().split())
    groups = "options", "cut and repair", "calibration", "adapter"
    own, cut, calibration, adapter = (said.index(f" {title}: ") for title in groups)
    assert own < said.index("--from-curve PATH folder") < cut < said.index("--drop-layers L layers") < calibration
    assert calibration < said.index("--seed SEED random") < adapter < said.index("--tune-layers T layers")
    assert "as for the curve with --from-curve" in said
    assert "from_curve" not in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankRequest("base", curve_up_to=3), "curve_up_to=3 has no effect without curve=True"),
        (lambda: RankRequest("base", curve=True, lengths=[1, 2]), r"lengths=\[1, 2\] has no effect on a curve"),
        (lambda: EvalRequest("model", base_revision="v1"), "needs base="),
        (lambda: BenchRequest("model", base_revision="v1"), "needs base="),
        (lambda: EvalRequest("model", windows="many"), "must be a whole number from 1 to 1000000, or all$"),
    ],
)
def test_what_would_be_ignored_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        make()


def test_the_next_command_has_the_options_of_this_one() -> None:
    said = AdviseRequest("base", max_kl=0.2, minutes=30, from_curve=Path("my curve"), force=True)
    assert to_arguments(said, "force") == ["--max-kl", "0.2", "--minutes", "30", "--from-curve", "my curve"]
    said = PushRequest(Path("model"), "me/model", private=True, include=("a", "b"), require="piqa>=0.6,kl<=1")
    words = ["--require", "piqa>=0.6,kl<=1", "--private", "--include", "a", "--include", "b"]
    assert to_arguments(said, "dry_run") == words
    for cls, request, place in (
        (AdviseRequest, AdviseRequest("b", target_size="2GB", revision="v1.0"), ["b"]),
        (PruneRequest, PruneRequest("b", "o", drop_layers=[2, 3, 5], tune_lm_head=False), ["b", "o"]),
        (PruneRequest, PruneRequest("b", "o", drop_layers=[2], tune_layers=[5]), ["b", "o"]),
        (PruneRequest, PruneRequest("b", "o", drop_layers=[2], tune_layers=[3, 4, 6]), ["b", "o"]),
        (PushRequest, said, ["model", "me/model"]),
    ):
        parser = argparse.ArgumentParser()
        add_options(parser, cls)
        assert options_from_args(parser.parse_args([*place, *to_arguments(request)]), cls) == request


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/options.md is stale: run `make docs`"


NO_EFFECT: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (
        PruneRequest,
        {"drop_layers": [3], "criterion": "kl", "steps": 4, "contiguous": True},
        "criterion='kl', contiguous=True and steps=4 have",
    ),
    (
        PruneRequest,
        {"drop_layers": [3], "from_curve": Path("curve")},
        "from_curve='curve' has no effect with drop_layers",
    ),
    (
        PruneRequest,
        {"drop_layers": [3], "target_size": "1GB", "target_dtype": "float16"},
        "target_size=1000000000 has no effect",
    ),
    (PruneRequest, {"drop": 2, "criterion": "auto", "steps": 4}, "steps=4 has no effect with criterion auto"),
    (PruneRequest, {"drop": 2, "steps": 4}, "steps=4 has no effect with criterion reverse_order"),
    (PruneRequest, {"drop": 2, "criterion": "kl", "variant": "paper"}, "variant='paper' has no effect"),
    (
        PruneRequest,
        {"drop": 2, "calibration": "a.txt"},
        "calibration='a.txt' has no effect with criterion reverse_order",
    ),
    (PruneRequest, {"drop_layers": [3], "calibration_samples": 8}, "calibration_samples=8 has no effect"),
    (
        PruneRequest,
        {"drop": 2, "from_curve": Path("curve"), "criterion": "kl"},
        "criterion='kl' has no effect with from_curve",
    ),
    (
        PruneRequest,
        {"target_params": "1B", "context": 512},
        "context=512 has no effect without target_memory or target_sp",
    ),
    (
        PruneRequest,
        {"drop": 2, "target_dtype": "float16"},
        "target_dtype='float16' has no effect without target_size or",
    ),
    (AdviseRequest, {"drop": 2, "batch": 4}, "batch=4 has no effect"),
    (
        RankRequest,
        {"criteria": ["magnitude_l1"], "calibration": "a.txt"},
        "calibration='a.txt' has no effect with criterion magn",
    ),
    (RankRequest, {"context": 512}, "context=512 has no effect"),
    (RankRequest, {"curve": True, "criteria": ["kl"]}, r"criteria=\['kl'\] has no effect on a curve"),
    (RankRequest, {"curve": True, "variant": "paper"}, "variant='paper' has no effect on a curve"),
]


def ask(cls: Callable[..., Any], options: dict[str, Any]) -> None:
    """Make a request, as its command does."""
    made = cls("base", "output", **options) if cls is PruneRequest else cls("base", **options)
    if cls is PruneRequest:  # a recipe may make one of more than it uses
        made.refuse_unused()


@pytest.mark.parametrize(("cls", "options", "message"), NO_EFFECT, ids=[str(case[1]) for case in NO_EFFECT])
def test_an_option_without_effect_is_refused(cls: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        ask(cls, options)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (PruneRequest, {"drop_layers": [3], "repair": "refit", "calibration": "a.txt", "seed": 3}),
        (PruneRequest, {"max_kl": 0.3, "from_curve": Path("curve"), "calibration_samples": 8}),
        (PruneRequest, {"max_kl": 0.3, "contiguous": True, "calibration_samples": 8}),
        (PruneRequest, {"drop": 2, "criterion": "taylor", "variant": "paper", "steps": 2, "calibration": "a.txt"}),
        (PruneRequest, {"target_memory": "1GB", "context": 512, "batch": 4, "target_dtype": "float16"}),
        (AdviseRequest, {"target_memory": "1GB", "context": 512, "batch": 4}),
        (RankRequest, {"curve": True, "context": 512, "batch": 4, "repair": "refit", "calibration": "a.txt"}),
        (RankRequest, {"calibration": "a.txt", "variant": "paper"}),
    ],
    ids=str,
)
def test_an_option_with_an_effect_is_not(cls: Callable[..., Any], options: dict[str, Any]) -> None:
    ask(cls, options)


@pytest.mark.parametrize(
    "cls", [PruneRequest, RankRequest, AdviseRequest, InspectRequest, EvalRequest, BenchRequest, VerifyRequest]
)
def test_only_a_model_on_the_hub_has_revisions(cls: Any, tmp_path: Path) -> None:
    output = ["output"] if cls is PruneRequest else []
    assert cls("org/model", *output, revision="v1").revision == "v1"
    with pytest.raises(
        CutError, match=f"revision='v1' has no effect on {tmp_path}, which is a local path; leave it out"
    ):
        cls(str(tmp_path), *output, revision="v1")
    if cls in (EvalRequest, BenchRequest):
        with pytest.raises(CutError, match="base_revision='v1' has no effect on"):
            cls("org/model", base=str(tmp_path), base_revision="v1")


def test_a_saved_config_keeps_how_its_layers_were_chosen(tmp_path: Path) -> None:
    """It holds the layers beside the criterion."""
    LayerDropConfig(drop=2, criterion="kl", steps=4, context=512, drop_layers=[3]).save_pretrained(str(tmp_path))
    again = LayerDropConfig.from_pretrained(str(tmp_path))
    assert (again.drop_layers, again.criterion, again.steps) == ([3], "kl", 4)


def test_layers_are_instead_of_a_number() -> None:
    """Otherwise the next command would name both, which exclude each other."""
    assert to_arguments(PruneRequest("b", "o", drop_layers=[3, 4]), "criterion") == ["--drop-layers", "3-4"]
