"""`hf-layerprune eval`: its numbers are the harness's and the textbook's, and belong to the weights beside them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import write_task
from hf_layerprune import CheckpointError, CutError, LayerPruneError
from hf_layerprune.adapter.loading import load_model, load_tokenizer
from hf_layerprune.cli import main
from hf_layerprune.measure.evaluate import EvalRequest, check_request
from hf_layerprune.measure.harness import Harness
from hf_layerprune.measure.subject import identify
from hf_layerprune.measure.tasks import load_tasks, read_task
from hf_layerprune.records.figures.results import build_results
from hf_layerprune.records.fingerprints import fingerprint, weights_hash
from hf_layerprune.records.metrics import Metrics

from .heal_makers import word_tokenizer
from .measure_models import NAMES, find, measure, write_gguf, write_model
from .tiny_models import tiny_model

# --- the numbers are right ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(base: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness's own command line gives, with the same files."""
    folder = tmp_path_factory.mktemp("harness")
    for path in tasks.glob("*.jsonl"):
        write_task(read_task(path), folder)
    words = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={base}", "--include_path", str(folder)]
    words += ["--tasks", ",".join(NAMES), "--batch_size", "1", "--device", "cpu", "--limit", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, "--output_path", str(folder / "out")])
        command = HarnessCLI()
        command.execute(command.parse_args())
    (found,) = (folder / "out").rglob("results*.json")
    return json.loads(found.read_text())["results"]


def test_numbers_are_those_of_the_harness_own_command(
    base: Path, tasks: Path, printed: dict[str, Any], tmp_path: Path
) -> None:
    """To the last digit, for three tasks."""
    found = measure(base, tasks, tasks=NAMES, texts=(), limit=20, batch_size=1, output=tmp_path / "metrics.json")
    weights = found.weights
    for task in NAMES:
        for metric in ("acc", "acc_norm"):
            record = find(found, weights, metric, task)
            assert record["value"] == printed[task][f"{metric},none"]
            assert record["stderr"] == printed[task][f"{metric}_stderr,none"]
            assert record["samples"] == printed[task]["sample_len"] == 20


