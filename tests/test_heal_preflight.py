"""What `recipes/sft_tail.py` refuses before it prunes or writes anything, and with which exit code."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from packaging.version import Version
from peft import get_peft_model
from transformers.integrations import deepspeed
from trl import ModelConfig

from hf_layerprune import drop_layers
from hf_layerprune.cut.dry_run import dry_run_cut_of_config
from hf_layerprune.errors import CutError, LayerPruneError, explain
from hf_layerprune.families import cut_config, make_cut
from hf_layerprune.heal import preflight
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.preflight import dry_run_training
from hf_layerprune.heal.student import Student, adapter_config, check_teacher_config, load_student
from hf_layerprune.measure.requests import EvalRequest
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.runtime.model_class import without_zero3
from hf_layerprune.versions import installed_version

from .heal_makers import load_recipe, rows, word_tokenizer
from .tiny_models import tiny_config, tiny_model

SETTINGS = {"method": "last2", "use_cpu": "true", "bf16": "false", "report_to": "none"}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model that was pruned from it, one of another depth, and rows."""
    folder = tmp_path_factory.mktemp("preflight")
    for name, drop in (("base", []), ("pruned", [3, 4])):
        model = tiny_model("llama")
        if drop:
            drop_layers(model, drop)
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    changes = {
        "other": {"vocab_size": 200},
        "wide": {"hidden_size": 64},
        "quantised": {"quantization_config": {"quant_method": "fp8"}},
    }
    for name, change in changes.items():
        config = load_config(folder / "base")
        config.update(change)
        config.save_pretrained(folder / name)
    rows(8).to_json(folder / "rows.jsonl")
    (folder / "long.jsonl").write_text(json.dumps({"text": "w4 " * 199}) + "\n")
    (folder / "endless.yaml").write_text(yaml.safe_dump({"max_length": None}))
    (folder / "text.jsonl").write_text('{"text": "w4"}\n')
    said = [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]
    talks = [{"messages": said}, {"messages": [said[0], {"role": "assistant", "content": None}]}]
    (folder / "talk.jsonl").write_text(json.dumps(talks[0]) + "\n")
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "rows.txt").write_text("w4")
    talker = word_tokenizer()
    talker.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
    shutil.copytree(folder / "base", folder / "talker")
    talker.save_pretrained(folder / "talker")
    (folder / "named.yaml").write_text(yaml.safe_dump({"datasets": ["rows.jsonl"]}))
    (folder / "odd.jsonl").write_text('{"question": "a"}\n')
    (folder / "stateless").mkdir()
    (folder / "stateless" / "trainer_state.json").write_text("{}")
    part = {"datasets": [{"path": str(folder / "rows.jsonl")}]}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(part))
    (folder / "streamed.yaml").write_text(yaml.safe_dump(part | {"streaming": True}))
    (folder / "advice.yaml").write_text(yaml.safe_dump({"drop_layers": "3,4"}))
    return folder


def words(folder: Path, output: Path, **settings: Any) -> list[str]:
    named = {"model_name_or_path": folder / "base", "dataset_name": folder / "rows.jsonl", "output_dir": output}
    said = {name: str(value).replace("FOLDER", str(folder)) for name, value in (named | SETTINGS | settings).items()}
    return [part for name, value in said.items() if value != "None" for part in (f"--{name}", value)]


