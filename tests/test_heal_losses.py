"""The chunked loss against the plain one, whose gradients autograd finds."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from hf_layerprune.heal import losses
from hf_layerprune.heal.losses import Distillation, Head, LogitTransform, head_loss

VOCABULARY, WIDTH = 11, 6


def plain(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    ce_weight: torch.Tensor | None,
    distillation: Distillation | None,
) -> torch.Tensor:
    def logits(states: torch.Tensor, head: Head) -> torch.Tensor:
        z = F.linear(states, head.weight, head.bias) * head.transform.scale
        return z if head.transform.cap is None else head.transform.cap * torch.tanh(z / head.transform.cap)

    z = logits(hidden, head)
    loss = torch.zeros((), dtype=hidden.dtype)
    if ce_weight is not None:
        loss = loss + ce_weight * F.cross_entropy(z, labels, reduction="sum", ignore_index=-100)
    if distillation is not None:
        t = distillation.temperature
        q, p = F.log_softmax(z / t, -1), F.log_softmax(logits(distillation.hidden, distillation.head) / t, -1)
        first, second = (p, q) if distillation.direction == "forward" else (q, p)
        kl = (first.exp() * (first - second)).sum(-1)
        loss = loss + distillation.weight * t * t * (kl * distillation.mask).sum()
    return loss


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 9),
    chunk=st.integers(1, 9),
    kind=st.sampled_from(["ce", "kd", "ce+kd"]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    direction=st.sampled_from(["forward", "reverse"]),
    cap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
    words=st.sampled_from([1, 4, 8192]),
)
def test_loss_and_gradients_are_those_of_autograd(
    seed: int,
    tokens: int,
    chunk: int,
    kind: str,
    temperature: float,
    direction: str,
    cap: float | None,
    scale: float,
    bias: bool,
    words: int,
) -> None:
    torch.manual_seed(seed)
    transform = LogitTransform(scale, cap)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    hidden, weight = some(tokens, WIDTH).requires_grad_(), some(VOCABULARY, WIDTH).requires_grad_()
    offset = some(VOCABULARY).requires_grad_() if bias else None
    labels = torch.randint(-3, VOCABULARY, (tokens,))
    labels[labels < 0] = -100
    distillation = None
    if "kd" in kind:
        distillation = Distillation(
            some(tokens, WIDTH + 2),
            Head(some(VOCABULARY, WIDTH + 2), None, transform),
            torch.rand(tokens) < 0.7,
            torch.tensor(0.3),
            temperature,
            direction,
        )
    ce_weight = torch.tensor(0.7) if "ce" in kind else None
    head = Head(weight, offset, transform)
    with mock.patch.multiple(losses, _WEIGHT_ROWS=words, CHUNK_BYTES=4 * VOCABULARY * chunk):
        found = head_loss(hidden, head, labels, ce_weight, distillation)
    wanted = plain(hidden, head, labels, ce_weight, distillation)
    assert torch.allclose(found.loss, wanted, rtol=1e-4, atol=1e-5)
    trained = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    # The loss is scaled on its way back, as gradient accumulation and loss scaling do.
    ours = torch.autograd.grad(3 * found.loss, trained)
    autograd = torch.autograd.grad(3 * wanted, trained, allow_unused=True)
    for mine, theirs in zip(ours, autograd, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-3, atol=1e-4)


def test_parts_are_sums_over_what_counts() -> None:
    hidden, weight = torch.randn(5, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = (hidden @ weight.T).argmax(-1)
    labels[1] = -100
    labels[2] = (labels[2] + 1) % VOCABULARY
    distillation = Distillation(hidden, Head(weight), torch.tensor([True] * 5), torch.tensor(1.0), temperature=2.0)
    found = head_loss(hidden, Head(weight), labels, torch.tensor(1.0), distillation)
    assert found.correct == 3
    assert found.kd.abs() < 1e-5  # the same distribution
    assert torch.allclose(found.ce, F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), rtol=1e-5)


@pytest.mark.parametrize("words", [7, 4096])
def test_bfloat16_compute_with_float32_weights(words: int) -> None:
    hidden = torch.randn(40, 32).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, 32) / 6).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (40,))
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(losses, "_WEIGHT_ROWS", words):
        found = head_loss(hidden, Head(weight), labels, torch.tensor(1 / 40))
    found.loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden.float() @ weight.T, labels)
    assert found.loss.item() == pytest.approx(exact.item(), rel=1e-2)
    wanted = torch.autograd.grad(exact, weight)[0]
    assert (weight.grad - wanted).norm() < 0.02 * wanted.norm()
    wanted = torch.autograd.grad(F.cross_entropy(hidden.float() @ weight.T, labels), hidden)[0]
    assert (hidden.grad - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("kind", ["ce", "kd", "ce+kd"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("mixed", [True, False])
def test_float16_gradients_with_tiny_weights_and_a_large_loss_scale(kind: str, direction: str, mixed: bool) -> None:
    """As GradScaler begins: each token weighs one by the tokens of a step, and the loss is multiplied by 65536."""
    torch.manual_seed(0)
    words, tokens, share, scale = 1000, 64, torch.tensor(1 / 65536), 65536.0
    hidden, weight, offset = torch.randn(tokens, 32), torch.randn(words, 32) / 4, torch.randn(words)
    taught, labels = hidden + 0.3 * torch.randn(tokens, 32), torch.randint(0, words, (tokens,))
    everywhere = torch.ones(tokens, dtype=torch.bool)
    gradients = []
    for exact in (False, True):
        own = torch.float64 if exact else torch.float16
        states, teacher = hidden.half().to(own).requires_grad_(), taught.half().to(own)
        trained = [tensor.half().to(torch.float32 if mixed and not exact else own) for tensor in (weight, offset)]
        matrix, bias = (tensor.requires_grad_() for tensor in trained)
        frozen = Head(matrix.detach().to(own), bias.detach().to(own))
        distillation = Distillation(teacher, frozen, everywhere, share, 2.0, direction) if "kd" in kind else None
        given = states, Head(matrix, bias), labels, share if "ce" in kind else None, distillation
        with torch.autocast("cpu", torch.float16, enabled=mixed and not exact):
            loss = plain(*given) if exact else head_loss(*given, accumulate=True).loss
        gradients.append(torch.autograd.grad(loss * scale, [states, matrix, bias]))
    for mine, wanted in zip(*gradients, strict=True):
        assert mine.isfinite().all()
        assert (mine - wanted).norm() < 0.01 * wanted.norm()


def test_float16_sums_over_many_tokens_do_not_overflow() -> None:
    hidden = torch.full((2000, WIDTH), 100.0).half()
    weight = torch.zeros(VOCABULARY, WIDTH).half().requires_grad_()
    found = head_loss(hidden, Head(weight), torch.zeros(2000, dtype=torch.long), torch.tensor(1 / 2000))
    (gradient,) = torch.autograd.grad(found.loss, weight)
    wanted = torch.full((VOCABULARY, WIDTH), 100 / VOCABULARY)
    wanted[0] -= 100
    assert torch.allclose(gradient.float(), wanted, rtol=0.01)


def test_gradient_added_up_at_once() -> None:
    """Over several batches, as gradient accumulation does, in chunks, with one matrix of memory less."""
    hidden = torch.randn(2, 30, WIDTH).requires_grad_()
    weights = [torch.randn(VOCABULARY, WIDTH).requires_grad_()]
    weights.append(weights[0].detach().clone().requires_grad_())
    labels = torch.randint(0, VOCABULARY, (2, 30))
    for weight, accumulate in zip(weights, (False, True), strict=True):
        for states, words in zip(hidden, labels, strict=True):
            with mock.patch.object(losses, "CHUNK_BYTES", 4 * VOCABULARY * 8):
                found = head_loss(states, Head(weight), words, torch.tensor(0.5), accumulate=accumulate)
            found.loss.backward()
    assert torch.allclose(weights[0].grad, weights[1].grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        head_loss(hidden[0], Head(weights[1]), labels[0], torch.tensor(0.5), accumulate=True)
    assert torch.allclose(weights[0].grad, weights[1].grad, rtol=1e-5, atol=1e-6)  # nothing without gradients


def test_gradient_added_up_is_never_wrongly_scaled() -> None:
    weight = torch.randn(VOCABULARY, WIDTH).requires_grad_()
    hidden, labels = torch.randn(3, WIDTH), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.5"):
        (head_loss(hidden, Head(weight), labels, torch.tensor(1.0), accumulate=True).loss / 2).backward()
    waited_for = torch.randn(VOCABULARY, WIDTH).requires_grad_()
    seen = []
    waited_for.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    (head_loss(hidden, Head(waited_for), labels, torch.tensor(1.0), accumulate=True).loss / 2).backward()
    assert len(seen) == 1  # as autograd does it, where somebody waits
    assert torch.equal(seen[0], waited_for.grad)
