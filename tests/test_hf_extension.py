"""`hf layerprune ...`: the command as an extension of the Hub's own command line."""

from __future__ import annotations

from pathlib import Path

from .hf_extension import HfExtension
from .tiny_models import tiny_model


def test_hf_layerprune(tmp_path: Path) -> None:
    hf = HfExtension(tmp_path / "home")
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)

    done = hf("prune", str(base), str(tmp_path / "out"), "--drop-layers", "1,6")
    assert done.returncode == 0, done.stderr
    assert "dropped layers 1,6 of 8: 6 left" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = hf("prune", str(base), str(tmp_path / "out2"), "--drop", "0")
    assert done.returncode == 2
    assert "drop=0 must be" in done.stderr
