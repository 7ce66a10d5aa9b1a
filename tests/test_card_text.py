"""The card as text: one whole card, its YAML read back, what is left out, and values that try to break out."""

from __future__ import annotations

import json
import re
import shlex
from copy import deepcopy
from html import unescape
from importlib.resources import files
from typing import Any

import jinja2
import pytest
import yaml
from markdown_it import MarkdownIt

from hf_layerprune.cli import build_parser
from hf_layerprune.layer_ranges import describe_layers
from hf_layerprune.measure.paired import compare_pairs
from hf_layerprune.measure.report import report
from hf_layerprune.options import options_from_args
from hf_layerprune.publish.card import metadata, regions, render, tables
from hf_layerprune.publish.card.commands import list_commands
from hf_layerprune.publish.card.escape import code_span, escape_text
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.declared import split_front_matter
from hf_layerprune.records.figures.metric_names import METRICS, Metric
from hf_layerprune.records.figures.numbers import MINUS, TIMES
from hf_layerprune.records.history import Stage, read_history
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics
from hf_layerprune.records.requirements import parse_bounds
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.select.registry import CRITERIA
from hf_layerprune.stages.requests import PruneRequest

from .publish_records import BASE, EXPECTED, ROLES, example_card, lineage_of, metrics_of

NBSP = "\u00a0"
SECTIONS = ["summary", "results", "speed", "use", "recipe", "training", "limits", "provenance", "licence", "citation"]


