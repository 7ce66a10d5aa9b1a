"""Whatever happens on the way, the target is absent, the old one or complete, and the base stays as it is."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from benchmarks.checkpoint import make_llama
from hf_layerprune.cut import disk
from hf_layerprune.cut.disk import plan_cut
from hf_layerprune.errors import CheckpointError
from hf_layerprune.files import copy as files, folders
from hf_layerprune.files.copy import check_inside, write_bytes
from hf_layerprune.options import format_bytes
from hf_layerprune.records import fingerprints
from hf_layerprune.records.licences import copy_licence

from .cutting import cut_checkpoint, write_checkpoint
from .folders import snapshot
from .test_checkpoint import assert_same, layer, sharded, tensors

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def base(tmp_path):
    return sharded(tmp_path / "base")


def cut(base: Path, target: Path, **options):
    return cut_checkpoint(base, target, [1], **options)


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_the_source_and_what_overlaps_with_it_is_no_target(base, tmp_path):
    before = snapshot(base)
    (tmp_path / "alias").symlink_to(base)
    (tmp_path / "inside").symlink_to(base / "sub")
    (base / "sub").mkdir()
    (tmp_path / "file").write_text("mine")
    (base / "sub/linked").symlink_to(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "away").symlink_to(tmp_path / "a/b")
    for target, match in (
        (base, "is the source itself"),
        (base / "." / "sub" / "..", "is the source itself"),
        (tmp_path / "alias", "is a symbolic link"),
        (tmp_path / "alias" / "cut", "which is only read"),
        (base / "cut", "which is only read"),
        (base / "a/b/c", "which is only read"),
        (tmp_path / "inside", "is a symbolic link"),
        (tmp_path / "inside" / "cut", "which is only read"),
        (tmp_path, "is inside"),
        (base / "sub/linked/base", "is the source itself"),
        (tmp_path / "away" / ".." / "base", "is the source itself"),  # which is written to, not a/base
        (Path("/"), "is inside"),
        (tmp_path / "file", "is a file; specify a folder"),
        (tmp_path / "file/cut", "is not a writable folder, so"),
    ):
        with pytest.raises(CheckpointError, match=match) as caught:
            cut(base, target, force=True)
        assert "\n" not in str(caught.value)
    (base / "sub/linked").unlink()
    (base / "sub").rmdir()
    assert snapshot(base) == before
    assert beside(base) == ["a", "alias", "away", "base", "file", "inside"]


def test_a_target_whose_files_the_source_links_to_is_not_replaced(base, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    for path in base.iterdir():
        (links / path.name).symlink_to(path)
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="which is only read, is inside"):
        cut(links, base, force=True)
    assert snapshot(base) == before


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "additional_chat_templates"])
def test_no_link_is_followed_out_of_the_source_into_the_copy(base, tmp_path, name):
    private = tmp_path / "blobs"  # a name that is not enough to be a part of the Hub client's cache
    private.mkdir()
    (private / "key.jinja").write_text("mine")
    (base / name).symlink_to(private if name.endswith("templates") else private / "key.jinja")
    with pytest.raises(CheckpointError, match="is a link out of"):
        cut(base, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    if name == "LICENSE":
        with pytest.raises(CheckpointError, match="is a link out of"):
            copy_licence(base, tmp_path)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("restored", [False, True])
def test_no_link_is_followed_that_was_put_there_after_the_checks(base, tmp_path, restored, monkeypatch):
    words = base / "tokenizer.model"
    words.write_text("words")
    (tmp_path / "private").write_text("mine")
    plan, start = plan_cut(base, [1]), files.LocalFile.__init__
    words.rename(tmp_path / "words")
    words.symlink_to(tmp_path / "private")

    def opened(self, path):
        start(self, path)
        if path == words:
            (tmp_path / "words").rename(words)

    if restored:  # before anybody looks at the link
        monkeypatch.setattr(files.LocalFile, "__init__", opened)
    with pytest.raises(CheckpointError, match="changed while it was being read" if restored else "is a link out of"):
        write_checkpoint(plan, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("moved", [False, True])
def test_no_other_file_is_linked_than_the_one_that_was_checked(base, tmp_path, monkeypatch, moved):
    """Nor a link to it, which may lead elsewhere later."""
    link = os.link

    def swapped(path, target):
        os.rename(path, tmp_path / "moved")
        (tmp_path / "private").write_text("mine")
        os.symlink(tmp_path / ("moved" if moved else "private"), path)
        link(path, target)

    monkeypatch.setattr(os, "link", swapped)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        cut(base, tmp_path / "cut", link=True)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("where", ["models--o--m/snapshots/0", "models--o--m/snapshots/0/part", "local"])
def test_links_into_the_cache_of_the_hub_are_no_links_out_of_the_folder(tmp_path, where):
    blob, folder = tmp_path / "models--o--m/blobs/abc", tmp_path / where
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").symlink_to(blob)
    check_inside(folder / "tokenizer.json", folder)


def test_a_folder_that_is_no_model_is_never_replaced(base, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a model folder, so it is not replaced"):
        cut(base, tmp_path / "home", force=True)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_appears_meanwhile_is_not_touched(base, tmp_path, monkeypatch, force):
    target = tmp_path / "cut"
    check = disk.read_weights

    def somebody_is_faster(source, kept=None):
        if source.folder.name.startswith(".cut.partial-"):  # what was written is read back
            target.mkdir()
            (target / "config.json").write_text("theirs")
            (target / "notes.txt").write_text("theirs")
        return check(source, kept)

    monkeypatch.setattr(disk, "read_weights", somebody_is_faster)
    match = "holds files that may be yours: notes.txt" if force else "was created in the meantime"
    with pytest.raises(CheckpointError, match=match):
        cut(base, target, force=force)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "notes.txt"]
    assert beside(target) == ["base", "cut"]


def test_missing_folders_above_the_target_are_made(base, tmp_path):
    cut(base, tmp_path / "a/b/cut")
    assert len(tensors(tmp_path / "a/b/cut")) == 2 + 3 * len(layer(0))


def test_a_full_disk_is_foreseen(base, tmp_path, monkeypatch, caplog):
    plan = plan_cut(base, [1])
    needed, kept = plan.target_bytes, format_bytes(plan.weight_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    with pytest.raises(
        CheckpointError,
        match=f"needs {format_bytes(needed)}, but its disk has only {format_bytes(needed - 1)} free; free some space",
    ):
        cut(base, tmp_path / "cut")
    assert beside(base) == ["base"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed}))
    with caplog.at_level("INFO"):
        cut(base, tmp_path / "cut")
    assert re.search(rf"{base}: keeping 3 of 4 layers and {kept} of weights$", caplog.text, re.MULTILINE)


@pytest.mark.parametrize(
    ("raised", "expected", "match"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            "No space left on device; free some space",
        ),
        (OSError(errno.EIO, "Input/output error"), CheckpointError, "could not write .*cut: Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), MemoryError, None),
    ],
)
@pytest.mark.parametrize("where", ["copy", "sync", "publish"])
def test_a_failure_on_the_way_leaves_nothing_behind(base, tmp_path, monkeypatch, raised, expected, match, where):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/config.json").write_text("old")
    before = snapshot(base), snapshot(tmp_path / "cut")

    def fail(*args, **kwargs):
        assert any(name.startswith(".cut.partial-") for name in beside(base))
        raise raised

    owner, name = {"copy": (files.LocalFile, "copy_into"), "sync": (os, "fsync"), "publish": (os, "rename")}[where]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(expected, match=match):
        cut(base, tmp_path / "cut", force=True)
    monkeypatch.undo()
    assert (snapshot(base), snapshot(tmp_path / "cut")) == before
    assert beside(base) == ["base", "cut"]


@pytest.mark.parametrize("asks", [True, False])
def test_bytes_do_not_depend_on_how_early_they_reach_the_disk(base, tmp_path, monkeypatch, asks):
    cut(base, tmp_path / "cut")
    monkeypatch.setattr(files, "CHUNK", 100)
    monkeypatch.setattr(files, "WRITEBACK", 1000)
    if not asks:  # Windows and macOS have no such call
        monkeypatch.delattr(os, "posix_fadvise")
    cut(base, tmp_path / "again")
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "again")


def test_a_source_that_changes_meanwhile_is_noticed(base, tmp_path, monkeypatch):
    plan = plan_cut(base, [1])
    shard = base / "model-00003-of-00004.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"00003.*changed while it was being read"):
        write_checkpoint(plan, tmp_path / "cut")
    copy = files.LocalFile.copy_into

    def shrinking(self, output, offset, length):
        if self.path == shard:
            os.truncate(shard, 500)
        yield from copy(self, output, offset, length)

    monkeypatch.setattr(files.LocalFile, "copy_into", shrinking)
    with pytest.raises(CheckpointError, match=r"00003.*became shorter while it was being read"):
        cut(base, tmp_path / "cut")
    assert beside(base) == ["base"]


def test_nothing_is_written_through_a_link_that_lies_in_wait(base, tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    lock = folders.lock_folder

    def lay_in_wait(folder):
        (folder / "model-00001-of-00003.safetensors").symlink_to(tmp_path / "precious")
        return lock(folder)

    monkeypatch.setattr(folders, "lock_folder", lay_in_wait)
    with pytest.raises(CheckpointError, match="could not write"):
        cut(base, tmp_path / "cut")
    assert (tmp_path / "precious").read_text() == "precious"
    assert beside(base) == ["base", "precious"]


def test_what_killed_runs_left_is_removed_by_the_next_run_and_nothing_else(base, tmp_path):
    for name in (".cut.partial-0123abcd", ".cut.old-0123abcd", ".other.partial-0123abcd", ".cut.partial-mine.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("left")
    (tmp_path / ".cut.partial-89abcdef").symlink_to(base)
    with pytest.raises(CheckpointError, match="was restored after a killed run; replace it with force=True"):
        cut(base, tmp_path / "cut")
    assert (tmp_path / "cut/config.json").read_text() == "left"
    (tmp_path / ".cut.old-4567cdef").mkdir()  # of a run that was killed after it had put the new folder in place
    cut(base, tmp_path / "cut", force=True)
    cut(base, tmp_path / "other")  # what was not complete is not restored
    (tmp_path / "cut").rename(tmp_path / ".cut.old-0123abcd")
    cut(base, tmp_path / "cut", force=True)
    assert beside(base) == [".cut.partial-89abcdef", ".cut.partial-mine.txt", "base", "cut", "other"]


@linux
def test_a_run_that_is_still_at_work_is_left_alone(base, tmp_path):
    with folders.new_folder(tmp_path / "cut") as other:
        with pytest.raises(CheckpointError, match="is being written by another process"):
            cut(base, tmp_path / "cut")
        assert other.is_dir()
    assert beside(base) == ["base", "cut"]


# Forks, since an import takes longer than a cut. The copying is slowed down here, and only here.
KILLS = """
import os, random, shutil, signal, sys, threading, time
from pathlib import Path
from tqdm.auto import tqdm
from hf_layerprune.files import copy as files
from tests.cutting import cut_checkpoint
from tests.folders import snapshot

