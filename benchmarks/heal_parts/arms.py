"""The arms: ways to prune and heal that are compared at equal time.

Peers are rewritten from their papers, and use this package's own code where it has the same thing. All but the
paper's recipe drop the same block in the middle, which is also the one that their own criterion (angular distance)
chooses for SmolLM2-135M, so they differ in what makes up for it. What differs besides, and what could not be matched:

- `ours` has steps of 2 rows, the peers those of `--batch`.
- `paper` (arXiv:2411.15558): its rate of 1e-5 hardly changes a model this small, so it has this package's default for
  the method. Batches are those of all arms instead of 64 rows; it has the same fast trainer.
- `lora` (arXiv:2403.17887 and many others): rank 16 on every linear layer, in 16 bits instead of 4. Its rate is the best of
  2e-4, 5e-4 and 1e-3 by KL at 3 minutes; 1e-3 has a lower perplexity there.
- `streamline` (arXiv:2403.19135): a block with one layer more, chosen by the same criterion, is replaced by one layer,
  which starts as the block's first, so that all models have the same size. Mean squared error, 2e-4 falling to 5e-5.
  The authors train on 30,000 rows of SlimPajama; here it is the rows of all arms.
- `replaceme` (arXiv:2505.02819): the least-squares map; the authors' cosine variant needs an optimiser and gains a point
  for them. `prune&comp` (arXiv:2507.18212): the rescaling on the same block; the authors also choose layers one by one
  with it. Both are done when they are fitted, and leave the rest of their time unused.
- `self-data` (arXiv:2410.09982): the dense model answers the data set's instructions, greedily, for 40 % of the time; then
  cross-entropy on its answers with LoRA. The authors also filter the answers by the data set's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAND_IN = "stand-in"
_SMALL_STEPS = {"per_device_train_batch_size": 2}
_LORA = {"learning_rate": 5e-4}


@dataclass(frozen=True)
class Arm:
    """One way to prune and heal.

    Args:
        what: A line for the table.
        drop: `middle` or `last`.
        repair: A closed-form repair, or empty.
        method: What is trained: a method of `hf_layerprune.heal.methods`, `stand-in`, or empty for nothing.
        loss: `ce`, `kd` or `ce+kd`.
        rows: See `texts.training_rows`; or `answers` (instructions, a row each, with labels on answers), `rewritten` (the
            same with the dense model's answers), `self` (text that the dense model writes), `broad and self` (all `broad`
            rows, and as many of its own as are missing).
        pace: Tokens of rows for each minute that is left behind the repair.
        settings: Of `HealConfig`.
        same_domain: Whether it trains on other text of a domain that no other arm has seen.
    """

    what: str
    drop: str = "middle"
    repair: str = ""
    method: str = ""
    loss: str = "ce"
    rows: str = "broad"
    pace: int = 14_000
    settings: dict[str, Any] = field(default_factory=dict)
    same_domain: bool = False


ARMS = {
    "none": Arm("the cut alone"),
    "paper": Arm("the paper: last layers, head and last 3", drop="last", method="lm_head+last3", rows="answers", pace=20_000),
    "lora": Arm("LoRA on all layers", method="lora", settings=_LORA),
    "streamline": Arm("LLM-Streamline: replacement layer, squared error", method=STAND_IN, pace=25_000),
    "replaceme": Arm("ReplaceMe: linear map", repair="linear"),
    "prune&comp": Arm("Prune&Comp: rescaling", repair="magnitude"),
    "self-data": Arm("self-data distillation: LoRA on the dense model's answers", method="lora", rows="rewritten",
                     settings=_LORA),
    "refit": Arm("ours without training", repair="refit"),
    "borrow": Arm("ours without training, borrowed neurons", repair="borrow"),
    "ours": Arm("ours", repair="refit", method="behind2", loss="kd", settings=_SMALL_STEPS),
    "ours, borrow": Arm("ours with borrowed neurons", repair="borrow", method="behind2", loss="kd", settings=_SMALL_STEPS),
    "ours, text last": Arm("ours with borrowed neurons, then cross-entropy as well in the last 15 % of the time",
                           repair="borrow", method="behind2", loss="ce+kd", settings=_SMALL_STEPS | {"kd_alone": 0.85}),
    "ours, states first": Arm("ours with borrowed neurons, hidden states at first, then distillation", repair="borrow",
                              method="behind2", loss="kd", settings=_SMALL_STEPS | {"features": 0.35}),
    "ours, states first, text last": Arm(
        "ours with borrowed neurons, hidden states at first, then distillation, then cross-entropy as well",
        repair="borrow", method="behind2", loss="ce+kd", settings=_SMALL_STEPS | {"features": 0.35, "kd_alone": 0.77}),
    "ours, more rows": Arm("ours, with rows that the dense model writes where the given ones run out", repair="refit",
                           method="behind2", loss="kd", rows="broad and self", pace=7_500, settings=_SMALL_STEPS),
    "ours, encyclopedia": Arm("ours on other articles of WikiText", repair="refit", method="behind2", loss="kd",
                              rows="encyclopedia", same_domain=True, settings=_SMALL_STEPS),
}  # fmt: skip
# The arms of the table, in its order; the others are made on demand.
PEERS = ("paper", "lora", "streamline", "replaceme", "prune&comp", "self-data")
