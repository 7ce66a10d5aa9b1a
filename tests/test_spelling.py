"""How messages name options: as flags where a command or the recipe shows them, and as in Python elsewhere."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from transformers import LlamaConfig

from hf_layerprune import CheckpointError, CutError
from hf_layerprune.cli import build_parser, main
from hf_layerprune.commands import COMMANDS
from hf_layerprune.measure.requests import EvalRequest
from hf_layerprune.options import option_fields, option_flags, spell_options
from hf_layerprune.options.kinds import FLAG
from hf_layerprune.stages.prune import prune_to
from hf_layerprune.stages.requests import PruneRequest, RankRequest

from .heal_makers import load_recipe
from .measure_models import write_model

REQUESTS = {name: import_module(f"hf_layerprune.commands.{name}").Request for name in COMMANDS}
OPTIONS = [(name, option) for name, request in REQUESTS.items() for option in option_fields(request)]


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("use drop=3, or drop=0.25.", "use --drop 3, or --drop 0.25."),
        ("use target_size or drop=N instead", "use --target-size or --drop N instead"),
        ("(protect_first=4, protect_last=0); drop fewer", "(--protect-first 4, --protect-last 0); drop fewer"),
        ("drop_layers=[3, 4, 5, 7] is", "--drop-layers 3-5,7 is"),
        ("tune_layers='cut' or tune_layers=[2]", "--tune-layers cut or --tune-layers 2"),
        ('repair="refit"; adapter=True: link=True', "--repair refit; --adapter: --link"),
        ("tune_lm_head=False, tune_lm_head=True", "--no-tune-lm-head, --tune-lm-head"),
        ("calibration='my text.txt' and calibration=''", "--calibration 'my text.txt' and --calibration ''"),
        ("calibration=org/set:train:text is; device=cuda:1: no", "--calibration org/set:train:text is; device=cuda:1: no"),
        ("drop=... needs max_kl", "--drop needs --max-kl"),
        ("base='' must, output=... too", "BASE '' must, OUTPUT too"),
        # Neither an option nor typed.
        ("drop the steps of a contiguous repair", "drop the steps of a contiguous repair"),
        ("leave it out (repair=None, link=False)", "leave it out (repair=None, link=False)"),
        ("config field 'drop_layers' and \"drop=3\" and `max_kl`", "config field 'drop_layers' and \"drop=3\" and `max_kl`"),
        ("it can't use the model's drop_layers", "it can't use the model's --drop-layers"),
        ("drop_layers(model, [3]), x.drop_layers", "drop_layers(model, [3]), x.drop_layers"),
        ("/data/seed=3/max_kl, a/drop_layers, drop_layers/b, max_kl.txt", "/data/seed=3/max_kl, a/drop_layers, drop_layers/b, max_kl.txt"),
        ("--drop-layers 3, my_drop_layers, drop_layers_2", "--drop-layers 3, my_drop_layers, drop_layers_2"),
    ],
)  # fmt: skip
def test_spelled_as_flags(message: str, spelled: str) -> None:
    flags = option_flags(PruneRequest)
    assert spell_options(message, flags) == spelled
    assert spell_options(spelled, flags) == spelled


def test_a_flag_may_have_another_name() -> None:
    assert spell_options("criteria=('kl', 'taylor')", option_flags(RankRequest)) == "--criterion kl,taylor"
    assert spell_options("texts=... or tasks=...", option_flags(EvalRequest)) == "--text or --tasks"


@given(st.text(max_size=60), st.sampled_from(["'{}'", '"{}"', "x/{}", "--{}"]), st.sampled_from(["drop=3", "max_kl"]))
def test_text_of_others_stays(before: str, place: str, name: str) -> None:
    """In quotes, in a path and in a flag, whatever is in front of it; and nothing fails."""
    text = re.sub("[\"'`=]", "", before) + " " + place.format(name)
    assert spell_options(text, option_flags(PruneRequest)).endswith(place.format(name))


@pytest.mark.parametrize(("command", "name"), OPTIONS, ids=["-".join(each) for each in OPTIONS])
def test_each_option_is_named_as_it_is_typed(command: str, name: str) -> None:
    """Whichever options there are: the parser of the command takes what the message says."""
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    actions = {action.dest: action for action in commands.choices[command]._actions}
    flags, action = option_flags(REQUESTS[command]), actions[name]
    typed = action.option_strings[0] if action.option_strings else action.metavar
    assert spell_options(f"use {name}=... here", flags) == f"use {typed} here"
    assert spell_options(f"{name} is", flags) == (f"{typed} is" if "_" in name else f"{name} is")
    if option_fields(REQUESTS[command])[name].kind is FLAG:
        assert spell_options(f"{name}=True", flags) == typed
        off = f"{name}=False" if len(action.option_strings) == 1 else action.option_strings[1]
        assert spell_options(f"{name}=False", flags) == off
    else:
        assert spell_options(f"{name}=8 is", flags) == f"{typed} 8 is"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("spelling") / "base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prune BASE out --tune-layers 2 --drop 2", "--tune-layers 2 has no effect without --adapter; leave it out"),
        (
            "prune BASE out --drop-layers 3 --criterion kl --steps 2",
            "--criterion kl and --steps 2 have no effect with --drop-layers, which names the layers to drop; leave them out",
        ),
        ("prune BASE out --drop-layers 30", "--drop-layers has 30, but the model's layers are 0..7"),
        (
            "prune BASE out --drop 7 --protect-first 4",
            "can't drop 7 of 8 layers: only 4 may be dropped (--protect-first 4, --protect-last 0); drop fewer layers, or "
            "protect fewer",
        ),
        (
            "prune BASE out --drop 2 --criterion kl --calibration-length 99999",
            "--calibration-length 99999 is more than the 512 positions of the model; use 512 or less",
        ),
        (
            "prune BASE out --drop 2 --contiguous --steps 2 --criterion kl",
            "--steps 2 and --contiguous exclude each other, since a block is chosen in one step; leave one of them out",
        ),
        (
            "prune BASE out --drop-layers 0,1 --repair linear --calibration-samples 4",
            "--repair linear changes the layer before a dropped block, but layer 0 is dropped; keep it (--protect-first 1, "
            "unless --drop-layers names the layers), or use --repair magnitude",
        ),
        (
            "prune BASE out --drop-layers 3 --calibration-samples 8",
            "--calibration-samples 8 has no effect without a repair; leave it out",
        ),
        ("prune BASE out --context 8", "--context 8 has no effect without --target-memory or --target-speedup; leave it out"),
        (
            "prune BASE out --drop 2 --link --dtype float16",
            "--link shares weight files with the base, but this cut changes or writes them; leave it out",
        ),
        ("rank BASE --curve-up-to 3", "--curve-up-to 3 has no effect without --curve; leave it out"),
        (
            "rank BASE --curve --criterion kl,taylor",
            "--criterion kl,taylor has no effect on a curve, whose cuts are searched for; leave it out",
        ),
        (
            "rank BASE --max-kl 0.1",
            "--max-kl is for --curve or --criterion auto; specify one of them, or --drop N, or a target",
        ),
        (
            "advise BASE --target-speedup 2",
            "--target-speedup is not available here; find the number of layers with hf-layerprune rank --curve, and pass it as "
            "--drop N",
        ),
        ("inspect BASE --drop 8", "--drop 8 would drop all 8 layers of the model; at least one must stay"),
        ("eval BASE --base-revision v1", "--base-revision needs --base; add it, or leave the revision out"),
        ("eval BASE --tasks none --text none", "there is nothing to measure; specify --tasks or --text"),
        ("bench BASE --gguf x.gguf", "--gguf names what llama.cpp runs; add --engine llama.cpp"),
        (
            "bench BASE --prompt-lengths 600",
            "base has a context of 512 tokens, but prompts with new tokens are 632 long; use shorter --prompt-lengths or "
            "fewer --new-tokens",
        ),
        ("card BASE --license-name x", "--license-name and --license-link need --license (other, unless it is a well-known one)"),
        (
            "card BASE --license other",
            "--license other says nothing without the name of the licence; add --license-name",
        ),
        ("push BASE org/x --space-secret X", "--space-secret and --overwrite-space need --space"),
    ],
)  # fmt: skip
def test_a_command_names_its_flags(
    words: str,
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(base) if word == "BASE" else word for word in words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hf-layerprune: {said}"
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have the name of an option."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "max_kl").mkdir()
    (tmp_path / "max_kl" / "config.json").touch()
    assert main(["prune", str(base), "max_kl", "--drop", "2"]) == 1
    replaced = "replace it with --force, or choose another folder"
    assert capsys.readouterr().err == f"hf-layerprune: max_kl exists and is not empty; {replaced}\n"
    with pytest.raises(CheckpointError, match="replace it with force=True, or choose another folder"):
        prune_to(PruneRequest(str(base), "max_kl", drop=2))


def test_what_inspect_does_not_show_names_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1).save_pretrained(
        tmp_path
    )
    assert main(["inspect", str(tmp_path)]) == 0
    assert (
        "No cut is shown: --drop 0.25 of 2 layers is less than one layer; to drop one, use --drop 1"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CutError("fp16=True needs a GPU; use fp16=False"), "--fp16 true needs a GPU; use --fp16 false"),
        (CutError("loss=kd needs max_length or tasks=..."), "--loss kd needs --max_length or --eval_tasks"),
        (CutError("drop_layers has 9, and `drop_layers` 8"), "--drop_layers has 9, and `drop_layers` 8"),
        (OSError("max_length is a file"), "max_length is a file"),
    ],
)
def test_the_recipe_names_its_flags(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(recipe, "make_parser", lambda: argparse.Namespace(parse_args_and_config=lambda: ()))
    monkeypatch.setattr(recipe, "main", fail)
    assert recipe.run() != 0
    assert capsys.readouterr().err == f"error: {said}\n"


def test_python_names_its_arguments() -> None:
    for make, said in (
        (lambda: PruneRequest("base", "out", tune_layers=2).refuse_unused(), "tune_layers=2 has no effect without adapter=True"),
        (lambda: RankRequest("base", curve=True, criteria=["kl"]), r"criteria=\['kl'\] has no effect on a curve"),
        (lambda: EvalRequest("model", base_revision="v1"), r"base_revision needs base=\.\.\.; add it"),
    ):  # fmt: skip
        with pytest.raises(CutError, match=f"^{said}"):
            make()
