"""`recipes/sft_tail.py`: from a base to a healed model, alone and with company, killed and resumed."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_layerprune import drop_layers
from hf_layerprune.errors import CheckpointError, CutError, LayerPruneError
from hf_layerprune.heal.checkpoints import last_checkpoint
from hf_layerprune.heal.preflight import check_data
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base

from .heal_makers import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    launch_recipe,
    load_recipe,
    recipe_words,
    word_tokenizer,
    write_base_and_rows,
)
from .measure_models import write_tasks
from .tiny_models import EAGER, tiny_model

pytestmark = pytest.mark.processes
SETTINGS = {
    "drop_layers": "3,4", "method": "behind1", "features": 0.25, "loss": "ce+kd", "num_train_epochs": 2,
    "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_length": 32, "logging_steps": 1,
    "attn_implementation": "eager", "use_cpu": "true", "bf16": "false", "report_to": "none", "disable_tqdm": "true",
}  # fmt: skip

DEEPSPEED = Path(sys.prefix) / "deepspeed"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_rows(tmp_path_factory.mktemp("recipe") / "base")


def words(base: Path, output: Path, **settings: Any) -> list[str]:
    return recipe_words(base, output, **SETTINGS | settings)


def losses(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"'loss': '([\d.e-]+)'", log)]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe()


def run(recipe: ModuleType, arguments: list[str]) -> None:
    recipe.main(*recipe.make_parser().parse_args_and_config(arguments))


@pytest.fixture(scope="module")
def healed(recipe: ModuleType, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run of one process, this one, and what it said."""
    output = tmp_path_factory.mktemp("healed") / "run"
    with redirect_stdout(io.StringIO()) as said:
        run(recipe, words(base, output, save_steps=4, save_strategy="steps"))
    return output, said.getvalue()


# --- what it makes -------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapter_and_model_are_the_same_healed_model(base: Path, healed: tuple[Path, str]) -> None:
    output, log = healed
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [
        "adapter", "checkpoint-12", "checkpoint-16", "checkpoint-4", "checkpoint-8", "model", "pruned",
    ]  # fmt: skip
    found = losses(log)
    assert len(found) == 16
    assert found[3] < found[0]  # hidden states in the first quarter, then distributions and text
    assert sum(found[-4:]) < sum(found[4:8])
    ids = torch.randint(3, 100, (2, 9))
    model = AutoModelForCausalLM.from_pretrained(output / "model", **EAGER).eval()
    assert model.config.num_hidden_layers == 6
    adapter = AutoPeftModelForCausalLM.from_pretrained(output / "adapter", **EAGER).eval()
    assert adapter.peft_config["default"].base_model_name_or_path == str(base)
    assert not (output / "adapter" / "README.md").exists()  # PEFT's template
    assert torch.allclose(model(ids).logits, adapter(ids).logits, atol=1e-6)
    pruned = AutoModelForCausalLM.from_pretrained(output / "pruned", **EAGER).eval()
    assert not torch.allclose(model(ids).logits, pruned(ids).logits, atol=1e-2)


def test_history_says_what_was_done(healed: tuple[Path, str]) -> None:
    output, _ = healed
    entries = Lineage.load(output / "model").entries
    assert [entry["stage"] for entry in entries] == ["prune", "heal"]
    entry = entries[1]
    before, after = (load_file(output / name / "model.safetensors") for name in ("pruned", "model"))
    changed = sorted(name for name in after if not torch.equal(after[name], before[name]))
    assert entry["changed_tensors"] == changed
    assert {name.split(".")[2] for name in changed if "layers" in name} == {"2", "3", "4", "5"}
    assert (entry["settings"]["method"], entry["settings"]["features"]) == ("behind1", 0.25)
    assert entry["settings"]["learning_rate"] == 0.01
    assert entry["data"][0]["rows"] == 32
    assert re.fullmatch(r"[0-9a-f]{64}", entry["data"][0]["sha256"])
    assert entry["layers"] == {"base": 8, "left": 6, "prefix": "model.layers."}
    assert str(output.parent) not in json.dumps(entry)


