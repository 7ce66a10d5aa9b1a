"""The table of architectures: prove every causal model type at every stage, and write what came out.

python -m tests.architectures                            prove all, print what fails
python -m tests.architectures llama gpt2                 prove some
python -m tests.architectures --stages heal,evaluate     prove some stages
python -m tests.architectures --write                    prove all, then write proven.txt and docs/architectures.md
python -m tests.architectures --document                 write docs/architectures.md alone
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_layerprune import families

from .compat import rendered as rendered_versions
from .matrix import CUT, cuts
from .tiny_models import MODEL_TYPES, tiny_config

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architectures.md"
PROVEN = ROOT / "hf_layerprune" / "families" / "proven.txt"
COLUMNS = (CUT, *families.STAGES)

HEADER = """\
# Architectures

Every causal language model type of transformers {version}: {proven} proven, {refused} refused, no third state. An
unknown type is refused too. Made by `make docs`; do not edit.

*Proven* means: a tiny random model of the type, with its own alternations between layers and with no scale or cap of
its config at 1, was compared with itself as transformers runs it.

**cut**: the model was cut at its tail and, at an odd number of places that are not neighbours, in its middle, and each
time

1. the cut model in memory and the same model saved and reloaded by plain transformers gave the same logits, to
   the last bit;
2. both gave the logits of the dense model in which each dropped layer hands its input on unchanged;
3. greedy generation gave the same tokens with the key-value cache and without it;
4. the saved config passed transformers' own validation;
5. the same cut made on disk, and the model loaded without the dropped layers, had the same tensors and logits.

**rank**: run one layer at a time, the hidden states behind every layer and the logits were the model's own; perplexity
and KL without each layer, and Taylor scores, were those of a plain loop over the model's own logits.

**repair**: each map was the ridge solution of what the model's own layers give, and explained the fitted rows no worse
than the plain cut; a rescaled model gave the logits of the cut one with its hidden states multiplied; the repaired
model in memory and reloaded were the same to the last bit. The repairs that a type accepts are listed.

**heal**: the loss and every gradient of one step of `HealTrainer` with `ce`, `kd` and `ce+kd` were those of a plain
loop over the model's own logits.

**evaluate**: perplexity, KL and top-1 agreement were those of the model's own logits.

Single cuts of a proven type can still be refused, with a reason: where layers share keys and values, where a
config can only describe a period, or where a layer can stand at one place only.

| model type | cut | rank | repair | heal | evaluate | tail cut | middle cut | fields rewritten besides the layer count |
|---|---|---|---|---|---|---|---|---|
"""


def middle_fields(model_type: str) -> list[str]:
    """The config fields that the middle cut of a type rewrites, without the layer count."""
    config = tiny_config(model_type)
    cut = families.make_cut(config, cuts(model_type, config)["middle"])
    before = families.text_config(config).to_dict()
    after = families.text_config(families.cut_config(config, cut)).to_dict()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return sorted(changed - {families.MARKER, families.count_field(families.text_config(config))})


def render() -> str:
    """The document, from the tables in `families` and the tiny configs, without running the proofs."""
    table = families.proven_stages()
    proven = [t for t in MODEL_TYPES if t not in families.REFUSED]
    refused = [t for t in MODEL_TYPES if t in families.REFUSED]
    lines = [HEADER.format(version=version("transformers"), proven=len(proven), refused=len(refused)).rstrip("\n")]
    for model_type in proven:
        both = cuts(model_type, tiny_config(model_type))
        spelled = [", ".join(map(str, both[name])) for name in ("tail", "middle")]
        fields = ", ".join(f"`{name}`" for name in middle_fields(model_type))
        stages = [_cell(stage, table[model_type]) for stage in COLUMNS]
        lines.append("| " + " | ".join((model_type, *stages, *spelled, fields)).rstrip() + " |")
    lines += ["", "## Refused", "", "| model type | reason |", "|---|---|"]
    lines += [f"| {model_type} | {families.REFUSED[model_type]} |" for model_type in refused]
    for stage, reasons in families.REFUSED_AT.items():
        if reasons:
            lines += ["", f"## Refused by {stage}", "", f"The way out: {families.STAGES[stage].instead}.", ""]
            lines += ["| reason | model types |", "|---|---|"]
            for reason in dict.fromkeys(reasons.values()):
                types = ", ".join(t for t, why in reasons.items() if why == reason)
                lines.append(f"| {reason} | {types} |")
    lines += ["", rendered_versions().rstrip("\n")]
    return "\n".join(lines) + "\n"


def _cell(stage: str, proven: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(proven[stage]) or "yes" if stage in proven else "refused"


def proven_types() -> list[str]:
    """What proven.txt lists: the types that are not refused, and the text decoders inside them."""
    types = [t for t in MODEL_TYPES if t not in families.REFUSED]
    return sorted({*types, *(families.text_config(tiny_config(t)).model_type for t in types)})


def write_table(outcomes: dict[str, dict[str, str]]) -> None:
    """Write proven.txt; what other versions of transformers have proven stays in it.

    Args:
        outcomes (`dict[str, dict[str, str]]`): By model type and stage, see [`~matrix.outcomes`].
    """
    rows = {
        t: " ".join((t, *(_token(s, stages) for s, stages in row.items())))
        for t, row in families.proven_stages().items()
        if t not in CONFIG_MAPPING
    }
    for model_type, by_stage in outcomes.items():
        stages = [s + o.removeprefix("proven") for s, o in by_stage.items() if o.startswith("proven")]
        for name in {families.text_config(tiny_config(model_type)).model_type, model_type}:
            if name == model_type or name not in MODEL_TYPES:
                rows[name] = " ".join((name, *stages))
    PROVEN.write_text("\n".join(rows[t] for t in sorted(rows)) + "\n")
    families.types.proven_stages.cache_clear()


def _token(stage: str, variants: tuple[str, ...]) -> str:
    return f"{stage}={','.join(variants)}" if variants else stage


def _prove(model_type: str, stages: tuple[str, ...]) -> tuple[str, dict[str, str], float]:
    import torch
    import transformers

    from .stages import outcomes

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    return model_type, outcomes(model_type, stages), time.perf_counter() - start


def main() -> int:
    """Prove, report, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--stages", default=",".join(COLUMNS), help="what to prove; all by default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write the table and the document if nothing is wrong")
    parser.add_argument("--document", action="store_true", help="only write the document")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    stages = tuple(args.stages.split(","))
    if args.write and (args.types or stages != COLUMNS):
        parser.error("--write goes with all types and stages")
    if args.document:
        DOCUMENT.write_text(render())
        return 0
    types = args.types or [t for t in MODEL_TYPES if t not in families.REFUSED]
    found: dict[str, dict[str, str]] = {}
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_prove, model_type, stages) for model_type in types]):
            model_type, found[model_type], seconds = done.result()
            for stage, outcome in found[model_type].items():
                print(f"{model_type:32} {stage:9} {outcome}")
            print(f"{model_type:32} {seconds:6.1f} s", flush=True)
    wrong = 0
    for stage in stages:
        counts = {kind: sum(o[stage].startswith(kind) for o in found.values()) for kind in ("proven", "refused")}
        rest = len(found) - sum(counts.values())
        wrong += rest
        print(f"{stage:9} {counts['proven']} proven, {counts['refused']} refused, {rest} wrong")
    if args.write and not wrong:
        write_table(found)
        DOCUMENT.write_text(render())
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