def html(card: str) -> str:
    """The card as a page shows it."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return markdown.render(split_front_matter(card)[1])


def sections(card: str) -> list[str]:
    return [part.region for part in regions.parse(split_front_matter(card)[1]) if part.region]


def test_a_whole_card() -> None:
    """Word for word; `python -m tests.publish_records --write` takes over what was changed on purpose."""
    assert example_card().render() == EXPECTED.read_text()


def test_the_hub_client_reads_the_yaml() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(EXPECTED.read_text()).data
    assert (data.base_model, data.base_model_relation) == (BASE, "finetune")
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.language == ["en"]
    assert data.datasets == ["allenai/c4"]
    assert data.tags == ["layer-pruning", "depth-pruning", "hf_layerprune", "conversational"]
    lineage = lineage_of()
    own = [one for one in metrics_of(lineage).results if one["weights"] == "d" * 64]
    assert len(own) == 11
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        (one["metric"], one["value"]) for one in own
    ]
    by_task = {(one.dataset_type, one.metric_type): one for one in data.eval_results}
    assert by_task["piqa", "acc_norm"].dataset_name == "PIQA"
    assert by_task["piqa", "acc_norm"].metric_args == {
        "stderr": 0.0339, "samples": 200, "device": "cpu", "dtype": "bfloat16",
    }  # fmt: skip
    # It survives a round trip through the client, as model.push_to_hub does it.
    assert ModelCard(str(ModelCard(EXPECTED.read_text()))).data.to_dict() == data.to_dict()


@pytest.mark.parametrize("roles", [("dense", "cut"), ("dense", "cut", "repaired"), ("cut",)])
def test_only_what_was_measured(roles: tuple[str, ...]) -> None:
    lineage = lineage_of(roles)
    text = Card.from_records(lineage, metrics_of(lineage, roles)).render()
    (head,) = {line for line in text.splitlines() if line.startswith("| ") and "chance | n |" in line}
    shown = [cell.strip().removesuffix("<br><sub>this\u00a0model</sub>") for cell in head.strip("|").split("|")]
    assert shown == ["", *roles, "chance", "n"]
    assert "this\u00a0model" in head
    assert not re.search(r"N/A|\bNone\b|\bnan\b|\binf\b", text)
    if len(roles) == 1:
        assert "assets/accuracy.png" not in text
        assert "dense model" not in text.partition("## Limits")[0]
        assert "Its base was not measured" in text


def test_a_card_without_numbers_says_so() -> None:
    text = Card.from_records(lineage_of(("dense", "cut"))).render()
    assert sections(text) == [name for name in SECTIONS if name not in ("results", "speed", "training")]
    assert "This model has not been measured" in text
    assert "metrics.json" not in text
    assert "model-index" not in text
    assert "in the tables above" not in text
    assert "every remaining tensor is the base's own, bit for bit" in text


@pytest.mark.parametrize(("roles", "said", "unsaid"), [
    (("cut",), ["plain cut", "bit for bit; nothing was trained"], ["repaired", "quantised"]),
    (("cut", "repaired"), ["The cut was repaired with", "; nothing was trained"], ["plain cut", "then trained"]),
    (("cut", "healed"), ["The model was then trained"], ["plain cut", "repaired", "nothing was trained"]),
    (("cut", "repaired", "healed"), ["repaired with", "and the model was then trained"], ["nothing was trained"]),
])  # fmt: skip
def test_the_summary_says_what_was_done(roles: tuple[str, ...], said: list[str], unsaid: list[str]) -> None:
    summary = Card.from_records(lineage_of(roles)).render().partition("## Use it")[0]
    assert all(words in summary for words in said)
    assert not any(words in summary for words in unsaid)


@pytest.mark.parametrize(("base", "said", "unsaid", "fields"), [
    ({"license": None}, ["The licence is unknown"], ["keeps the base's licence", "In short"], {}),
    ({"license": "other", "license_name": "Mine", "license_link": "https://huggingface.co/l"},
     ["licence: [Mine](https://huggingface.co/l)", "not listed here; read it"], ["is unknown", "In short"],
     {"license": "other", "license_name": "Mine", "license_link": "https://huggingface.co/l"}),
    ({"license": "cc0-1.0"}, ["keeps the base's licence"], ["In short", "not listed", "Built"], {"license": "cc0-1.0"}),
    ({"license": "llama3.1"}, ["In short", "- Begin the model's name with “Llama”.", "\n**Built with Llama**\n"],
     ["is unknown", "not listed"], {"license": "llama3.1"}),
])  # fmt: skip
def test_the_licence_says_what_to_do(
    base: dict[str, Any], said: list[str], unsaid: list[str], fields: dict[str, str]
) -> None:
    text = Card.from_records(lineage_of(**base)).render()
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)
    assert {name: text for name, text in split_front_matter(text)[0].items() if "license" in name} == fields


def test_only_a_missed_requirement_is_called_missed() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)

    def requirements(*bounds: str) -> str:
        metrics.bounds = parse_bounds(",".join(bounds) or "none")
        return Card.from_records(lineage, metrics).render().partition("## Requirements")[2].partition("##")[0]

    assert "| `piqa>=0.6` |" in requirements("piqa>=0.6")
    assert "misses" not in requirements("piqa>=0.6")
    assert "misses a requirement" in requirements("piqa>=0.6", "piqa>=0.9")
    assert "misses 2 requirements" in requirements("piqa>=0.8", "piqa>=0.9")
    assert "--allow-miss" not in requirements("piqa>=0.9")
    lineage.published = {"repo_id": "someone/small"}
    assert "--allow-miss" in requirements("piqa>=0.9")
    assert requirements() == ""


def test_images_are_told_beside_the_data() -> None:
    lineage = lineage_of()
    data = next(entry["data"] for entry in lineage.entries if entry.get("data"))[0]
    data["images"] = True
    assert f"{data['name']}`, with images " in Card.from_records(lineage).render()


def test_rewritten_answers_are_told_beside_the_data() -> None:
    lineage = lineage_of()
    data = next(entry["data"] for entry in lineage.entries if entry.get("data"))
    data[0]["answers"] = "rewritten by the dense model"
    assert f"{data[0]['name']}`, answers rewritten by the dense model `" in Card.from_records(lineage).render()
    data[0]["name"] = "self"
    assert "`text that the dense model wrote itself`, answers" in Card.from_records(lineage).render()


def test_speed_that_was_not_measured_has_no_section() -> None:
    lineage = lineage_of()
    text = Card.from_records(lineage, metrics_of(lineage, cost=False)).render()
    assert "speed" not in sections(text)
    assert "tradeoff" not in text


def test_each_speed_says_of_which_run_it_is() -> None:
    speed = example_card().render().partition("## Speed, memory and size")[2].partition("## Use it")[0]
    main, _, every = speed.partition("<details>")
    assert main.count("| decode throughput, tokens/s") == 1
    assert "medians of n runs: batch size 1, 512 prompt tokens, 32 new tokens, 2 threads." in main
    rows = [line for line in every.splitlines() if line.startswith("| decode throughput, tokens/s")]
    assert [re.search(r"<sub>(batch size \d)", row)[1] for row in rows] == ["batch size 1", "batch size 4"]
    assert "**126**" in rows[1]


def test_the_harness_is_named_only_where_it_measured() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    assert "with lm-eval 0.4.13" in Card.from_records(lineage, metrics).render()
    tasks = [one for one in metrics.results if one["kind"] == "accuracy"]
    metrics.results = [one for one in metrics.results if one["kind"] != "accuracy"]
    assert "lm-eval" not in Card.from_records(lineage, metrics).render()
    metrics.results += [one | {"kind": "text", "metric": "word_perplexity", "value": 20.0} for one in tasks]
    assert "with lm-eval 0.4.13" in Card.from_records(lineage, metrics).render()


def test_only_tasks_that_were_asked_in_part_are_said_to_be() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    assert "on the first 200 questions of each task" in Card.from_records(lineage, metrics).render()
    for record in [*metrics.results, *metrics.comparisons]:
        if record.get("task") == "piqa":
            record["settings"] = {"limit": 50}
    assert "on the first 50 or 200 questions of each task" in Card.from_records(lineage, metrics).render()
    for record in [*metrics.results, *metrics.comparisons]:
        if record.get("task") == "piqa":
            record["settings"] = {}
    assert "on the first 200 questions of some tasks" in Card.from_records(lineage, metrics).render()


def test_nats_beside_a_perplexity_are_told_below() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    nats = [one | {"metric": "nll", "value": 3.5} for one in metrics.results if one["metric"] == "perplexity"]
    metrics.add(results=nats)
    main, _, every = Card.from_records(lineage, metrics).render().partition("## Quality")[2].partition("<details>")
    assert "<sub>cross-entropy, nats per token</sub>" not in main
    assert "<sub>cross-entropy, nats per token</sub>" in every


def test_a_new_metric_needs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, unit and direction are on the card by themselves; of one that is not registered, its own name."""
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    new = [one for one in metrics.results if one["metric"] == "perplexity"]
    metrics.add(results=[one | {"metric": "energy_used", "kind": "memory", "value": 0.25} for one in new])
    text = Card.from_records(lineage, metrics).render().replace(NBSP, " ")
    assert "| **WikiText-2** ↑<br><sub>energy used</sub> | 0.250 " in text
    monkeypatch.setitem(METRICS, "energy_used", Metric("energy per token, of the limit", "share"))
    text = Card.from_records(lineage, metrics).render().replace(NBSP, " ")
    assert "| **WikiText-2** ↓<br><sub>energy per token, of the limit</sub> | 25.0 " in text
    assert "name: energy per token, of the limit" in text


