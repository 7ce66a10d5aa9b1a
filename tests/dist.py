"""Build the wheel and the sdist, install the wheel into an empty environment, and use it there.

python -m tests.dist          build, check the contents, install the wheel with its dependencies, run it (minutes)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# Run in the new environment, on a tiny random model that it makes there.
USE = """
import pathlib, subprocess, sys
import torch, transformers
from hf_layerprune import LayerDropConfig, __version__, prune_with
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained("base")
command = str(pathlib.Path(sys.executable).with_name("hf-layerprune"))
subprocess.run([command, "prune", "base", "pruned", "--drop-layers", "2,3"], check=True)
subprocess.run([command, "recipes"], check=True)
assert pathlib.Path("recipes/configs/heal.yaml").is_file()
subprocess.run([command, "verify", "pruned", "--base", "base"], check=True)
model = prune_with(LayerDropConfig(base_model_name_or_path="base", drop_layers=[2, 3]))
ids = torch.arange(10)[None]
cut = transformers.AutoModelForCausalLM.from_pretrained("pruned")
torch.testing.assert_close(model(ids).logits, cut(ids).logits)
print("hf-layerprune", __version__, "works")
"""


def _run(*words: object, cwd: Path = ROOT) -> None:
    subprocess.run([str(word) for word in words], cwd=cwd, check=True)


def build() -> tuple[Path, Path]:
    """Build the wheel and the sdist in `dist/`; the wheel is built from the sdist, as pip does it."""
    shutil.rmtree(DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--outdir", DIST)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check that the wheel has every module and data file of the package, and the sdist what a developer needs."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {name for name in tracked if name.startswith("hf_layerprune/")}
    wanted |= {f"hf_layerprune/{name}" for name in tracked if name.startswith(("spaces/chat/", "recipes/"))}
    if missing := sorted(wanted - packed):
        raise SystemExit(f"the wheel lacks {', '.join(missing)}")
    stray = sorted(name for name in packed - wanted if ".dist-info/" not in name)
    if stray:
        raise SystemExit(f"the wheel holds {', '.join(stray)}")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = {"Makefile", "README.md", "LICENSE", "recipes/sft_tail.py", "tests/conftest.py", "docs/architectures.md"}
    if missing := sorted(needed - packed):
        raise SystemExit(f"the sdist lacks {', '.join(missing)}")


def use(wheel: Path) -> None:
    """Install the wheel into an empty environment, and prune a model there with the command and in Python."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        venv.create(here / "venv", with_pip=True)
        python = here / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=here)
        _run(python, "-m", "pip", "check", cwd=here)
        _run(python, "-c", USE, cwd=here)


if __name__ == "__main__":
    built = build()
    check_contents(*built)
    use(built[0])