def test_perplexity_is_the_textbooks(base: Path, tasks: Path, tmp_path: Path) -> None:
    found = measure(base, tasks, tasks=(), output=tmp_path / "metrics.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), load_tokenizer(base)
    ids = tokenizer((tasks / "words.txt").read_text(), return_tensors="pt").input_ids[0]
    losses = []
    with torch.no_grad():
        for i in range(8):
            window = ids[None, 64 * i : 64 * (i + 1)]
            losses.append(model(window, labels=window).loss.item())
    record = find(found, found.weights, "perplexity", "words")
    assert record["value"] == pytest.approx(math.exp(sum(losses) / 8), rel=1e-6)
    assert record["samples"] == 8 * 63
    assert record["settings"] == {"length": 64, "windows": 8, "starts_with_bos": False}


def test_beside_the_dense_model(base: Path, cut: Path, tasks: Path) -> None:
    found = measure(cut, tasks, base=str(base))
    ours, dense = found.weights, weights_hash(fingerprint(base))
    assert {one["role"] for one in found.models.values()} == {"cut", "dense"}
    assert found.models[ours]["layers"] == 6
    assert found.models[dense]["layers"] == 8
    for task, chance in (("asked", 0.25), ("begun", 0.5)):
        mine, theirs = find(found, ours, "acc", task), find(found, dense, "acc", task)
        assert mine["chance"] == theirs["chance"] == chance
        (compared,) = (one for one in found.comparisons if (one.get("task"), one["metric"]) == (task, "acc"))
        assert compared["difference"] == pytest.approx(mine["value"] - theirs["value"])
        assert compared["test"] == "mcnemar_exact"
        assert compared["samples"] == mine["samples"] == 24
        assert 0 <= compared["p_value"] <= 1
    assert 0.25 < find(found, ours, "acc", "mixed")["chance"] < 0.5
    kl, nll = find(found, ours, "kl", "words"), find(found, ours, "nll", "words")
    assert kl["value"] > 0
    assert kl["kind"] == "distance"
    assert 0 < find(found, ours, "top1_agreement", "words")["value"] < 1
    (compared,) = (one for one in found.comparisons if one["metric"] == "nll")
    assert compared["difference"] == pytest.approx(nll["value"] - find(found, dense, "nll", "words")["value"])
    assert compared["test"] == "paired_t"
    assert find(found, dense, "kl", "words") is None
    # The file says the same, and every number says how it came about.
    assert Metrics.load(cut) == found
    for record in found.results:
        assert {"value", "samples", "dataset", "dtype", "device", "date", "versions", "seconds"} <= record.keys()
        assert record["versions"]["lm-eval"]
    for record in (one for one in found.results if one["kind"] == "accuracy"):
        assert {"stderr", "shots", "seed", "task_version"} <= record.keys()


def test_the_paired_difference_is_over_the_same_questions(base: Path, cut: Path, tasks: Path) -> None:
    """Held against the harness's own log of each question."""
    found = measure(cut, tasks, base=str(base), tasks=("asked",), texts=())
    right = []
    asked = load_tasks(["asked"], tasks)["asked"]
    for folder in (cut, base):
        harness = Harness(load_model(folder), load_tokenizer(folder), 8)
        right.append(list(harness.run("asked", asked).scores["acc"].outcomes.values()))
    (compared,) = (one for one in found.comparisons if one["metric"] == "acc")
    differences = [a - b for a, b in zip(*right, strict=True)]
    assert compared["difference"] == pytest.approx(sum(differences) / 24)
    assert compared["stderr"] == pytest.approx(stats.sem(differences))
    gained, lost = differences.count(1), differences.count(-1)
    assert gained + lost > 0
    assert compared["p_value"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)


# --- what can be measured -----------------------------------------------------------------------------------


def test_an_adapter(base: Path, tasks: Path, tmp_path: Path) -> None:
    """One of ours and one of another method; its numbers are those of the merged model."""
    ours = tmp_path / "ours"
    words = ["--drop-layers", "6-7", "--adapter", "--no-tune-lm-head"]
    assert main(["prune", str(base), str(ours), *words]) == 0
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.05 if parameter.requires_grad else 0)
    lora.save_pretrained(tmp_path / "lora")
    for folder, layers in ((ours, 6), (tmp_path / "lora", 8)):
        load_model(folder).save_pretrained(tmp_path / "merged")
        shutil.copy(base / "tokenizer.json", tmp_path / "merged")
        shutil.copy(base / "tokenizer_config.json", tmp_path / "merged")
        output = tmp_path / f"{folder.name}.json"
        merged = measure(tmp_path / "merged", tasks, tasks=("asked",), output=tmp_path / "merged.json", force=True)
        found = measure(folder, tasks, tasks=("asked",), output=output)
        assert found.models[found.weights]["layers"] == layers
        assert [one["value"] for one in found.results] == [one["value"] for one in merged.results]
        shutil.rmtree(tmp_path / "merged")
    assert identify(ours).role == "cut"


