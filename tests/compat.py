"""Run the tests against other versions of transformers, PEFT, TRL, the Hub client and other libraries.

python -m tests.compat                    the fast tests, the matrix and the floors' own test files in all stacks but torch's
python -m tests.compat torch-2.8          torch's floor, which pip downloads with its dependencies
python -m tests.compat floor newest       some stacks
python -m tests.compat --smoke            a few test files at the floor

Each stack is an overlay: its packages, without their dependencies, in a folder under `.compat/` that precedes the
environment on the path. With transformers 5.4, tests skip the model types that it lacks or that are broken in it. The
results of the matrix go to hf_layerprune/families/versions.json, those of the tests to `.compat/results.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / ".compat"
PROVEN_AT = ROOT / "hf_layerprune" / "families" / "versions.json"
UNCUT = "fails uncut as well"

_WORKERS = ["-n", "auto", "--dist", "loadfile"]
FAST = [*_WORKERS, "-m", "not matrix and not browser and not processes and not space and not fuzz", "tests"]
SMOKE = [f"tests/test_{name}.py" for name in ("names", "registration", "check", "prune_with")]
_PEFT = [f"tests/test_{name}.py" for name in ("adapter", "prune_with", "registration", "push_adapter")]
_TRL = [
    f"tests/test_heal_{name}.py"
    for name in ("checkpoints", "data", "losses", "methods", "precompute", "store", "trainer")
]
_HUB = [f"tests/test_{name}.py" for name in ("checkpoint_remote", "publish_hub", "push_adapter")]
_FLOORS = [
    f"tests/test_{name}.py"
    for name in "adapter walk check repair heal_data heal_losses heal_methods gguf_layers gguf_file".split()
]
_OLD_TOKENIZERS = "tokenizers==0.22.2"


@dataclass
class Stack:
    """Versions that are tested together.

    Args:
        packages (`list[str]`): Pinned requirements for pip.
        tests (`list[str]`): The arguments of pytest.
        matrix (`bool`): Whether to prove every architecture as well.
        only_by_name (`bool`): Whether its dependencies (gigabytes) are installed too; it then runs only when named.
    """

    packages: list[str]
    tests: list[str] = field(default_factory=lambda: list(FAST))
    matrix: bool = False
    only_by_name: bool = False


STACKS = {
    "floor": Stack(
        ["transformers==5.4.0", _OLD_TOKENIZERS, "huggingface-hub==1.31.0", "peft==0.19.0", "trl==1.0.0"], matrix=True
    ),
    "5.10": Stack(["transformers==5.10.4", _OLD_TOKENIZERS, "huggingface-hub==1.31.0"], matrix=True),
    "5.16": Stack(["transformers==5.16.1", "huggingface-hub==1.33.0"], matrix=True),
    "newest": Stack(["transformers==5.24.0"], matrix=True),
    "floors": Stack(["accelerate==1.10.0", "datasets==4.7.0", "pyarrow==21.0.0", "gguf==0.18.0"], _FLOORS),
    "peft-0.19": Stack(["peft==0.19.0"], _PEFT),
    "peft-0.20": Stack(["peft==0.20.0"], _PEFT),
    "trl-1.0": Stack(["trl==1.0.0"], _TRL),
    "trl-1.10": Stack(["trl==1.10.0"], _TRL),
    "trl-1.15": Stack(["trl==1.15.0"], _TRL),
    "hub-1.31": Stack(["huggingface-hub==1.31.0", "transformers==5.16.1"], _HUB),
    "hub-2.0": Stack(["huggingface-hub==2.0.0"], _HUB),
    # torchao 0.18 needs a newer torch.
    "torch-2.8": Stack(["torch==2.8.0", "torchao==0.17.0", "torchvision==0.23.0"], _FLOORS, only_by_name=True),
}


def overlay(name: str) -> Path:
    """The folder with a stack's packages, installed by pip if it is missing or has other versions."""
    folder, pins = OVERLAYS / name, "\n".join(STACKS[name].packages)
    stamp = folder / "pins.txt"
    if not stamp.is_file() or stamp.read_text() != pins:
        subprocess.run(["rm", "-rf", folder], check=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        alone = [] if STACKS[name].only_by_name else ["--no-deps"]
        subprocess.run([*pip, *alone, "--target", str(folder), *STACKS[name].packages], check=True)
        stamp.write_text(pins)
    return folder


def run(name: str, command: list[str]) -> int:
    """Run Python in a stack."""
    path = os.pathsep.join([str(ROOT), str(overlay(name))])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT).returncode


def test(name: str, tests: list[str]) -> dict[str, object]:
    """Run tests in a stack, and count the outcomes."""
    report = OVERLAYS / f"{name}.xml"
    start = time.perf_counter()
    run(name, ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *tests])
    suite = next(iter(ElementTree.parse(report).getroot()))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(failed) - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(time.perf_counter() - start)}


