"""How many layers to drop: a number, a target for what is left, or an acceptable loss of quality."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CutError
from .declare import option, refuse_unused
from .kinds import DROP, DTYPES, integer
from .quantities import BYTES, COUNT, NATS, RATIO, SHARE, join_words, number_between

DEFAULT_DROP = 0.25
TARGETS = ("target_params", "target_size", "target_memory", "target_speedup")
BUDGETS = ("max_perplexity_ratio", "max_kl", "min_top1_agreement")
# Only one of these may be given.
AMOUNTS = ("drop", *TARGETS, *BUDGETS)
# The options that decide how a target is counted.
TARGET_SETTINGS = {
    "target_size": ("target_dtype",),
    "target_memory": ("context", "batch", "target_dtype"),
    "target_speedup": ("context", "batch"),
}


@dataclass(kw_only=True)
class AmountOptions:
    """How many layers to drop."""

    help_group = "cut and repair"

    drop: float | int | None = option(
        None,
        "Fraction (rounded down to whole layers) or number of layers to drop; by default 0.25, unless layers, a target or a "
        "budget is given",
        DROP,
    )
    target_params: int | str | None = option(
        None, "Drop just enough layers to leave at most this many parameters, such as 6.3B (6.3 * 10^9)", COUNT
    )
    target_size: int | str | None = option(
        None,
        "Drop just enough layers for the weight files to fit into this many bytes, such as 12GB (12 * 1000^3) or 8GiB (8 * "
        "1024^3)",
        BYTES,
    )
    target_memory: int | str | None = option(
        None,
        "Drop just enough layers for the weights and the key-value cache to fit into this many bytes, such as 8GB",
        BYTES,
    )
    target_speedup: float | None = option(
        None,
        "Drop just enough layers to speed up decoding by this factor, such as 1.3, estimated from the time that the layers "
        "and the head take on this machine",
        number_between(1, 1000, "a factor above 1, such as 1.3", "X"),
    )
    max_perplexity_ratio: float | None = option(
        None,
        "Drop as many layers as possible while the perplexity on held-out calibration rows, after the repair, is at most "
        "this multiple of the dense model's, such as 1.1",
        RATIO,
    )
    max_kl: float | None = option(
        None,
        "Drop as many layers as possible while the KL divergence from the dense model on held-out calibration rows, after "
        "the repair, is at most this many nats per token, such as 0.2",
        NATS,
    )
    min_top1_agreement: float | None = option(
        None,
        "Drop as many layers as possible while the most likely next token on held-out calibration rows, after the repair, "
        "agrees with the dense model's for at least this share of tokens, such as 0.8",
        SHARE,
    )
    context: int | None = option(
        None,
        "Number of tokens per sequence in the cache, for target_memory and target_speedup; by default 4096 for memory and "
        "512 for speed, or fewer if the model's context is shorter",
        integer(1, 10**8),
    )
    batch: int = option(1, "Number of sequences in the cache, for target_memory and target_speedup", integer(1, 10**6))
    target_dtype: str = option(
        "auto", "Data type of the weights and the cache for target_size and target_memory; auto means the base's",
        choices=DTYPES,
    )  # fmt: skip

    def check_combination(self) -> None:
        """Refuse more than one amount, and set the default if there is none.

        Raises:
            CutError: More than one is given.
        """
        amounts = [f"{name}={value}" for name in AMOUNTS if (value := getattr(self, name)) is not None]
        if len(amounts) > 1:
            raise CutError(f"{join_words(amounts)} each say how many layers to drop; use only one of them")
        if not amounts and getattr(self, "drop_layers", None) is None:
            self.drop = self.default_drop

    @property
    def default_drop(self) -> float | None:
        """What is dropped if no option says how much; `None` leaves it open."""
        return DEFAULT_DROP

    def refuse_unused(self) -> None:
        """Refuse options that only affect how a target is counted, if that target is not set.

        Raises:
            CutError: One of these options is set.
        """
        for name in ("context", "batch", "target_dtype"):
            targets = [target for target, names in TARGET_SETTINGS.items() if name in names]
            if self.target not in targets:
                refuse_unused(self, (name,), f"without {' or '.join(targets)}")

    @property
    def target(self) -> str | None:
        """The name of the target, if there is one."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def budget(self) -> str | None:
        """The name of the budget, if there is one."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)


def drop_exactly(count: int) -> dict[str, int | None]:
    """The fields of `AmountOptions` that drop a number of layers, for `copy_fields` and `replace`."""
    return dict.fromkeys(AMOUNTS) | {"drop": count}
