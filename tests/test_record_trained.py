"""A pruned model that another program trained: its history, its card, and what `verify` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_layerprune import CheckpointError, LayerDropConfig, LayerPruneError, record_trained
from hf_layerprune.cli import main
from hf_layerprune.files.json_file import read_object
from hf_layerprune.heal.student import Student
from hf_layerprune.publish.card.writing import write_card
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base

from .measure_models import write_model

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
    assert Student.load(output).whole_only


def test_training_that_changed_nothing_is_no_stage(place: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(place / "cut", dtype="auto").save_pretrained(tmp_path / "trained")
    with pytest.raises(LayerPruneError, match="changed no weight"):
        record_trained(place / "cut", tmp_path / "trained", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def other_shape(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5, "use_cache": False}))


def no_history(folder: Path) -> None:
    (folder.parent / "source" / "lineage.json").unlink()


def other_source(folder: Path) -> None:
    source = folder.parent / "source"
    (source / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (chat_template, "the chat template differ"),
        (other_shape, "weights alone: rms_norm_eps differ"),
        (no_history, "has no lineage.json"),
        (other_source, "are not those that its lineage.json names"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder"),
    ],
)
def test_what_is_more_than_training_is_refused(place: Path, tmp_path: Path, change: Any, said: str) -> None:
    source, trained = tmp_path / "source", tmp_path / "trained"
    for folder in (source, trained):
        folder.mkdir()
        for file in (place / "cut").iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    (trained / "lineage.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    model.model.norm.weight.data.add_(0.5)
    model.save_pretrained(trained)
    change(trained)
    with pytest.raises(CheckpointError, match=said):
        record_trained(source, trained, tmp_path / "output")
    assert not (tmp_path / "output").exists()