# --- with company --------------------------------------------------------------------------------------


# As a launcher does, but what takes longest to import is imported once for both.
TWO = """
import gc, os, runpy, signal, socket, sys
import hf_layerprune.heal.trainer
gc.freeze()  # collecting garbage takes half of such a run
with socket.create_server(("127.0.0.1", 0)) as free:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
children = []
for rank in "01":
    if (child := os.fork()) == 0:
        os.environ |= where | {"RANK": rank, "LOCAL_RANK": rank}
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    children.append(child)
while children:
    child, status = os.wait()
    children.remove(child)
    if status:  # the other one would wait for it
        for other in children:
            os.kill(other, signal.SIGKILL)
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_learn_what_one_does(base: Path, healed: tuple[Path, str], tmp_path: Path) -> None:
    log = launch_recipe(words(base, tmp_path / "run", per_device_train_batch_size=2), "-c", TWO)
    assert losses(log) == pytest.approx(losses(healed[1]), rel=1e-3)  # as printed, in four digits
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", healed[0]))
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, atol=1e-4), name


def test_fsdp_learns_what_one_process_does(base: Path, healed: tuple[Path, str], tmp_path: Path) -> None:
    """`fsdp2.yaml` with two processes on the CPU: the weights that it shards are trained, saved, loaded, and whole again."""
    engine = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())
    on_the_cpu = {"use_cpu": True, "mixed_precision": "no", "num_processes": 2}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(engine | on_the_cpu))
    launcher = (
        "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "cpu.yaml"), "--main_process_port", "0",
        str(ROOT / "benchmarks" / "gpu_parts" / "fsdp_on_cpu.py"),
    )  # fmt: skip
    saving = {"save_steps": 8, "save_strategy": "steps"}
    arguments = words(base, tmp_path / "run", per_device_train_batch_size=2, **saving)

    def check(log: str, steps: int) -> None:
        assert log.count("trained by FSDP") == 2
        assert losses(log) == pytest.approx(losses(healed[1])[-steps:], rel=1e-3)
        mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", healed[0]))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.allclose(mine[name], tensor, atol=1e-4), name

    check(launch_recipe(arguments, *launcher), 16)
    outcome = verify(VerifyRequest(str(tmp_path / "run" / "model")))
    assert outcome.consistent, outcome.lines
    assert set(outcome.recorded) == {"heal"}
    for name in ("model", "adapter", "checkpoint-16"):
        shutil.rmtree(tmp_path / "run" / name)
    check(launch_recipe([*arguments, "--resume_from_checkpoint", "true"], *launcher), 8)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_what_one_process_does(
    base: Path, healed: tuple[Path, str], tmp_path: Path, stage: int
) -> None:
    """Its settings files, on the CPU, for which it compiles a kernel. `make install` puts it beside the environment."""
    if not (DEEPSPEED / "deepspeed").is_dir() or shutil.which("c++") is None:
        pytest.skip("needs DeepSpeed and a C++ compiler")
    engine = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"deepspeed_zero{stage}.yaml").read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(engine | {"mixed_precision": "no", "num_processes": 1}))
    path = os.pathsep.join((str(DEEPSPEED), ENVIRONMENT["PYTHONPATH"]))
    programs = os.pathsep.join((str(DEEPSPEED / "bin"), os.environ["PATH"]))
    env = ENVIRONMENT | {"PYTHONPATH": path, "PATH": programs, "DS_ACCELERATOR": "cpu"}
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "cpu.yaml"),
        "--main_process_port",
        "0",
    )
    settings = {"use_cpu": "false"}  # with it, accelerate would leave DeepSpeed out
    if stage == 3:  # the dense model would have to be split as well
        settings |= {"loss": "ce", "features": 0}
    log = launch_recipe(words(base, tmp_path / "run", **settings), *launcher, env=env)
    if stage == 2:
        assert losses(log)[:2] == pytest.approx(losses(healed[1])[:2], rel=1e-3)
    outcome = verify(VerifyRequest(str(tmp_path / "run" / "model")))
    assert outcome.consistent, outcome.lines
    assert set(outcome.recorded) == {"heal"}


# --- killed --------------------------------------------------------------------------------------------


def test_killed_and_resumed_is_as_if_nothing_had_been(
    recipe: ModuleType,
    base: Path,
    healed: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed while it writes a checkpoint: it goes on from the one before."""
    output, half = tmp_path / "run", tmp_path / "run" / "checkpoint-8"
    command = [sys.executable, str(RECIPE), *words(base, output, save_steps=4, save_strategy="steps")]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 800
    while not half.exists():
        assert running.poll() is None, running.stdout.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (output / "model").exists()
    (half / "trainer_state.json").write_text("")  # wherever in the writing the kill came
    with pytest.raises(
        CheckpointError, match="checkpoint-4 is from an earlier run; resume it with --resume_from_checkpoint true"
    ):
        run(recipe, words(base, output, save_steps=4, save_strategy="steps"))
    capsys.readouterr()
    run(recipe, words(base, output, save_steps=4, save_strategy="steps", resume_from_checkpoint="true"))
    assert f"{half} is incomplete and is skipped" in caplog.text
    assert len(losses(capsys.readouterr().out)) == 12  # of the 16 steps
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, healed[0]))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    entries = [Lineage.load(folder / "model").entries[-1] for folder in (output, healed[0])]
    assert ["seconds" in entry for entry in entries] == [False, True]  # those before the kill are not known


