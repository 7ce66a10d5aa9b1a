"""The chunked head loss compared with a plain implementation: all logits at once, with autograd.

    python benchmarks/head_loss.py
    python benchmarks/head_loss.py --tokens 4096 --vocabulary 128256 --hidden 4096

Cross-entropy with a trained head, and distillation with a frozen one, in bfloat16 on random states. The two ways run
in turn; times are CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from hf_layerprune.heal.losses import Distillation, head_loss
from hf_layerprune.runtime.head import Head


def plain(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
    """The loss as one would write it by hand."""
    logits = F.linear(hidden, head).float()
    if taught is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        wanted = F.linear(taught, head).float().log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def ours(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor | None) -> torch.Tensor:
    one = torch.tensor(1 / len(hidden))
    if taught is None:
        return head_loss(hidden, Head(head), labels, one).loss
    everywhere = torch.ones(len(hidden), dtype=torch.bool)
    return head_loss(hidden, Head(head), labels, None, Distillation(taught, Head(head.detach()), everywhere, one)).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    states, taught = (torch.randn(args.tokens, args.hidden).bfloat16() for _ in range(2))
    weight = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).bfloat16()
    labels = torch.randint(0, args.vocabulary, (args.tokens,))
    print("| loss | plain, s | ours, s | speed-up | loss, plain | loss, ours | gradient difference |")
    print("|---|---|---|---|---|---|---|")
    for name, trained in (("cross-entropy, trained head", True), ("distillation, frozen head", False)):
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        outcomes = {}
        for number in range(args.repeats + 1):
            for way, function in (("plain", plain), ("ours", ours)):
                hidden, head = states.clone().requires_grad_(), weight.clone().requires_grad_(trained)
                start = time.process_time()
                loss = function(hidden, head, labels, None if trained else taught)
                loss.backward()
                if number:  # the first round warms up
                    times[way].append(time.process_time() - start)
                outcomes[way] = loss.item(), hidden.grad.float()
        seconds = {way: statistics.median(runs) for way, runs in times.items()}
        apart = ((outcomes["ours"][1] - outcomes["plain"][1]).norm() / outcomes["plain"][1].norm()).item()
        print(
            f"| {name} | {seconds['plain']:.2f} | {seconds['ours']:.2f} | {seconds['plain'] / seconds['ours']:.2f} "
            f"| {outcomes['plain'][0]:.4f} | {outcomes['ours'][0]:.4f} | {apart:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
