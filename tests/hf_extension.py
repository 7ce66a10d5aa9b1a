"""`hf layerprune`: this installation as an extension of the Hub's own command line, in a home folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class HfExtension:
    """Runs `hf layerprune ...`.

    Args:
        home (`Path`): The home folder, which is made.
    """

    def __init__(self, home: Path) -> None:
        self._scripts = Path(sys.executable).parent
        extension = home / ".local" / "share" / "hf" / "extensions" / "hf-layerprune"
        extension.mkdir(parents=True)
        manifest = {
            "owner": "someone",
            "repo": "hf-layerprune",
            "repo_id": "someone/hf-layerprune",
            "short_name": "layerprune",
            "executable_path": str(self._scripts / "hf-layerprune"),
            "type": "python",
            "installed_at": "2026-01-01T00:00:00+00:00",
        }
        (extension / "manifest.json").write_text(json.dumps(manifest))
        self._environment = os.environ | {
            "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"
        }  # fmt: skip

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one command."""
        command = [str(self._scripts / "hf"), "layerprune", *words]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=600)
