from __future__ import annotations

import os
import subprocess
import sys

import pytest

KNOWN = "import peft.mapping as m; assert 'LAYER_DROP' in m.PEFT_TYPE_TO_TUNER_MAPPING, 'unknown to PEFT'"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_layerprune, peft",
        "import peft, hf_layerprune",
        "from hf_layerprune import LayerDropConfig",
        "from hf_layerprune.adapter.config import LayerDropConfig",
        "from hf_layerprune.adapter.model import LayerDropModel",
    ],
)
def test_peft_knows_the_method(imports: str) -> None:
    done = run(f"{imports}\n{KNOWN}")
    assert done.returncode == 0, done.stderr


def test_without_the_plugin_peft_does_not() -> None:
    assert "unknown to PEFT" in run(KNOWN).stderr


@pytest.mark.parametrize(
    "code",
    [
        "import hf_layerprune",
        "import hf_layerprune.cli as c; c.build_parser()",
        "import hf_layerprune.stages.requests",
    ],
)
def test_import_is_light(code: str) -> None:
    done = run(f"import sys; {code}; print(sorted({{'torch', 'peft', 'transformers', 'numpy'}} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_is_quick() -> None:
    def seconds() -> float:
        """Of the processor, so that a busy machine is no failure."""
        start = os.times()
        assert run("from hf_layerprune.cli import main; main(['prune', '--help'])").returncode == 0
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_public_surface() -> None:
    import hf_layerprune

    for name in hf_layerprune.__all__:
        assert getattr(hf_layerprune, name).__doc__, name
    assert set(hf_layerprune.__all__) <= set(dir(hf_layerprune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_layerprune.nothing


def test_asking_whether_peft_is_there_does_not_lose_the_registration() -> None:
    code = (
        "import hf_layerprune, importlib.util; importlib.util.find_spec('peft'); importlib.util.find_spec('peft'); "
        "import peft; from hf_layerprune import LayerDropConfig; "
        "assert LayerDropConfig(drop=1).peft_type in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
