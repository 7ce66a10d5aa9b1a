"""A pruned model that another program trained: its history, its card, and what `verify` says of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_layerprune import (
    CheckpointError,
    LayerDropConfig,
    LayerPruneError,
    prune_with,
    record_quantized,
    record_trained,
)
from hf_layerprune.cli import main
from hf_layerprune.files.json_file import read_object
from hf_layerprune.heal.student import Student
from hf_layerprune.publish.card.writing import write_card
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base

from .heal_makers import word_tokenizer
from .measure_models import write_model
from .tiny_models import tiny_model

PAIRS = [{"prompt": "What do bees make?", "chosen": " Honey.", "rejected": " Wax."}] * 4
ROWS = [{"text": "Bees make honey."}] * 4
QUIET = {
    "max_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "bf16": False,
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and its cut."""
    place = tmp_path_factory.mktemp("trained")
    write_model(place / "base")
    (place / "base" / "LICENSE").write_text("Pass this on.\n")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "1"]) == 0
    return place


def preferred(place: Path, folder: Path) -> None:
    """A whole model, by DPO."""
    args = DPOConfig(output_dir=str(folder / "run"), **QUIET)
    tokenizer = AutoTokenizer.from_pretrained(place / "cut")
    trainer = DPOTrainer(
        str(place / "cut"), args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(folder / "trained"))


def fine_tuned(place: Path, folder: Path, peft_config: Any, base: str = "cut") -> None:
    """An adapter, by TRL's own fine-tuning."""
    args = SFTConfig(output_dir=str(folder / "run"), gradient_checkpointing=False, **QUIET)
    rows = Dataset.from_list(ROWS)
    trainer = SFTTrainer(str(place / base), args=args, train_dataset=rows, peft_config=peft_config)
    trainer.train()
    trainer.save_model(str(folder / "trained"))