def test_a_new_section_is_a_file_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = render._environment()
    new = jinja2.DictLoader({"energy.md.jinja": "## Energy\n\n{{ card.name }} | <b>\n", "empty.md.jinja": "\n"})
    monkeypatch.setattr(environment, "loader", jinja2.ChoiceLoader([new, environment.loader]))
    monkeypatch.setattr(render, "SECTIONS", [*SECTIONS, "energy", "empty"])
    text = example_card().render()
    assert sections(text) == [*SECTIONS, "energy"]
    assert "## Energy\n\nSmolLM2-135M-Instruct-23L | <b>\n" in text


def test_the_adapter_form() -> None:
    lineage = lineage_of(("dense", "cut"))
    lineage.entries[0]["settings"]["form"] = "adapter"
    lineage.published = {"repo_id": "someone/small"}
    card = Card.from_records(lineage)
    text = card.render()
    assert 'AutoPeftModelForCausalLM.from_pretrained("someone/small", dtype="auto")' in text
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in text
    assert (card.metadata["library_name"], card.metadata["base_model_relation"]) == ("peft", "adapter")
    assert "--adapter" in text
    assert "pip install hf-layerprune\n" in text
    lineage.base |= {"quantized": "bitsandbytes, nf4", "pipeline_tag": "image-text-to-text"}
    text = Card.from_records(lineage).render()
    assert "pip install hf-layerprune 'bitsandbytes>=0.50'\n" in text
    assert "need torchvision as well" in text
    assert 'Before the text, {"type": "image", "path": "image.png"} adds an image' in text
    lineage.base["pipeline_tag"] = "audio-text-to-text"
    text = Card.from_records(lineage).render()
    assert "torchvision" not in text
    assert 'Before the text, {"type": "audio", "path": "audio.wav"} adds a recording' in text


