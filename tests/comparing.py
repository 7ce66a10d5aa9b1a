"""Shared by the proofs of the stages: naive losses, and comparisons that name what differs."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from hf_layerprune.cut.memory import drop_layers

from .matrix import ProofError

TOLERANCE = 1e-4


def same(name: str, mine: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    """Raise unless two results agree up to `tolerance`, relative to the norm of the expected one."""
    mine, wanted = torch.as_tensor(mine).double(), torch.as_tensor(wanted).double()
    if mine.shape != wanted.shape:
        raise ProofError(f"{name}: shape {list(mine.shape)}, should be {list(wanted.shape)}")
    off = ((mine - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
    if not off <= tolerance:
        raise ProofError(f"{name}: off by {off:.2g} of its size")


def next_token_loss(own: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, from logits `[batch, seq, vocab]`."""
    return F.cross_entropy(own[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


@lru_cache(maxsize=1)
def cut_of(dense: Any, drop: tuple[int, ...]) -> Any:
    """A model without some layers, shared by the proofs of a type, which must not change it."""
    pruned = copy.deepcopy(dense)
    drop_layers(pruned, drop)
    return pruned


def divergence(dense: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """KL(dense || own) at each position, from logits `[..., vocab]`."""
    p, q = dense.double().log_softmax(-1), own.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
