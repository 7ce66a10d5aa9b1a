"""`hf layerprune ...`: the command as an extension of the Hub's own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .tiny_models import tiny_model


def test_hf_layerprune(tmp_path: Path) -> None:
    base, scripts, home = tmp_path / "base", Path(sys.executable).parent, tmp_path / "home"
    tiny_model("llama").save_pretrained(base)
    extension = home / ".local" / "share" / "hf" / "extensions" / "hf-layerprune"
    extension.mkdir(parents=True)
    manifest = {
        "owner": "someone", "repo": "hf-layerprune", "repo_id": "someone/hf-layerprune", "short_name": "layerprune",
        "executable_path": str(scripts / "hf-layerprune"), "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (extension / "manifest.json").write_text(json.dumps(manifest))
    env = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

    def hf(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(scripts / "hf"), "layerprune", *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)

    done = hf("prune", str(base), str(tmp_path / "out"), "--drop-layers", "1,6")
    assert done.returncode == 0, done.stderr
    assert "dropped layers 1,6 of 8: 6 left" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    done = hf("prune", str(base), str(tmp_path / "out2"), "--drop", "0")
    assert done.returncode == 2
    assert "--drop 0 must be" in done.stderr
