"""Next-token losses of a model, and the divergence of its distributions from a reference: KL(reference || model)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_CACHED_LOGITS = 1 << 18  # 1 MiB in float32; with chunks of this size, 16-bit logits take a quarter of the time


@dataclass
class Divergence:
    """Losses and divergence of some tokens.

    Args:
        nll (`torch.Tensor`): Negative log-likelihood of the next token, in nats, `[targets]`.
        kl (`torch.Tensor`, *optional*): KL(reference || model) of the next-token distribution, in nats, `[tokens]`.
        agrees (`torch.Tensor`, *optional*): Whether both have the same top-1 token, boolean `[tokens]`.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None = None
    agrees: torch.Tensor | None = None


class Reference:
    """The next-token distributions that a model is compared with, and what depends on them alone.

    They are given as logits `[tokens, vocabulary]`.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.float()
        self.norms = self.logits.new_empty(len(logits))
        self.probabilities = torch.empty_like(self.logits)
        for piece in _pieces(logits):
            self.norms[piece] = self.logits[piece].logsumexp(-1)
            torch.sub(self.logits[piece], self.norms[piece, None], out=self.probabilities[piece]).exp_()
        self.excludes = bool(self.logits.amin().isneginf())  # whether any token has probability 0


def compute_divergence(logits: torch.Tensor, targets: torch.Tensor, reference: Reference | None = None) -> Divergence:
    """Losses of some tokens, and their divergence from a reference for the same tokens: one value for each token.

    The logits are `[tokens, vocabulary]`, of any type. There may be fewer targets, each the token after one of the
    first tokens.
    """
    parts = [_piece_divergence(logits[piece].float(), targets[piece], reference, piece) for piece in _pieces(logits)]
    nll, *others = map(torch.cat, zip(*parts, strict=True))
    return Divergence(nll, *others)


def _piece_divergence(
    logits: torch.Tensor, targets: torch.Tensor, reference: Reference | None, piece: slice
) -> tuple[torch.Tensor, ...]:
    norms = logits.logsumexp(-1)
    nll = norms[: len(targets)] - logits[: len(targets)].gather(-1, targets[:, None])[:, 0]
    if reference is None:
        return (nll,)
    # log p - log q is the difference of the logits less the difference of the norms, and p sums to one.
    gaps = reference.logits[piece] - logits
    if reference.excludes:  # a token of probability 0 adds nothing, though its log is infinite
        gaps.masked_fill_(reference.logits[piece].isneginf(), 0)
    kl = torch.linalg.vecdot(reference.probabilities[piece], gaps) - reference.norms[piece] + norms
    return nll, kl, logits.argmax(-1) == reference.logits[piece].argmax(-1)


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the tokens: on a CPU, small enough that the logits stay in its cache; elsewhere, a single one."""
    tokens, vocabulary = logits.shape
    step = max(1, _CACHED_LOGITS // vocabulary) if logits.device.type == "cpu" else tokens
    return (slice(start, start + step) for start in range(0, tokens, step))
