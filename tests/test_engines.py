"""What `make engines` makes of an engine's answers; the engines themselves take half an hour."""

import re

import pytest
from transformers import AutoModelForCausalLM

from hf_layerprune.cli import main
from hf_layerprune.families import make_cut
from hf_layerprune.families.engines import COUNTED, misread
from hf_layerprune.layer_ranges import parse_layers

from .engines import asking, environments, models, page

REFERENCE = {"tokens": [5, 6, 7], "logprobs": [-1.0, -2.0, -3.0], "leads": [0.5, 0.001, 0.5]}
FAILED = {"error": "ValueError: no such architecture"}


def answer(tokens=(5, 6, 7), logprobs=(-1.0, -2.0, -3.0)):
    return {"tokens": list(tokens), "logprobs": list(logprobs)}


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        (answer(), True),
        (answer(logprobs=(-1.0, -2.001, -3.0)), True),
        (answer(logprobs=(-1.0, -2.1, -3.0)), False),
        (answer(tokens=(5, 9, 4), logprobs=(-1.0, -2.001, -8.0)), True),  # two tokens that are equally likely
        (answer(tokens=(9, 6, 7)), False),  # not these two
        (answer(tokens=(5, 6), logprobs=(-1.0, -2.0)), False),
        (FAILED, False),
    ],
)
def test_an_answer_fits_if_it_differs_by_rounding_alone(given, fits):
    assert asking.matches(REFERENCE, given) is fits


def test_an_engine_that_lacks_the_architecture_is_told_apart_from_a_wrong_cut():
    right, off = (REFERENCE, answer()), (REFERENCE, answer(logprobs=(-1.5, -2.0, -3.0)))
    assert asking.judge(right, None) == (asking.SAME, 0.0, "")
    assert asking.judge((REFERENCE, FAILED), (REFERENCE, FAILED)) == (asking.UNKNOWN, None, FAILED["error"])
    assert asking.judge(off, off)[0] == asking.UNKNOWN
    assert asking.judge((REFERENCE, FAILED), right) == (asking.WRONG, None, FAILED["error"])
    assert asking.judge(off, right) == (asking.WRONG, None, "off by 0.5 nats; the whole model is right")
    with pytest.raises(ValueError, match="the whole model must be asked too"):
        asking.judge(off, None)


def test_the_page_is_made_from_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.split(page.MARK)[1] == page.rendered(), "run `python -m tests.engines --page`"


def test_an_environment_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "HOME", tmp_path)
    monkeypatch.setattr(environments, "ENGINES", {"x": environments.Engine("x.py", npm=("x@1",))})
    (tmp_path / "x" / "bin").mkdir(parents=True)
    (tmp_path / "x" / "bin" / "python").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(environments.CannotBuild, match=r"^x: npm is not installed; install Node.js 20 or newer$"):
        environments.build("x")


def test_the_modelfile_of_the_page_is_one():
    # The grammar: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
    (block,) = re.findall(r"```dockerfile\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.S)
    lines = [line.split(maxsplit=1) for line in block.splitlines()]
    assert [words[0] for words in lines].count("FROM") == 1
    assert lines[0] == ["FROM", "./pruned.gguf"]
    kinds = {"temperature": float, "top_p": float, "top_k": int, "num_ctx": int, "stop": str, "seed": int}
    for instruction, rest in lines[1:]:
        assert instruction in ("PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
        if instruction == "PARAMETER":
            name, value = rest.split(maxsplit=1)
            kinds[name](value)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "smollm3"])
def test_a_cut_that_an_engine_would_misread_is_told(name):
    tried = models.FAMILIES[name]
    config = models.tiny(name)
    period = COUNTED[config.model_type].period
    out_of_step = misread(config, make_cut(config, parse_layers(tried.drop)))
    assert f"every {period} layers of a {config.model_type} count as a group" in out_of_step
    assert misread(config, make_cut(config, range(period))) is None
    assert misread(config, make_cut(config, [tried.layers - 1])) is None


def test_the_warning_reaches_who_prunes(tmp_path, caplog):
    config = models.tiny("gpt_oss")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2-4"]) == 0
    assert "in vLLM, llama.cpp and ONNX Runtime, every 2 layers of a gpt_oss count as a group" in caplog.text
    caplog.clear()
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "whole"), "--drop-layers", "2-3"]) == 0
    assert "count as a group" not in caplog.text