WAYS = {
    "DPO of all weights": preferred,
    "LoRA on the pruned model": lambda place, folder: fine_tuned(place, folder, LORA),
    "layers of the dense model": lambda place, folder: fine_tuned(
        place, folder, LayerDropConfig(drop_layers=[1], tune_layers=1), "base"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_history_names_every_tensor_that_training_changed(place: Path, tmp_path: Path, way: str) -> None:
    WAYS[way](place, tmp_path)
    output = tmp_path / "output"
    settings = {"method": "ORPO-like", "learning_rate": 1e-2, "config": str(tmp_path / "run.yaml")}
    record_trained(place / "cut", tmp_path / "trained", output, settings=settings, data=["org/pairs", "my rows.jsonl"])

    old, new = (load_base(folder).state_dict() for folder in (place / "cut", output))
    changed = {name for name in old if not old[name].equal(new[name])}
    entry = Lineage.load_required(output).entries[-1]
    assert entry["stage"] == "train"
    assert changed
    assert changed <= {*entry["changed_tensors"], "lm_head.weight"}
    assert set(entry["changed_tensors"]) <= changed
    assert str(tmp_path) not in json.dumps(entry)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (output / name).read_bytes() == (place / "cut" / name).read_bytes(), name
    plain, accepting = (verify(VerifyRequest(str(output), accept_trained=accept)) for accept in (False, True))
    assert plain.verdict.startswith("IN PART"), plain.verdict
    assert accepting.verdict.startswith("YES"), accepting.verdict

    if way.startswith("DPO"):  # the numbers and their plots know this kind of model
        text = tmp_path / "text.txt"
        text.write_text("Bees make honey, and rivers run to the sea. " * 40)
        assert main(["eval", str(output), "--base", str(place / "base"), "--text", str(text), "--length", "64"]) == 0
        assert {one["role"] for one in read_object(output / "metrics.json")["models"].values()} == {"dense", "trained"}
    write_card(output)
    card = (output / "README.md").read_text()
    assert "trained with other software" in card
    assert "nothing was trained" not in card
    assert "ORPO-like" in card
    assert "datasets/org/pairs" in card
    assert "| method | `ORPO-like` |" in card
    assert re.search(r"--drop-layers 1\n# Here, the model was trained with other software\.\n```", card)
    assert Student.load(output).whole_only


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "changed no weight"), (torch.nan, "norm.weight of .* not finite"), (torch.inf, "not finite")],
)
def test_training_that_changed_nothing_or_diverged_is_no_stage(
    place: Path, tmp_path: Path, value: float, said: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto")
    model.model.norm.weight.data[3] += value
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(LayerPruneError, match=said):
        record_trained(place / "cut", tmp_path / "trained", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_an_adapter_is_what_was_trained_never_the_source(place: Path, tmp_path: Path) -> None:
    words = ["--drop-layers", "1", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(place / "base"), str(tmp_path / "adapter"), *words]) == 0
    with pytest.raises(CheckpointError, match="prune the base in the same way without adapter=True, specify that"):
        record_trained(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_words(folder: Path) -> None:
    """Of as many tokens as the model has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def other_end_word(folder: Path) -> None:
    AutoTokenizer.from_pretrained(folder, eos_token="<s>").save_pretrained(folder)


def other_shape(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 2.0, "use_cache": False}))


def other_layers(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["layer_drop"]["drop_layers"] = [2]
    (folder / "config.json").write_text(json.dumps(fields))


def quantised(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "fp8"}}))


def other_end(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": [2, 7]}))


def no_history(folder: Path) -> None:
    (folder.parent / "source" / "lineage.json").unlink()


def other_source(folder: Path) -> None:
    source = folder.parent / "source"
    (source / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def other_history(folder: Path) -> None:
    record = read_object(folder.parent / "source" / "lineage.json")
    record["entries"][-1]["settings"]["repair"] = "refit"
    (folder / "lineage.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_history, "has another history than"),
        (chat_template, "more than its weights: the chat template"),
        (other_words, "more than its weights: the vocabulary"),
        (other_end_word, "more than its weights: the end token"),
        (other_shape, "more than its weights: rms_norm_eps"),
        (other_layers, "lacks other layers than"),
        (other_end, "more than its weights: eos_token_id"),
        (quantised, "trained is quantised"),
        (no_history, "has no lineage.json"),
        (other_source, "are not those that its lineage.json names"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder; specify one that"),
    ],
)
def test_what_is_more_than_training_is_refused(place: Path, tmp_path: Path, change: Any, said: str) -> None:
    source, trained = tmp_path / "source", tmp_path / "trained"
    for folder in (source, trained):
        folder.mkdir()
        for file in (place / "cut").iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    model.model.norm.weight.data.add_(0.5)
    model.save_pretrained(trained)
    change(trained)
    with pytest.raises(CheckpointError, match=said):
        record_trained(source, trained, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("form", [(), ("--adapter",)])
def test_the_same_cut_made_again_and_trained_in_its_folder(place: Path, tmp_path: Path, form: tuple[str, ...]) -> None:
    folder = tmp_path / "trained"
    assert main(["prune", str(place / "base"), str(folder), "--drop-layers", "1", *form]) == 0
    model: Any = load_base(place / "base" if form else folder)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=True) if form else model
    next(one for one in model.parameters() if one.requires_grad).data.add_(0.5)
    model.save_pretrained(folder)
    record_trained(place / "cut", folder, tmp_path / "output")
    assert accepts(tmp_path / "output").startswith("YES")


def test_a_checkpoint_with_the_names_of_the_model_itself(tmp_path: Path) -> None:
    """As the recipe writes one; the model is written with those of its source."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "1"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    model.lm_head.weight.data *= 2
    model.save_pretrained(tmp_path / "trained", save_original_format=False)
    record_trained(tmp_path / "cut", tmp_path / "trained", tmp_path / "out")
    assert Lineage.load_required(tmp_path / "out").entries[-1]["changed_tensors"] == ["lm_head.weight"]
    request = VerifyRequest(str(tmp_path / "out"), base=str(tmp_path / "base"), accept_trained=True)
    assert verify(request).verdict.startswith("YES")


def record_adapter(place: Path, folder: Path, config: Any, tokens: int = 259) -> None:
    """Record an adapter that was put on the cut after its vocabulary was resized."""
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto")
    model.resize_token_embeddings(tokens)
    get_peft_model(model, config).save_pretrained(folder / "trained", save_embedding_layers=tokens != 259)
    record_trained(place / "cut", folder / "trained", folder / "output")


def test_adapters_that_add_tokens_or_of_other_layers_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained has 264 tokens in its vocabulary, and .*cut has 259"):
        record_adapter(place, tmp_path, LORA, 264)
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"adds virtual tokens \(PROMPT_TUNING\)"):
        record_adapter(place, tmp_path / "virtual", virtual)
    assert main(["prune", str(place / "base"), str(tmp_path / "other"), "--drop-layers", "2"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype="auto")
    get_peft_model(model, LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"other lacks other layers than .*cut"):
        record_trained(place / "cut", tmp_path / "adapter", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def accepts(folder: Path) -> str:
    return verify(VerifyRequest(str(folder), accept_trained=True)).verdict


def test_fields_that_trainers_set_and_an_untied_head_are_no_other_model(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    own = {
        "attention_dropout": 0.1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "unsloth_version": "1",
    }
    model.config.update(own | {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": [2]})
    model.save_pretrained(tmp_path / "trained")
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "output")

    was, has = (read_object(folder / "config.json") for folder in (place / "cut", tmp_path / "output"))
    assert has == was | {"tie_word_embeddings": False}
    assert Lineage.load_required(tmp_path / "output").entries[-1]["changed_tensors"] == ["lm_head.weight"]
    assert accepts(tmp_path / "output").startswith("YES")


def test_trainers_take_the_end_from_the_tokenizer(place: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place / "cut", tmp_path / "source"))
    (source / "config.json").write_text(json.dumps(read_object(source / "config.json") | {"eos_token_id": [1, 5]}))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.model.norm.weight.data.add_(0.5)
    model.config.eos_token_id = [5, 2]
    model.save_pretrained(tmp_path / "trained")
    record_trained(source, tmp_path / "trained", tmp_path / "output")
    assert read_object(tmp_path / "output" / "config.json")["eos_token_id"] == [1, 5]


def test_the_sections_of_a_config_keep_their_types(tmp_path: Path) -> None:
    tiny_model("llava").to(torch.bfloat16).save_pretrained(tmp_path / "base")  # whose sections say float32
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "1"]) == 0
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(load_base(tmp_path / "cut", dtype="auto"), config).save_pretrained(tmp_path / "trained")
    word_tokenizer().save_pretrained(tmp_path / "trained")  # which the source lacks
    record_trained(tmp_path / "cut", tmp_path / "trained", tmp_path / "output")
    assert accepts(tmp_path / "output").startswith("YES")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("trained_in", ["auto", "float32"])
def test_what_was_not_trained_keeps_its_type(tmp_path: Path, dtype: str, trained_in: str) -> None:
    """Transformers loads the norms of this type in float32, and a cut that it converts has them so on disk."""
    tiny_model("gpt_oss").to(torch.float16).save_pretrained(tmp_path / "base")
    words = ["--drop-layers", "2", "--dtype", dtype]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), *words]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=trained_in)
    model.lm_head.weight.data.add_(0.5)
    model.save_pretrained(tmp_path / "trained")
    record_trained(tmp_path / "cut", tmp_path / "trained", tmp_path / "output")
    assert Lineage.load_required(tmp_path / "output").entries[-1]["changed_tensors"] == ["lm_head.weight"]
    types = [
        {name: tensor.dtype for name, tensor in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("cut", "output")
    ]
    assert types[0] == types[1]
    assert accepts(tmp_path / "output").startswith("YES")


def test_lora_of_quantised_weights_is_merged_into_the_whole_ones(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cut", tmp_path / "quantised")
    quantised(tmp_path / "quantised")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto")
    model.name_or_path = str(tmp_path / "quantised")
    get_peft_model(model, config).save_pretrained(tmp_path / "trained")
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "output")
    assert accepts(tmp_path / "output").startswith("YES")


def test_settings_and_data_are_recorded_without_local_paths(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto")
    model.model.norm.weight.data.add_(0.5)
    model.save_pretrained(tmp_path / "trained")
    rows = tmp_path / "rows.jsonl"
    settings = {"loss": float("nan"), "rate": 0.1, "sets": [{"path": str(rows), "type": Path}], 1: (None, True)}
    (tmp_path / "org" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = [rows, "org/mine", "pairs"]
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "a", settings=settings, data=data)
    entry = Lineage.load_required(tmp_path / "a").entries[-1]
    kept = {"loss": "nan", "rate": 0.1, "sets": [{"path": "rows.jsonl", "type": str(Path)}], "1": [None, True]}
    assert (entry["settings"], entry["data"]) == (
        kept,
        [{"name": name} for name in ("rows.jsonl", "org/mine", "pairs")],
    )

    record_trained(place / "cut", tmp_path / "trained", tmp_path / "b", data="org/pairs")
    assert Lineage.load_required(tmp_path / "b").entries[-1]["data"] == [{"name": "org/pairs", "id": "org/pairs"}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"settings": "DPO"}, "settings is a str; pass a dict"),
        ({"data": [{"text": "a row"}]}, "data must be the names"),
    ],
)
def test_settings_and_data_of_another_kind_are_refused(tmp_path: Path, words: Any, said: str) -> None:
    with pytest.raises(LayerPruneError, match=said):
        record_trained("pruned", "trained", tmp_path / "out", **words)