def test_a_base_on_somebodys_disk_is_named_by_its_last_part() -> None:
    lineage = lineage_of(("dense", "cut"), id="/home/alice/secret project/SmolLM2.gguf", commit=None)
    text = Card.from_records(lineage).render()
    assert "alice" not in text
    assert "SmolLM2-23L" in text
    assert "unpacked from a GGUF file to bfloat16" in text
    assert "base_model" not in text
    lineage.base["hub_id"] = BASE
    assert Card.from_records(lineage).metadata["base_model"] == BASE


def test_a_cut_in_another_type_calibrated_on_a_local_file() -> None:
    lineage = lineage_of(("dense", "cut"))
    lineage.entries[0]["settings"]["dtype"] = "float16"
    text = Card.from_records(lineage).render()
    assert "every remaining tensor is the base's own in float16;" in text
    assert "--dtype float16" in text
    lineage = lineage_of()
    lineage.entries[0]["calibration"]["source"] = "~/secret project/rows.jsonl"
    text = Card.from_records(lineage).render()
    assert "--calibration rows.jsonl" in text
    assert "secret" not in text


def test_changed_layers_are_those_of_the_base() -> None:
    lineage = lineage_of()
    lineage.entries[1]["changed_tensors"] += ["lm_head.weight", "model.layers.23.mlp.down_proj.weight"]
    history = read_history(lineage)
    assert (history.layers_changed("repair"), history.layers_changed("heal")) == ({11}, {10, 11, 19})


def test_the_commands_fit_together() -> None:
    """Each takes the folder that the one before it writes, and none is wider than a page."""
    lineage = lineage_of()
    commands = list_commands(read_history(lineage))
    words = [shlex.split(command.replace("\\\n", "")) for command in commands]
    assert [line[:2] for line in words] == [["hf-layerprune", "prune"], ["accelerate", "launch"]]
    assert words[0][2] == BASE
    assert words[0][3] == words[1][words[1].index("--model_name_or_path") + 1] == "repaired"
    assert words[0][-2:] == ["--revision", lineage.base["commit"]]
    assert max(map(len, "\n".join(commands).splitlines())) <= 82
    # A recipe that is given the base prunes it, too.
    lineage.entries[1]["command"] = (
        f"accelerate launch recipes/sft_tail.py --model_name_or_path {BASE} --drop_layers 12-18"
    )
    assert [command.split()[0] for command in list_commands(read_history(lineage))] == ["accelerate"]
    lineage = lineage_of(id="/home/alice/models/smol", commit=None)
    for name, first in (("models/smol", "accelerate"), ("smol", "accelerate"), ("cuts/smol", "hf-layerprune")):
        lineage.entries[1]["command"] = f"accelerate launch recipes/sft_tail.py --model_name_or_path {name}"
        assert list_commands(read_history(lineage))[0].split()[0] == first
    # Pruned twice, of a copy of the base; and of a file with other weights than the Hub's.
    lineage = lineage_of(("dense", "cut"), id="copy", commit=None, hub_id=BASE)
    again = deepcopy(lineage.entries[0])
    again |= {"layers": {"base": 23, "left": 22}, "settings": {"drop_layers": [3]}}
    lineage.entries.append(again)
    assert [command.split()[2:4] for command in list_commands(read_history(lineage))] == [
        [BASE, "pruned"],
        ["pruned", "pruned-again"],
    ]
    lineage.base["id"] = "model.gguf"
    assert list_commands(read_history(lineage))[0].split()[2] == "model.gguf"


