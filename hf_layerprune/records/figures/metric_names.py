"""Labels, units and directions of all metrics, by their names in `metrics.json`.

A new metric is one line in `METRICS`. A metric that is not listed, such as one from an lm-eval task, is shown under its
own name; its unit and direction are guessed from the name.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE, BYTES, SECONDS, COUNT, NUMBER = "share", "bytes", "seconds", "count", "number"


@dataclass(frozen=True)
class Metric:
    """Label, unit and direction of a metric.

    Args:
        label (`str`): The label, with the unit if the formatted number does not show one.
        unit (`str`, defaults to `"number"`): The format of the number: `share` (0 to 1, in percent), `bytes`,
            `seconds`, `count` or `number`.
        higher_is_better (`bool`, defaults to `False`): Whether higher values are better.
        replaces (`str`, *optional*): An equivalent metric of the same task that is hidden if this one is present.
        depends_on_file (`bool`, defaults to `False`): Whether the metric depends on how a file stores its weights.
    """

    label: str
    unit: str = NUMBER
    higher_is_better: bool = False
    replaces: str | None = None
    depends_on_file: bool = False


METRICS: dict[str, Metric] = {
    "acc": Metric("accuracy", SHARE, True),
    # By the likelihood per byte of an answer.
    "acc_norm": Metric("length-normalised accuracy", SHARE, True, replaces="acc"),
    "exact_match": Metric("exact match", SHARE, True),
    "f1": Metric("F1", SHARE, True),
    "perplexity": Metric("perplexity", replaces="nll"),
    "word_perplexity": Metric("per-word perplexity"),
    "byte_perplexity": Metric("per-byte perplexity"),
    "bits_per_byte": Metric("bits per byte"),
    "nll": Metric("cross-entropy, nats per token"),
    "kl": Metric("KL divergence from dense, nats per token"),  # of the distributions of the next token
    "top1_agreement": Metric("top-1 agreement with dense", SHARE, True),  # of the likeliest next token
    "parameters": Metric("parameters", COUNT),
    "active_parameters": Metric("active parameters", COUNT),  # those that a token of a mixture of experts uses
    "bytes_on_disk": Metric("size on disk", BYTES, depends_on_file=True),  # of the weight files
    "prefill_tokens_per_second": Metric("prefill throughput, tokens/s", NUMBER, True),
    "decode_tokens_per_second": Metric("decode throughput, tokens/s", NUMBER, True),
    "time_to_first_token": Metric("time to first token", SECONDS),
    "load_seconds": Metric("load time", SECONDS, depends_on_file=True),
    "peak_rss_bytes": Metric("peak memory", BYTES, depends_on_file=True),  # resident set of the process
    "peak_cuda_bytes": Metric("peak GPU memory", BYTES),  # allocated by PyTorch
    "kv_cache_bytes_per_token": Metric("KV cache per token", BYTES),
}
_SHARES = {"acc", "agreement", "match", "em", "f1"}
_LOWER = ("perplexity", "nll", "kl", "bits_per", "bytes", "seconds", "time_", "parameters", "loss", "error")

# Names of tasks as their authors spell them.
TASKS = {
    "piqa": "PIQA", "hellaswag": "HellaSwag", "openbookqa": "OpenBookQA", "openbook_qa": "OpenBookQA",
    "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "cmmlu": "CMMLU",
    "winogrande": "WinoGrande", "wikitext": "WikiText-2", "lambada_openai": "LAMBADA", "boolq": "BoolQ",
    "gsm8k": "GSM8K",
}  # fmt: skip


def get_metric(name: str, kind: str | None = None, unit: str | None = None) -> Metric:
    """Look up a metric by its name, or guess its unit and direction from the name, kind and unit in `metrics.json`."""
    if name in METRICS:
        return METRICS[name]
    if kind == "accuracy" or _SHARES & set(name.split("_")):
        guess = SHARE
    elif "bytes" in name or unit in ("bytes", "B"):
        guess = BYTES
    elif name.endswith("seconds") or name.startswith("time_") or unit in ("s", "seconds"):
        guess = SECONDS
    else:
        guess = NUMBER
    return Metric(name.replace("_", " "), guess, not any(part in name for part in _LOWER))
