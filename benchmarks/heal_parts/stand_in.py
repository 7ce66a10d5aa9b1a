"""LLM-Streamline's replacement layer (arXiv:2403.19135): one layer is trained to do what a block of layers does."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from .setting import Clock, Setting

_HIGHEST, _LOWEST = 2e-4, 5e-5
_ROWS_AT_ONCE = 16


def train_stand_in(
    folder: Path, first: int, last: int, rows: list[list[int]], setting: Setting, clock: Clock, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Train layer `first` of a cut without the layers behind it up to `last`, on the dense model's states around them.

    Args:
        folder: The cut.
        first: The layer that stands in, which has the same index in the cut.
        last: The last layer that it stands in for.
        rows: Tokens to train on.
        setting: The settings that all arms share.
        clock: The arm's time.
        seed: Determines the order of the rows.
    """
    import torch

    from hf_layerprune.families.layout import find_decoder_layers
    from hf_layerprune.runtime.loading import load_base
    from hf_layerprune.runtime.walk import LayerWalk

    walk = LayerWalk(setting.dense)
    batches = []
    with torch.inference_mode():
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            batch = walk.begin(torch.tensor(rows[start : start + _ROWS_AT_ONCE]))
            for i in range(last + 1):
                if i == first:
                    before = batch.hidden
                with walk.layer(i) as run:
                    batch.hidden = run(batch.hidden, batch)
            batches += list(zip(before.split(1), batch.hidden.split(1), strict=True))
    args, kwargs = walk.begin(torch.tensor(rows[: setting.batch])).calls[first]
    model: Any = load_base(folder, dtype="auto")
    layer = find_decoder_layers(model).layers[first].float()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=_HIGHEST)
    begun, steps, losses = time.process_time(), 0, []
    order, draw = list(range(len(batches))), random.Random(seed)
    while clock.left > 0:
        draw.shuffle(order)
        for start in range(0, len(order) - setting.batch + 1, setting.batch):
            gone = (time.process_time() - begun) / max(clock.end - begun, 1.0)
            if gone >= 1:
                break
            optimizer.param_groups[0]["lr"] = _HIGHEST - (_HIGHEST - _LOWEST) * gone
            chosen = [batches[i] for i in order[start : start + setting.batch]]
            entering, leaving = (torch.cat(states).clone() for states in zip(*chosen, strict=True))
            with torch.autocast("cpu", enabled=setting.bf16):
                made = layer(entering, *args, **kwargs)
            loss = torch.nn.functional.mse_loss(
                (made[0] if isinstance(made, tuple) else made).float(), leaving.float()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps, losses = steps + 1, [*losses[:1], loss.item()]
    layer.to(model.dtype)
    return model, {
        "method": "stand-in",
        "learning_rate": _HIGHEST,
        "rows": len(rows),
        "row_tokens": len(rows) * setting.length,
        "tokens": steps * setting.batch * setting.length,
        "steps": steps,
        "epochs": round(steps * setting.batch / len(rows), 2),
        "trained_parameters": sum(p.numel() for p in layer.parameters()),
        "losses": [round(loss, 4) for loss in losses],
    }