PRUNED = {"model_name_or_path": "FOLDER/pruned"}
TALKS = {"model_name_or_path": "FOLDER/talker", "dataset_name": "FOLDER/talks.jsonl"}
USAGE = [
    ({"method": "head"}, "--method head is unknown"),
    ({"method": "last9"}, "trains the last 9 layers, but only 6 remain"),
    ({"method": "last8", "max_kl": 0.1}, "trains the last 8 layers, but only 7 remain"),
    ({"method": "last2", "features": 0.5, "drop_layers": "3,4"}, "none of them is trained; use --method behind2"),
    ({"method": "lora", "features": 0.5, "drop_layers": "0,1"}, "none of them is trained; use --method behind2"),
    ({"dataset_name": "self", "self_length": 5000}, "--self_length 5000 is more than the 128 positions of the model"),
    ({"dataset_name": None}, "specify the training data with --dataset_name"),
    ({"dataset_name": "FOLDER/odd.jsonl"}, "has the columns question, but training needs prompt"),
    ({"dataset_test_split": "test", "eval_strategy": "steps"}, "has no split 'test'; it has train"),
    ({"config": "FOLDER/mixture.yaml"}, "has no effect with `datasets`"),
    ({"model_revision": "v1"}, "--model_revision v1 has no effect on FOLDER/base, which is a local path"),
    (PRUNED | {"model_revision": "v1"}, "--model_revision v1 has no effect on FOLDER/pruned, which is a local path"),
    ({"loss": "kd", "teacher_revision": "v1"}, "--teacher_revision v1 has no effect on FOLDER/base, which is a local path"),
    ({"test_split_size": 4}, "--test_split_size 4.0 has no effect without `datasets`"),
    ({"config": "FOLDER/advice.yaml", "drop": 0.3}, "--drop 0.3 has no effect with --drop_layers, which names the layers to drop"),
    (PRUNED | {"drop": 0.5}, "--drop 0.5 has no effect on FOLDER/pruned, which is pruned already"),
    (PRUNED | {"target_params": "1K"}, "--target_params 1000 has no effect on"),
    (PRUNED | {"max_kl": 0.1}, "--max_kl 0.1 has no effect on"),
    (PRUNED | {"criterion": "kl", "repair": "linear"}, "--repair linear and --criterion kl have no effect on"),
    (PRUNED | {"features": 0.5, "teacher": "FOLDER/base"}, "none of them is trained; use --method behind2"),
    (PRUNED | {"dataset_name": "self", "self_length": 64}, "distilling and writing rows need the dense model; specify it with --teacher"),
    (PRUNED | {"rewrite_answers": "true"}, "distilling and writing rows need the dense model"),
    ({"model_name_or_path": None}, "specify the model with --model_name_or_path"),
    (
        {"dataset_name": "self", "dataset_config": "en", "dataset_streaming": "true"},
        "--dataset_config en and --dataset_streaming true have no effect with --dataset_name self",
    ),
    (
        {"config": "FOLDER/streamed.yaml", "dataset_name": None, "loss": "kd", "max_steps": 1},
        "--loss kd needs all rows at once",
    ),
    ({"dataset_name": "self", "rewrite_answers": "true"}, "--rewrite_answers true has no effect with --dataset_name self"),
    ({"rewrite_temperature": 1}, "--rewrite_temperature 1.0 has no effect without --rewrite_answers"),
    ({"kd_temperature": 2, "kd_tokens": "completion"}, "--kd_temperature 2.0 and --kd_tokens completion have no effect with --loss ce"),
    ({"loss": "kd", "kd_share": 0.9, "kd_alone": 0.5}, "--kd_share 0.9 and --kd_alone 0.5 have no effect with --loss kd"),
    ({"load_in_4bit": "true", "method": "lora"}, "--load_in_4bit true has no effect in this recipe"),
    ({"use_peft": "true"}, "--use_peft true has no effect"),
    ({"use_dora": "true", "lora_r": 4}, "--lora_r 4 and --use_dora true have no effect with --method last2"),
    ({"dataset_streaming": "true", "loss": "kd", "max_steps": 1}, "--loss kd needs all rows at once"),
    ({"dataset_streaming": "true", "rewrite_answers": "true", "max_steps": 1}, "--rewrite_answers needs all rows"),
    ({"dataset_streaming": "true"}, "max_steps has to be specified"),
    (PRUNED | {"loss": "kd"}, "distilling and writing rows need the dense model; specify it with --teacher"),
    ({"push_to_hub": "true"}, "--push_to_hub needs the name of a repository: --hub_model_id NAMESPACE/NAME"),
    ({"push_to_hub": "true", "hub_model_id": "small"}, "'small' is not a Hub id; write it as NAMESPACE/NAME"),
    ({"trust_remote_code": "true"}, "leave --trust_remote_code out"),
    ({"chat_template_path": "FOLDER/t.jinja"}, "--chat_template_path changes the tokenizer only during training"),
    ({"num_train_epochs": 0}, "--num_train_epochs must be above 0"),
    ({"max_steps": 0}, "--max_steps must be above 0"),
    ({"max_length": 0}, "--max_length must be above 0"),
    ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be above 0"),
    ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be above 0"),
    ({"num_train_epochs": -1}, "--num_train_epochs must be above 0"),
    ({"learning_rate": 0}, "--learning_rate must be above 0"),
    ({"gradient_accumulation_steps": -1}, "--gradient_accumulation_steps must be above 0"),
    ({"eval_on_start": "true", "do_eval": "true"}, "--do_eval true and --eval_on_start true have no effect without --eval_strategy"),
    ({"ignore_bias_buffers": "true"}, "--ignore_bias_buffers true has no effect on the models"),
    ({"dataset_name": "self", "completion_only_loss": "true"}, "--completion_only_loss true has no effect with --dataset_name self"),
    ({"push_to_hub": "true", "hub_strategy": "checkpoint"}, "--hub_strategy checkpoint has no effect in this recipe"),
    ({"cache": "off", "keep_cache": "true"}, "--keep_cache true has no effect with --cache off"),
    ({"report_to": "neptune"}, "can't train: "),
    ({"method": "lora", "lora_target_modules": "nope"}, "Target modules {'nope'} not found in the base model"),
    ({"attn_implementation": "nope"}, "`attn_implementation=\"nope\"` is not supported"),
    ({"use_liger_kernel": "true"}, "liger-kernel >= 0.3.0 is not available"),
    ({"dataset_name": "FOLDER/long.jsonl"}, "a row has 200 tokens, and the model 128 positions; use --max_length 128"),
    ({"loss": "kd", "loss_type": "dft"}, "--loss kd can't be combined with --loss_type"),
    ({"adam_beta1": 2}, "Invalid beta parameter at index 0: 2.0"),
    ({"dataset_name": "self", "self_length": 64, "pad_token": "nope"}, "The specified `pad_token` ('nope') is not found"),
    ({"packing": "true", "config": "FOLDER/endless.yaml"}, "When packing is enabled, `max_length` can't be `None`"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required positional argument: 'num_decay_steps'"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
    ({"eos_token": "w3"}, "--eos_token changes the tokenizer only during training"),
    ({"padding_free": "true"}, "When `padding_free=True` without packing, `max_length` is not enforced"),
    ({"activation_offloading": "true"}, "--activation_offloading frees memory of a GPU"),
    ({"optim": "schedule_free_adamw"}, "can't train: You need to install `schedulefree`"),
    ({"optim": "grokadamw"}, "can't train: Please install grokadamw"),
    ({"model_init_kwargs": '{"dtype": "float32"}'}, "--model_init_kwargs {'dtype': 'float32'} has no effect in this recipe"),
    ({"dataset_config": "en"}, "--dataset_config has no effect on FOLDER/rows.jsonl, which has no configurations"),
    ({"dataset_train_split": "train[:1]"}, "it has train; a part of a split is named under `datasets`"),
    ({"config": "FOLDER/named.yaml", "dataset_name": None}, "each entry of `datasets` is a mapping with a path"),
    ({"dataset_name": "FOLDER/text.jsonl", "completion_only_loss": "true"}, "text.jsonl has only text; leave it out"),
    ({"dataset_name": "FOLDER/text.jsonl", "assistant_only_loss": "true"}, "You set `assistant_only_loss=True`, but the dataset is not conversational"),
    (TALKS | {"dataset_name": "FOLDER/talk.jsonl", "assistant_only_loss": "true"}, "can't train: The "),
    ({"features": 0.5, "method": "behind2", "drop_layers": "3,4", "label_smoothing_factor": 0.1}, "--features 0.5 can't be combined with"),
    ({"eval_limit": 3}, "--eval_limit 3 has no effect without --eval_tasks or --eval_from"),
    ({"eval_texts": "FOLDER/rows.txt", "eval_limit": 3}, "--eval_limit 3 has no effect without tasks"),
    (TALKS, "the chat template can't take row 1 of FOLDER/talks.jsonl: "),
    ({"eval_tasks": "piqaa"}, "piqaa"),
    ({"eval_texts": "/nowhere.txt"}, "/nowhere.txt"),
    ({"hub_tok": "hf_" + "a" * 30}, "'--hub_tok', 'hf_***'"),
]  # fmt: skip
FAILURES = [
    ({"model_name_or_path": "FOLDER/quantised"}, "the weights are quantised (fp8), and can't be repaired or healed"),
    (
        {"dataset_name": "FOLDER/named.yaml"},
        "FOLDER/named.yaml is not a .json, .jsonl, .ndjson, .parquet, .csv, .txt file",
    ),
    ({"dataset_name": "/nowhere.jsonl"}, "data file /nowhere.jsonl does not exist"),
    ({"loss": "kd", "teacher": "/nowhere"}, "/nowhere"),
    ({"loss": "kd", "teacher": "FOLDER/pruned"}, "has 6 layers, but this model is cut from one with 8"),
    (
        {"teacher": "FOLDER/other"},
        "has 200 tokens in its vocabulary, but this model is cut from one with",
    ),
    (
        {"features": 0.5, "method": "behind2", "drop_layers": "3,4", "teacher": "FOLDER/wide"},
        "has 64 values in a hidden",
    ),
    ({"resume_from_checkpoint": "FOLDER/base"}, "is not a checkpoint; specify a folder checkpoint-N"),
    ({"resume_from_checkpoint": "FOLDER/stateless"}, "has no state of the optimizer and the schedule"),
    ({"eval_from": "/nowhere"}, "/nowhere"),
    ({"output_dir": "FOLDER/pruned"}, "FOLDER/pruned is a model folder; choose another --output_dir"),
    ({"push_to_hub": "true", "hub_model_id": "me/small"}, "HF_HUB_OFFLINE is set, so nothing can be pushed"),
]


@pytest.mark.parametrize(
    ("written", "read"),
    [("3", [3]), ("3-4,6", [3, 4, 6]), ("[3, 4]", [3, 4]), ("0x4", [4]), ("'3'", [3]), ("null", None)],
)
def test_layers_in_a_settings_file(recipe: ModuleType, tmp_path: Path, written: str, read: list[int] | None) -> None:
    (tmp_path / "settings.yaml").write_text(f"drop_layers: {written}\noutput_dir: {tmp_path}/out\nuse_cpu: true\n")
    *_, cut, _, _ = recipe.make_parser().parse_args_and_config(["--config", str(tmp_path / "settings.yaml")])
    assert cut.drop_layers == read


@pytest.mark.parametrize("written", ["on", "off", "auto", "'off'"])
def test_the_cache_in_a_settings_file(recipe: ModuleType, tmp_path: Path, written: str) -> None:
    (tmp_path / "settings.yaml").write_text(f"cache: {written}\noutput_dir: {tmp_path}/out\nuse_cpu: true\n")
    _, training, *_ = recipe.make_parser().parse_args_and_config(["--config", str(tmp_path / "settings.yaml")])
    assert training.cache == written.strip("'")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("drop_layers: true", "--drop_layers true must be a list of layer indices"),
        ("drop_layers: [a]", "--drop_layers a must be a list of layer indices"),
        ("drop: 0", "--drop 0 must be a fraction between 0 and 1, or a whole number of layers"),
        ("contiguous: [1]", "--contiguous 1 must be True or False"),
        ("criterion: {a: 1}", "criterion {'a': 1} is unknown"),
        ("max_length: []", "'max_length: []' in the settings file must be a single value"),
        ("learning_rate: {a: 1}", "must be a single value"),
        ("bf16: [1]", "'bf16: [1]' in the settings file must be a single value"),
        ("packing: {a: 1}", "must be a single value"),
        ("max_length: 2026-01-01", "must be a single value"),
    ],
)
def test_settings_of_the_wrong_kind(
    recipe: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    message: str,
) -> None:
    (tmp_path / "settings.yaml").write_text(f"{setting}\noutput_dir: {tmp_path}/out\nuse_cpu: true\n")
    monkeypatch.setattr("sys.argv", ["sft_tail.py", "--config", str(tmp_path / "settings.yaml")])
    assert recipe.run() == 2
    assert message in capsys.readouterr().err


