"""From what was trained to a whole model folder, also where the model had been cut before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from hf_layerprune import LayerDropConfig
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.describe import describe_command, describe_rows, training_settings
from hf_layerprune.heal.methods import Method, parse_method
from hf_layerprune.heal.stage import write_healed
from hf_layerprune.heal.student import Student, adapter_config, load_student
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage, stage_entry
from hf_layerprune.stages.prune import PruneRequest, prune_to

from .heal_makers import rows, word_tokenizer
from .measure_models import write_model
from .test_verify_attacks import forge
from .tiny_models import tiny_model


def train(student: Student, method: Method, folder: Path) -> dict[str, Any]:
    """Save a student as a trainer leaves it, after a change of all that the method trains. Returns the stage's entry."""
    model = get_peft_model(load_student(student, method), adapter_config(student, method, ModelConfig()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model.save_pretrained(folder)
    with stage_entry("heal", {}) as entry:
        pass
    return entry


@pytest.mark.parametrize("rounds", [1, 2])
def test_only_a_model_that_was_cut_once_is_an_adapter_of_its_base(tmp_path: Path, rounds: int) -> None:
    write_model(tmp_path / "0")
    (tmp_path / "0" / "LICENSE").write_text("Pass this on.\n")
    ids = torch.arange(3, 43)[None]
    for number in range(rounds):
        prune_to(PruneRequest(str(tmp_path / f"{number}"), str(tmp_path / f"{number + 1}"), drop_layers=[2]))
    student = Student.load(tmp_path / f"{rounds}")
    assert student.whole_only == (rounds > 1)
    method = parse_method("last1")
    model = get_peft_model(load_student(student, method), adapter_config(student, method, ModelConfig()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
        wanted = model(ids).logits
    model.save_pretrained(tmp_path / "trained")
    with stage_entry("heal", {}) as entry:
        pass
    write_healed(student, tmp_path / "trained", tmp_path / "healed", entry, adapter=tmp_path / "adapter")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")(ids).logits
    torch.testing.assert_close(found, wanted)
    assert (tmp_path / "adapter").exists() == (rounds == 1)
    assert (tmp_path / "healed" / "LICENSE").read_text() == "Pass this on.\n"
    assert (tmp_path / "adapter" / "LICENSE").exists() == (rounds == 1)
    for name in ("healed", "adapter")[: 3 - rounds]:
        outcome = verify(VerifyRequest(str(tmp_path / name)))
        assert outcome.consistent, outcome.lines
        assert set(outcome.recorded) == {"heal"}


@pytest.mark.parametrize(
    ("model_type", "method", "repair"),
    [
        ("llama", "behind1", "refit"),
        ("gpt2", "lm_head+last1", "refit"),
        ("llama", "last1", "magnitude"),
        ("mixtral", "behind1", None),
        ("llama", "lora", None),
    ],
)
def test_the_adapter_has_the_records_of_its_model(
    tmp_path: Path, model_type: str, method: str, repair: str | None
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    asked = {"repair": repair, "calibration_samples": 4, "calibration_length": 8} if repair else {}
    drop = [6, 7] if repair == "magnitude" else [3, 4]  # at the tail, it changes nothing
    prune_to(PruneRequest(str(tmp_path / "base"), str(tmp_path / "cut"), drop_layers=drop, **asked))
    student, tuning = Student.load(tmp_path / "cut"), parse_method(method)
    entry = train(student, tuning, tmp_path / "trained")
    write_healed(student, tmp_path / "trained", tmp_path / "healed", entry, adapter=tmp_path / "adapter")
    outcome = verify(VerifyRequest(str(tmp_path / "adapter")))
    if method == "lora":
        assert [line.text for line in outcome.lines] == [
            f"{tmp_path / 'adapter'} is an adapter without a lineage.json, as LoRA's or a trainer's is; merge it into "
            "a whole model with hf_layerprune.record_trained, or specify the one that the recipe writes beside it"
        ]
        return
    assert outcome.consistent, outcome.lines
    told = {name for stages in outcome.recorded for name in stages.split(" and ")}
    assert told == ({"repair", "heal"} if repair == "refit" else {"heal"})
    if repair:  # otherwise, loading would fit it again
        assert LayerDropConfig.from_pretrained(tmp_path / "adapter").repaired_modules is not None
    assert read_history(Lineage.load_required(tmp_path / "adapter")).form == "adapter"
    assert read_history(Lineage.load_required(tmp_path / "healed")).form == "model"


def test_a_base_with_names_and_masks_of_an_old_transformers(tmp_path: Path) -> None:
    """As gpt2 is on the Hub: saved without its head, whose prefix transformers adds, and with the masks of its layers."""
    base, cut, healed = (tmp_path / name for name in ("base", "cut", "healed"))
    tiny_model("gpt2").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    path = base / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(8)}
    save_file(tensors, path, metadata={"format": "pt"})
    prune_to(PruneRequest(str(base), str(tmp_path / "adapter"), drop_layers=[2], adapter=True, tune_layers="1"))
    outcome = verify(VerifyRequest(str(tmp_path / "adapter")))
    assert outcome.good, outcome.lines

    prune_to(PruneRequest(str(base), str(cut), drop_layers=[2]))
    model = AutoModelForCausalLM.from_pretrained(cut)
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(0.01)
    model.save_pretrained(tmp_path / "trained")
    with stage_entry("heal", {}) as entry:
        pass
    write_healed(Student.load(cut), tmp_path / "trained", healed, entry)
    assert entry["changed_tensors"] == ["transformer.ln_f.weight"]
    outcome = verify(VerifyRequest(str(healed)))
    assert outcome.consistent, outcome.lines
    assert outcome.recorded == {"heal": 1}
    assert outcome.same == 7 * 12 + 3  # of seven layers, and outside them

    path = healed / "model.safetensors"
    save_file({name: one for name, one in load_file(path).items() if "h.3.ln_1.weight" not in name}, path)
    forge(healed)
    outcome = verify(VerifyRequest(str(healed)))
    assert [line.text for line in outcome.lines if line.good is False] == ["h.3.ln_1.weight is missing"]


def test_a_trained_head_of_a_multimodal_model_is_untied_in_each_section_of_the_config(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "base")
    prune_to(PruneRequest(str(tmp_path / "base"), str(tmp_path / "cut"), drop_layers=[2]))
    student, method = Student.load(tmp_path / "cut"), parse_method("lm_head")
    entry = train(student, method, tmp_path / "trained")
    write_healed(student, tmp_path / "trained", tmp_path / "healed", entry)
    outcome = verify(VerifyRequest(str(tmp_path / "healed")))
    assert outcome.consistent, outcome.lines
    path = tmp_path / "healed" / "model.safetensors"
    save_file({name: one for name, one in load_file(path).items() if "lm_head" not in name}, path)
    forge(tmp_path / "healed")
    outcome = verify(VerifyRequest(str(tmp_path / "healed")))
    assert any("lm_head.weight is missing" in line.text for line in outcome.lines if line.good is False)


def test_what_training_left_as_it_was_is_not_healed(tmp_path: Path) -> None:
    write_model(tmp_path / "base")
    prune_to(PruneRequest(str(tmp_path / "base"), str(tmp_path / "cut"), drop_layers=[2]))
    student, method = Student.load(tmp_path / "cut"), parse_method("last1")
    model = get_peft_model(load_student(student, method), adapter_config(student, method, ModelConfig()))
    model.save_pretrained(tmp_path / "trained")
    with stage_entry("heal", {}) as entry:
        pass
    with pytest.raises(LayerPruneError, match=r"training changed no weight of .*cut; train more"):
        write_healed(student, tmp_path / "trained", tmp_path / "healed", entry, adapter=tmp_path / "adapter")
    assert not any((tmp_path / name).exists() for name in ("healed", "adapter"))


def test_an_evaluation_leaves_4_bit_weights_trainable(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes repacks the weights in a pass without gradients, and then passes none on."""
    pytest.importorskip("bitsandbytes")
    write_model(tmp_path / "base")
    prune_to(PruneRequest(str(tmp_path / "base"), str(tmp_path / "cut"), drop_layers=[2]))
    student, method = Student.load(tmp_path / "cut"), parse_method("qlora")
    ids, found = torch.arange(3, 43)[None], []
    for evaluated in (False, True):
        torch.manual_seed(0)
        config = adapter_config(student, method, ModelConfig(lora_r=4))
        args = HealConfig(output_dir=str(tmp_path / "heal"), use_cpu=True, report_to="none")
        model: Any = load_student(student, method)
        model = HealTrainer(
            model, args, train_dataset=rows(), processing_class=word_tokenizer(), peft_config=config
        ).model
        assert model.is_quantized
        if evaluated:
            with torch.no_grad():
                model.eval()(ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    alone, after = found
    for name, gradient in alone.items():
        assert torch.equal(after[name], gradient), name
    assert any(gradient.abs().max() > 0 for name, gradient in alone.items() if ".layers.0." in name)


@pytest.mark.parametrize("version", ["4.57.3", "5.1.0"])
def test_an_adapter_gets_no_tokenizer_that_its_folder_would_change(tmp_path: Path, version: str) -> None:
    write_model(tmp_path / "base")
    for name, field in {
        "config": {"transformers_version": version},
        "tokenizer_config": {"fix_mistral_regex": True},
    }.items():
        path = tmp_path / "base" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | field))
    prune_to(PruneRequest(str(tmp_path / "base"), str(tmp_path / "cut"), drop_layers=[2]))
    student = Student.load(tmp_path / "cut")
    entry = train(student, parse_method("last1"), tmp_path / "trained")
    write_healed(student, tmp_path / "trained", tmp_path / "healed", entry, adapter=tmp_path / "adapter")
    assert (tmp_path / "adapter" / "tokenizer.json").exists() == (version > "5")
    for name in ("healed", "adapter"):
        found = verify(VerifyRequest(str(tmp_path / name), accept_trained=True))
        assert found.good, found.lines


def test_options_that_decide_the_result_are_recorded(tmp_path: Path) -> None:
    args = HealConfig(output_dir=str(tmp_path), use_cpu=True, loss="ce+kd", kd_alone=0.85, learning_rate=1e-3)
    found = training_settings(args)
    assert (found["kd_alone"], found["kd_share"], found["learning_rate"]) == (0.85, 0.5, 1e-3)
    assert "cache" not in found
    assert "label_smoothing_factor" not in found
    args = HealConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not [name for name in training_settings(args) if name.startswith("kd_")]


def test_every_option_that_differs_is_recorded_unless_it_decides_nothing(tmp_path: Path) -> None:
    changed = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "loss_type": "dft", "adam_beta2": 0.95}
    idle = {"logging_steps": 1, "save_strategy": "no", "hub_token": "hf_" + "a" * 30, "dataloader_num_workers": 1}
    common = {"output_dir": str(tmp_path), "use_cpu": True}
    plain, found = (training_settings(HealConfig(**common, **more)) for more in ({}, changed | idle))
    assert found == plain | changed
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 10}
    assert best.items() <= training_settings(HealConfig(**common, **best)).items()
    lora = ModelConfig(lora_r=4, use_dora=True, dtype="auto", model_name_or_path=str(tmp_path))
    found = training_settings(HealConfig(**common, method="lora"), lora)
    assert (found["lora_r"], found["lora_alpha"], found["use_dora"]) == (4, 32, True)
    assert str(tmp_path) not in str(found)


def test_sources_are_named_one_by_one_and_without_their_folders(tmp_path: Path) -> None:
    (tmp_path / "c++").mkdir()
    path = tmp_path / "c++" / "rows.jsonl"
    path.write_text("{}")
    told = describe_rows([], [{"path": str(path)}, {"path": "org/rows", "name": "small", "split": "train[:9]"}], True)
    assert told == [
        {"name": "rows.jsonl", "answers": "rewritten by the dense model"},
        {"name": "org/rows", "id": "org/rows", "config": "small", "split": "train[:9]", "answers": told[0]["answers"]},
    ]


def test_the_recorded_command_has_neither_tokens_nor_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    token = "hf_" + "a" * 30
    recipes = Path(__file__).parents[1] / "recipes"
    words = [
        "--config", f"{tmp_path}/mine/heal.yaml", "--hub_token", token, f"--hub-token={token}", "--pad_token", "<pad>",
        "--output_dir=/home/alice/x", "--eval-texts", "~/secret/a.txt,b/c.txt", "--run_name", f"of {token}",
        "--push_to_hub", "--hub_model_id", "me/x", "--resume_from_checkpoint", "x/checkpoint-4",
        "--dataset_name", "mine/rows.jsonl",
    ]  # fmt: skip
    assert describe_command(recipes / "sft_tail.py", words) == (
        "accelerate launch recipes/sft_tail.py --config mine/heal.yaml --pad_token '<pad>' --output_dir x --eval_texts a.txt,b/c.txt "
        "--run_name 'of hf_***' --dataset_name mine/rows.jsonl"
    )
    expected = "accelerate launch recipes/sft_tail.py --config recipes/configs/heal.yaml"
    assert describe_command(recipes / "sft_tail.py", ["--config", f"{recipes}/configs/heal.yaml"]) == expected
    monkeypatch.chdir(recipes)
    assert describe_command(Path("sft_tail.py"), ["--config=configs/heal.yaml"]) == expected
