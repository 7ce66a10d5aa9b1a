"""The pruned model to train: find it, load it, and make the adapter config of a method."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CheckpointError, CutError
from ..families import Cut
from ..families.fields import cut_without
from ..families.layout import ties_head
from ..files.hub import Repo
from ..layer_ranges import format_layers
from ..records.fingerprints import CONFIG, is_hashed, is_part
from ..records.history import TRAIN
from ..records.lineage import Lineage
from ..records.names import is_gguf_name
from ..runtime.loading import is_hub_id, load_base, load_config
from ..runtime.model_class import layer_modules, model_without_weights
from .methods import Method, choose_method, parse_method

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel
    from trl import ModelConfig

    from .checkpoints import RunSettings
    from .config import HealConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """A pruned model on disk.

    Args:
        folder (`Path`): Folder of a whole model, not an adapter.
        cut (`Cut`): Which layers were dropped.
        base (`str`, *optional*): The model that it was pruned from, if its history says so.
        revision (`str`, *optional*): The commit of the base.
        repaired (`tuple[str, ...]`): The tensors that a repair changed, as the checkpoint names them.
        whole_only (`bool`, defaults to `False`): Whether the model was pruned more than once or trained before. An
            adapter of the base would lack what was done first, so only the whole model is written.
    """

    folder: Path
    cut: Cut
    base: str | None
    revision: str | None
    repaired: tuple[str, ...]
    whole_only: bool = False

    @classmethod
    def load(cls, name: str | Path, revision: str | None = None) -> Student:
        """Read the cut and the history of a pruned model in a folder, or of one on the Hub, which is downloaded.

        Raises:
            CheckpointError: The model was not pruned by this package.
        """
        folder = Path(name).expanduser()
        if is_hub_id(name):
            repo = Repo.open(str(name), revision)
            own = [file for file in repo.files if "/" not in file and is_hashed(file) and not is_gguf_name(file)]
            files = [*own, *filter(is_part, repo.files)]
            folder = repo.fetch([*files, CONFIG])[CONFIG].parent
        cut = recorded_cut(load_config(folder))
        if cut is None:
            raise CheckpointError(
                f"{name} was not pruned by hf-layerprune; prune it first: hf-layerprune prune {name} OUTPUT"
            )
        if folder.is_file():
            raise CheckpointError(
                f"{name} is a GGUF file that is pruned already, and only a folder can be trained as it is; specify the "
                f"{cut.num_layers}-layer file that it was cut from, with --drop_layers {format_layers(cut.drop)}"
            )
        lineage = Lineage.load(folder) or Lineage({})
        entries = lineage.entries
        repaired = tuple(name for e in entries for name in (e.get("repair") or {}).get("changed_tensors") or ())
        stages = [entry["stage"] for entry in entries]
        again = stages.count("prune") > 1 or "heal" in stages or TRAIN in stages
        return cls(folder, cut, lineage.base.get("id"), lineage.base.get("commit"), repaired, again)

    def method(self, name: str) -> Method:
        """The method of that name; `"auto"` chooses the one that suits this model, and logs why."""
        if name != "auto":
            return parse_method(name)
        config = load_config(self.folder)
        method, why = choose_method(
            self.cut, ties_head(model_without_weights(config)), config.get_text_config().hidden_size
        )
        logger.info("the method is %s: %s", method.name, why)
        return method

    def use_base_as_teacher(self, args: HealConfig) -> None:
        """Make the weights before the cut the teacher, unless `args` names another one."""
        if args.teacher in (None, self.base):
            args.teacher = self.base
            args.teacher_revision = args.teacher_revision or self.revision

    def check_healed(self, folder: Path, run: RunSettings) -> None:
        """Refuse a folder unless it holds this model, healed with the settings and data of a run, and nothing more."""
        before, after = (Lineage.load(one) or Lineage({}) for one in (self.folder, folder))
        *earlier, last = after.entries or [{}]
        if last.get("stage") != "heal" or earlier != before.entries:
            raise CheckpointError(f"{folder} is not from this run; choose another --output_dir, or remove it")
        others = run.changed_settings(last.get("settings", {}), last.get("data"))
        others.pop("world_size", None)  # it may be finished on another machine
        if others:
            raise CheckpointError(
                f"{folder} was trained with other settings ({', '.join(others)}); repeat those, or choose another --output_dir"
            )


def recorded_cut(config: PreTrainedConfig) -> Cut | None:
    """The cut that a pruned model's config records; `None` for any other model."""
    marker = getattr(config, families.MARKER, None)
    return cut_without(marker["drop_layers"], marker["num_base_layers"]) if marker else None


def check_teacher_config(dense: PreTrainedConfig, config: PreTrainedConfig, name: str, *, features: bool) -> None:
    """Check that a dense model, called `name` in errors, can teach a model that was, or will be, cut.

    The other config is of that model or of its base. With `features`, hidden states are taught, too.

    Raises:
        CheckpointError: It has fewer layers, another vocabulary or, for hidden states, another width.
        CutError: It has more layers than hidden states can be taught for.
    """
    cut = recorded_cut(config)
    layers, own = cut.num_layers if cut else families.layer_count(config), families.layer_count(dense)
    if features and own > layers:
        raise CutError(
            f"features=... reproduces hidden states of the model that the last cut began with, which had {layers} layers, and "
            f"the teacher {name} has {own}; specify that model with teacher=..., or use features=0"
        )
    fields = {"tokens in its vocabulary": "vocab_size"}
    if features:
        fields["values in a hidden state"] = "hidden_size"
    texts = dense.get_text_config(), config.get_text_config()
    # The base of a model that was cut more than once has more layers than the last cut began with.
    sizes: dict[str, tuple[Any, ...]] = {"layers": (min(own, layers), layers)}
    sizes |= {what: tuple(getattr(text, field, None) for text in texts) for what, field in fields.items()}
    for what, (found, wanted) in sizes.items():
        if found != wanted:
            raise CheckpointError(
                f"the teacher {name} has {found} {what}, but this model is cut from one with {wanted}; specify the dense "
                "model with --teacher"
            )


def load_student(student: Student, method: Method, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a pruned model for training; some methods, such as `qlora`, change how it is loaded.

    Raises:
        LayerPruneError: The method can't run here, such as `qlora` without bitsandbytes.
    """
    model = load_base(student.folder, **from_pretrained_kwargs, **method.loading_kwargs())
    if method.trains_layers and student.base and not student.whole_only:
        model.name_or_path = student.base  # PEFT writes this into the adapter, whose base is the dense model
    return model


def adapter_config(student: Student, method: Method, settings: ModelConfig) -> PeftConfig | None:
    """The adapter config of a method, with these settings of LoRA; `None` for `full`.

    The adapter of a method that trains whole layers has the dense model as its base: it records the cut, and holds the
    trained and the repaired weights. A LoRA adapter has the folder of the pruned model as its base.
    """
    if not method.trains_layers:
        return method.adapter(settings)
    base = None if student.whole_only else student.base
    config = method.tail_config(student.cut, base or str(student.folder))
    config.revision = student.revision if base else None
    if base and student.repaired:
        config.repaired_modules = layer_modules(load_config(student.folder), student.repaired)
    return config
