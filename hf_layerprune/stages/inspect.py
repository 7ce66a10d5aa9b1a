"""What a model is made of, and what a cut would leave, without loading a weight."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..cut.gguf import plan_gguf_cut
from ..cut.sizes import Sizes
from ..errors import CutError, LayerPruneError, boundary
from ..families.engines import REMEDY, describe_misread_layers, describe_period_rule
from ..families.layout import count_by_layer, count_parameters, find_decoder_layers, ties_head
from ..layer_ranges import describe_layers
from ..options import CutOptions, format_bytes, format_percent, pluralize
from ..records.history import read_history
from ..records.lineage import Lineage
from ..runtime.loading import as_path, load_config, resolve_base
from ..runtime.model_class import auto_class_of, model_without_weights
from ..select import select_layers
from .requests import InspectRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


logger = logging.getLogger(__name__)


@dataclass
class Anatomy:
    """Parameters of a model, by part.

    Args:
        model_type (`str`): The type of the language decoder.
        architecture (`str`): The class that it is loaded as.
        layers (`list[int]`): Parameters of each decoder layer.
        embeddings (`int`): Parameters of the input embeddings.
        head (`int`): Parameters of the output head; 0 where it is tied to the embeddings.
        other (`int`): All other parameters: norms, other towers, what layers share.
        tied (`bool`): Whether the head is the embedding matrix.
        layers_path (`str`): Where the layers are in the model.
        refusal (`str`, *optional*): Why this model can't be pruned; `None` if it can.
        protected (`dict[int, str]`): Layers that can't be dropped, with the reason.
        dropped_before (`list[int]`): Layers of its base that earlier cuts dropped, if it is the result of any.
        base (`str`, *optional*): That base, the first model of the folder's records; `None` without records, where the base
            is what was left before the last cut.
        base_layers (`int`, *optional*): How many layers that base has.
        refused_at (`dict[str, str]`): Why it can't be ranked, repaired, healed or evaluated, by stage.
        repairs (`list[str]`): The repairs that its type is proven for.
        engine_warning (`str`, *optional*): Which engines go by layer numbers, and so misread this model or some cuts of it.
        dropped (`list[int]`): The layers that the cut tried out drops, by default the last ones that may go; empty
            without one.
        left (`int`, *optional*): The parameters that it leaves.
        file_bytes (`list[int]`): The size of the weight files, and of what the cut leaves of them; empty if there are
            none to go by.
        memory_bytes (`list[int]`): The same in memory, with a key-value cache; empty if that is not known, and for GGUF.
        context (`int`, *optional*): The number of tokens in the cache.
        no_cut (`str`, *optional*): Why no cut was tried out.
    """

    model_type: str
    architecture: str
    layers: list[int]
    embeddings: int
    head: int
    other: int
    tied: bool
    layers_path: str
    dropped_before: list[int]
    refused_at: dict[str, str]
    repairs: list[str]
    engine_warning: str | None
    base: str | None = None
    base_layers: int | None = None
    refusal: str | None = None
    protected: dict[int, str] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    left: int | None = None
    no_cut: str | None = None
    file_bytes: list[int] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    context: int | None = None

    @property
    def total(self) -> int:
        """All parameters, a shared one once."""
        return sum(self.layers) + self.embeddings + self.head + self.other


def inspect_model(request: InspectRequest) -> Anatomy:
    """Count the parameters of a model by part, and those that a cut would leave, from its config alone.

    Raises:
        CheckpointError: There is no such model.
        CutError: The cut that was asked for can't be made.
        LayerPruneError: It has no language decoder.
    """
    config = load_config(request.model, revision=request.revision)
    if type(config) not in auto_class_of(config)._model_mapping:
        raise LayerPruneError(
            f"a {config.model_type} model has no language decoder of its own, so there are no decoder layers to prune; "
            "docs/architectures.md lists the types that can be pruned"
        )
    with boundary("no model can be built from the config", "check that it belongs to this checkpoint"):
        model = model_without_weights(config)
    stack, table, output = find_decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()
    layers, tied = count_by_layer(stack.layers), ties_head(model)
    in_table, in_head = count_parameters(table), 0 if tied or output is None else count_parameters(output)
    model_type = families.text_config(config).model_type
    anatomy = Anatomy(
        model_type=model_type,
        architecture=type(model).__name__,
        layers=layers,
        embeddings=in_table,
        head=in_head,
        other=count_parameters(model) - sum(layers) - in_table - in_head,
        tied=tied,
        layers_path=stack.path,
        **_earlier_cuts(request.model, config),
        refused_at=_refused_stages(config),
        repairs=list(families.proven_stages().get(model_type, {}).get("repair", ())),
        engine_warning=describe_misread_layers(config) or describe_period_rule(config),
    )
    try:
        families.check_supported(model.config)
        anatomy.protected = families.protected_layers(model.config)
    except LayerPruneError as error:
        anatomy.refusal = str(error)
        return anatomy
    sizes = Sizes(config, request.model, revision=request.revision)
    try:
        if request.drop_layers is not None:
            dropped = list(families.make_cut(model.config, request.drop_layers).drop)
        else:
            dropped = select_layers(len(layers), CutOptions(drop=request.drop), anatomy.protected)
        anatomy.left = sizes.parameters(dropped)
    except CutError as error:
        if request.drop != InspectRequest.drop or request.drop_layers is not None:
            raise
        anatomy.no_cut = str(error)  # the user did not ask for this cut, and still wants to see the parts
        return anatomy
    anatomy.dropped = dropped
    folder, file = resolve_base(request.model)
    try:
        if file is not None:
            path = Path(folder) / file
            anatomy.file_bytes = [path.stat().st_size, plan_gguf_cut(path, dropped).target_bytes]
        else:
            anatomy.file_bytes = [sizes.file_bytes(drop) for drop in ((), dropped)]
            anatomy.context = sizes.resolve_context(None)
            anatomy.memory_bytes = [sizes.memory_bytes(drop) for drop in ((), dropped)]
    except LayerPruneError as error:
        # A config without weights, or a model whose cache is not known without running it.
        logger.debug("%s", error)
    return anatomy


def _earlier_cuts(model: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The cuts that made a model: all of them, by the records of its folder, or the last one, which its config has."""
    last = getattr(config, families.MARKER, None) or {}
    found = {"dropped_before": list(last.get("drop_layers", [])), "base_layers": last.get("num_base_layers")}
    with suppress(LayerPruneError):  # of the records of another model, or damaged ones, which other commands refuse
        lineage = Lineage.load(as_path(model))
        if lineage is not None and len((history := read_history(lineage)).kept) == families.layer_count(config):
            dropped = {"dropped_before": list(history.dropped), "base_layers": history.num_base_layers}
            found = dropped | {"base": history.base_id}
    return found