def test_killed_in_the_evaluation_and_resumed(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is complete then: it is measured, and not trained again. That of another run is left alone."""
    tasks = {"eval_from": write_tasks(tmp_path / "tasks", 4), "eval_tasks": "asked", "eval_texts": "none"}
    arguments = words(base, tmp_path / "run", max_steps=1, **tasks)
    with monkeypatch.context() as patch:
        patch.setattr("hf_layerprune.measure.evaluate.evaluate", lambda request: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(recipe, arguments)
    model = tmp_path / "run" / "model"
    entries, resumed = Lineage.load(model).entries, [*arguments, "--resume_from_checkpoint", "true"]
    run(recipe, resumed)
    assert f"{model} is complete, so it is not trained again" in caplog.text
    assert Lineage.load(model).entries == entries
    assert "asked" in (model / "metrics.json").read_text()
    assert (model / "README.md").is_file()
    with pytest.raises(CheckpointError, match="model exists already"):
        run(recipe, arguments)
    others = ["--learning_rate", "0.02", "--method", "cut2", "--max_length", "16"]
    with pytest.raises(CheckpointError, match=r"other settings \(data, learning_rate, max_length, method\); repeat"):
        run(recipe, [*resumed, *others])
    pruned = tmp_path / "run" / "pruned"
    lineage = pruned / "lineage.json"
    lineage.write_text(lineage.read_text().replace('"date": "20', '"date": "19'))  # as if cut again
    with pytest.raises(CheckpointError, match="model is not from this run; choose another --output_dir, or remove it"):
        run(recipe, resumed)
    shutil.rmtree(pruned)
    with pytest.raises(
        CheckpointError, match=rf"{pruned}, which {model} was made of, is gone; use hf-layerprune eval"
    ):
        run(recipe, resumed)


@pytest.mark.parametrize("method", ["behind1", "lora"])
@pytest.mark.parametrize("named", ["model", "adapter"])  # the last folder that had its name
def test_killed_before_its_adapter_has_a_name(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, named: str
) -> None:
    rename, settings = os.rename, {"method": method, "features": 0, "max_steps": 1}
    run(recipe, words(base, tmp_path / "whole", **settings))

    class Killed(BaseException):
        pass

    def rename_and_die(old: Any, new: Any) -> None:
        rename(old, new)
        if Path(new).name == named:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename_and_die)
        with pytest.raises(Killed):
            run(recipe, words(base, tmp_path / "run", **settings))
    assert (tmp_path / "run" / "adapter").exists() == (named == "adapter")
    run(recipe, words(base, tmp_path / "run", resume_from_checkpoint="true", **settings))
    assert not (tmp_path / "run" / ".trained").exists()
    mine, theirs = (load_file(tmp_path / one / "adapter" / "adapter_model.safetensors") for one in ("run", "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    entries = [(Lineage.load(tmp_path / one / "adapter") or Lineage({})).entries for one in ("run", "whole")]
    assert [[entry["settings"] for entry in one] for one in entries[:1]] == [[e["settings"] for e in entries[1]]]


def test_the_history_names_settings_that_a_resumed_run_changed(
    recipe: ModuleType, base: Path, healed: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "resumed" not in Lineage.load(healed[0] / "model").entries[-1]
    settings = {"learning_rate": 0.02, "save_steps": 6, "save_strategy": "steps", "resume_from_checkpoint": "true"}
    for name in ("pruned", "checkpoint-4"):
        shutil.copytree(healed[0] / name, tmp_path / "run" / name)
    run(recipe, words(base, tmp_path / "run", max_steps=6, **settings))
    assert "training goes on with settings that have changed: data, learning_rate, max_steps" in caplog.text
    for name in ("model", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    run(recipe, words(base, tmp_path / "run", max_steps=7, **settings))
    entry = Lineage.load(tmp_path / "run" / "model").entries[-1]
    before = [one["settings_before"] | {"after_step": one["after_step"]} for one in entry["resumed"]]
    assert [one.pop("data")[0]["rows"] for one in before] == [32, 24]  # those that the steps reach
    assert before == [{"learning_rate": 0.01, "max_steps": -1, "after_step": 4}, {"max_steps": 6, "after_step": 6}]
    assert (entry["settings"]["learning_rate"], entry["settings"]["max_steps"]) == (0.02, 7)


def test_resuming_after_the_end(recipe: ModuleType, base: Path, healed: tuple[Path, str], tmp_path: Path) -> None:
    """Nothing would be trained, and the history would have settings that the model was not trained with."""
    for name in ("pruned", "checkpoint-16"):
        shutil.copytree(healed[0] / name, tmp_path / "run" / name)
    with pytest.raises(LayerPruneError, match="has 16 steps, and training ends after 8; train for longer"):
        run(recipe, words(base, tmp_path / "run", num_train_epochs=1, resume_from_checkpoint="true"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_is_stopped_halfway_is_not_finished(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM does with --enable_jit_checkpoint, which saves a checkpoint and ends training without an error."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = state.global_step == 3

    monkeypatch.setattr("hf_layerprune.heal.progress.show_progress", lambda trainer: trainer.add_callback(Stop()))
    with pytest.raises(LayerPruneError, match="after 3 of 16 steps; go on with --resume_from_checkpoint true"):
        run(recipe, words(base, tmp_path / "run", save_strategy="no"))
    assert last_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


# --- other ways to begin and to train ------------------------------------------------------------------


def test_a_model_that_is_pruned_already(
    recipe: ModuleType, base: Path, healed: tuple[Path, str], tmp_path: Path
) -> None:
    settings = {"drop_layers": "", "max_steps": 2, "method": "auto", "loss": "kd"}
    arguments = words(healed[0] / "pruned", tmp_path / "run", dataset_name=base.parent / "rows.jsonl", **settings)
    place = arguments.index("--drop_layers")
    run(recipe, arguments[:place] + arguments[place + 2 :])
    assert not (tmp_path / "run" / "pruned").exists()
    entry = Lineage.load(tmp_path / "run" / "model").entries[-1]
    assert entry["settings"]["method"] == "behind2"
    assert {name.split(".")[2] for name in entry["changed_tensors"] if ".layers." in name} == {"1", "2", "3", "4", "5"}


def test_a_model_that_is_healed_again_is_no_adapter_of_the_base(
    recipe: ModuleType, base: Path, healed: tuple[Path, str], tmp_path: Path
) -> None:
    """Such an adapter would lack what was trained before."""
    settings = {"dataset_name": base.parent / "rows.jsonl", "max_steps": 2, "method": "last1"}
    settings |= {"features": 0}
    arguments = words(healed[0] / "model", tmp_path / "run", **settings)
    place = arguments.index("--drop_layers")
    run(recipe, arguments[:place] + arguments[place + 2 :])
    assert [entry["stage"] for entry in Lineage.load(tmp_path / "run" / "model").entries] == ["prune", "heal", "heal"]
    assert not (tmp_path / "run" / "adapter").exists()
    before, after = (load_file(f / "model" / "model.safetensors") for f in (healed[0], tmp_path / "run"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(("model.layers.5.", "model.norm.")) for name in changed)
    outcome = verify(VerifyRequest(str(tmp_path / "run" / "model"), base=str(base)))
    assert outcome.consistent, outcome.lines


@pytest.mark.parametrize("hidden", [True, False])
def test_progress_bars_are_hidden_if_that_is_asked_for(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("huggingface_hub.utils.disable_progress_bars", lambda: calls.append(1))
    settings = {"disable_tqdm": str(hidden).lower(), "trust_remote_code": "true"}
    with pytest.raises(CutError, match="need code of their own"):
        run(recipe, words(base, tmp_path / "run", **settings))
    assert len(calls) == hidden


def test_settings_of_lora_are_used_and_recorded(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    lora = {"use_dora": "true", "use_rslora": "true", "lora_modules_to_save": "lm_head", "lora_r": 4}
    run(recipe, words(base, tmp_path / "run", method="lora", max_steps=3, loss="ce", **lora))
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["use_dora"], adapter["use_rslora"], adapter["modules_to_save"]) == (True, True, ["lm_head"])
    entry = Lineage.load(tmp_path / "run" / "model").entries[-1]
    assert (entry["settings"]["lora_r"], entry["settings"]["use_dora"]) == (4, True)
    assert "lm_head.weight" in entry["changed_tensors"]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_methods_that_are_no_tail(recipe: ModuleType, base: Path, tmp_path: Path, method: str) -> None:
    left_over = tmp_path / "run" / ".trained" / "adapter_config.json"  # of a run that was killed while it merged
    left_over.parent.mkdir(parents=True)
    left_over.write_text("{}")
    run(recipe, words(base, tmp_path / "run", method=method, max_steps=3, loss="ce"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", **EAGER)
    assert model.config.num_hidden_layers == 6
    assert not getattr(model, "is_quantized", False)
    changed = Lineage.load(tmp_path / "run" / "model").entries[-1]["changed_tensors"]
    assert ("model.embed_tokens.weight" in changed) == (method == "full")
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert (tmp_path / "run" / "adapter").exists() == (method != "full")
    if method == "qlora":  # a resumed run trains in float32, as PEFT loads the adapter of a checkpoint
        saved = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_evaluation_has_the_memory_to_itself(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the trainer nor its optimizer is left when the finished model is measured."""
    alive, finish = [], recipe.finish
    before = {id(one) for one in gc.get_objects() if isinstance(one, torch.optim.Optimizer)}

    def look(*args: Any) -> list[str]:
        found = [one for one in gc.get_objects() if isinstance(one, Trainer | torch.optim.Optimizer)]
        alive.extend(type(one).__name__ for one in found if id(one) not in before)
        return [*finish(*args), "looked"]

    monkeypatch.setattr(recipe, "finish", look)
    arguments = words(base, tmp_path / "run", max_steps=1, loss="ce", features=0)
    assert recipe.main(*recipe.make_parser().parse_args_and_config(arguments)) == ["looked"]
    assert alive == []


def test_rows_that_the_dense_model_writes(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    settings = {"dataset_name": "self", "self_rows": 8, "self_length": 12, "loss": "kd", "max_steps": 2}
    run(recipe, words(base, tmp_path / "run", **settings))
    entry = Lineage.load(tmp_path / "run" / "model").entries[-1]
    record = entry["data"][0]
    assert (record["name"], record["rows"], record["tokens"]) == ("self", 8, 96)
    assert (entry["settings"]["self_rows"], entry["settings"]["attn_implementation"]) == (8, "eager")
    assert "template" not in entry["settings"]


def test_repaired_first(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    settings = {"repair": "linear", "calibration_samples": 8, "calibration_length": 16, "max_steps": 2}
    settings |= {"method": "last2", "features": 0}
    run(recipe, words(base, tmp_path / "run", **settings))
    prune, heal = Lineage.load(tmp_path / "run" / "model").entries
    assert prune["repair"]["changed_tensors"] == ["model.layers.2.mlp.down_proj.weight"]
    assert "model.layers.2.mlp.down_proj.weight" not in heal["changed_tensors"]
    ids = torch.randint(3, 100, (1, 9))
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter", **EAGER).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", **EAGER).eval()
    with torch.no_grad():
        assert torch.allclose(adapter(ids).logits, model(ids).logits, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "exaone"])
def test_repaired_modules_that_the_checkpoint_names_otherwise(
    recipe: ModuleType, base: Path, model_type: str, tmp_path: Path
) -> None:
    for made in (tiny_model(model_type), word_tokenizer()):
        made.save_pretrained(tmp_path / "base")
    shutil.copy(base.parent / "rows.jsonl", tmp_path)
    settings = {"repair": "refit", "calibration_samples": 8, "calibration_length": 16, "max_steps": 2, "features": 0}
    run(recipe, words(tmp_path / "base", tmp_path / "run", **settings))
    found = verify(VerifyRequest(str(tmp_path / "run" / "model"), accept_trained=True))
    assert found.good, [line.text for line in found.lines if not line.good]
    ids = torch.randint(3, 100, (1, 9))
    adapted = PeftModel.from_pretrained(load_base(tmp_path / "base"), tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        merged = load_base(tmp_path / "run" / "model").eval()(ids).logits
        assert torch.allclose(adapted(input_ids=ids).logits, merged, atol=1e-5)


def test_what_the_trainer_sets_in_the_config_of_experts_is_not_kept(
    recipe: ModuleType, base: Path, tmp_path: Path
) -> None:
    for made in (tiny_model("qwen3_moe"), word_tokenizer()):
        made.save_pretrained(tmp_path / "base")
    shutil.copy(base.parent / "rows.jsonl", tmp_path)
    run(recipe, words(tmp_path / "base", tmp_path / "run", method="full", loss="ce", features=0, max_steps=1))
    found = verify(VerifyRequest(str(tmp_path / "run" / "model"), accept_trained=True))
    assert found.good, [line.text for line in found.lines if not line.good]


def test_a_miss_of_what_is_required(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is complete, and the exit code says that it is not good enough."""
    settings = {
        "max_steps": 1,
        "eval_from": write_tasks(tmp_path / "tasks", 4),
        "eval_tasks": "asked",
        "eval_texts": "none",
    }
    arguments = words(base, tmp_path / "run", **settings, require="asked>=0, asked<0, mixed_ratio>=0.9")
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stopped.value.code == 2
    assert "mixed_ratio>=0.9 is required, but 'mixed' is neither" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments[:-1], "asked>=0, asked<0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stopped.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: asked<0 is missed: ")
    recorded = json.loads((tmp_path / "run" / "model" / "metrics.json").read_text())["requirements"]
    assert [one["met"] for one in recorded] == [True, False]


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": "true"}, "fp16=True needs a GPU, and training would run on the CPU; use fp16=False"),
        ({"drop_layers": "3-12"}, r"drop_layers has 8, but the model's layers are 0\.\.7"),
        ({"model_name_or_path": "/nowhere"}, "/nowhere does not exist"),
        ({"require": "kl<=1"}, "--require needs numbers; say what to measure: --eval_tasks"),
        ({"max_length": 2}, "none of the 32 training rows has a labelled token within max_length=2"),
    ],
)
def test_bad_settings(recipe: ModuleType, base: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerPruneError, match=message):
        run(recipe, words(base, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_target_that_can_not_be_met(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    arguments = words(base, tmp_path / "run", target_size="1kB")
    place = arguments.index("--drop_layers")
    with pytest.raises(LayerPruneError, match="target_size=1kB can't be met"):
        run(recipe, arguments[:place] + arguments[place + 2 :])
    assert not (tmp_path / "run").exists()


def test_rows_that_can_not_be_written(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("shape is invalid")

    monkeypatch.setattr("hf_layerprune.heal.self_data.RowWriter.generate_rows", fail)
    with pytest.raises(LayerPruneError, match="base can't write rows: shape is invalid"):
        run(recipe, words(base, tmp_path / "run", dataset_name="self", self_rows=4, self_length=12))


def test_output_of_another_run(recipe: ModuleType, base: Path, healed: tuple[Path, str]) -> None:
    with pytest.raises(CheckpointError, match="model exists already; choose another --output_dir, or remove it"):
        run(recipe, words(base, healed[0]))


def test_an_adapter_of_somebody_else_stays(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter exists already; choose another --output_dir, or remove it"):
        run(recipe, words(base, tmp_path / "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]


def test_what_a_library_raises_in_training_is_one_line(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"nope": 1}'}
    with pytest.raises(LayerPruneError, match=r"^can't train: .*nope; HF_LAYERPRUNE_DEBUG=1 shows") as caught:
        run(recipe, words(base, tmp_path / "run", **settings))
    assert "\n" not in str(caught.value)


def test_pruned_folder_of_another_cut(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    drop_layers(model, [5, 6])
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run" / "pruned")
    with pytest.raises(CheckpointError, match="holds a different cut"):
        run(recipe, words(base, tmp_path / "run"))


def test_settings_for_other_rows_may_stay_in_a_settings_file(
    recipe: ModuleType, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of `heal.yaml` and the paper, with other rows named beside them; and those of an evaluation and of a push."""
    caplog.set_level("INFO", "hf_layerprune")
    hub = {"hub_model_id": "me/small", "hub_private_repo": "true", "hub_strategy": "end"}
    evaluation = {"eval_steps": 5, "eval_packing": "false", "dataset_test_split": "other"}
    run(recipe, words(base, tmp_path / "run", max_steps=1, self_rows=3, template="alpaca", **hub, **evaluation))
    assert "without --push_to_hub, nothing is pushed to me/small" in caplog.text
    assert "--self_rows and --self_length have no effect without --dataset_name self" in caplog.text
    assert "rows.jsonl, whose rows are no instructions" in caplog.text


# --- files of settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_files_are_understood(recipe: ModuleType, path: Path) -> None:
    on_a_cpu = ["--use_cpu", "true", "--fp16", "false", "--bf16", "false"]
    script, training, model, data, cut, row, _ = recipe.make_parser().parse_args_and_config(
        ["--config", str(path), *on_a_cpu]
    )
    check_data(script, data, row, training)  # nothing in it would have no effect
    assert model.model_name_or_path
    assert training.output_dir == path.stem
    if path.stem.startswith("paper"):
        assert (training.learning_rate, training.num_train_epochs, row.template) == (1e-5, 2, "alpaca")
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
        assert (cut.drop, cut.criterion, training.loss) == (0.25, "reverse_order", "ce")
        assert data.datasets


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_engine_files_are_understood(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    # On a CPU the recipe decides, by what the CPU is fast in.
    assert load_config_from_file(str(path)).mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert yaml.safe_load(path.read_text())["num_machines"] == 1


def test_script_header_names_what_it_needs() -> None:
    import tomllib

    header = re.search(r"(?m)^# /// script\n((?:^#.*\n)+?)^# ///$", RECIPE.read_text())
    settings = tomllib.loads("\n".join(line.removeprefix("#").strip() for line in header[1].splitlines()))
    assert any(name.startswith("hf-layerprune[") and "train" in name for name in settings["dependencies"])
