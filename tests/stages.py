"""The proof that a model type can be ranked, repaired, healed and measured, each against the model's own forward pass.

Every proof computes the result of a stage a second time, in the simplest way: from whole logits of the model's own
`forward`, one row at a time, with dropped layers turned into identities. One of our own errors is a refusal,
not a failure.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F

from hf_layerprune import families
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.measure.distance import text_metrics, window_means
from hf_layerprune.runtime.head import OutputHead
from hf_layerprune.runtime.parts import hook_scope
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import ALL, taylor
from hf_layerprune.select.runner import score_layers
from hf_layerprune.select.trials import Trial, evaluate_trials

from .comparing import TOLERANCE, cut_of, divergence, next_token_loss, same
from .evaluate_proofs import prove_sizes, prove_times, prove_writing
from .heal_makers import word_tokenizer
from .matrix import CUT, SEED, ProofError, cuts, identities, logits, prove, text_inputs
from .multimodal_inputs import media_inputs
from .repair_proofs import prove_repair
from .tiny_models import MULTIMODAL_TYPES, tiny_input, tiny_model
from .tiny_multimodal import WHOLE, whole_model

# --- rank -----------------------------------------------------------------------------------------------


def prove_rank(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> None:
    """Hidden states after every layer, perplexity and KL of cuts, the gradients of Taylor scores, and a choice by each
    criterion that has scores.
    """
    ids = tiny_input(seed=1, batch=3, length=12)
    dense = copy.deepcopy(dense)  # some layers keep their last states, and with them the graph for gradients
    walk = LayerWalk(dense)
    _states_are_those_of_the_model(walk, dense, ids)
    middle = proven_cuts["middle"]
    tried = [(), *((i,) for i in range(walk.num_layers)), *proven_cuts.values()]
    text = CalibrationSet.from_ids(ids, "random tokens")
    whole = logits(dense, ids)
    for drop, outcome in zip(tried, evaluate_trials(walk, text, [Trial(drop) for drop in tried]), strict=True):
        with identities(dense, drop):
            own = logits(dense, ids)
        same(f"loss without layers {drop}", outcome.loss, next_token_loss(own, ids))
        wanted = divergence(whole, own).mean()
        if not abs(outcome.kl - wanted) <= TOLERANCE * wanted + 1e-7:
            raise ProofError(f"KL without layers {drop} is {outcome.kl}, should be {wanted}")
    scores = taylor.score(walk, text).layers
    for i in (0, middle[0], walk.num_layers - 1):
        same(f"Taylor score of layer {i}", scores[i], _taylor(dense, ids, i))
    for name, found in score_layers(walk, text, ALL, drop=len(middle)).items():  # as `rank` does by default
        if len(found.pick(len(middle), set(range(walk.num_layers)), False)) != len(middle):
            raise ProofError(f"{name} can't choose {len(middle)} layers")


def _states_are_those_of_the_model(walk: LayerWalk, model: Any, ids: torch.Tensor) -> None:
    own: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        own.append(output[0] if isinstance(output, tuple | list) else output)

    with hook_scope(*[layer.register_forward_hook(keep) for layer in walk.layers]):
        whole = logits(model, ids)
    with torch.no_grad():
        batch = walk.begin(ids)
        for i in range(walk.num_layers):
            with walk.layer(i) as run:
                batch.hidden = run(batch.hidden, batch)
            same(f"hidden states behind layer {i}", batch.hidden, own[i])
        same("logits", walk.logits(batch.hidden), whole)
        same("logits of some positions of a row", walk.logits(batch.hidden[1:2, 3:7]), whole[1:2, 3:7])


def _taylor(dense: Any, ids: torch.Tensor, index: int) -> float:
    layer = find_decoder_layers(dense).layers[index]
    named = [(name, p) for name, p in layer.named_parameters() if not name.endswith("bias")]
    before = [p.requires_grad for p in dense.parameters()]
    dense.requires_grad_(False)
    for _, p in named:
        p.requires_grad_(True)
    loss = next_token_loss(dense(input_ids=ids, use_cache=False).logits, ids)
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for p, wanted in zip(dense.parameters(), before, strict=True):
        p.requires_grad_(wanted)
    products = [(p * g).abs().sum() for (_, p), g in zip(named, gradients, strict=True) if g is not None]
    return sum(product.item() for product in products)


# --- heal -----------------------------------------------------------------------------------------------

KD_SHARE, KD_TEMPERATURE = 0.3, 2.0
TEMPERATURE = {"kd_temperature": KD_TEMPERATURE}
# With attention this sharp, padding changes gradients by more than `TOLERANCE` in float32.
ROUGH = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), 5 * TOLERANCE)
# Loss, and what is trained.
HEALED = (("ce", "lm_head+last1"), ("kd", "full"), ("ce+kd", "lm_head+last1"))


class RecordingTrainer(HealTrainer):
    """Keeps the loss and the gradients of its last step."""

    seen: tuple[float, dict[str, torch.Tensor]]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step."""
        loss = super().training_step(*args, **kwargs)
        trained = {plain_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        self.seen = loss.item(), gradients
        return loss


def plain_name(name: str) -> str:
    """A parameter's name in the model inside the adapter."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def heal_rows() -> Dataset:
    """Two rows of different lengths, each with a prompt."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for length, prompt in ((12, 4), (9, 3)):
        ids = torch.randint(3, 127, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def prove_heal(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> None:
    """Loss and gradients of one step with each loss, against the model's own logits, a row at a time.

    With one cut alone, as in `make test`, cross-entropy is proven as a part of `ce+kd`.
    """
    drop = proven_cuts["middle"]
    pruned = cut_of(dense, drop)
    teacher = copy.deepcopy(dense)
    gc.freeze()  # each training run collects garbage, which is slow with everything that was imported
    for loss, method in HEALED if len(proven_cuts) > 1 else HEALED[1:]:
        mine, gradients = _trained(copy.deepcopy(pruned), teacher, loss, method, drop)
        own = copy.deepcopy(pruned)
        wanted, naive = _naive_step(own, dense, loss, list(gradients), untied=method != "full")
        name = f"{loss} of {method}"
        same(f"{name}: loss", mine, wanted)
        if not gradients:
            raise ProofError(f"{name}: nothing was trained")
        # Some gradients are only rounding errors: a bias of keys has no effect on attention.
        tolerance = ROUGH.get(dense.config.model_type, TOLERANCE)
        noise = 1e-6 * sum(gradient.square().sum() for gradient in naive.values()) ** 0.5
        for parameter, gradient in naive.items():
            off, size = (gradients[parameter] - gradient).norm(), gradient.norm()
            if not off <= tolerance * size + noise:
                raise ProofError(f"{name}: gradient of {parameter} is off by {off / size:.2g} of its size")


def _trained(
    pruned: Any, dense: Any, loss: str, method: str, drop: tuple[int, ...]
) -> tuple[float, dict[str, torch.Tensor]]:
    n = families.layer_count(dense.config)
    cut = families.Cut(tuple(i for i in range(n) if i not in drop), n)
    chosen = None if method == "full" else parse_method(method).tail_config(cut, "dense")
    settings = {"ce": {}, "kd": TEMPERATURE, "ce+kd": TEMPERATURE | {"kd_share": KD_SHARE}}[loss]
    with tempfile.TemporaryDirectory() as folder:
        args = HealConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, max_grad_norm=0.0,
            optim="sgd", report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
            bf16=False, max_length=32, pad_to_multiple_of=4, completion_only_loss=False, warmup_steps=0,
            dataset_kwargs={"skip_prepare_dataset": True}, loss=loss, method=method, **settings,
        )  # fmt: skip
        trainer = RecordingTrainer(
            pruned,
            args,
            teacher=dense if "kd" in loss else None,
            train_dataset=heal_rows(),
            processing_class=word_tokenizer(),
            peft_config=chosen,
        )
        trainer.train()
    return trainer.seen


def _naive_step(
    pruned: Any, dense: Any, loss: str, trained: list[str], *, untied: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The step's loss and gradients, from whole logits."""
    head = pruned.get_output_embeddings()
    if untied and head is not None and pruned.get_input_embeddings().weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    names = dict(pruned.named_parameters(remove_duplicate=False))
    parameters = {name: names[name] for name in trained}
    pruned.requires_grad_(False).train()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    share = {"ce": 0.0, "kd": 1.0, "ce+kd": KD_SHARE}[loss]
    ce, kd, labelled, taught = 0.0, 0.0, 0, 0
    for row in heal_rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        own = pruned(input_ids=ids, use_cache=False).logits[0, :-1].double()
        ce = ce + F.cross_entropy(own, labels, ignore_index=-100, reduction="sum")
        teacher = logits(dense, ids)[0, :-1].double()
        kd = kd + divergence(teacher / KD_TEMPERATURE, own / KD_TEMPERATURE).sum() * KD_TEMPERATURE**2
        labelled, taught = labelled + int((labels != -100).sum()), taught + len(labels)
    total = (1 - share) * ce / labelled + share * kd / taught
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    found = zip(parameters.items(), gradients, strict=True)
    return total.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in found}


# --- evaluate -------------------------------------------------------------------------------------------


def prove_evaluate(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> None:
    """Perplexity, KL and top-1 agreement, logits a few positions at a time, and text that the model writes.

    With one cut alone, as in `make test`, times and sizes are left out.
    """
    rows = tiny_input(seed=5, batch=3, length=12)
    pruned = cut_of(dense, proven_cuts["middle"])
    own, whole = (torch.cat([logits(model, row[None]) for row in rows]) for model in (pruned, dense))
    measured = window_means(pruned, rows, dense)
    same("KL", measured["kl"].mean(), divergence(whole, own)[:, :-1].mean())
    agreement = (own.argmax(-1) == whole.argmax(-1))[:, :-1].double().mean()
    same("top-1 agreement", measured["top1_agreement"].mean(), agreement, 1e-6)
    for name, nll, model in (("model", measured["nll"], own), ("base", measured["base_nll"], whole)):
        same(f"log-likelihood of the {name}", nll.mean(), next_token_loss(model, rows))
    alone, _ = text_metrics(window_means(pruned, rows)["nll"])["perplexity"]
    same("perplexity", alone, next_token_loss(own, rows).exp())
    output = OutputHead(pruned)
    with torch.no_grad():
        part = output.head().logits(output.states(input_ids=rows, use_cache=False)[:, 3:7])
    same("logits of some positions", part, own[:, 3:7])
    prove_writing(dense)
    if len(proven_cuts) > 1:
        prove_times(dense, pruned)
        prove_sizes(dense, pruned)


# The proof of each stage, which returns the variants that it holds for.
PROOFS: dict[str, Callable[[Any, dict[str, tuple[int, ...]]], Sequence[str] | None]] = {
    "rank": prove_rank,
    "repair": prove_repair,
    "heal": prove_heal,
    "evaluate": prove_evaluate,
}


def outcomes(model_type: str, stages: Sequence[str] = (CUT, *PROOFS), only: str = "") -> dict[str, str]:
    """Try to prove a model type at some stages.

    Args:
        model_type (`str`): A type that is not refused.
        stages (`Sequence[str]`, *optional*): The stages; all by default.
        only (`str`, *optional*): Try only this one of the cuts that [`cuts`] names.

    Returns:
        `dict[str, str]`: By stage, `"proven"` (or `"proven="` and the variants that are), `"refused: "` and why, or
            what is wrong.
    """
    dense = tiny_model(model_type, seed=SEED.get(model_type, 0))
    return {stage: _outcome(model_type, dense, stage, only) for stage in stages}


def _outcome(model_type: str, dense: Any, stage: str, only: str) -> str:
    both = {name: cut for name, cut in cuts(model_type, dense.config).items() if name.startswith(only)}
    try:
        if stage == CUT:
            inputs = text_inputs() | ({} if model_type in WHOLE else media_inputs(model_type, dense))
            prove(dense, both, inputs)
            variants = list(inputs) if model_type in MULTIMODAL_TYPES or len(inputs) > 1 else None
            if model_type in WHOLE:
                whole = whole_model(model_type)
                inputs = text_inputs() | media_inputs(model_type, whole)
                prove(whole, {"middle": both["middle"]}, inputs)
                variants = ["alone", *inputs]
        else:
            variants = PROOFS[stage](dense, both)
    except LayerPruneError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"
    return f"proven={','.join(variants)}" if variants else "proven"
