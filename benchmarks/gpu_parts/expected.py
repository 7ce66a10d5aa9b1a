"""The time and memory that a row of `recipes/reproduce_paper` should need on a card, computed and not measured.

Frozen layers run forward once, the trained ones three times (forward, gradients of inputs and of weights) in each epoch;
LoRA trains all layers, which costs two more passes through frozen weights. Memory is weights in 16 bits, trained weights
with their gradients and AdamW's states in float32, and 6 GB for activations and chunks of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

# Alpaca-cleaned without the rows that are held out, its mean length in tokens, and the share of them in answers.
ROWS, LENGTH, LABELLED, EPOCHS = 49_760, 170, 0.6, 2
PEAK, ASSUMED = 989e12, 0.35


@dataclass(frozen=True)
class Model:
    """The weights of a model of the paper after a quarter of the layers is dropped, in millions.

    Args:
        name (`str`): Its name in the paper.
        layers (`int`): Layers that are left.
        layer (`float`): Weights of a layer.
        head (`float`): Weights of the head.
        shared (`bool`): Whether embeddings and head are one matrix.
    """

    name: str
    layers: int
    layer: float
    head: float
    shared: bool = False


MODELS = (
    Model("Vicuna-7B", 24, 202.4, 131.1),
    Model("Qwen1.5-7B", 24, 202.4, 622.3),
    Model("Gemma2-2B-It", 20, 77.9, 589.8, shared=True),
    Model("Llama-3.1-8B-It", 24, 218.1, 525.3),
)
METHODS = ("lm_head", "lm_head+last1", "lm_head+last2", "lm_head+last3", "lora")


def expected(model: Model, method: str, fraction: float, peak: float = PEAK) -> tuple[float, float]:
    """Hours of training and gigabytes of peak memory.

    Args:
        model (`Model`): The model.
        method (`str`): One of `METHODS`.
        fraction (`float`): The fraction of the card's peak that training reaches.
        peak (`float`): The card's operations per second.

    Returns:
        `tuple[float, float]`: Hours, GB.
    """
    layers, head = model.layer * model.layers, model.head
    if method == "lora":
        a_token = EPOCHS * (2 * layers + 2 * head * LABELLED)  # forward, and gradients of inputs
        adapters = 0.012 * layers
        memory = 2 * (layers + (1 if model.shared else 2) * head) + 16 * adapters
    else:
        last = int(method[-1]) if method[-1].isdigit() else 0
        tail = last * model.layer
        trained = tail + head
        a_token = (layers - tail) + EPOCHS * (3 * tail + 3 * head * LABELLED)
        # First all weights, those that will be trained in float32; then, without the frozen layers, the optimizer.
        # A head that is trained is no longer the embeddings' matrix.
        memory = max(2 * (layers - tail + head) + 4 * trained, 2 * head + 16 * trained)
    hours = 2e6 * a_token * ROWS * LENGTH / (fraction * peak) / 3600
    return hours, memory / 1e3 + 6


def table(fraction: float | None = None, peak: float | None = None) -> str:
    """The hours and the memory of each row as Markdown.

    Args:
        fraction (`float`, *optional*): The fraction that part b reached; assumed if it has not run.
        peak (`float`, *optional*): The peak that part b measured.

    Returns:
        `str`: A table with the sentence that says what it rests on.
    """
    if fraction is None or peak is None:
        basis = f"Computed, not measured: assumes {ASSUMED:.0%} of {PEAK / 1e12:.0f} TFLOP/s (an H100 in bfloat16)"
        fraction, peak = ASSUMED, PEAK
    else:
        basis = f"Computed from the speed of part b: {fraction:.0%} of {peak / 1e12:.0f} TFLOP/s"
    lines = [
        f"{basis}, {ROWS:,} rows of {LENGTH} tokens, {EPOCHS} epochs, a quarter of the layers dropped. Hours of training "
        "/ GB of peak memory; choosing layers and evaluating come on top.\n",
        f"| method | {' | '.join(model.name for model in MODELS)} |",
        "|---" * (len(MODELS) + 1) + "|",
    ]
    for method in METHODS:
        cells = [
            f"{hours:.2f} / {memory:.0f}" for hours, memory in (expected(m, method, fraction, peak) for m in MODELS)
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)