def test_a_gguf_file(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, when its numbers are only shown; and as the base of what was cut from it."""
    path = write_gguf(tmp_path / "tiny.gguf")
    if Version(transformers.__version__) < Version("5.23"):
        try:
            AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        except Exception as error:
            pytest.skip(f"this transformers can't make the tokenizer in the file: {error}")
    words = ["--tasks-from", str(tasks), "--tasks", "asked", "--text", "none", "--limit", "8", "--quiet"]
    assert main(["eval", str(path), *words]) == 0
    assert capsys.readouterr().out.startswith("model:    tiny.gguf, 4 layers")
    assert sorted(tmp_path.iterdir()) == [path]
    assert main(["prune", str(path), str(tmp_path / "cut"), "--drop-layers", "1"]) == 0
    assert main(["eval", str(tmp_path / "cut"), "--base", str(path), *words]) == 0
    found = Metrics.load(tmp_path / "cut")
    dense = weights_hash(fingerprint(path))
    assert found.models[dense] | {"parameters": 0} == {
        "role": "dense", "name": "tiny.gguf", "layers": 4, "parameters": 0, "identity": {},
    }  # fmt: skip
    assert find(found, dense, "acc", "asked")["dtype"] == "bfloat16"
    # The same as the model that it unpacks to.
    model, tokenizer = load_model(path, dtype=torch.bfloat16), load_tokenizer(path)
    asked = load_tasks(["asked"], tasks)["asked"]
    run = Harness(model, tokenizer, "auto").run("asked", asked, limit=8)
    assert run.scores["acc"].value == find(found, dense, "acc", "asked")["value"]


# --- going on, and going wrong ------------------------------------------------------------------------------


def test_no_question_is_asked_twice(base: Path, cut: Path, tasks: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    answers.write_text("a file")
    with pytest.raises(CutError, match="answers is a file; specify a folder"):
        measure(cut, tasks, base=str(base), texts=(), answers=answers)
    answers.unlink()
    first = measure(cut, tasks, base=str(base), texts=(), answers=answers)
    files = sorted(answers.iterdir())
    assert len(files) == 6
    stamps = [path.stat().st_mtime_ns for path in files]
    (cut / "metrics.json").unlink()
    again = measure(cut, tasks, base=str(base), texts=(), answers=answers)
    strip = [{name: value for name, value in one.items() if name != "date"} for one in again.comparisons]
    assert strip == [{name: value for name, value in one.items() if name != "date"} for one in first.comparisons]
    assert [path.stat().st_mtime_ns for path in sorted(answers.iterdir())] == stamps
    measure(cut, tasks, texts=(), answers=answers, limit=3)
    assert len(list(answers.iterdir())) == 9
    files[0].write_text("{")
    measure(cut, tasks, base=str(base), texts=(), answers=answers)
    assert json.loads(files[0].read_text())["samples"] == 24


def test_batches_halve_where_memory_ends(
    base: Path, tasks: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that asks for more memory than there is, for more than two texts at once, with the allocator's error."""
    model = load_model(base)
    sizes = []

    def forget(module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        sizes.append(len(ids))
        if len(ids) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)

    asked = load_tasks(["asked"], tasks)["asked"]
    plain = Harness(model, load_tokenizer(base), 2).run("asked", asked)
    model.register_forward_pre_hook(forget, with_kwargs=True)
    harness = Harness(model, load_tokenizer(base), 8)
    halved = harness.run("asked", asked)
    assert harness.batch_size == 2
    assert sizes[:3] == [8, 4, 2]
    assert "continuing with batches of 4" in caplog.text
    assert halved.scores == plain.scores
    model.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(LayerPruneError, match="out of memory with a single question"):
        harness.run("asked", asked)


def test_a_model_without_a_tokenizer(base: Path, tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, folder)
    with pytest.raises(CheckpointError, match=r"has no tokenizer that can be loaded: .*; copy the tokenizer files"):
        measure(folder, tasks)


def test_a_model_that_needs_its_own_code(base: Path, tasks: Path, tmp_path: Path) -> None:
    """Its tokenizer can't be loaded either, but that is not what is wrong."""
    folder = Path(shutil.copytree(base, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(CheckpointError, match=r"needs code of its own \(auto_map in its config"):
        measure(folder, tasks)


def test_another_vocabulary(base: Path, tasks: Path, tmp_path: Path) -> None:
    """Refused before a weight is read; without texts, answers can still be compared."""
    wide = write_model(tmp_path / "wide", vocabulary=300)
    more = {"base": str(base), "output": tmp_path / "metrics.json"}
    with pytest.raises(LayerPruneError, match="wide has a vocabulary of 300 tokens and base one of 259"):
        measure(wide, tasks, **more)
    assert measure(wide, tasks, tasks=("asked",), texts=(), **more).comparisons
    bos = write_model(tmp_path / "bos", bos=True, seed=2)
    with pytest.raises(LayerPruneError, match="split the text into different tokens"):
        measure(bos, tasks, base=str(base), output=tmp_path / "bos.json")
    small = write_model(tmp_path / "small", vocabulary=90)
    with pytest.raises(LayerPruneError, match="use the model's own tokenizer"):
        measure(small, tasks, output=tmp_path / "small.json")


@pytest.mark.parametrize("scale", [50, 1e5])
def test_ruined_models_are_recorded(
    base: Path, tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float
) -> None:
    """A perplexity beyond all numbers, or those that metrics.json takes, is left out; what can be said of it is not."""
    ruined = Path(shutil.copytree(base, tmp_path / "ruined"))
    model = AutoModelForCausalLM.from_pretrained(ruined)
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    model.save_pretrained(ruined)
    found = measure(ruined, tasks, base=str(base), tasks=(), output=tmp_path / "metrics.json")
    assert find(found, found.weights, "perplexity", "words") is None
    assert find(found, found.weights, "nll", "words")["value"] > min(scale, 700)
    assert "perplexity on words is inf and is not recorded" in caplog.text
    assert any(one["metric"] == "nll" for one in found.comparisons)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tasks", "askd"], 2, "did you mean asked"),
        (["--tasks", "none", "--text", "none"], 2, "nothing to measure"),
        (["--tasks", "none", "--text", "missing.txt"], 2, "text missing.txt is not a file"),
        (["--tasks", "asked", "--num-fewshot", "24", "--answers", "no"], 1, "use fewer few-shot examples"),
        (
            ["--tasks", "none", "--limit", "3", "--batch-size", "2"],
            2,
            "--limit 3 and --batch-size 2 have no effect without tasks",
        ),
        (["--text", "none", "--length", "32"], 2, "--length 32 has no effect without texts"),
        (["--length", "513"], 2, "--length 513 is more than the 512 positions"),
        (["--device", "gpu"], 2, "'gpu' is not a device"),
        (["--device", "cuda:7"], 2, "'cuda:7' is not a device"),
        (["--output", "nowhere/metrics.json"], 1, "nowhere does not exist"),
        (["--output", "."], 1, ". is a link, a folder or a device; specify another file"),
        (["--tasks-from", "nowhere"], 1, "nowhere is not a folder"),
        (["--base", "./nowhere"], 1, "nowhere does not exist"),
        (["--base", "org/nowhere"], 1, "org/nowhere"),
    ],
)
def test_bad_words(
    base: Path, tasks: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(base), "--quiet", "--tasks-from", str(tasks), *words]
    assert main(command) == code
    assert message in capsys.readouterr().err
    assert not (base / "metrics.json").exists()


def test_two_texts_of_one_name(tmp_path: Path) -> None:
    """The numbers of the second would replace those of the first."""
    texts = [tmp_path / folder / "notes.txt" for folder in ("a", "b")]
    for text in texts:
        text.parent.mkdir()
        text.write_text("Some text.")
    with pytest.raises(CutError, match=r"two texts are called notes, the second of them .*b/notes.txt; rename one"):
        check_request(EvalRequest("model", tasks=(), texts=tuple(map(str, texts))))


def test_the_table(base: Path, cut: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks-from", str(tasks), "--length", "64", "--windows", "4", "--limit", "12", "--quiet"]
    assert main(["eval", str(cut), "--base", str(base), *words]) == 0
    out, err = capsys.readouterr()
    assert not err  # no progress bars of the harness
    assert out.splitlines()[0].startswith("dense:    base, 8 layers")
    assert out.splitlines()[1].startswith("cut:      cut, 6 layers")
    rows = {tuple(line.split()[:2]): line for line in out.splitlines()[3:] if line}
    assert ("asked", "acc") in rows
    assert rows["asked", "acc"].count("±") == 3
    assert "kl" in rows["words", "kl"]
    assert "McNemar" in out
    assert max(map(len, out.split("\n\n")[1].splitlines())) < 140


def test_a_row_in_two_types_is_like_the_others_until_a_model_is_measured_in_another(
    base: Path, tasks: Path, tmp_path: Path
) -> None:
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "3", "--dtype", "float16"]) == 0

    def labels(**more: Any) -> dict[str, set[str]]:
        found = measure(tmp_path / "cut", None, base=str(base), texts=(str(tasks / "words.txt"),), **more)
        rows = [row for row in build_results(found).rows if row.key[1] == "words"]
        return {metric: {row.qualifier for row in rows if row.key[2] == metric} for metric in ("perplexity", "kl")}

    assert labels() == {"perplexity": {""}, "kl": {""}}
    assert labels(dtype="bfloat16", windows=4) == {
        "perplexity": {"float32 and float16, 8 windows", "bfloat16, 4 windows"},
        "kl": {"float16, 8 windows", "bfloat16, 4 windows"},
    }


@pytest.mark.parametrize("model_type", ["bart", "voxtral"])
def test_a_decoder_whose_type_has_an_encoder_too_is_scored_as_a_decoder(model_type: str) -> None:
    """The harness by itself would give it the question and the answer as two sequences."""
    model, tokenizer = tiny_model(model_type), word_tokenizer()
    question, answer = "w5 w6 w7", " w8 w9 w10"
    asked = Instance(request_type="loglikelihood", doc={}, arguments=(question, answer), idx=0)
    ((score, _),) = Harness(model, tokenizer, 1).loglikelihood([asked], disable_tqdm=True)
    ids = tokenizer(question + answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, 2:-1].log_softmax(-1)
    assert score == pytest.approx(logits.gather(1, ids[0, 3:, None]).sum().item(), rel=1e-4)
