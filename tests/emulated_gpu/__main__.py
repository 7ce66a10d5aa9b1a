"""The tests that need a GPU, on a CUDA device that is emulated on the CPU.

    python -m tests.emulated_gpu                             # pytest -m gpu tests/test_gpu.py
    python -m tests.emulated_gpu -m pytest tests/test_rank.py     # whatever python can run

The device has its own memory and allocator. It computes with the CPU's kernels, and refuses what a GPU refuses: operands
on different devices, and matrix products of integers. So it finds tensors that are on the wrong device, and anything
that is read from the card without being copied. It shows nothing of speed, of rounding, of streams, or of kernels that
only exist for GPUs.

It needs a C++ compiler and a torch without CUDA.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TESTS = ("-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py")


def build() -> Path:
    """Compile the device for this torch, unless that was done."""
    import torch

    if torch.version.cuda:
        sys.exit("this torch has CUDA: run the tests on a GPU (make gpu)")
    source, root = HERE / "device.cpp", Path(torch.__file__).parent
    library = ROOT / ".emulated_gpu" / f"device-{torch.__version__}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    library.parent.mkdir(exist_ok=True)
    include = (root / "include", root / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=device",
        *(f"-I{folder}" for folder in include), str(source), "-o", str(library), f"-L{root / 'lib'}",
        "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", f"-Wl,-rpath,{root / 'lib'}",
    ]  # fmt: skip
    print("compiling the device", file=sys.stderr)
    subprocess.run(command, check=True)
    return library


def main() -> int:
    places = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"EMULATED_GPU": str(build()), "PYTHONPATH": os.pathsep.join(filter(None, places))}
    return subprocess.run([sys.executable, *(sys.argv[1:] or TESTS)], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