OF_NEWER_TRL = ("The specified `pad_token` ('nope') is not found", "can't train: The ")


@pytest.mark.parametrize(
    ("settings", "message", "code"), [(*one, 2) for one in USAGE] + [(*one, 1) for one in FAILURES]
)
def test_refused_before_the_cut(
    recipe: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    message: str,
    code: int,
) -> None:
    if message in OF_NEWER_TRL and installed_version("trl") < Version("1.10"):
        pytest.skip("TRL 1.0 accepts it, or says so in other words")
    monkeypatch.setattr(sys, "argv", ["sft_tail.py", *words(folder, tmp_path / "run", **settings)])
    assert recipe.run() == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert message.replace("FOLDER", str(folder)) in said
    assert not (tmp_path / "run").exists()


def test_a_value_that_can_not_be_parsed(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, without the usage, which is 200 lines long."""
    monkeypatch.setattr(sys, "argv", ["sft_tail.py", "--drop_layers", "3-"])
    with pytest.raises(SystemExit, match="2"):
        recipe.run()
    said = capsys.readouterr().err
    assert said.startswith("error: argument --drop_layers/--drop-layers: '3-' is neither a layer nor a range; ")
    assert said.count("\n") == 1


LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "lora_target_modules": "q_proj", "use_rslora": "true"}
ACCEPTED = [
    PRUNED,
    PRUNED | {"resume_from_checkpoint": "true"},  # nothing is missing where it was not pruned by the recipe
    {"method": "lora", "features": 0.5, "drop_layers": "3,4", "dtype": "float32", "attn_implementation": "eager"}
    | LORA,
    {"method": "lora", "lora_target_parameters": "x", "lora_modules_to_save": "lm_head", "hub_strategy": "end"},
    {"loss": "kd", "teacher": "FOLDER/wide"},  # whose hidden states nothing learns
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_what_has_an_effect_is_accepted(
    recipe: ModuleType, folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    if "resume_from_checkpoint" in settings:
        (run / "model").mkdir(parents=True)
    *parsed, _ = recipe.make_parser().parse_args_and_config(words(folder, run, **settings))
    student = preflight.check_run(*parsed)
    assert (student is not None) == ("model_name_or_path" in settings)


def test_a_pruned_model_without_records_is_named(
    recipe: ModuleType, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `save_pretrained` writes it; what is healed from it can't have the records of a cut either."""
    pruned = Path(shutil.copytree(folder / "pruned", tmp_path / "pruned"))
    *parsed, _ = recipe.make_parser().parse_args_and_config(words(folder, tmp_path / "run", model_name_or_path=pruned))
    preflight.check_run(*parsed)
    assert f"{pruned} has no lineage.json, so the healed model will have no card" in caplog.text
    caplog.clear()
    Lineage({"id": "org/base"}).record(pruned, {"stage": "prune", "settings": {"drop_layers": [3, 4]}})
    preflight.check_run(*parsed)
    assert "lineage.json" not in caplog.text


class _ZeRO3:
    """What transformers asks DeepSpeed's settings."""

    def is_zero3(self) -> bool:
        return True


@pytest.fixture
def zero3() -> Iterator[_ZeRO3]:
    """As under `deepspeed_zero3.yaml`: transformers would load every model split, for which DeepSpeed is not even installed."""
    deepspeed.set_hf_deepspeed_config(settings := _ZeRO3())
    yield settings
    deepspeed.unset_hf_deepspeed_config()


@pytest.mark.parametrize("lesson", [{"loss": "kd"}, {"features": 0.5, "method": "behind2"}], ids=str)
def test_zero3_can_not_distil(
    lesson: dict[str, Any],
    recipe: ModuleType,
    folder: Path,
    tmp_path: Path,
    zero3: _ZeRO3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft_tail.py", *words(folder, tmp_path / "run", **lesson)])
    assert recipe.run() == 2
    assert "DeepSpeed ZeRO-3 splits them; train with ZeRO-2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_process_prunes_a_whole_model_under_zero3(
    recipe: ModuleType, folder: Path, tmp_path: Path, zero3: _ZeRO3
) -> None:
    """Pruning and repair load whole models there, and only what is loaded afterwards is split."""
    said = words(folder, tmp_path / "run", repair="linear", calibration_samples=8, calibration_length=16)
    _, training, model, _, cut, *_ = recipe.make_parser().parse_args_and_config(said)
    student = recipe.prune(model, cut, training)
    assert student.repaired
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_the_dense_model_writes_whole_under_zero3(
    recipe: ModuleType, folder: Path, tmp_path: Path, zero3: _ZeRO3
) -> None:
    said = words(folder, tmp_path / "run", dataset_name="self", self_rows=2, self_length=8, teacher=folder / "base")
    _, training, _, _, _, rows_, _ = recipe.make_parser().parse_args_and_config(said)
    student = Student.load(folder / "pruned")
    assert len(recipe.generate_rows(None, rows_, training, student, word_tokenizer())) == 2


def test_a_whole_model_is_merged_and_evaluated_under_zero3(
    recipe: ModuleType, folder: Path, tmp_path: Path, zero3: _ZeRO3
) -> None:
    with without_zero3():
        student = Student.load(folder / "pruned")
        method = parse_method("last2")
        model = get_peft_model(
            load_student(student, method, dtype="auto"), adapter_config(student, method, ModelConfig())
        )
        for parameter in model.parameters():
            parameter.data += 0.01 * parameter.requires_grad
    said = words(folder, tmp_path / "run")
    _, training, *_ = recipe.make_parser().parse_args_and_config(said)
    trainer = SimpleNamespace(
        args=training,
        is_world_process_zero=lambda: True,
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
        save_model=model.save_pretrained,
    )
    entry: dict[str, Any] = {"stage": "heal", "settings": {}}
    recipe.save(trainer, student, entry)
    healed = tmp_path / "run" / "model"
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 50}" for i in range(200)))
    request = EvalRequest(str(healed), tasks=("none",), texts=(str(text),), length=16, windows=2)
    assert recipe.finish(healed, training, request, None) == []
    assert (healed / "metrics.json").is_file()