def test_the_command_has_all_that_chose_the_layers() -> None:
    chosen = {
        "max_kl": 0.1234567,
        "criterion": "taylor",
        "variant": "paper",
        "steps": 2,
        "protect_first": 0,
        "protect_last": 1,
    }
    lineage = lineage_of(("dense", "cut"))
    lineage.entries[0]["settings"] |= chosen
    lineage.entries[0]["calibration"] = {"source": "self", "samples": 64, "length": 512, "seed": 7}
    words = shlex.split(list_commands(read_history(lineage))[0].replace("\\\n", ""))[1:]
    request = options_from_args(build_parser().parse_args(words), PruneRequest).with_calibration()
    assert chosen == {name: getattr(request, name) for name in chosen}
    assert (request.calibration_samples, request.calibration_length, request.seed) == (64, 512, 7)
    assert "--calibration-length" not in words


def test_the_base_is_named_as_it_was_read() -> None:
    def provenance(**base: Any) -> str:
        text = Card.from_records(lineage_of(("dense", "cut", "repaired"), **base)).render()
        return text.partition("## Verify it")[2].partition("## Licence")[0]

    assert f"The base is `{BASE}` at commit `7e27bd9f9532`;" in provenance()
    assert f"The base is a local copy of `{BASE}`;" in provenance(id="dense", commit=None, hub_id=BASE)
    assert "The base is `dense`;" in provenance(id="dense", commit=None)
    unpacked = "The base is `model.Q4_1.gguf`, unpacked to bfloat16;"
    assert unpacked in provenance(id="model.Q4_1.gguf", commit=None, hub_id=BASE)
    assert "-23L --base model.Q4_1.gguf\n" in provenance(id="model.Q4_1.gguf", commit=None, hub_id=BASE)
    assert "--base" not in provenance()


def test_limits_come_from_the_numbers() -> None:
    lineage = lineage_of(("dense", "cut"))
    metrics = metrics_of(lineage, ("dense", "cut"))
    limits = Card.from_records(lineage, metrics).render().partition("## Limits")[2].partition("##")[0]
    assert (
        "**PIQA**: length-normalised accuracy fell by 15.0 ± 3.1 points, to 52.0 %, indistinguishable from chance (50.0 %)"
        in limits
    )
    assert "**ARC-Easy**: length-normalised accuracy fell by 17.0 ± 3.1 points, to 30.5 %" in limits
    assert f"**Perplexity** on WikiText-2 rose from 19.9 to 62.6, {TIMES} 3.15." in limits
    for record in metrics.results:
        if record["metric"] == "perplexity" and record["weights"] == "b" * 64:
            record["value"] = 2.8e8
        elif record.get("task") == "piqa":
            record["stderr"] = 0.001
    for record in metrics.comparisons:
        if record.get("task") == "arc_easy":
            record |= {"difference": 0.17, "p_value": 0.001}
    text = Card.from_records(lineage, metrics).render()
    assert f"2.8 {TIMES} 10⁸" in text
    assert "hardly predicts text any more" in text
    limits = text.partition("## Limits")[2].partition("##")[0]
    assert "points, to 52.0 %.\n" in limits  # which is not chance
    assert "ARC-Easy" not in limits  # where it is better


@pytest.mark.parametrize(("samples", "points"), [(200, "6.2"), (50, "12.0"), (4, "100.0")])
def test_no_difference_that_the_exact_test_calls_noise_is_called_detectable(samples: int, points: str) -> None:
    lineage = lineage_of(("dense", "cut"))
    metrics = metrics_of(lineage, ("dense", "cut"))
    for record in metrics.comparisons:
        if "p_value" in record:
            record |= {"test": "mcnemar_exact", "samples": samples}
    assert f"differences below about {points} points can't be detected" in Card.from_records(lineage, metrics).render()
    significant = (
        compare_pairs([0] * 6 + [1] * samples, [1] * (6 + samples)).p_value,
        compare_pairs([0] * 5, [1] * 5).p_value,
    )
    assert significant[0] < 0.05 < significant[1]


