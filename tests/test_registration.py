from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import hf_layerprune

KNOWN = "import peft.mapping as m; assert 'LAYER_DROP' in m.PEFT_TYPE_TO_TUNER_MAPPING, 'unknown to PEFT'"
# Each program on standard input in a process of its own; the slow imports, which none of them is about, once for all.
EACH_ALONE = """
import json, os, sys, traceback, accelerate, bitsandbytes, torch._dynamo
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomPreTrainedModel, PreTrainedModel
assert not {"peft", "hf_layerprune"} & set(sys.modules)
for program in json.load(sys.stdin):
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        try:
            exec(program)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(code: str, words: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], input=words, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_peft_knows_the_method() -> None:
    """However the two are imported; asking whether PEFT is there does not count; and not without the package."""
    asking = "import hf_layerprune, importlib.util as u; u.find_spec('peft'); u.find_spec('peft'); import peft"
    imports = [
        "import hf_layerprune, peft",
        "import peft, hf_layerprune",
        "from hf_layerprune import LayerDropConfig",
        "from hf_layerprune.adapter.model import LayerDropModel",
        "import hf_layerprune.repair.frozen, peft",
        "import hf_layerprune.runtime.head, peft",
        asking,
        "import sys; sys.meta_path.insert(0, type('Old', (), {'find_module': lambda *_: None})()); import hf_layerprune, peft",
    ]
    programs = [*(f"{each}\n{KNOWN}" for each in imports), KNOWN]
    done = run(EACH_ALONE, json.dumps(programs))
    assert done.stdout.split() == ["0"] * len(imports) + ["1"], done.stderr
    assert "unknown to PEFT" in done.stderr


def test_only_the_method_imports_peft_at_its_top() -> None:
    """PEFT's import registers the method, which would find a module half-imported that is the first to import PEFT."""
    package = Path(hf_layerprune.__file__).parent
    found = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and re.match(r"(from|import) peft\b", ast.unparse(node))
    }
    assert found == {"adapter"}


@pytest.mark.parametrize(
    "code",
    [
        "import hf_layerprune",
        "import hf_layerprune.cli as c; c.build_parser()",
        "import hf_layerprune.stages.requests",
        # The rooms of a card, which a page or a Space may use without torch.
        "from hf_layerprune.publish.card import escape, plots, regions, render, style, tables",
        "from hf_layerprune.publish.hub import leaks",
        "from hf_layerprune.records import licences, lineage",
    ],
)
def test_import_is_light(code: str) -> None:
    heavy = {"torch", "peft", "transformers", "numpy", "matplotlib"}
    done = run(f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_is_quick() -> None:
    def seconds() -> float:
        """Processor time, so that a busy machine does not fail the test."""
        start = os.times()
        assert run("from hf_layerprune.cli import main; main(['prune', '--help'])").returncode == 0
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_public_surface() -> None:
    from trl import SFTConfig, SFTTrainer

    import hf_layerprune

    for name in hf_layerprune.__all__:
        assert getattr(hf_layerprune, name).__doc__, name
    # What a name in a signature means is known when a program runs, too.
    for one in (*map(hf_layerprune.__getattr__, hf_layerprune._LAZY), hf_layerprune.HealTrainer.__init__):
        assert get_type_hints(one), one
    assert issubclass(hf_layerprune.HealTrainer, SFTTrainer)
    assert issubclass(hf_layerprune.HealConfig, SFTConfig)
    assert {*hf_layerprune.__all__, "HealConfig", "HealTrainer"} <= set(dir(hf_layerprune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_layerprune.nothing