base, target, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
copy, sync = files.LocalFile.copy_into, os.fsync

def slowly(self, output, offset, length):
    for start in range(offset, offset + length, 400):
        yield from copy(self, output, start, min(400, offset + length - start))
        time.sleep(0.0005)

def slow_sync(descriptor):
    sync(descriptor)
    time.sleep(0.002)

files.LocalFile.copy_into, os.fsync = slowly, slow_sync

def once():
    cut_checkpoint(base, target, [1], force=True)

once()
def is_done():
    return target.exists() and (target / "model.safetensors.index.json").exists()

started = time.monotonic()
once()
seconds, new, source = time.monotonic() - started, snapshot(target), snapshot(base)
chance, seen = random.Random(int(time.time())), {"none": 0, "old": 0, "new": 0, "partial": 0}
for number in range(rounds):
    # What the last round left aside would be put back, which is tested apart from this.
    for left in [target, *target.parent.glob(".cut.old-*")]:
        shutil.rmtree(left, ignore_errors=True)
    if number % 3:
        target.mkdir()
        (target / "config.json").write_text(f"old {number}")
    old = snapshot(target) if target.exists() else None
    began, child = time.monotonic(), os.fork()
    if not child:
        # tqdm's own lock is a semaphore that forks share: a child killed with it would stop all later ones.
        tqdm.set_lock(threading.RLock())
        once()
        os._exit(0)
    if number % 2:
        time.sleep(chance.uniform(0, 1.2 * seconds))
    else:  # near the end, where the names change
        while not any(target.parent.glob(".cut.partial-*/config.json")) and not is_done():
            assert time.monotonic() - began < 60, f"round {number}: neither begun nor ended"
        time.sleep(chance.uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen["partial"] += any(target.parent.glob(".cut.partial-*"))
    if not target.exists() and (aside := list(target.parent.glob(".cut.old-*"))):
        assert snapshot(aside[0]) == old  # the next run puts it back
        state = old
    else:
        state = snapshot(target) if target.exists() else None
    assert state in (old, new), f"round {number}: half a model"
    seen["none" if state is None else "new" if state == new else "old"] += 1
    assert snapshot(base) == source, f"round {number}: the base was written to"
once()
assert snapshot(target) == new
print(seen)
"""


@linux
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(base, tmp_path):
    rounds = 60
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(base), str(tmp_path / "cut"), str(rounds)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.replace("'", '"'))
    assert seen["partial"] > rounds / 4, seen
    assert all(seen.values()), seen
    assert beside(base) == ["base", "cut"]
    assert_same(
        tensors(tmp_path / "cut"), {new: tensors(base)[old] for old, new in plan_cut(base, [1]).tensor_names.items()}
    )


PEAK = """
import resource, sys
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1])
import tqdm.auto
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from tests.cutting import cut_checkpoint
cut_checkpoint(sys.argv[1], sys.argv[2], range(21, 29))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@linux
def test_peak_memory_does_not_depend_on_the_size(tmp_path):
    growth, peaks = [], []
    for gb in (0.1, 0.5):
        base, target = tmp_path / "base", tmp_path / "cut"
        make_llama(base, gb, sparse=True)
        kept = plan_cut(base, range(21, 29)).weight_bytes
        assert kept > 0.7 * gb * 1e9
        out = subprocess.run(
            [sys.executable, "-c", PEAK, str(base), str(target)], check=True, capture_output=True, text=True
        ).stdout.split()
        assert sum(path.stat().st_size for path in target.glob("*.safetensors")) == kept
        for folder in (base, target):
            subprocess.run(["rm", "-r", str(folder)], check=True)
        growth.append((int(out[1]) - int(out[0])) / 1000)
        peaks.append(int(out[1]) / 1000)
    assert max(growth) < 60, growth
    assert max(growth) - min(growth) < 10, growth
    assert max(peaks) - min(peaks) < 20, peaks


