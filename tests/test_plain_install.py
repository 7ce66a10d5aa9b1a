"""What the commands do where none of the extras is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .measure_models import write_model
from .test_dependencies import PROJECT, ROOT, normal

COMMANDS = """
import sys
from hf_layerprune.cli import main

base = sys.argv[1]
few = ["--calibration-samples", "8", "--calibration-length", "16"]
for name, command in {
    "rank": ["rank", base, "scores", "--criterion", "magnitude_l1,angular_distance", *few],
    "curve": ["rank", base, "curve", "--curve", "--curve-up-to", "1", "--context", "16", *few],
    "prune": ["prune", base, "cut", "--drop-layers", "2-3", "--repair", "refit", *few],
    "verify": ["verify", "cut", "--accept-trained"],
    "card": ["card", "cut"],
    "push": ["push", "cut", "me/cut", "--dry-run"],
    "eval": ["eval", "cut", "--base", base, "--tasks", "piqa"],
    "bench": ["bench", "cut", "--base", base],
    "chat": ["chat", "cut"],
    "set": ["prune", base, "more", "--criterion", "kl", "--calibration", "some/set", *few],
}.items():
    print(f"[{name}]", flush=True)
    sys.stderr.flush()
    print(f"\\n[{name} ended with {main(command)}]", flush=True)
"""


def needed() -> set[str]:
    """The distributions that `pip install hf-layerprune` brings, without an extra."""
    found: set[tuple[str, str]] = set()
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    while wanted:
        one = wanted.pop()
        for extra in {"", *one.extras} - {extra for name, extra in found if name == normal(one.name)}:
            found.add((normal(one.name), extra))
            try:
                lines = distribution(one.name).requires or []
            except PackageNotFoundError:  # such as one for another system
                continue
            more = [Requirement(line) for line in lines]
            wanted += [each for each in more if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The exit code and the output of each command, run with nothing but the required packages on the path."""
    folder = tmp_path_factory.mktemp("plain")
    site = folder / "site"
    site.mkdir()
    tops: dict[str, Path] = {}  # several packages may share one, as those of CUDA do
    for name in needed():
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {Path(str(file)).parts[0] for file in files} - {"..", "__pycache__"}:
            tops[top] = Path(str(distribution(name).locate_file(top)))
    for top, place in tops.items():
        (site / top).symlink_to(place)
    base = write_model(folder / "base")
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", COMMANDS, str(base)],
        cwd=folder, env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    parts = re.findall(r"^\[(\w+)\]\n(.*?)^\[\1 ended with (\d)\]$", done.stdout, re.DOTALL | re.MULTILINE)
    assert done.returncode == 0, done.stdout
    return {name: (int(code), text) for name, text, code in parts}


@pytest.mark.parametrize("name", ["rank", "curve", "prune", "verify"])
def test_what_needs_no_extra_works(outcomes: dict[str, tuple[int, str]], name: str) -> None:
    code, text = outcomes[name]
    assert code == 0, text


@pytest.mark.parametrize(
    ("name", "extra"),
    [("card", "plots"), ("push", "plots"), ("eval", "eval"), ("bench", "eval"), ("chat", "space"), ("set", "eval")],
)
def test_what_needs_an_extra_names_it(outcomes: dict[str, tuple[int, str]], name: str, extra: str) -> None:
    code, text = outcomes[name]
    assert code == 1
    assert f'pip install "hf-layerprune[{extra}]"' in text
