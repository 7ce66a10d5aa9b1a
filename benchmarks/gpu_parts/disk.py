"""Part c: cutting an 8B shape on disk, loading the cut model onto the card, ranking the layers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_layerprune.select.registry import ALL

from .steps import Setting, Step, middle, peak_bytes, random_model, reset_peak, synchronise


def steps(rounds: int) -> list[Step]:
    """The drive, the cut, loading, and each criterion."""
    ranks = [Step(f"c-rank-{name}", partial(rank, (name,)), 5) for name in ALL]
    return [
        Step("c-drive", drive, 4),
        Step("c-cut", cut, 4),
        Step("c-load", load, 4),
        *ranks,
        Step("c-rank-all", partial(rank, tuple(ALL)), 7),
    ]


def base(setting: Setting) -> Path:
    """The dense checkpoint, written on first use."""
    folder = setting.work / ("tiny" if setting.tiny else "8b")
    if not (folder / "config.json").exists():
        partial_ = folder.with_suffix(".part")
        shutil.rmtree(partial_, ignore_errors=True)
        random_model(setting).save_pretrained(partial_, max_shard_size="1GB")
        partial_.rename(folder)
    return folder


def drop_page_cache(files: Iterable[Path]) -> None:
    """Flush files to the drive, and drop them from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def tiny_setting(setting: Setting) -> Setting:
    """The same setting with a tiny model, for a warm-up, so that imports and the start of the card are not timed."""
    return replace(setting, tiny=True, work=setting.work / "warm_up")


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drive(setting: Setting) -> dict[str, float]:
    """Bytes per second of a plain loop that writes, with a sync at the end, and that reads without the page cache."""
    block, count = os.urandom(8 << 20), 1 if setting.tiny else 512
    path = setting.work / "drive"
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    drop_page_cache([path])
    start = time.perf_counter()
    read_through(path)
    read = time.perf_counter() - start
    path.unlink()
    size = count * len(block)
    return {"bytes": size, "write_bytes_per_second": size / written, "read_bytes_per_second": size / read}


def prune(setting: Setting) -> Path:
    """Run `hf-layerprune prune`. Returns the folder of the cut checkpoint."""
    from hf_layerprune.cli import main

    target, layers = setting.work / "cut", middle(setting)
    shutil.rmtree(target, ignore_errors=True)
    if main(["prune", str(base(setting)), str(target), "--drop-layers", f"{layers[0]}-{layers[-1]}"]):
        raise RuntimeError("prune failed")
    return target


def cut(setting: Setting) -> dict[str, Any]:
    """Seconds of `hf-layerprune prune` from a cold cache, and again; with the drive's speed just before."""
    prune(tiny_setting(setting))
    dense = base(setting)
    found: dict[str, Any] = {"drive": drive(setting)}
    for name in ("cold", "warm"):
        if name == "cold":
            drop_page_cache(weights(dense))
        start = time.perf_counter()
        target = prune(setting)
        drop_page_cache(weights(target))  # until it is on the drive
        found[f"{name}_seconds"] = time.perf_counter() - start
    kept = sum(path.stat().st_size for path in weights(target))
    speeds = found["drive"]
    found["kept_bytes"] = kept
    found["drive_seconds"] = kept / speeds["read_bytes_per_second"] + kept / speeds["write_bytes_per_second"]
    return found


def load(setting: Setting) -> dict[str, Any]:
    """Seconds until a cut model is on the card: the cut checkpoint, and the dense one without the layers that go."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_layerprune.cut.lazy import load_pruned

    ids = torch.tensor([[1]], device=setting.device)
    where = {"dtype": "auto", "device_map": setting.device}
    ways = {
        "cut checkpoint": lambda size: AutoModelForCausalLM.from_pretrained(size.work / "cut", **where),
        "dense checkpoint": lambda size: load_pruned(base(size), middle(size), **where),
    }

    def token(make: Callable[[Setting], Any], size: Setting) -> None:
        with torch.no_grad():
            make(size)(ids)
        synchronise(setting)

    for size in (tiny_setting(setting), setting):
        if not (size.work / "cut").exists():
            prune(size)
    found: dict[str, Any] = {"drive": drive(setting)}
    kept = weights(setting.work / "cut")
    for name, make in ways.items():
        token(make, tiny_setting(setting))
        for state in ("cold", "warm"):
            if state == "cold":
                drop_page_cache([*weights(base(setting)), *kept])
            reset_peak(setting)
            start = time.perf_counter()
            token(make, setting)
            found[f"{name}, {state}"] = {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(setting)}
    size_kept = sum(path.stat().st_size for path in kept)
    seconds = size_kept / found["drive"]["read_bytes_per_second"]
    return found | {"kept_bytes": size_kept, "drive_seconds": seconds}


def rank(criteria: tuple[str, ...], setting: Setting) -> dict[str, Any]:
    """Seconds and peak memory of scoring all layers, with one layer at a time on the card, as `rank` does."""
    score(criteria, tiny_setting(setting), setting.device)
    for path in weights(base(setting)):  # into the page cache, so that the drive's speed does not matter
        read_through(path)
    reset_peak(setting)
    found = score(criteria, setting, setting.device)
    return found | {"peak_bytes": peak_bytes(setting)}


def score(criteria: tuple[str, ...], setting: Setting, device: str) -> dict[str, Any]:
    """Load the dense checkpoint, score its layers on a device, and take the time."""
    import torch

    from hf_layerprune.calibration.rows import CalibrationSet
    from hf_layerprune.options.shared import CalibrationOptions
    from hf_layerprune.runtime.loading import load_base
    from hf_layerprune.runtime.walk import LayerWalk
    from hf_layerprune.select.runner import score_layers

    usual, dense = CalibrationOptions(), base(setting)
    samples, length = (4, 16) if setting.tiny else (usual.calibration_samples, usual.calibration_length)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 100 if setting.tiny else 128_000, (samples, length), generator=generator)
    start = time.perf_counter()
    walk = LayerWalk(load_base(dense, dtype="auto"), device=device)
    loaded = time.perf_counter() - start
    score_layers(walk, CalibrationSet.from_ids(rows, "random"), criteria)
    if device != "cpu":
        torch.accelerator.synchronize()
    return {"seconds": time.perf_counter() - start, "load_seconds": loaded, "tokens": rows.numel()}