def test_every_part_of_a_model_may_be_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in fingerprints._PARTS:
        (tmp_path / name).write_text("")
    folders.check_target(tmp_path, None, force=True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "src/main.py", "package.json", "README.md", "assets/plan.docx", "runs/vocab.txt"]
)
def test_a_file_that_may_be_somebodys_own_is_named_and_never_replaced(base, tmp_path, name):
    target = tmp_path / "cut"
    cut(base, target)
    if name == "runs/vocab.txt":  # a link to a folder is not followed, and is itself somebody's own
        (tmp_path / "runs").mkdir()
        (target / "runs").symlink_to(tmp_path / "runs")
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    fields = json.loads((target / "config.json").read_text())
    fields.pop("layer_drop", None)  # a folder that anybody may have made
    (target / "config.json").write_text(json.dumps(fields))
    before = snapshot(target)
    with pytest.raises(
        CheckpointError, match=f"holds files that may be yours: {name.removesuffix('/vocab.txt')}; move"
    ):
        cut(base, target, force=True)
    assert snapshot(target) == before


def test_nothing_is_written_outside_a_folder_that_a_link_leads_out_of(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "model/assets").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leads out of"):
        write_bytes(tmp_path / "model/assets/layers.png", b"x", inside=tmp_path / "model")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("lay", [
    lambda target: target.symlink_to(target.with_name("other")), lambda target: target.symlink_to("nowhere"), Path.mkdir,
    os.mkfifo,
])  # fmt: skip
def test_nothing_but_a_file_is_replaced(tmp_path, lay):
    (tmp_path / "other").write_text("mine")
    lay(tmp_path / "file")
    mode = os.lstat(tmp_path / "file").st_mode
    with pytest.raises(CheckpointError, match="is a link, a folder or a device"):
        write_bytes(tmp_path / "file", b"x")
    assert os.lstat(tmp_path / "file").st_mode == mode
    assert beside(tmp_path / "file") == ["file", "other"]
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize(("raised", "match"), [
    (SafetensorError("I/O error"), "could not write .*file: I/O error; free some space, or write elsewhere"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied; write elsewhere"),
])  # fmt: skip
def test_a_file_that_could_not_be_written_stays_as_it_was(tmp_path, raised, match):
    def write_half(target):
        with files.new_file(target, force=True) as partial:
            partial.write_text("half")
            raise raised

    (tmp_path / "file").write_text("old")
    with pytest.raises(CheckpointError, match=match):
        write_half(tmp_path / "file")
    assert beside(tmp_path / "file") == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_killed_run_left_of_a_file_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    mine, others = [".file.partial-mine", ".file.partial-89abcdef"], ".other.partial-0123abcd"
    for name in (".file.partial-0123abcd", ".file.partial-4567cdef", mine[0], others):
        (tmp_path / name).write_text("left")
    (tmp_path / mine[1]).symlink_to(tmp_path / others)
    with files.new_file(tmp_path / "file", force=True) as partial:
        partial.write_text("first")
        write_bytes(tmp_path / "file", b"second")
        assert partial.read_text() == "first"
    assert (tmp_path / "file").read_text() == "first"
    assert beside(tmp_path / "file") == sorted([*mine, others, "file"])


def test_a_file_that_another_process_takes_for_a_leftover_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes may write the same file, such as records, at the same time."""
    lock, attempts = files.lock_folder, []

    def lock_later(path: Path) -> int | None:
        attempts.append(path)
        if len(attempts) < 3:
            path.unlink()  # the other process has locked it, and removes it
        if len(attempts) == 1:
            raise BlockingIOError
        return None if len(attempts) == 2 else lock(path)

    monkeypatch.setattr(files, "lock_folder", lock_later)
    write_bytes(tmp_path / "file", b"written")
    assert (len(attempts), (tmp_path / "file").read_bytes()) == (3, b"written")
    assert beside(tmp_path / "file") == ["file"]


@linux
def test_a_file_that_the_system_can_t_read_is_named() -> None:
    path = Path("/proc/self/mem")  # nothing is mapped at its start
    with files.LocalFile(path) as file, pytest.raises(CheckpointError, match=f"could not read {path}: Input/output"):
        file.read(0, 8)


def test_a_folder_that_was_not_written_leaves_none_above_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), folders.new_folder(tmp_path / "mine" / "new" / "er" / "cut"):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with folders.new_folder(tmp_path / "mine" / "new" / "cut") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "mine" / "new" / "cut" / "file").is_file()