def test_what_the_card_says_of_training_that_nobody_describes_or_that_came_first(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto")
    model.model.norm.weight.data.add_(0.5)
    model.save_pretrained(tmp_path / "trained")
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "bare")
    settings = {"form": "adapter", "criterion": ["own"], "per_device_train_batch_size": "auto", "world_size": 1}
    settings |= {"gradient_accumulation_steps": "auto", "max_steps": 3}
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "first", settings=settings)
    assert main(["card", str(tmp_path / "first"), "--name", "Mine"]) == 0
    assert main(["prune", str(tmp_path / "first"), str(tmp_path / "again"), "--drop-layers", "2"]) == 0
    cards = []
    for name in ("bare", "again"):
        write_card(tmp_path / name)
        cards.append((tmp_path / name / "README.md").read_text())
    bare, again = cards
    assert "It was then trained with other software. Its makers did not say how." in bare
    assert "## Data and training" not in bare
    assert (
        "It was also trained with other software. What this card says about that training is what its makers" in again
    )
    assert "| steps | `3` |" in again
    assert "plain transformers checkpoint" in again
    assert "# Mine" not in again  # another model
    assert re.search(r" pruned --drop-layers 1\n# Here, .*\nhf-layerprune prune pruned .*--drop-layers 2\n", again)


