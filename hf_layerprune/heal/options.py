"""The options of healing. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options, integer, option
from ..options.quantities import number_between
from .methods import method_help

# The bounds are excluded.
_RATE = number_between(-1e-12, 100, "a number from 0 to 100", "X")
_TEMPERATURE = number_between(0, 1e6, "a number above 0", "T")
LOSSES = ("ce", "kd", "ce+kd")
CACHE_MODES = ("auto", "on", "off")
DIRECTIONS = ("forward", "reverse")
TEMPLATES = ("auto", "chat", "alpaca")


@dataclass(kw_only=True)
class HealOptions(Options):
    """What is trained, on which loss, and what is computed only once. The rest is TRL's `SFTConfig`."""

    method: str = option("auto", method_help())
    learning_rate: float | None = option(None, "Peak learning rate of AdamW; by default the method's own", _RATE)
    loss: str = option(
        "ce", "Cross-entropy on the data (ce), distillation from the dense model (kd), or both", choices=LOSSES
    )
    kd_share: float = option(
        0.5,
        "Weight of distillation in ce+kd; cross-entropy gets the rest",
        number_between(0, 1 + 1e-9, "above 0 and at most 1; use loss=ce for none", "X"),
    )
    kd_alone: float = option(
        0.0,
        "With ce+kd, share of the steps after those of features that use distillation alone; 0.85 adds cross-entropy only in "
        "the last 15 percent of them",
        number_between(-1e-9, 1, "at least 0 and below 1; use loss=kd for 1", "X"),
    )
    features: float = option(
        0.0,
        "Share of the steps at the start that only train the layers before the cut, to reproduce the dense model's "
        "hidden states after it, at 2.5 times the learning rate; such a step takes a fraction of the time of the others",
        number_between(-1e-9, 1, "at least 0 and below 1", "X"),
    )
    kd_temperature: float = option(1.0, "Temperature of both distributions in distillation", _TEMPERATURE)
    kd_direction: str = option(
        "forward", "KL(teacher || student) (forward), or KL(student || teacher) (reverse)", choices=DIRECTIONS
    )
    kd_tokens: str = option(
        "all", "Tokens to distil on: all of them, prompts included, or only those with a label (completion)",
        choices=("all", "completion"),
    )  # fmt: skip
    teacher: str | None = option(
        None, "Dense model, which teaches and writes rows; by default the one that the model was pruned from"
    )
    teacher_revision: str | None = option(
        None, "Branch, tag or commit of the teacher on the Hub; by default the commit that the model was pruned from"
    )
    cache: str = option(
        "auto",
        "Compute the output of the frozen layers once and keep it on disk: if the result is exact (auto), always, or fail if "
        "it is not exact (on), or never (off)",
        choices=CACHE_MODES,
    )
    cache_dir: str | None = option(
        None, "Folder of the cache, by default in the output folder; processes on several machines must share it"
    )
    keep_cache: bool = option(False, "Keep the cache after training, also after later runs that use it")
    float32_weights: bool = option(
        True,
        "Keep trained weights in float32 in mixed-precision training, and all weights on a CPU that is slow in bfloat16",
    )


@dataclass(kw_only=True)
class RowOptions(Options):
    """How the recipe makes training rows. With `--dataset_name self`, the dense model writes them."""

    template: str = option(
        "auto",
        "Prompt format for instructions; auto uses the chat template if there is one, otherwise Alpaca's",
        choices=TEMPLATES,
    )
    self_rows: int = option(512, "Number of rows that the dense model writes for --dataset_name self", integer())
    self_length: int = option(512, "Number of tokens in each of these rows", integer())
    rewrite_answers: bool = option(False, "Replace the data set's answers with the dense model's")
    rewrite_max_tokens: int = option(
        256, "Maximum number of tokens in a rewritten answer; rows with longer answers are left out", integer()
    )
    rewrite_temperature: float = option(
        0.0, "Sampling temperature for rewritten answers; 0 means greedy decoding", _RATE
    )


@dataclass(kw_only=True)
class FinishOptions(Options):
    """How the recipe measures the finished model."""

    eval_tasks: str | None = option(
        None,
        "Tasks to measure the finished model on, separated by commas, such as piqa,arc_easy; by default all of eval_from",
    )
    eval_texts: str | None = option(
        None,
        "Texts for perplexity and the distance to the dense model, separated by commas: wikitext2, or files; by default "
        "all of eval_from",
    )
    eval_from: str | None = option(None, "Folder with tasks and texts, as for eval --tasks-from")
    eval_limit: int | None = option(None, "Number of questions per task; by default all", integer())