def prove_all(output: Path, types: list[str]) -> None:
    """Prove the model types that this version of transformers has. Each writes a line of JSON, so a run can be resumed.

    Args:
        output (`Path`): The file for the lines.
        types (`list[str]`): The model types; all if empty.
    """
    import torch
    import transformers

    from hf_layerprune import families

    from .matrix import CUT
    from .stages import outcomes
    from .tiny_models import ALL_TYPES, tiny_config

    families.is_known_broken = lambda *_: False  # retry what failed before
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    done = {json.loads(line)["type"] for line in output.read_text().splitlines()} if output.is_file() else set()
    for model_type in types or ALL_TYPES:
        if model_type in families.REFUSED or model_type not in families.proven() or model_type in done:
            continue
        try:
            outcome = outcomes(model_type, (CUT,))[CUT]
        except Exception as failure:  # this version refuses the settings of the tiny model
            outcome = f"{type(failure).__name__}: {failure}"
        error = None if outcome.startswith("proven") else " ".join(outcome.split())[:200]
        if error is not None and _fails_uncut(model_type):
            error = f"{UNCUT}; {error}"
        row = {"version": transformers.__version__, "type": model_type, "error": error}
        if error is None:
            row["text"] = families.text_config(tiny_config(model_type)).model_type
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _fails_uncut(model_type: str) -> bool:
    """Whether the uncut model can't be built, changes on reload, or generates other tokens with a cache."""
    import tempfile

    import torch

    from .matrix import SEED, greedy, load, logits
    from .tiny_models import tiny_input, tiny_model

    ids = tiny_input()
    try:
        dense = tiny_model(model_type, seed=SEED.get(model_type, 0))
        with tempfile.TemporaryDirectory() as folder:
            dense.save_pretrained(folder)
            again, lost = load(folder, dense)
        same = torch.equal(greedy(again, ids, use_cache=True), greedy(again, ids, use_cache=False))
        return bool(lost) or not same or not torch.allclose(logits(again, ids), logits(dense, ids), atol=1e-5)
    except Exception:
        return True


def record(output: Path, add: bool = False) -> str:
    """Record the results of the matrix in versions.json.

    Args:
        output (`Path`): The lines that [`prove_all`] wrote.
        add (`bool`): Keep the results of other types with this version.

    Returns:
        `str`: A one-line summary.
    """
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    version = rows[0]["version"]
    table = json.loads(PROVEN_AT.read_text()) if PROVEN_AT.is_file() else {}
    proven = {row["type"] for row in rows if row["error"] is None}
    failed = {row["type"]: row["error"] for row in rows if row["error"] is not None}
    listed = proven | {row["text"] for row in rows if "text" in row}  # and the text decoders inside multimodal types
    if add and version in table:
        known = table[version]
        listed |= set(known["proven"]) - failed.keys()
        failed |= {name: why for name, why in known["failed"].items() if name not in listed | failed.keys()}
    table[version] = {"proven": sorted(listed), "failed": dict(sorted(failed.items()))}
    ordered = sorted(table.items(), key=lambda item: tuple(map(int, item[0].split("."))))
    PROVEN_AT.write_text(json.dumps(dict(ordered), indent=1) + "\n")
    return f"transformers {version}: {len(proven)} of {len(rows)} types proven"


def rendered(without_row: int) -> str:
    """The section of docs/architectures.md about other versions, from versions.json.

    Args:
        without_row (`int`): Number of proven types without a row of their own in the tables above it.
    """
    table = json.loads(PROVEN_AT.read_text())
    lines = [
        "## With other versions of transformers",
        "",
        "Results of the cut proof for the listed types that each version has (`make compat`). With a version that is not",
        "in this table, a cut on disk logs a warning once, and `hf-layerprune prune --check` compares the pruned model with",
        "its base; a cut in memory is always compared.",
        "",
        "The counts include text models inside multimodal ones, which have no row of their own above "
        f"({without_row} in the newest version).",
        "",
        "| transformers | proven | not proven | fail even without a cut |",
        "|---|---|---|---|",
    ]
    for version, row in table.items():
        uncut = sorted(name for name, why in row["failed"].items() if why.startswith(UNCUT))
        ours = sorted(row["failed"].keys() - set(uncut))
        lines.append(f"| {version} | {len(row['proven'])} | {', '.join(ours)} | {', '.join(uncut)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Build the overlays, run the tests and the matrix in them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", nargs="*", help=f"of {', '.join(STACKS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="a few test files at the floor")
    parser.add_argument("--only", choices=("tests", "matrix"), help="one of the two")
    parser.add_argument("--types", nargs="*", default=[], help="only these rows of the matrix; the others stay")
    parser.add_argument("--prove", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prove:
        prove_all(args.prove, args.types)
        return 0
    names = args.stacks or (["floor"] if args.smoke else [n for n, s in STACKS.items() if not s.only_by_name])
    if unknown := [name for name in names if name not in STACKS]:
        parser.error(f"no stack {unknown[0]}; there are {', '.join(STACKS)}")
    OVERLAYS.mkdir(exist_ok=True)
    results, failed = {}, False
    for name in names:
        stack = STACKS[name]
        if args.only != "matrix":
            results[name] = test(name, SMOKE if args.smoke else stack.tests)
            failed |= bool(results[name]["failed"]) or not results[name]["passed"]
            print(f"{name}: {json.dumps(results[name])}", flush=True)
        if stack.matrix and not args.smoke and args.only != "tests":
            output = OVERLAYS / f"{name}.{'-'.join(['matrix', *args.types])}.jsonl"
            if run(name, ["-m", "tests.compat", "--prove", str(output), "--types", *args.types]):
                failed = True  # the next run continues from here
                continue
            print(f"{name}: {record(output, add=bool(args.types))}", flush=True)
            output.unlink()
    (OVERLAYS / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