def test_whole_benchmarks_of_the_hub_become_eval_results() -> None:
    lineage = lineage_of(("dense", "cut"))
    metrics = metrics_of(lineage, ("dense", "cut"))
    assert metadata.eval_files(Card.from_records(lineage, metrics).results) == {}  # of 200 questions each
    for record in [*metrics.results, *metrics.comparisons]:
        if record.get("task") == "piqa":
            record["settings"] = {}
            record |= {"dataset": "ybisk/piqa"} if "value" in record else {}
        elif record.get("task") == "arc_easy" and "value" in record:
            record |= {"settings": {}, "dataset": "5" * 64}  # a file
    files = metadata.eval_files(Card.from_records(lineage, metrics).results)
    assert list(files) == [".eval_results/piqa.yaml"]
    from huggingface_hub import parse_eval_result_entries

    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/piqa.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("ybisk/piqa", "piqa", 52.0, "2026-11-24")
    index = Card.from_records(lineage, metrics).metadata["model-index"]
    assert {"ybisk/piqa", "arc_easy"} <= {one["dataset"]["type"] for one in index[0]["results"]}


def test_a_score_up_to_100_is_no_share() -> None:
    lineage = lineage_of(("dense", "cut"))
    metrics = metrics_of(lineage, ("dense", "cut"))
    whole = Card.from_records(lineage, metrics)
    scores = {"dense": 71.25, "cut": 0.5}
    for weights, model in list(metrics.models.items()):
        one = {
            "kind": "accuracy",
            "task": "squadv2",
            "metric": "f1",
            "value": scores[model["role"]],
            "weights": weights,
        }
        more = {"samples": 11_873, "shots": 0, "date": "2026-11-24", "versions": {}, "dataset": "rajpurkar/squad_v2"}
        metrics.add(results=[one | more])
    card = Card.from_records(lineage, metrics)
    line = next(line for line in card.render().splitlines() if line.startswith("| **squadv2**"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["71.2", f"**0.500**<br><sub>{TIMES}{NBSP}0.00702</sub>"]
    assert (card.results.mean_accuracy(), set(card.pictures)) == (whole.results.mean_accuracy(), set(whole.pictures))
    assert "value: 0.5\n" in metadata.eval_files(card.results)[".eval_results/squadv2.yaml"]
    assert "- **squadv2**: F1 went from 71.2 to 0.500." in card.render()
    assert "71.2 " in report(metrics)
    assert "71.2 %" not in report(metrics)


def test_a_packed_base_is_no_measure_of_size() -> None:
    lineage = lineage_of(("dense", "cut"))

    def cost(name: str) -> str:
        metrics = metrics_of(lineage, ("dense", "cut"))
        metrics.models[metrics.weights]["name"] = "SmolLM2-23L"
        next(model for model in metrics.models.values() if model["role"] == "dense")["name"] = name
        return (
            Card.from_records(lineage, metrics)
            .render()
            .partition("## Speed, memory and size")[2]
            .partition("\n## ")[0]
        )

    def row(text: str) -> str:
        return next(line for line in text.splitlines() if line.startswith("| size on disk"))

    assert f"{TIMES}\u00a00.82" in row(cost("SmolLM2"))
    assert "GGUF" not in cost("SmolLM2")
    assert TIMES not in row(cost("SmolLM2.Q4_1.gguf"))
    assert f"{TIMES}\u00a01." in cost("SmolLM2.Q4_1.gguf")  # speeds are compared all the same
    assert "The dense model was measured from a GGUF file" in cost("SmolLM2.Q4_1.gguf")


def test_a_difference_without_a_pair_has_no_error() -> None:
    lineage = lineage_of(("dense", "cut"))
    metrics = metrics_of(lineage, ("dense", "cut"))
    metrics.comparisons = []
    assert f"**52.0\u00a0±\u00a03.5**<br><sub>{MINUS}15.0</sub>" in Card.from_records(lineage, metrics).render()


# Hostile values.

NASTY = [
    '"}} {{', "{% for x in y %}", "{{ 7 * 7 }}", "]]>", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))", "![x](https://evil.example/x.png)", "| a | b |", "`` ` ``", "```\n# Title\n```",
    "\n\n# Title\n\n", "---\nlicense: mit\n---", "a: b: [c", "!!python/object:os.system", "&amp; &lt;", "\\", "\\\\(x\\\\)",
    "$$x$$", "<!-- hf-layerprune:end summary -->", "--> <b>bold</b>", "\u202eevil", "a\x00b\x1b[31m", "\ud800",
    "https://evil.example", "www.evil.example", "someone@evil.example", "'; rm -rf ~ #", "$(reboot)", "x" * 10_000,
    "\\|[click](https://evil.example)", "<a href='//evil.example'>", "*" * 500, "_a_ __b__", "~~x~~", "^1", "\r\n- item", "é" * 300,
]  # fmt: skip


def check_harmless(card: str, repo_id: str | None) -> None:
    """What holds of every card, whoever has chosen the names in it."""
    card.encode()
    fields, body = split_front_matter(card)
    allowed = {"language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model",
               "base_model_relation", "datasets", "tags", "model-index"}  # fmt: skip
    assert set(fields) <= allowed
    assert fields["tags"][:3] == ["layer-pruning", "depth-pruning", "hf_layerprune"]
    parts = regions.parse(body)
    assert [part.region for part in parts] == [name for name in SECTIONS if name in [part.region for part in parts]]
    assert not any(part.edited for part in parts)
    page = html(card)
    plain = re.sub(r"(?s)<pre>.*?</pre>|<code>.*?</code>", "", page)
    tags = set(re.findall(r"<([a-zA-Z!][\w-]*)", plain))
    assert tags <= {
        "h1", "h2", "p", "a", "img", "strong", "em", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td",
        "details", "summary", "sub", "br", "code", "pre", "!--",
    }  # fmt: skip
    assert not re.search(r"(?i)<[^>]*(\son\w+\s*=|javascript:)", plain)
    assert set(re.findall(r'<img src="([^"]*)"', plain)) <= {
        f"assets/{name}.png" for name in ("layers", "accuracy", "tradeoff", "scores")
    }
    for target in re.findall(r'href="([^"]*)"', plain):
        hosts = ("https://huggingface.co/", "https://www.apache.org/", "lineage.json", "metrics.json")
        assert target.startswith(hosts) or target in (repo_id,), target
    assert page.count("<h1>") == 1
    assert page.count("<h2>") == len(parts) - 1
    prose = re.sub(r"(?s)```.*?```", "", body)
    assert max(map(len, re.findall(r"[^|\n]+", prose))) < 4000


@pytest.mark.parametrize(
    "value", ["a@b.example", "mailto:a@b.example", "http://b.example", "HTTPS://b.example", "www.b.example"]
)
def test_nothing_becomes_a_link(value: str) -> None:
    """Remark finds addresses in what is left of the text after its character references are replaced."""
    text = escape_text(value)
    assert unescape(text) == text
    assert text.replace("<!-- -->", "") == value
    assert re.search(r"https?:/|mailto:\w|www\.|\w@\w", text, re.IGNORECASE) is None


@pytest.mark.parametrize("value", ["|", "a|b", r"a\|b", r"a\\|[click](https://evil.example)", r"\`|`"])
def test_no_backslash_undoes_the_escape_of_a_pipe(value: str) -> None:
    """To marked and remark, an even number of backslashes before a pipe leaves it the end of a table's cell."""
    for text in (code_span(value), escape_text(value)):
        assert not re.search(r"(?<!\\)(\\\\)*\|", text)
        row = html(f"| name | next |\n|---|---|\n| {text} | here |").partition("<tbody>")[2]
        assert row.count("<td>") == 2
        assert value in unescape(re.sub(r"<[^>]*>", "", row))


@pytest.mark.parametrize("value", NASTY)
def test_each_hostile_value_everywhere(value: str) -> None:
    def nasty(record: Any, key: str = "") -> Any:
        if isinstance(record, dict):
            return {name: nasty(inner, name) for name, inner in record.items()}
        if isinstance(record, list):
            return [nasty(inner, key) for inner in record]
        kept = ("weights", "base", "kind", "stage", "form", "changed_tensors", "dtype", "input_weights", "method")
        return value if isinstance(record, str) and key not in kept else record

    lineage = lineage_of()
    metrics = metrics_of(lineage)
    told = {key: nasty(entry) for key, entry in lineage.base.items() if key not in ("license", "files", "commit")}
    told |= {"license": "apache-2.0", "files": lineage.base["files"]}
    card = Card.from_records(
        Lineage(told, nasty(lineage.entries), {"repo_id": value}),
        Metrics(metrics.weights, metrics.models, nasty(metrics.results)),
    )
    text = card.render()
    check_harmless(text, card.repo_id)
    from huggingface_hub import ModelCard

    assert ModelCard(text).data.license == "apache-2.0"
    assert json.dumps(card.metadata)


def test_records_are_not_changed_by_rendering() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    before = deepcopy((lineage, metrics))
    Card.from_records(lineage, metrics).render()
    assert (lineage, metrics) == before


def test_roles_have_one_order() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    metrics.results.reverse()
    metrics.models = dict(reversed(metrics.models.items()))
    assert [column.role for column in Card.from_records(lineage, metrics).results.columns] == list(ROLES)


def test_choosing_and_repairing_have_times_of_their_own() -> None:
    lineage = lineage_of()
    prune = lineage.entries[0]
    prune["selection"] = {"criterion": "auto", "why": "layers 2: best", "seconds": 384.5}
    prune |= {"seconds": 15.8}
    prune["repair"]["seconds"] = 125.0
    text = Card.from_records(lineage).render()
    assert "6 min 24 s to choose the layers, 15.8 s to cut" in text
    assert re.search(r"\*\*repair.*<sub>2 min 05 s</sub>", text)


@pytest.mark.parametrize(("borrowed", "shown"), [(0, "with a refit"), (7, "with neurons borrowed")])
def test_a_repair_that_borrows_no_neurons_is_a_refit(borrowed: int, shown: str) -> None:
    lineage = lineage_of()
    repair = lineage.entries[0]["repair"]
    repair |= {"method": "borrow", "cuts": [{"borrowed_neurons": borrowed}]}
    assert f"The cut was repaired {shown}" in Card.from_records(lineage).render()


@pytest.mark.parametrize("dropped", [[2], [2, 3]])
def test_the_reason_of_a_choice_does_not_repeat_its_layers(dropped: list[int]) -> None:
    named = describe_layers(dropped)
    entry = {"settings": {"drop_layers": dropped}, "selection": {"why": f"{named} (best block): the lowest KL"}}
    line = tables.stage_line(Stage("prune", entry, frozenset()))
    assert f"{named} dropped (the lowest KL)" in line


@pytest.mark.parametrize(("steps", "shown"), [(-1, "epochs"), (2, "steps")])
def test_what_ended_training(steps: int, shown: str) -> None:
    """`max_steps` overrides the epochs."""
    stage = Stage("heal", {"settings": {"num_train_epochs": 3.0, "max_steps": steps}}, frozenset())
    assert re.findall("epochs|steps", tables.training_table(stage)) == [shown]


def test_every_paper_of_a_criterion_or_a_repair_can_be_cited() -> None:
    sources = " ".join(one.source for one in (*CRITERIA.values(), *REPAIRS.values()))
    papers = files("hf_layerprune.publish.card").joinpath("papers.bib").read_text(encoding="utf-8")
    named = set(re.findall(r"arXiv:([\d.]+)", sources))
    assert len(named) > 5
    assert not named - set(re.findall(r"eprint += {(.+)}", papers)), "add them to publish/card/papers.bib"
