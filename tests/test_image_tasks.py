"""Tasks about images run by lm-evaluation-harness's `hf-multimodal`, or are refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image

from hf_layerprune import CheckpointError, LayerPruneError
from hf_layerprune.cli import main
from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from hf_layerprune.measure.harness import ImageHarness, prompts_hash
from hf_layerprune.measure.tasks import load_tasks, task_dataset
from hf_layerprune.runtime.loading import load_base, load_processor

from .measure_models import write_model
from .multimodal_makers import half_a_jpeg, lay_postscript, noise, write_llava

LENGTH = 32  # of an answer, as the harness is told


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("image-tasks") / "base")


@pytest.fixture(scope="module")
def cut(base: Path) -> Path:
    folder = base.parent / "cut"
    assert main(["prune", str(base), str(folder), "--drop-layers", "3-4"]) == 0
    return folder


def answers(folder: Path, query: str, seeds: list[int]) -> list[str]:
    """What a model answers, by transformers alone."""
    from transformers import AutoModelForImageTextToText

    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), load_processor(folder)
    said = []
    for seed in seeds:
        asked = processor(text=f"<image>\n{query}", images=noise(seed), return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**asked, max_new_tokens=LENGTH, do_sample=False)
        text = processor.tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append(text.split(processor.tokenizer.eos_token)[0])  # the harness stops there, if only by its spelling
    return said


def write_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "pictures").mkdir(parents=True)
    for seed in range(4):
        noise(seed).save(folder / "pictures" / f"{seed}.png")
    (folder / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def question(seed: int, answer: str, **more: Any) -> dict[str, Any]:
    return {"query": "w5 w6", "answer": answer, "image": f"pictures/{seed}.png"} | more


def test_answers_are_those_of_the_models(base: Path, cut: Path, tmp_path: Path) -> None:
    """Of four questions, the dense model is right about three by construction, and the cut one about the fourth."""
    dense, pruned = answers(base, "w5 w6", [0, 1, 2, 3]), answers(cut, "w5 w6", [0, 1, 2, 3])
    assert len(set(dense)) > 1  # the image matters
    assert dense[3] != pruned[3]
    assert all(answer.strip() for answer in (*dense[:3], pruned[3]))
    right = [*(answer.upper() for answer in dense[:3]), pruned[3]]
    folder = write_task(tmp_path / "tasks", [question(seed, answer) for seed, answer in enumerate(right)])
    request = EvalRequest(str(cut), base=str(base), tasks_from=folder, answers=tmp_path / "kept", batch_size=2)
    metrics = evaluate(request)
    values = {metrics.models[one["weights"]]["role"]: one["value"] for one in metrics.results}
    same = sum(mine == theirs for mine, theirs in zip(pruned[:3], dense[:3], strict=True))
    assert values == {"dense": 0.75, "cut": (same + 1) / 4}
    (difference,) = metrics.comparisons
    assert difference["metric"] == "exact_match"
    assert difference["difference"] == pytest.approx(values["cut"] - values["dense"])
    kept = sorted((tmp_path / "kept").rglob("*.json"))
    before = [path.stat().st_mtime_ns for path in kept]
    evaluate(request)  # from the answers that were kept
    assert sorted((tmp_path / "kept").rglob("*.json")) == kept
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_another_picture_is_another_question(tmp_path: Path) -> None:
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = write_task(tmp_path / name, [question(0, "w7")])
        noise(seed).save(folder / "pictures" / "0.png")
        found = load_tasks(None, folder)
        seen = found["seen"]
        hashes.append(task_dataset(seen))
        assert prompts_hash("seen", seen, None, None) == prompts_hash("seen", seen, None, None)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_text_model_is_not_asked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and before anything is loaded; also where only the base reads no images."""
    folder, text = write_task(tmp_path / "tasks", [question(0, "w7")]), write_model(tmp_path / "text")
    monkeypatch.setattr("hf_layerprune.measure.subject.load_model", None)
    assert main(["eval", str(text), "--tasks-from", str(folder)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "task seen asks about images, and text is a llama model that reads none; omit the task" in line
    with pytest.raises(LayerPruneError, match="text is a llama model that reads none"):
        evaluate(EvalRequest(str(base), base=str(text), tasks_from=folder, output=tmp_path / "numbers.json"))
    with pytest.raises(LayerPruneError, match="but its few-shot examples have none; omit num_fewshot"):
        evaluate(EvalRequest(str(base), tasks_from=folder, num_fewshot=2))


def test_places_are_the_processors(base: Path) -> None:
    """Gemma 3's processor looks for a token that its config does not name, and puts that of its config in its place."""
    model, processor = load_base(base), load_processor(base)
    model.config.image_token_id = 5
    assert ImageHarness(model, processor, 1).image_token == processor.image_token == "<image>"


def test_without_a_processor(base: Path, tmp_path: Path) -> None:
    import shutil

    folder = write_task(tmp_path / "tasks", [question(0, "w7")])
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no processor"):
        evaluate(EvalRequest(str(bare), tasks_from=folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (question(0, "w7") | {"answer": 3}, "at answer: a text that is not empty"),
        ({"query": "w5", "choices": ["a", "b"], "gold": 0, "image": "pictures/0.png"}, "a question about an image is"),
        (question(9, "w7"), "9.png, which is not a file"),
        (question(0, "w7", image=7), "image is the path of an image"),
        (question(0, "w7", images=[]), "image is the path of an image"),
        (question(0, "w7", query="<image> and <image>"), "2 places for 1 image$"),
        (question(0, "w7", query=" "), "at query: a text that is not empty"),
        (question(0, "w7", image="seen.jsonl"), "can't be read"),
        (question(0, "w7", image="pictures/half.jpg"), "half.jpg can't be read: image file is truncated"),
        ({"query": "w5", "answer": "w6"}, "into files of their own"),
    ],
)
def test_bad_questions(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = write_task(tmp_path / "tasks", [question(0, "w7"), row])
    half_a_jpeg(folder / "pictures" / "half.jpg")
    with pytest.raises(LayerPruneError, match=message) as caught:
        load_tasks(None, folder)
    assert "line 2" in str(caught.value)


def test_images_of_questions_that_are_not_asked_are_not_read(cut: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", [question(seed, "w7") for seed in (0, 1, 2, 9)])
    (folder / "pictures" / "2.png").write_bytes(b"")
    evaluate(EvalRequest(str(cut), tasks_from=folder, limit=2, output=tmp_path / "numbers.json"))
    two = task_dataset(load_tasks(None, folder, 2)["seen"])
    noise(3).save(folder / "pictures" / "1.png")
    assert task_dataset(load_tasks(None, folder, 2)["seen"]) != two
    with pytest.raises(LayerPruneError, match="line 3"):
        load_tasks(None, folder, 3)


def test_questions_with_and_without_images_are_not_mixed(tmp_path: Path) -> None:
    plain = {"query": "w5", "choices": ["a", "b"], "gold": 0}
    folder = write_task(tmp_path / "tasks", [plain, question(0, "w7")])
    with pytest.raises(LayerPruneError, match="into files of their own"):
        load_tasks(None, folder)


def test_no_image_of_the_data_of_a_task_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own tasks decode their images as data sets do, whatever the first task is about."""
    ran = lay_postscript(tmp_path / "0.png", tmp_path, monkeypatch)
    load_tasks(None, write_task(tmp_path / "tasks", [{"query": "w5", "choices": ["a", "b"], "gold": 0}]))
    data = Dataset.from_dict({"image": [str(tmp_path / "0.png")]}, Features({"image": Image()}))
    with pytest.raises(OSError, match="it is PostScript"):
        data[0]
    assert not ran.exists()