def test_rehearsals_have_whole_models_under_zero3(folder: Path, zero3: _ZeRO3) -> None:
    config = load_config(folder / "base")
    cut = make_cut(config, [3, 4])
    dry_run_cut_of_config(config, cut_config(config, cut), cut)


def _global_state() -> dict[str, Any]:
    """What a trainer may set for the whole process, but for random numbers: each sets the seed."""
    shared = {one.__name__: {**one._shared_state} for one in (PartialState, AcceleratorState, GradientState)}
    return shared | {
        "environment": {**os.environ},
        "tensors": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "log": logging.root.manager.disable,
        "deepspeed": deepspeed._hf_deepspeed_config_weak_ref,
    }


@pytest.mark.parametrize("method", ["behind1", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_rehearsal_of_a_training_leaves_nothing_behind(
    folder: Path, tmp_path: Path, zero3: _ZeRO3, method: str, fails: bool
) -> None:
    """With what accelerate keeps of a trainer, DeepSpeed is refused in the training itself."""
    args = HealConfig(output_dir=str(tmp_path / "heal"), use_cpu=True, report_to="none", method=method)
    config = load_config(folder / "base")
    before = _global_state()
    assert before["PartialState"]
    with pytest.raises(CutError) if fails else nullcontext():
        if fails:
            args.optim = "lomo"
        dry_run_training(args, ModelConfig(), config, rows(), rows(4), word_tokenizer())
    assert _global_state() == before
    assert GradientState().active_dataloader is None
    assert not (tmp_path / "heal").exists()


def test_lora_on_experts_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """PEFT drops nothing out of the experts' input, and TRL's default is to drop 5 % out."""
    args = HealConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", method="lora")
    given = (tiny_config("qwen3_moe"), rows(), None, word_tokenizer())
    with pytest.raises(CutError, match=r"can't apply LoRA: .*; experts need --lora_dropout 0"):
        dry_run_training(args, ModelConfig(), *given)
    if installed_version("peft") >= Version(
        "0.20"
    ):  # PEFT 0.19 takes the letters of "all-linear" for the experts' names
        dry_run_training(args, ModelConfig(lora_dropout=0.0), *given)


def test_the_base_teaches_a_model_that_was_cut_twice(folder: Path) -> None:
    dense, twice = load_config(folder / "base"), tiny_model("llama")
    for drop in ([3, 4], [1]):
        drop_layers(twice, drop)
    check_teacher_config(dense, twice.config, "base", features=False)
    with pytest.raises(CutError, match=r"which had 6 layers, and the teacher base has 8; .*or use features=0"):
        check_teacher_config(dense, twice.config, "base", features=True)


def test_a_type_that_can_not_be_healed_is_refused_before_the_cut(
    recipe: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_layerprune.heal import preflight

    def refused(config: Any, stage: str) -> None:
        raise LayerPruneError(f"{config.model_type} can't go through {stage}")

    monkeypatch.setattr(preflight, "check_stage", refused)
    with pytest.raises(LayerPruneError, match="llama can't go through heal"):
        recipe.main(*recipe.make_parser().parse_args_and_config(words(folder, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (KeyboardInterrupt(), "interrupted; nothing was left half-written", 130),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied", 1),
        (CutError("a"), "a", 2),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory; use smaller batches or fewer or shorter texts, or run on the CPU or on a machine with more memory",
            1,
        ),
        (TypeError("b"), "internal error: TypeError: b; HF_LAYERPRUNE_DEBUG=1 shows where it came from", 1),
    ],
)
def test_whatever_ends_it_is_one_line(
    recipe: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    line: str,
    code: int,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(preflight, "check_run", fail)
    monkeypatch.setattr(sys, "argv", ["sft_tail.py", *words(folder, tmp_path / "run")])
    assert recipe.run() == code
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
    assert explain(error) == (line, code)


def test_the_demo_removes_nothing_of_others(tmp_path: Path) -> None:
    demo = load_recipe("demo")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").touch()
    for other in ("models", "models/mine"):
        with pytest.raises(CutError, match="was not made by the demo; choose another --output, or remove it"):
            demo.empty_output(tmp_path / other)
    assert (tmp_path / "models" / "mine").is_file()
    for _ in range(2):
        demo.empty_output(tmp_path / "new")
        (tmp_path / "new" / "base").mkdir()
    demo.empty_output(tmp_path / "new")
    assert not (tmp_path / "new" / "base").exists()