def test_layers_of_the_dense_model_do_not_fit_a_cut_that_was_repaired_or_trained(place: Path, tmp_path: Path) -> None:
    words = ["--repair", "linear", "--calibration-samples", "4", "--calibration-length", "32"]
    assert main(["prune", str(place / "base"), str(tmp_path / "repaired"), "--drop-layers", "1", *words]) == 0
    fine_tuned(place, tmp_path, LayerDropConfig(drop_layers=[1], tune_layers=1), "base")
    with pytest.raises(CheckpointError, match=r"was trained on .*base, without what was done to .*repaired"):
        record_trained(tmp_path / "repaired", tmp_path / "trained", tmp_path / "output")
    record_trained(place / "cut", tmp_path / "trained", tmp_path / "once")
    with pytest.raises(CheckpointError, match=r"was trained on .*base, without what was done to .*once"):
        record_trained(tmp_path / "once", tmp_path / "trained", tmp_path / "output")
    how = {"repair": "linear", "calibration_samples": 4, "calibration_length": 32}
    fine_tuned(place, tmp_path, LayerDropConfig(drop_layers=[1], tune_layers=1, **how), "base")
    record_trained(tmp_path / "repaired", tmp_path / "trained", tmp_path / "output")
    assert accepts(tmp_path / "output").startswith("YES")


def test_layers_of_a_cut_fit_a_further_cut_of_it(place: Path, tmp_path: Path) -> None:
    assert main(["prune", str(place / "cut"), str(tmp_path / "twice"), "--drop-layers", "2"]) == 0
    fine_tuned(place, tmp_path, LayerDropConfig(drop_layers=[2], tune_layers=1))
    record_trained(tmp_path / "twice", tmp_path / "trained", tmp_path / "output")
    assert accepts(tmp_path / "output").startswith("YES")


def test_an_adapter_of_another_cut_and_a_model_in_memory_are_told(place: Path, tmp_path: Path) -> None:
    base, other = str(place / "base"), LayerDropConfig(drop_layers=[2], tune_layers=1)
    prune_with(other, AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "trained")
    with pytest.raises(
        CheckpointError, match=r"drops layer 2 of .*, and .* lacks layer 1; specify a pruned model with"
    ):
        record_trained(place / "cut", tmp_path / "trained", tmp_path / "out")
    model: Any = tiny_model("llama")
    for record in (
        lambda: record_trained(place / "cut", model, tmp_path / "out"),
        lambda: record_quantized(place, model),
    ):
        with pytest.raises(
            CheckpointError, match="a LlamaForCausalLM is not a folder; save the model, and specify where"
        ):
            record()
