"""What `make engines` makes of an engine's answers; the engines themselves take half an hour."""

import re

import pytest
from transformers import AutoModelForCausalLM

from hf_layerprune.cli import main
from hf_layerprune.cut.gguf.modelfile import make_modelfile
from hf_layerprune.families import make_cut
from hf_layerprune.families.engines import PERIOD_RULES, describe_misread_layers
from hf_layerprune.layer_ranges import parse_layers
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.lineage import Lineage

from .engines import asking, environments, models, page
from .gguf_makers import all_of, make_gguf, number, smollm2

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
    assert asking.judge((REFERENCE, FAILED), (REFERENCE, FAILED)) == (asking.UNSUPPORTED, None, FAILED["error"])
    assert asking.judge(off, off)[0] == asking.UNSUPPORTED
    assert asking.judge((REFERENCE, FAILED), right) == (asking.WRONG, None, FAILED["error"])
    assert asking.judge(off, right) == (asking.WRONG, None, "off by 0.5 nats; the uncut model is right")
    with pytest.raises(ValueError, match="the uncut model must be asked too"):
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


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile, by its grammar: https://github.com/ollama/ollama/blob/main/docs/modelfile.md"""
    kinds = {"temperature": float, "top_p": float, "top_k": int, "num_ctx": int, "stop": str, "seed": int}
    found = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        instruction, rest = line.split(maxsplit=1)
        assert instruction in ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE")
        if instruction == "PARAMETER":
            instruction, rest = rest.split(maxsplit=1)
            kinds[instruction](rest)
        assert rest.count('"') == 0 or re.fullmatch(r'"[^"]*"', rest), "text after a closing quote"
        found.append((instruction, rest.strip('"')))
    assert [name for name, _ in found].count("FROM") == 1
    return found


def test_the_modelfile_of_the_page_is_the_one_that_is_written(tmp_path, caplog):
    (block,) = re.findall(r"```dockerfile\n(.*?)```", page.PAGE.read_text(encoding="utf-8"), re.S)
    assert parse_modelfile(block) == [("FROM", "./pruned.gguf"), ("stop", "<|im_end|>")]
    words = ["prune", str(smollm2()), str(tmp_path / "pruned.gguf"), "--drop-layers", "12-18"]
    assert main(words) == 0
    written = tmp_path / "pruned.Modelfile"
    assert written.read_text() == block
    written.write_text("FROM ./pruned.gguf\nSYSTEM mine\n")
    assert main([*words, "--force"]) == 0
    assert written.read_text() == "FROM ./pruned.gguf\nSYSTEM mine\n", "it may have been edited"


@pytest.mark.parametrize("end", ['a"b', "a\nb", "", "\u202e"])
def test_a_modelfile_names_no_token_that_would_break_it(tmp_path, end):
    add = all_of(
        lambda writer: writer.add_chat_template("{{ messages }}"),
        lambda writer: writer.add_token_list(["x", end, "<end>"]),
        number("tokenizer.ggml.eos_token_id", 1),
        number("tokenizer.ggml.eot_token_id", 2),
        number("tokenizer.ggml.eom_token_id", 99),
    )
    make_gguf(tmp_path / "a b.gguf", more=add)
    assert parse_modelfile(make_modelfile(tmp_path / "a b.gguf")) == [("FROM", "./a b.gguf"), ("stop", "<end>")]


def test_a_file_without_a_chat_gets_no_modelfile(tmp_path):
    make_gguf(tmp_path / "base.gguf")
    assert main(["prune", str(tmp_path / "base.gguf"), str(tmp_path / "cut.gguf"), "--drop-layers", "2"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "cut.gguf"]


@pytest.mark.parametrize("base", ["folder", "org/model"])
def test_a_gguf_file_out_of_a_folder_is_told_in_one_line(tmp_path, monkeypatch, capsys, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert main(["prune", base, "out/small.gguf", "--drop-layers", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{base} is not a GGUF file, so out/small.gguf takes two steps: prune into the folder small" in line
    assert "python convert_hf_to_gguf.py small --outfile out/small.gguf" in line
    assert main(["prune", "none.gguf", "small.gguf", "--drop-layers", "2"]) == 1
    assert "none.gguf does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "smollm3"])
def test_a_cut_that_an_engine_would_misread_is_told(name):
    tried = models.FAMILIES[name]
    config = models.tiny(name)
    period = PERIOD_RULES[config.model_type].period
    out_of_step = describe_misread_layers(config, make_cut(config, parse_layers(tried.drop)).keep)
    assert f"every {period} layers of a {config.model_type} count as a group" in out_of_step
    assert describe_misread_layers(config, make_cut(config, range(period)).keep) is None
    assert describe_misread_layers(config, make_cut(config, [tried.layers - 1]).keep) is None


def test_the_warning_reaches_who_prunes_inspects_and_reads_the_card(tmp_path, caplog, capsys):
    config = models.tiny("gpt_oss")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2-4"]) == 0
    assert "in vLLM, llama.cpp and ONNX Runtime, every 2 layers of a gpt_oss count as a group" in caplog.text
    told = "and layer 5, now 2, would run as the other kind"
    assert told in Card.from_records(Lineage.load(tmp_path / "cut")).body()
    assert main(["inspect", str(tmp_path / "cut")]) == 0
    assert (
        "count as a group, whatever layer_types says, and layer 2 would run as the other kind"
        in capsys.readouterr().out
    )
    assert main(["inspect", str(tmp_path / "base")]) == 0
    assert "count as a group, whatever layer_types says; to serve the model there, drop" in capsys.readouterr().out
    caplog.clear()
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "whole"), "--drop-layers", "2-3"]) == 0
    assert "count as a group" not in caplog.text
    assert "other kind" not in Card.from_records(Lineage.load(tmp_path / "whole")).body()
    # A second cut that brings the layers back into step is told as it is.
    assert main(["prune", str(tmp_path / "cut"), str(tmp_path / "again"), "--drop-layers", "2"]) == 0
    assert "other kind" not in Card.from_records(Lineage.load(tmp_path / "again")).body()
