"""Which model types are proven for which stages, and why the others are refused.

The table is `proven.txt` in this folder: one model type per line, followed by the stages it is proven for. `make docs`
writes it together with docs/architectures.md from a run of the matrix, and `tests/test_matrix.py` checks both. It may
contain types that some supported versions of transformers don't have.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """The words for refusing a stage: completes "model type 'x' can't be ...", and what to do instead."""

    can_not: str
    instead: str


# What to do about a model, or a layer, that can't be repaired.
UNREPAIRABLE = (
    "leave the repair out; to recover quality, train the layers next to the cut (--method cut2 in the recipe, or "
    'tune_layers="cut")'
)

STAGES: dict[str, Stage] = {
    "rank": Stage(
        "ranked on text",
        "use a criterion that needs no text (reverse_order, random, magnitude_l1, magnitude_l2), or list the layers "
        "yourself (`prune --drop-layers`, or `drop_layers` in a config)",
    ),
    "repair": Stage("repaired", UNREPAIRABLE),
    "heal": Stage("healed", "train the pruned model with transformers' Trainer, which uses the model's own loss"),
    "evaluate": Stage("evaluated on text", "run lm-eval's own command on the model's folder"),
}

ENCODER_DECODER = "it is an encoder-decoder: every layer of its decoder reads the encoder's output"
_IMAGE_ALWAYS = "its forward pass needs an image with every text, so it can't be ranked, checked or healed on text"
_REFUSED_MULTIMODAL: dict[str, str] = {
    **dict.fromkeys(
        ("blip", "evolla", "florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
        ENCODER_DECODER,
    ),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "kosmos-2"), _IMAGE_ALWAYS),
    "diffusion_gemma": "it fills blocks of tokens by diffusion, not one token after another",
    "idefics": "its cross-attention layers come at a fixed interval, and it can't run without an image",
    "inkling2": "the residuals of its text decoder span blocks of layers that are defined by index",
    "inkling2_loop": "its text decoder runs some layers in a loop, and its residuals span blocks that are defined by index",
    "kyutai_speech_to_text": "each position of its input is a token and a row of audio codes, so it can't run on text alone",
    "nemo_speechlm": "it is two speech encoders around a decoder of labels, not a language model",
    "pi0": "it is a robot's policy: its language decoder feeds a second decoder of actions layer by layer",
    "qwen2_5_omni": "it has no forward pass of its own; its language model, qwen2_5_omni_thinker, is proven",
    "qwen3_omni_moe": "it has no forward pass of its own; its language model, qwen3_omni_moe_thinker, is proven",
    "shieldgemma2": "saved and reloaded by transformers, even uncut, it loses the weights of its text decoder",
    "unlimited_ocr": "its cache keeps only the prompt and a window of its output, so results with and without a cache differ",
    "voxtral_realtime": "it adds a stretch of audio to every token, generated ones included, so it can't run on text alone",
}

REFUSED: dict[str, str] = {
    "beam": "each layer scales its residual by its own index, so every layer above a cut would change on reload",
    "blt": "it is four stacks of layers (patcher, encoder, global, decoder) that depend on one another",
    "cpmant": "it generates other tokens with a cache than without, even uncut, so a cut can't be proven",
    "diffllama": "each layer derives its attention's lambda from its own index, so layers above a cut would change",
    "dory": "its config counts input, recurrent and output layers separately; a cut would have to update all three",
    "gemma4_assistant": "it drafts for another model and reads that model's key-value cache layer by layer",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's key-value cache layer by layer",
    "hrm_text": "it runs two stacks of layers in repeated cycles, so no layer can be dropped",
    "inkling2_text": "its residuals span blocks of layers that are defined by index",
    "inkling2_loop_text": "it runs some layers in a loop, and its residuals span blocks that are defined by index",
    "minimax": "its linear attention decays at a rate computed from the layer's index and the number of layers",
    "musicgen": "it generates audio codes for a text encoder; it can't be loaded as a causal language model alone",
    "musicgen_melody": "it generates audio codes for a text encoder; it can't be loaded as a causal language model alone",
    "prophetnet": "it generates other tokens with a cache than without, even uncut, so a cut can't be proven",
    "reformer": "its reversible layers run forward and backward in one stack with hashed attention",
    "rwkv": "it halves the hidden states and rescales weights every few layers, by layer index",
    "xlm": "it keeps attentions, norms and feed-forwards in parallel lists, not in layers",
    "zamba": "its hybrid layers share one transformer block, stored with the first of them",
    "zamba2": "its hybrid layers share transformer blocks, stored with the first of them",
    **_REFUSED_MULTIMODAL,
}

# Types that count positions from the one after the padding token's id, and so have fewer than their configs say.
AFTER_PADDING = (
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip

# Types whose layers can't be run one at a time, as ranking on text and repairs require.
_STREAMS = "its layers pass on several streams of hidden states"
_SHARED = "its last layers read keys and values of earlier layers, so they can't run alone"
_NO_IMAGE = "its cross-attention layers run only if there is an image"
_UNRANKED: dict[str, str] = {
    **dict.fromkeys(("deepseek_v4", "gemma3n", "gemma3n_text", "hy_v4", "xlnet"), _STREAMS),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _SHARED),
    **dict.fromkeys(
        ("glm_moe_dsa", "mistral_large4", "mistral_large4_text"),
        "its layers attend to tokens selected by an earlier layer, so they can't run alone",
    ),
    **dict.fromkeys(("mllama", "mllama_text_model"), _NO_IMAGE),
    "zaya": "its routers read the output of the previous layer's router",
    **dict.fromkeys(("glm5_next", "glm5_next_text", "hy_v4_vl", "hy_v4_vl_text"), _STREAMS),
    "chameleon": "it masks logits of image tokens by index, so it can't run without its output head",
}

_NO_PROJECTION = (
    "no output projection of its layers writes into the hidden states, directly or through an RMS norm: it is followed "
    "by another norm, or is not a plain matrix"
)


@cache
def proven_stages() -> dict[str, dict[str, tuple[str, ...]]]:
    """The proven stages of each model type, `"cut"` first, each with its variants, such as the repairs."""
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    for line in files(__package__).joinpath("proven.txt").read_text().splitlines():
        model_type, *stages = line.split()
        parts = (stage.partition("=") for stage in stages)
        table[model_type] = {stage: tuple(variants.split(",")) if variants else () for stage, _, variants in parts}
    return table


# Types that are proven for a cut but refused at a later stage: the reason, by stage and model type.
REFUSED_AT: dict[str, dict[str, str]] = {
    "rank": _UNRANKED,
    # Types without any layer that can be repaired. If some layers can be, only cuts at the others are refused.
    "repair": _UNRANKED
    | {t: _NO_PROJECTION for t, stages in proven_stages().items() if "repair" not in stages and t not in _UNRANKED},
    "heal": {
        "git": "its output embedding shares its name with modules inside its layers, so PEFT can't train it alone",
        **dict.fromkeys(
            ("mistral_large4", "mistral_large4_text"),
            "its layers read keys and values of earlier ones, so they can't be trained on top of cached layers",
        ),
        **dict.fromkeys(("molmo2", "molmo2_text"), "training it needs rows that mark their image tokens"),
        "nemotron_h_omni": "transformers does not say which module is its output head, so PEFT can't train it",
        "mpt": "with PEFT it accepts no input embeddings, which training on top of cached layers needs",
        **dict.fromkeys(("mllama", "mllama_text_model"), _NO_IMAGE),
    },
    "evaluate": {},
}


@cache
def proven() -> frozenset[str]:
    """Model types that are proven to survive a cut, including the text decoders of multimodal models."""
    return frozenset(proven_stages())


@cache
def _version_table() -> dict[str, dict[str, Any]]:
    """By version of transformers: the `proven` types, and why the `failed` ones are not."""
    return json.loads(files(__package__).joinpath("versions.json").read_text())


def is_known_broken(version: str, model_type: str) -> bool:
    """Whether a cut of a type that is proven elsewhere is known to change the model with a version of transformers."""
    return _version_table().get(version, {}).get("failed", {}).get(model_type, "").startswith("WRONG")


def proven_versions(*model_types: str) -> list[str]:
    """The versions of transformers for which the matrix proves all of the given model types, oldest first.

    `versions.json` in this folder lists the proven and failed types for each version that was tested; `make compat`
    writes it.
    """
    return [version for version, row in _version_table().items() if set(row["proven"]).issuperset(model_types)]
