"""Cutting GGUF files: the real model, every rewrite of the metadata, and what happens when something goes wrong."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from transformers import AutoModelForCausalLM

import hf_layerprune.cut.gguf as gguf_file
from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.cli import main
from hf_layerprune.cut.gguf import cut_gguf, gguf_layer_count, is_gguf, plan_gguf_cut
from hf_layerprune.errors import CheckpointError, CutError
from hf_layerprune.files.gguf_header import read_header, recorded_cut
from hf_layerprune.files.json_file import read_object
from hf_layerprune.heal.student import Student
from hf_layerprune.measure.subject import identify
from hf_layerprune.options import format_bytes
from hf_layerprune.records.fingerprints import fingerprint, weights_hash
from hf_layerprune.runtime.loading import load_base, load_config, resolve_base
from hf_layerprune.versions import gguf_options
from tests.gguf_makers import array, check_bytes, make_gguf, mark, number, smollm2, value
from tests.matrix import identities, logits
from tests.measure_models import write_gguf
from tests.tiny_models import tiny_input, tiny_model

MIDDLE = (3, 5, 12, 13, 20)

# Runs the module without its package's __init__, which is free to import torch.
BARE = f"""
import sys, types
package = types.ModuleType("hf_layerprune")
package.__path__ = [{str(Path(gguf_file.__file__).parents[2])!r}]
sys.modules["hf_layerprune"] = package
from hf_layerprune.cut.gguf import cut_gguf
"""


def cut(source: Path, drop, **options):
    target = source.with_name("cut.gguf")
    return target, cut_gguf(source, target, drop, **options)


def refused(match: str):
    return pytest.raises(CheckpointError, match=match)


def test_a_file_whose_suffix_is_in_capitals_is_written_read_and_hashed(tmp_path, capsys):
    sources = [write_gguf(tmp_path / f"{seed}.GGUF", layers=4, seed=seed) for seed in range(2)]
    assert main(["prune", str(sources[0]), str(tmp_path / "cut.GGUF"), "--drop-layers", "2"]) == 0
    assert is_gguf(tmp_path / "cut.GGUF")
    assert main(["inspect", str(tmp_path / "cut.GGUF")]) == 0
    assert "No cut is shown: --drop 0.25 of 3 layers is less than one layer" in capsys.readouterr().out
    assert len({weights_hash(fingerprint(source)) for source in sources}) == 2
    assert identify(sources[0]).bytes_on_disk == sources[0].stat().st_size
    tiny_model("llama").save_pretrained(tmp_path / "folder.GGUF")  # a folder is none
    assert identify(tmp_path / "folder.GGUF").load(device="cpu").dtype == torch.float32


def test_an_adapter_is_measured_in_the_type_of_its_unpacked_base_and_its_card_loads_it(tmp_path, monkeypatch):
    source, folder = write_gguf(tmp_path / "a.gguf", layers=8), tmp_path / "adapter"
    assert main(["prune", str(source), str(folder), "--adapter", "--drop-layers", "3-4"]) == 0
    models = [identify(path).load(device="cpu") for path in (source, folder)]
    assert [model.dtype for model in models] == [torch.bfloat16] * 2
    assert main(["card", str(folder)]) == 0
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "dropped ones are never loaded" not in (folder / "README.md").read_text()
    names = {}
    monkeypatch.chdir(tmp_path)
    if "quantization_config" in gguf_options():  # transformers 5.17, as the card says
        exec(re.sub('"path/to/[^"]+"', repr(str(folder)), code), names)
        assert torch.equal(logits(names["model"], tiny_input()), logits(models[1], tiny_input()))
    with refused("merge it into its base first"):
        resolve_base(folder)


def test_what_cannot_be_dropped_from_a_file_is_refused_before_its_weights_are_unpacked(tmp_path, monkeypatch):
    source = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr("hf_layerprune.adapter.pruning.load_base", None)
    with pytest.raises(CutError, match=r"drop_layers has 4, but the model's layers are 0\.\.3"):
        prune_with(LayerDropConfig(base_model_name_or_path=str(source), drop_layers=[4]))


def test_a_curve_of_a_file_is_of_what_prune_makes_of_it(tmp_path, capsys):
    source, folder = write_gguf(tmp_path / "a.gguf", packed=GGMLQuantizationType.Q8_0), tmp_path / "curve"
    rows = ["--calibration-samples", "8", "--calibration-length", "32"]
    assert main(["rank", str(source), str(folder), "--curve", "--curve-up-to", "1", "--repair", "linear", *rows]) == 0
    point = read_object(folder / "curve.json")["points"][0]
    from_curve = ["--from-curve", str(folder), "--drop", "1"]
    assert main(["prune", str(source), str(tmp_path / "cut"), *from_curve]) == 0
    assert point["bytes"] == (tmp_path / "cut" / "model.safetensors").stat().st_size
    capsys.readouterr()
    assert main(["prune", str(source), str(tmp_path / "cut.gguf"), *from_curve]) == 2
    assert f"without repair: --drop-layers {point['layers']}" in capsys.readouterr().err
    assert main(["prune", str(source), str(tmp_path / "cut.gguf"), "--drop-layers", point["layers"]]) == 0
    capsys.readouterr()
    size = ["--from-curve", str(folder), "--target-size", "1MB"]
    assert main(["prune", str(source), str(tmp_path / "small.gguf"), *size]) == 2
    assert "a curve has the sizes of unpacked weights" in capsys.readouterr().err


def test_a_cut_file_computes_what_the_model_without_those_layers_computes(tmp_path):
    source = write_gguf(tmp_path / "a.gguf", layers=8, packed=GGMLQuantizationType.Q4_0)
    cut(source, (2, 3, 5))
    dense, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32).eval()
        for name in ("a.gguf", "cut.gguf")
    )
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    whole = logits(dense, tiny_input())
    with identities(dense, (2, 3, 5)):
        expected = logits(dense, tiny_input())
    assert torch.equal(logits(model, tiny_input()), expected)
    assert not torch.equal(whole, expected)


def test_a_cut_smollm2_keeps_every_other_byte(tmp_path):
    source = smollm2()
    plan = cut_gguf(source, tmp_path / "cut.gguf", MIDDLE)
    assert (plan.cut.num_layers, plan.cut.drop) == (30, MIDDLE)
    assert plan.target_bytes == (tmp_path / "cut.gguf").stat().st_size < smollm2().stat().st_size
    names = {"general.name", "general.size_label"}
    check_bytes(source, tmp_path / "cut.gguf", MIDDLE, {"llama.block_count"} | names)
    assert is_gguf(tmp_path / "cut.gguf")
    assert gguf_layer_count(tmp_path / "cut.gguf") == 25
    assert value(tmp_path / "cut.gguf", "general.size_label") == "117M"
    assert value(source, "general.name").replace("135M", "117M") == value(tmp_path / "cut.gguf", "general.name")


def test_planning_and_cutting_need_little_memory_and_no_torch(tmp_path):
    script = BARE + (
        f"cut_gguf({str(smollm2())!r}, {str(tmp_path / 'cut.gguf')!r}, {list(MIDDLE)})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "if sys.platform == 'linux': print(open('/proc/self/status').read())\n"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    if peak := re.search(r"VmHWM:\s+(\d+) kB", out):
        # The interpreter with numpy takes 40 MB of this; the file has 98 MB.
        assert int(peak[1]) < 70_000


def test_a_cut_file_says_which_layers_of_the_first_one_it_lacks(tmp_path, capsys):
    source, (once, twice) = write_gguf(tmp_path / "a.gguf", layers=8), [tmp_path / f"{n}.gguf" for n in (1, 2)]
    assert main(["prune", str(source), str(once), "--drop-layers", "2-3"]) == 0
    assert main(["prune", str(once), str(twice), "--drop-layers", "0,4"]) == 0
    assert main(["inspect", str(twice)]) == 0
    assert "it is a cut model, without layers 0,2-3,6 of the " in capsys.readouterr().out
    mark = {"drop_layers": [0, 2, 3, 6], "num_base_layers": 8}
    assert load_config(twice).layer_drop == load_base(twice).config.layer_drop == mark
    assert not hasattr(load_config(source), "layer_drop")
    # As a folder, it is a cut of the file, whatever that says of itself.
    assert main(["prune", str(twice), str(tmp_path / "folder"), "--drop-layers", "1"]) == 0
    assert load_config(tmp_path / "folder").layer_drop == {"drop_layers": [1], "num_base_layers": 4}
    assert main(["verify", str(tmp_path / "folder")]) == 0
    with pytest.raises(CheckpointError, match=r"specify the 8-layer file that it was cut from, .* 0,2-3,6$"):
        Student.load(twice)


@pytest.mark.parametrize(
    "wrong",
    [
        mark([1, 2], 9),
        mark([2, 1], 8),
        mark([1, 1], 8),
        mark([1, 8], 8),
        number("hf_layerprune.num_base_layers", 8),
        array("hf_layerprune.drop_layers", [1, 2], GGUFValueType.FLOAT32),
    ],
)
def test_a_mark_that_does_not_fit_the_file_counts_for_nothing(tmp_path, wrong):
    source = make_gguf(tmp_path / "a.gguf", more=wrong)
    assert recorded_cut(read_header(source)) is None
    target, _ = cut(source, [3])
    assert recorded_cut(read_header(target)) == {"drop_layers": [3], "num_base_layers": 6}


@pytest.mark.parametrize("alignment", [None, 64, 4096])
@pytest.mark.parametrize("drop", [(0,), (5,), (1, 2, 4), (0, 1, 2, 3, 4)])
def test_all_tensor_types_and_alignments_are_copied_exactly(tmp_path, alignment, drop):
    source = make_gguf(tmp_path / "a.gguf", alignment=alignment)
    target, plan = cut(source, drop)
    check_bytes(source, target, drop, {"llama.block_count"})
    # And the file is the one that the gguf library writes for a model without these layers.
    kept = plan.cut.keep
    more = mark(drop, 6)
    model = make_gguf(tmp_path / "b.gguf", layers=len(kept), more=more, alignment=alignment, seeds=kept)
    assert target.read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("drop", "match"),
    [
        ([30], r"^drop_layers has 30, but the model's layers are 0\.\.29$"),
        ([-1], r"^drop_layers has -1, but the model's layers are 0\.\.29$"),
        ([], "nothing would be dropped"),
        (range(30), "all 30 layers; at least one must stay"),
        ([3, 4, 3], "drop_layers has 3 more than once"),
        ([1.5], "drop_layers has 1.5, which is not a layer index"),
        ([True], "drop_layers has True, which is not a layer index"),
        ("12", "drop_layers has '1', which is not a layer index"),
    ],
)
def test_a_bad_list_of_layers_is_refused_in_one_line(tmp_path, drop, match):
    with pytest.raises(CutError, match=match) as caught:
        cut_gguf(smollm2(), tmp_path / "cut.gguf", drop)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_the_target_is_never_overwritten_unasked(tmp_path, monkeypatch):
    source = make_gguf(tmp_path / "a.gguf")
    (tmp_path / "cut.gguf").write_text("mine")
    with refused("exists; replace it with force=True"):
        cut(source, [1])
    assert (tmp_path / "cut.gguf").read_text() == "mine"
    cut(source, [1], force=True)
    assert gguf_layer_count(tmp_path / "cut.gguf") == 5

    (tmp_path / "cut.gguf").unlink()

    def somebody_is_faster(self):
        (tmp_path / "cut.gguf").write_text("theirs")

    monkeypatch.setattr(gguf_file.LocalFile, "check_unchanged", somebody_is_faster)
    with refused("was created in the meantime"):
        cut(source, [1])
    assert (tmp_path / "cut.gguf").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "cut.gguf"]


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_source_is_never_the_target(tmp_path, link):
    source = make_gguf(tmp_path / "a.gguf")
    target = source
    if link is not None:
        target = tmp_path / "b.gguf"
        link(source, target)
    before = source.read_bytes()
    with refused("is the source itself"):
        cut_gguf(source, target, [1], force=True)
    assert source.read_bytes() == before


def test_targets_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    source = make_gguf(tmp_path / "a.gguf")
    with refused("no/such does not exist; create it first"):
        cut_gguf(source, tmp_path / "no/such/cut.gguf", [1])
    with refused("which is only read, is inside"):
        cut_gguf(source, tmp_path, [1], force=True)
    with refused(r"none\.gguf does not exist"):
        cut_gguf(tmp_path / "none.gguf", tmp_path / "cut.gguf", [1])
    with refused("is not a file"):
        plan_gguf_cut(tmp_path, [1])
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with refused("needs [0-9.]+ kB, but its disk has only 10 B free"):
        cut(source, [1])
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_target_that_cannot_be_written_is_refused_before_layers_are_chosen(tmp_path, monkeypatch, capsys):
    make_gguf(tmp_path / "a.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ["prune", "~/a.gguf", "~/no/cut.gguf", "--drop", "1", "--criterion", "taylor"]
    assert main(command) == 1
    assert "no does not exist; create it first" in capsys.readouterr().err
    command[2:] = ["~/cut.gguf", "--drop", "1"]
    assert main(command) == 0
    assert gguf_layer_count(tmp_path / "cut.gguf") == 5


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), MemoryError()]
)
def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch, error):
    source = make_gguf(tmp_path / "a.gguf")
    (tmp_path / "cut.gguf").write_text("old")

    def fail(*_):
        assert any(name.startswith(".cut.gguf.partial-") for name in os.listdir(tmp_path))
        raise error

    monkeypatch.setattr(gguf_file.LocalFile, "copy_into", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        cut(source, [1], force=True)
    assert (tmp_path / "cut.gguf").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "cut.gguf"]


def test_what_a_killed_run_left_is_removed_by_the_next_run_and_what_is_being_written_is_not(tmp_path):
    source = make_gguf(tmp_path / "a.gguf")
    for name in (".cut.gguf.partial-0123abcd", ".b.gguf.partial-0123abcd", ".cut.gguf.partial-mine"):
        (tmp_path / name).write_text("left")
    (tmp_path / ".cut.gguf.partial-89abcdef").symlink_to(source)
    cut(source, [1])
    kept = [".b.gguf.partial-0123abcd", ".cut.gguf.partial-89abcdef", ".cut.gguf.partial-mine"]
    assert sorted(os.listdir(tmp_path)) == [*kept, "a.gguf", "cut.gguf"]


def test_two_runs_do_not_write_one_target(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    source = make_gguf(tmp_path / "a.gguf")
    copy_into = gguf_file.LocalFile.copy_into

    def meanwhile(self, *args):
        monkeypatch.setattr(gguf_file.LocalFile, "copy_into", copy_into)
        with refused("is being written by another process"):
            cut(source, [2])
        yield from copy_into(self, *args)

    monkeypatch.setattr(gguf_file.LocalFile, "copy_into", meanwhile)
    cut(source, [1])
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "cut.gguf"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source = make_gguf(tmp_path / "a.gguf")
    copy_into = gguf_file.LocalFile.copy_into

    def touched(self, *args):
        yield from copy_into(self, *args)
        os.utime(source, ns=(1, 1))

    monkeypatch.setattr(gguf_file.LocalFile, "copy_into", touched)
    with refused("changed while it was being read"):
        cut(source, [1])
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_target_of_parameters(tmp_path, caplog):
    caplog.set_level("INFO", "hf_layerprune")
    source, target = write_gguf(tmp_path / "a.gguf", layers=8), tmp_path / "cut.gguf"
    whole = load_base(source).num_parameters()
    assert main(["prune", str(source), str(target), "--target-params", str(int(0.8 * whole))]) == 0
    assert 0.6 * whole < load_base(target).num_parameters() <= 0.8 * whole
    assert "does far better" in caplog.text


def test_the_next_command_keeps_a_gguf_file_one(tmp_path, capsys):
    source = write_gguf(tmp_path / "a.gguf", layers=8)
    rank = ["rank", str(source), "--criterion", "block_influence", "--calibration-samples", "4"]
    assert main([*rank, "--calibration-length", "16"]) == 0
    assert f"next: hf-layerprune prune {source} pruned.gguf --drop-layers" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["card", "verify", "push"])
def test_a_gguf_file_has_no_records(tmp_path, capsys, command):
    source = write_gguf(tmp_path / "a.gguf")
    assert main([command, str(source), *(["me/a"] if command == "push" else [])]) == 1
    assert "a.gguf is a GGUF file, which has no records; specify a model folder" in capsys.readouterr().err


def test_unpacking_says_what_it_takes(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "hf_layerprune")
    source = write_gguf(tmp_path / "a.gguf")
    needed = format_bytes(4 * load_base(source).num_parameters())
    assert "unpacking" not in caplog.text
    monkeypatch.setattr("hf_layerprune.runtime.memory.free_bytes", lambda _: 100)
    load_base(source)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"unpacking {source} takes a while and about {needed} of memory; 100 B is free"