def _refused_stages(config: PreTrainedConfig) -> dict[str, str]:
    """The stages that a model type can't go through, each with the reason."""
    refused_at = {}
    for stage in families.STAGES:
        try:
            families.check_stage(config, stage)
            if stage in ("repair", "heal"):
                families.check_trainable(config)
        except LayerPruneError as error:
            refused_at[stage] = str(error)
    return refused_at


def report(name: str, anatomy: Anatomy, drop: float | int | None = 0.25) -> str:
    """Describe a model, by the name that the user gave it, and what a cut would leave of it.

    `drop` is what determined the cut; `None` if its layers were given.
    """
    n, smallest, largest = len(anatomy.layers), min(anatomy.layers), max(anatomy.layers)
    each = f"{smallest:,} each" if smallest == largest else f"{smallest:,} to {largest:,} each"
    head = f"{'-':>15}   tied to the embeddings" if anatomy.tied else f"{anatomy.head:,}"
    lines = [
        f"{name}: {anatomy.architecture} ({anatomy.model_type})",
        f"  decoder layers   {n:>15}   {anatomy.layers_path}, {each}",
        f"  in the layers    {sum(anatomy.layers):>15,}   {format_percent(sum(anatomy.layers) / anatomy.total, 1)}",
        f"  embeddings       {anatomy.embeddings:>15,}   {format_percent(anatomy.embeddings / anatomy.total, 1)}",
        f"  output head      {head:>15}",
        f"  other            {anatomy.other:>15,}",
        f"  parameters       {anatomy.total:>15,}",
    ]
    size = memory = ""
    if anatomy.file_bytes:
        whole, size = map(format_bytes, anatomy.file_bytes)
        lines.append(f"  weight files     {whole:>15}")
        size = f"; {size} of weight files"
    if anatomy.memory_bytes:
        whole, memory = map(format_bytes, anatomy.memory_bytes)
        lines[-1] += f"   {whole} in memory with a key-value cache of {anatomy.context:,} tokens"
        memory = f", {memory} in memory"
    if anatomy.dropped_before:
        whole = f"the {anatomy.base_layers} of {anatomy.base or 'its base'}"
        lines.append(f"  it is a cut model, without {describe_layers(anatomy.dropped_before)} of {whole}")
    if anatomy.engine_warning:
        lines.append(f"  {anatomy.engine_warning}; {REMEDY}")
    lines += [f"  layer {i} must stay: {reason}" for i, reason in sorted(anatomy.protected.items())]
    if anatomy.refusal:
        return "\n".join([*lines, f"It can't be pruned: {anatomy.refusal}"])
    if anatomy.repairs and "repair" not in anatomy.refused_at:
        lines.append(f"  a cut of it can be repaired by {', '.join(anatomy.repairs)}")
    lines += [f"  {refused}" for refused in dict.fromkeys(anatomy.refused_at.values())]
    left = anatomy.left
    if left is None:
        return "\n".join([*lines, f"No cut is shown: {anatomy.no_cut}"])
    layers = describe_layers(anatomy.dropped) if drop is None else pluralize(len(anatomy.dropped), "layer")
    effect = f"A cut of {format_percent(drop)} drops {layers} and" if isinstance(drop, float) else f"A cut of {layers}"
    lines.append(
        f"{effect} leaves {n - len(anatomy.dropped)} of {n}: {left:,} parameters, {format_percent(left / anatomy.total, 1)} of the "
        f"base{size}{memory}."
    )
    if anatomy.tied:
        untied = left + anatomy.embeddings
        lines.append(
            "The output head stays tied to the embeddings. An adapter that tunes it (--tune-lm-head) makes it a matrix of its own: "
            f"{untied:,} parameters in all, {format_percent(untied / anatomy.total, 1)} of the base"
            + (", more than the base itself." if untied > anatomy.total else ".")
        )
    return "\n".join(lines)
