"""The proof that a model type can be ranked, repaired, healed and measured, each against the model's own forward.

Every proof computes a stage's result a second time, as naively as it can be done: whole logits of the model's own
`forward`, one row at a time, with dropped layers turned into identities. What a stage refuses is no failure, as long
as it says so in an error of ours.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_layerprune import families
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.measure.distance import distance, perplexity
from hf_layerprune.repair.fit import Repair, fit_repair
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.repair.writers import swapped
from hf_layerprune.runtime.head import OutputHead
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import taylor
from hf_layerprune.select.trials import Trial, try_out

from .heal_makers import word_tokenizer
from .matrix import CUT, SEED, ProofError, cuts, identities, load, logits, prove, text_inputs
from .multimodal_inputs import media_inputs
from .tiny_models import MULTIMODAL_TYPES, tiny_input, tiny_model
from .tiny_multimodal import WHOLE, whole_model

TOLERANCE = 1e-4


def same(name: str, mine: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Raise unless two results are the same up to `tolerance`, relative to the norm of what is wanted."""
    mine, wanted = torch.as_tensor(mine).double(), torch.as_tensor(wanted).double()
    if mine.shape != wanted.shape:
        raise ProofError(f"{name}: shape {list(mine.shape)}, should be {list(wanted.shape)}")
    off = ((mine - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
    if not off <= tolerance:
        raise ProofError(f"{name}: off by {off:.2g} of its size")


def next_token_loss(own: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token: of logits `[batch, seq, vocab]`."""
    return F.cross_entropy(own[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


@lru_cache(maxsize=1)
def cut_of(dense: Any, drop: tuple[int, ...]) -> Any:
    """A model without some layers, which the proofs of a type share. Nobody changes it."""
    pruned = copy.deepcopy(dense)
    drop_layers(pruned, drop)
    return pruned


def divergence(dense: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """KL(dense || own) by position, of logits `[..., vocab]`."""
    p, q = dense.double().log_softmax(-1), own.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# --- rank -----------------------------------------------------------------------------------------------


def prove_rank(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> None:
    """Hidden states behind every layer, perplexity and KL of cuts, and the gradients of Taylor scores."""
    ids = tiny_input(seed=1, batch=3, length=12)
    dense = copy.deepcopy(dense)  # some layers keep their last states, and with them what gradients need
    walk = LayerWalk(dense)
    _states_are_those_of_the_model(walk, dense, ids)
    middle = proven_cuts["middle"]
    tried = [(), *((i,) for i in range(walk.num_layers)), *proven_cuts.values()]
    text = CalibrationSet.of(ids, "random tokens")
    whole = logits(dense, ids)
    for drop, outcome in zip(tried, try_out(walk, text, [Trial(drop) for drop in tried]), strict=True):
        with identities(dense, drop):
            own = logits(dense, ids)
        same(f"loss without layers {drop}", outcome.loss, next_token_loss(own, ids))
        wanted = divergence(whole, own).mean()
        if abs(outcome.kl - wanted) > TOLERANCE * wanted + 1e-7:
            raise ProofError(f"KL without layers {drop} is {outcome.kl}, should be {wanted}")
    scores = taylor.score(walk, text).layers
    for i in (0, middle[0], walk.num_layers - 1):
        same(f"Taylor score of layer {i}", scores[i], _taylor(dense, ids, i))


def _states_are_those_of_the_model(walk: LayerWalk, model: Any, ids: torch.Tensor) -> None:
    own: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        own.append(output[0] if isinstance(output, tuple | list) else output)

    with _hooked(walk.layers, keep):
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


@contextmanager
def _hooked(modules: Sequence[Any], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- repair ---------------------------------------------------------------------------------------------


def prove_repair(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> list[str]:
    """Every repair that the type does not refuse; their names."""
    refusals = {method: _prove_method(dense, method, proven_cuts["middle"], repair_rows(method)) for method in REPAIRS}
    proven = [method for method, refusal in refusals.items() if refusal is None]
    if not proven:
        raise next(iter(refusals.values()))
    return proven


def repair_rows(method: str) -> CalibrationSet:
    """Rows to fit a repair to; of a few tokens, a layer's own neurons explain all, so that it borrows none."""
    length = 120 if method == "borrow" else 16
    return CalibrationSet.of(tiny_input(seed=2, batch=5, length=length), "random tokens")


def _prove_method(dense: Any, method: str, middle: tuple[int, ...], rows: CalibrationSet) -> LayerPruneError | None:
    """Prove a repair at the first of some cuts that it accepts; why not, where it accepts none."""
    refusal = None
    for drop in chain((middle,), _single_layers(dense)):
        try:
            repair = fit_repair(dense, drop, rows, method)
        except LayerPruneError as error:
            refusal = refusal or error
            continue
        (fitted_as_written if REPAIRS[method].in_front else _scaled_as_written)(dense, repair, drop, rows)
        _same_when_saved(dense, repair, drop)
        return None
    return refusal


def _single_layers(dense: Any) -> Iterator[tuple[int, ...]]:
    """Cuts of one layer each: where experts stand in front of one, a plain layer may stand in front of another."""
    n, protected = families.layer_count(dense.config), families.protected_layers(dense.config)
    for i in range(1, n - 1):
        try:
            families.cut_config(dense.config, families.make_cut(dense.config, [i]))
        except LayerPruneError:
            continue
        if i not in protected:
            yield (i,)


def fitted_as_written(dense: Any, repair: Repair, drop: tuple[int, ...], rows: CalibrationSet) -> None:
    """Each map is the ridge solution on the fitted rows, given what the model's own forward does there."""
    layers = find_decoder_layers(dense).layers
    ids, fitted = rows.input_ids, slice(0, 4)  # the fifth row judges
    for cut in repair.cuts:
        first, last = cut["layers"]
        index, _, name = cut["folded_into"].partition(".")
        module, before = layers[int(index)].get_submodule(name), int(index)
        earlier = [i for i in drop if i < first]
        folded = repair.by_layer()
        wanted = _leaving(dense, last, ids)
        with ExitStack() as stack:
            stack.enter_context(identities(dense, earlier))
            for i, values in folded.items():
                if i < before:
                    stack.enter_context(swapped(layers[i], values))
            cut_plainly = _leaving(dense, before, ids)
            refitted = (name, cut.get("norm", "").partition(".")[2])
            stack.enter_context(swapped(layers[before], _borrowed(layers[before], refitted, folded[before])))
            entering: list[torch.Tensor] = []
            with _hooked(
                [module], lambda m, args, output, entering=entering: entering.extend((args[0], output.clone()))
            ):
                plain = _leaving(dense, before, ids)
            with _hooked([module], lambda m, args, output: torch.zeros_like(output)):
                written = plain - _leaving(dense, before, ids)
            with swapped(layers[before], folded[before]):
                mine = _leaving(dense, before, ids)
        features, output = (x.double().view(*plain.shape[:-1], -1) for x in entering)
        missing = wanted.double() - plain.double()
        added = added_by_fit(repair.method, cut, layers[before], features, output, written, missing, fitted)
        same(f"{_name(repair)}: states behind layers {first} to {last}", mine, plain.double() + added, 1e-3)
        errors = [(wanted - states)[fitted].double().square().sum().item() for states in (mine, cut_plainly)]
        if errors[0] > errors[1] * (1 + TOLERANCE):
            raise ProofError(f"{_name(repair)}: error {errors[0]} on the fitted rows, plainly cut {errors[1]}")


def added_by_fit(
    method: str,
    cut: dict[str, Any],
    layer: Any,
    features: torch.Tensor,
    output: torch.Tensor,
    written: torch.Tensor,
    missing: torch.Tensor,
    fitted: slice = slice(None),
) -> torch.Tensor:
    """What a fit adds to the states behind a layer, by its definition.

    Args:
        method (`str`): `linear`, or one that fits from the input of the projection.
        cut (`dict`): The record of the fit.
        layer (`nn.Module`): The layer, as it is in front of the fit.
        features (`torch.Tensor`): The projection's input `[..., in]`.
        output (`torch.Tensor`): Its output `[..., hidden]`.
        written (`torch.Tensor`): What of it arrives behind the layer.
        missing (`torch.Tensor`): What the dropped layers added.
        fitted (`slice`): The rows that were fitted.
    """
    norm = _Norm(layer.get_submodule(cut["norm"].partition(".")[2]), output) if "norm" in cut else None
    output = output if norm is None else norm.output
    gain = (written.double() * output).sum() / output.square().sum()
    same(f"repair {method}: what {cut['folded_into']} writes", gain * output, written, 1e-3)
    x = gain * (output if method == "linear" else features if norm is None else features / norm.divisor)
    added = x @ _ridge(x[fitted], missing[fitted], cut["ridge"])
    if norm is None or cut["ridge"] is None:
        return added
    new, old = gain * norm.again(output + added / gain), gain * output
    factor = (new * (missing + old))[fitted].sum() / new[fitted].square().sum()
    return factor * new - old


class _Norm:
    """An RMS norm behind a projection, by its definition: what it makes of the projection's output."""

    def __init__(self, module: Any, x: torch.Tensor) -> None:
        self.epsilon = getattr(module, "variance_epsilon", None) or module.eps
        self.divisor = (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        self.output = module(x.float()).double()
        self.scale = (self.output * self.divisor).flatten(0, -2).norm(dim=0) / x.flatten(0, -2).norm(dim=0)

    def again(self, y: torch.Tensor) -> torch.Tensor:
        """What it makes of an input to which it would give `y`, if it divided by what it divided by before."""
        wide = y * self.divisor
        return wide / ((wide / self.scale).square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def _borrowed(layer: Any, refitted: tuple[str, str], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a fit starts from: neurons that are new in front of the projection write nothing yet."""
    start = {name: value for name, value in values.items() if name.rpartition(".")[0] not in refitted}
    if not start:
        return {}

    def by_output(name: str, value: torch.Tensor) -> torch.Tensor:
        module = layer.get_submodule(name.rpartition(".")[0])
        return value.T if value.ndim == 2 and isinstance(module, Conv1D) else value

    weight = by_output(f"{refitted[0]}.weight", layer.get_parameter(f"{refitted[0]}.weight")).clone()
    new = torch.zeros(weight.shape[1], dtype=torch.bool)
    for name, value in start.items():
        differs = by_output(name, value) != by_output(name, layer.get_parameter(name))
        new |= (
            differs.flatten(1).any(1).view(-1, len(new)).any(0)
            if differs.ndim > 1
            else differs.view(-1, len(new)).any(0)
        )
    weight[:, new] = 0
    return start | {f"{refitted[0]}.weight": by_output(f"{refitted[0]}.weight", weight)}


def _name(repair: Repair) -> str:
    """For messages."""
    return f"repair {repair.method}"


def _ridge(x: torch.Tensor, y: torch.Tensor, strength: float | None) -> torch.Tensor:
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    if strength is None:
        return torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    gram = x.T @ x
    scale = gram.diagonal().mean()  # the mean eigenvalue
    return torch.linalg.solve(gram + strength * scale * torch.eye(len(gram)), x.T @ y)


def _leaving(model: Any, index: int, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states that leave a layer in the model's own forward."""
    seen: list[torch.Tensor] = []
    keep = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple | list) else output)  # noqa: E731
    with _hooked([find_decoder_layers(model).layers[index]], keep):
        logits(model, ids)
    return seen[0]


def _scaled_as_written(dense: Any, repair: Repair, drop: tuple[int, ...], rows: CalibrationSet) -> None:
    """What the layers behind a cut write is divided by how much larger the dropped block made the states."""
    layers, factor = find_decoder_layers(dense).layers, 1.0
    factors = [1.0] * len(layers)
    for cut in repair.cuts:
        first, last = cut["layers"]
        before, after = (_leaving(dense, i, rows.input_ids).abs().sum(-1) for i in (first - 1, last))
        same("repair magnitude: size ratio", cut["size_ratio"], (after / before).mean())
        factor /= (after / before).mean().item()
        for i in range(last + 1, len(layers)):
            factors[i] = factor
    if not repair.tensors:
        raise ProofError("repair magnitude changes nothing behind a cut in the middle")
    for (i, name), value in repair.tensors.items():
        same(f"repair magnitude: {i}.{name}", value, layers[i].get_parameter(name) * factors[i])
    _multiplied_at_the_cuts(dense, repair, drop, rows.input_ids)


def _multiplied_at_the_cuts(dense: Any, repair: Repair, drop: tuple[int, ...], ids: torch.Tensor) -> None:
    """The same as Prune&Comp's own way: what reaches the place of a dropped block is multiplied by the ratio."""
    layers = find_decoder_layers(dense).layers
    with identities(dense, drop), ExitStack() as stack:
        for cut in repair.cuts:

            def multiply(module: Any, args: Any, kwargs: Any, ratio: float = cut["size_ratio"]) -> Any:
                if args:
                    return (args[0] * ratio, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": kwargs["hidden_states"] * ratio}

            handle = layers[cut["layers"][0]].register_forward_pre_hook(multiply, with_kwargs=True)
            stack.callback(handle.remove)
        wanted = logits(dense, ids)
    with identities(dense, drop), ExitStack() as stack:
        for i, values in repair.by_layer().items():
            stack.enter_context(swapped(layers[i], values))
        same("repair magnitude: logits", logits(dense, ids), wanted, 1e-2)  # norms add a little to what they divide by


def _same_when_saved(dense: Any, repair: Repair, drop: tuple[int, ...]) -> None:
    ids = tiny_input(seed=3)
    pruned = copy.deepcopy(cut_of(dense, drop))
    cut = families.make_cut(dense.config, drop)
    repair.apply(find_decoder_layers(pruned).layers, cut.new_index)
    mine = logits(pruned, ids)
    layers = find_decoder_layers(dense).layers
    with ExitStack() as stack:
        stack.enter_context(identities(dense, drop))
        for i, values in repair.by_layer().items():
            stack.enter_context(swapped(layers[i], values))
        same(f"{_name(repair)}: logits", mine, logits(dense, ids))
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        again, lost = load(folder, dense)
    if lost or not torch.equal(logits(again, ids), mine):
        raise ProofError(f"{_name(repair)}: saved and reloaded, it differs ({lost})")


# --- heal -----------------------------------------------------------------------------------------------

KD_SHARE, KD_TEMPERATURE = 0.3, 2.0
# Attention so sharp that padding moves gradients by more than that, in float32.
ROUGH = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), 5 * TOLERANCE)
# Loss, and what is trained.
HEALED = (("ce", "lm_head+last1"), ("kd", "full"), ("ce+kd", "lm_head+last1"))


class RecordingTrainer(HealTrainer):
    """Keeps the loss and the gradients of its steps."""

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
    """Loss and gradients of one step with each loss, against the model's own logits, a row at a time."""
    drop = proven_cuts["middle"]
    pruned = cut_of(dense, drop)
    teacher = copy.deepcopy(dense)
    gc.freeze()  # each training run collects garbage, which takes long among all that was imported
    for loss, method in HEALED:
        mine, gradients = _trained(copy.deepcopy(pruned), teacher, loss, method, drop)
        own = copy.deepcopy(pruned)
        wanted, naive = _naive_step(own, dense, loss, list(gradients), untied=method != "full")
        name = f"{loss} of {method}"
        same(f"{name}: loss", mine, wanted)
        if not gradients:
            raise ProofError(f"{name}: nothing was trained")
        # Some are nothing but rounding: a bias of keys moves no attention.
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
    with tempfile.TemporaryDirectory() as folder:
        args = HealConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, max_grad_norm=0.0,
            optim="sgd", report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
            bf16=False, max_length=32, pad_to_multiple_of=4, completion_only_loss=False, warmup_steps=0,
            dataset_kwargs={"skip_prepare_dataset": True}, loss=loss, method=method, kd_share=KD_SHARE,
            kd_temperature=KD_TEMPERATURE,
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
    """Perplexity, KL and top-1 agreement, and logits a few positions at a time."""
    rows = tiny_input(seed=5, batch=3, length=12)
    pruned = cut_of(dense, proven_cuts["middle"])
    own, whole = (torch.cat([logits(model, row[None]) for row in rows]) for model in (pruned, dense))
    measured = distance(pruned, dense, rows, batch_size=2)
    same("KL", measured.kl, divergence(whole, own)[:, :-1].mean())
    agreement = (own.argmax(-1) == whole.argmax(-1))[:, :-1].double().mean()
    same("top-1 agreement", measured.top1_agreement, agreement, 1e-6)
    for name, nll, model in (("model", measured.nll, own), ("base", measured.base.nll, whole)):
        same(f"log-likelihood of the {name}", nll, next_token_loss(model, rows))
    alone = perplexity(pruned, rows, batch_size=2)
    same("perplexity", alone.perplexity, next_token_loss(own, rows).exp())
    output = OutputHead(pruned)
    with torch.no_grad():
        part = output.head().logits(output.states(input_ids=rows, use_cache=False)[:, 3:7])
    same("logits of some positions", part, own[:, 3:7])


# A stage, to its proof; what a proof returns are the variants that it holds for.
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
        stages (`Sequence[str]`, *optional*): Which ones; all by default.
        only (`str`, *optional*): Make this cut alone of those that [`cuts`] names.

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
            inputs = text_inputs() | (media_inputs(model_type, dense) if model_type in MULTIMODAL_TYPES else {})
            prove(dense, both, inputs)
            variants = list(inputs) if model_type in MULTIMODAL_TYPES else None
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
