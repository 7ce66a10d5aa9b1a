"""Records for the tests of publishing: a lineage and metrics as a real run could have written them.

python -m tests.publish_records --write    rewrites tests/card_expected.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.fingerprints import Identity, compute_identity, fingerprint, weights_hash
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics

EXPECTED = Path(__file__).with_name("card_expected.md")
ROLES = ("dense", "cut", "repaired", "healed")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "7e27bd9f95328f0f3b08261d1252705110c806f8"
VERSIONS = {"python": "3.11.7", "hf-layerprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
_ACCURACY = {
    "piqa": ((0.67, 0.52, 0.555, 0.64), 0.5),
    "arc_easy": ((0.475, 0.305, 0.365, 0.44), 0.25),
    "openbook_qa": ((0.355, 0.285, 0.295, 0.32), 0.276),
}
_TEXT = {"perplexity": (19.9, 62.6, 49.9, 33.1), "kl": (None, 1.42, 1.1, 0.51)}
_SPEED = (25.4, 31.5, 31.4, 31.6)


def lineage_of(roles: tuple[str, ...] = ROLES, **base: Any) -> Lineage:
    """The history of a model without layers 12 to 18 of 30, and of the later stages."""
    files = {"model.safetensors": {"size": 269_060_552, "sha256": "1" * 64}}
    told = {"id": BASE, "commit": COMMIT, "files": files, "license": "apache-2.0", "language": ["en"], "chat": True}
    drop = list(range(12, 19))
    prune = {
        "stage": "prune", "date": "2026-11-24T10:00:00+00:00", "versions": VERSIONS, "seconds": 4.8,
        "settings": {"drop_layers": drop, "dtype": "auto", "form": "model"}, "peak_memory_bytes": 337_000_000,
        "layers": {"base": 30, "left": 23}, "weights": "b" * 64,
    }  # fmt: skip
    entries: list[dict[str, Any]] = [prune]
    if "repaired" in roles:
        prune["repair"] = {"method": "linear", "changed_tensors": ["model.layers.11.mlp.down_proj.weight"]}
        prune["settings"]["repair"] = "linear"
        prune["calibration"] = {"source": "allenai/c4:validation:text", "samples": 96, "length": 512, "seed": 42,
                                "fingerprint": "1588ec45" * 8}  # fmt: skip
        prune["weights"] = "c" * 64
    if "healed" in roles:
        entries.append({
            "stage": "heal", "date": "2026-11-24T11:00:00+00:00", "versions": VERSIONS, "seconds": 960,
            "settings": {"method": "cut", "loss": "kd", "learning_rate": 2e-4, "lr_scheduler_type": "cosine",
                         "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                         "world_size": 1, "max_length": 256, "weight_decay": 0.0, "seed": 42},
            "data": [{"name": "alpaca_en_demo.json", "rows": 999, "tokens": 68_000, "sha256": "e" * 64,
                      "license": "cc-by-nc-4.0"}],
            "command": "accelerate launch recipes/sft_tail.py --model_name_or_path repaired --method cut --loss kd "
                       "--dataset_name alpaca_en_demo.json --output_dir healed",
            "changed_tensors": [f"model.layers.{i}.mlp.down_proj.weight" for i in (10, 11, 12)],
            "input_weights": prune["weights"], "weights": "d" * 64,
        })  # fmt: skip
    return Lineage(told | base, entries)


def metrics_of(lineage: Lineage, roles: tuple[str, ...] = ROLES, *, cost: bool = True) -> Metrics:
    """Numbers of each role, with paired differences to the dense model."""
    dense = weights_hash(lineage.base["files"])
    weights = {"dense": dense, "cut": "b" * 64, "repaired": "c" * 64, "healed": "d" * 64}
    weights[roles[-1]] = lineage.entries[-1]["weights"]
    metrics = Metrics(weights[roles[-1]])
    for index, role in enumerate(ROLES):
        if role not in roles:
            continue
        own, layers = weights[role], 30 if role == "dense" else 23
        parameters = 134_515_008 if role == "dense" else 109_734_336
        metrics.add_model(Identity(own), role=role, name="SmolLM2", layers=layers, parameters=parameters)
        common = {"weights": own, "date": "2026-11-24", "versions": {"lm-eval": "0.4.13"}, "dtype": "bfloat16"}
        common |= {"device": "cpu"}
        results: list[dict[str, Any]] = []
        differences: list[dict[str, Any]] = []
        for task, (values, chance) in _ACCURACY.items():
            settings = {"limit": 200}
            for metric, less in (("acc", 0.01), ("acc_norm", 0.0)):
                value = round(values[index] - less, 4)
                stderr = round((value * (1 - value) / 200) ** 0.5, 4)
                key = {"kind": "accuracy", "task": task, "metric": metric, "settings": settings}
                results.append(common | key | {"value": value, "stderr": stderr, "chance": chance, "samples": 200,
                                               "shots": 0, "higher_is_better": True})  # fmt: skip
                if role != "dense":
                    difference = round(values[index] - values[0], 4)
                    differences.append(
                        key | {"weights": own, "base": dense, "difference": difference, "stderr": 0.031,
                               "p_value": 0.4 if difference > -0.05 else 0.001, "samples": 200, "date": "2026-11-24"}
                    )  # fmt: skip
        for metric, values in _TEXT.items():
            if values[index] is not None:
                kind = "text" if metric == "perplexity" else "distance"
                results.append(common | {"kind": kind, "task": "wikitext", "metric": metric, "value": values[index],
                                         "stderr": round(values[index] * 0.03, 4), "samples": 16_384})  # fmt: skip
        if cost:
            size = {"kind": "size", "metric": "bytes_on_disk", "value": 2 * parameters, "unit": "bytes"}
            results.append(common | size)
            for batch in (1, 4):
                value = batch * _SPEED[index]
                run = {"batch": batch, "prompt_tokens": 512, "new_tokens": 32, "threads": 2}
                speed = {"kind": "speed", "metric": "decode_tokens_per_second", "value": value, "samples": 5,
                         "settings": run, "spread": [value - 0.9, value + 0.7], "higher_is_better": True}  # fmt: skip
                results.append(common | speed)
                if role != "dense":
                    key = {name: speed[name] for name in ("kind", "metric", "settings", "samples")}
                    share = round(_SPEED[index] / _SPEED[0], 4)
                    differences.append(key | {"weights": own, "base": dense, "difference": value - batch * _SPEED[0],
                                              "share": share, "date": "2026-11-24"})  # fmt: skip
        metrics.add(results=results, comparisons=differences)
    return metrics


def example_card() -> Card:
    """The card whose text is `EXPECTED`."""
    lineage = lineage_of()
    lineage.published = {"repo_id": "someone/SmolLM2-135M-Instruct-23L"}
    return Card.from_records(lineage, metrics_of(lineage))


def measure_by_hand(folder: Path) -> None:
    """Write a `metrics.json` with made-up numbers of a folder with a lineage, and of its base."""
    lineage = Lineage.load(folder)
    own, base = weights_hash(fingerprint(folder)), weights_hash(lineage.base["files"])
    layers = lineage.entries[-1]["layers"]
    metrics = Metrics(own)
    for weights, role, count, value in ((base, "dense", layers["base"], 0.5), (own, "cut", layers["left"], 0.4)):
        model = compute_identity(folder) if weights == own else Identity(weights)
        metrics.add_model(model, role=role, name="tiny", layers=count, parameters=1000 * count)
        result = {"weights": weights, "kind": "accuracy", "task": "piqa", "metric": "acc", "value": value,
                  "stderr": 0.03, "chance": 0.5, "samples": 200, "date": "2026-11-24", "versions": {}}  # fmt: skip
        metrics.add(results=[result])
    metrics.write(folder)


if __name__ == "__main__" and "--write" in sys.argv:
    EXPECTED.write_text(example_card().render())
