"""Running models by parts: logits a few positions at a time, and layers that two models share only once.

Logits are the largest thing that a language model makes: of 2,048 tokens and a vocabulary of 256,000 they take 2 GB in
float32. So the decoder runs once, and the head then turns its hidden states into logits in chunks. The head is run by
the model's own `forward`, with what the decoder returned put in the decoder's place, so that whatever a model does
around its head (scaling, soft-capping) is done.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..errors import LayerPruneError, UnsupportedModelError
from ..families.layout import DecoderStack, find_decoder_layers, find_final_norm, find_output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The most float32 logits of one model that are in memory at once, in bytes.
LOGITS_BYTES = 64 << 20
# So many tokens tell whether a model can be run by parts.
_PROBE = 32
# What may go wrong in a model that can't be run by parts.
_TROUBLE = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class SplitModel:
    """A model whose decoder and head can be run apart.

    Args:
        model (`PreTrainedModel`): A causal language model, which may be wrapped by PEFT.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        self._decoder = decoder if decoder is not model and isinstance(decoder, nn.Module) else None

    def whole(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, length, vocabulary]` of token ids `[batch, length]`, as the model makes them."""
        return self.model(input_ids=ids, use_cache=False).logits

    def decode(self, ids: torch.Tensor) -> Any:
        """Run the decoder.

        Args:
            ids (`torch.Tensor`): Token ids `[batch, length]`.

        Returns:
            `Any`: What `logits` takes.
        """
        if self._decoder is None:
            return self.whole(ids)
        kept: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            kept.append(output)
            return _positions(output, slice(0, 1))  # the head is run later

        handle = self._decoder.register_forward_hook(keep)
        try:
            self.whole(ids)
        finally:
            handle.remove()
        return kept[0]

    def logits(self, ids: torch.Tensor, decoded: Any, positions: slice) -> torch.Tensor:
        """Run the head.

        Args:
            ids (`torch.Tensor`): Token ids `[batch, length]`.
            decoded (`Any`): What `decode` made of them.
            positions (`slice`): Of which positions.

        Returns:
            `torch.Tensor`: Logits `[batch, positions, vocabulary]`.
        """
        if self._decoder is None:
            return decoded[:, positions]
        with replaced_forward([self._decoder], lambda *args, **kwargs: _positions(decoded, positions)):
            return self.whole(ids)

    def check(self, row: torch.Tensor) -> None:
        """Run the model whole from now on, if running it by parts makes a difference.

        Args:
            row (`torch.Tensor`): Some token ids `[length]`.
        """
        if self._decoder is None:
            return
        ids = row[None, :_PROBE].to(self.device)
        if not _tried(lambda: same_logits(self.whole(ids), self.by_parts(ids))):
            logger.info("%s can't be run by parts, so all logits of a text are in memory at once", _name(self.model))
            self._decoder = None

    def by_parts(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, length, vocabulary]` of token ids `[batch, length]`, decoder and head run apart."""
        return self.logits(ids, self.decode(ids), slice(0, ids.shape[1]))


class SharedPrefix:
    """The leading layers that two models have in common: the second gets the hidden states of the first.

    Args:
        base (`PreTrainedModel`): It runs first, inside `shared`.
        model (`PreTrainedModel`): It runs second.
    """

    def __init__(self, base: PreTrainedModel, model: PreTrainedModel) -> None:
        self._layers: list[nn.Module] = []
        self._source: nn.Module | None = None
        try:
            stacks = find_decoder_layers(base), find_decoder_layers(model)
        except UnsupportedModelError:
            return
        if base is model or not _same_around(base, stacks[0], model, stacks[1]):
            return
        for ours, theirs in zip(stacks[0].layers, stacks[1].layers, strict=False):
            if not _same(ours, theirs):
                break
            self._source = ours
            self._layers.append(theirs)

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While this lasts, the second model's shared layers return what the last of the first model's made."""
        if not self._layers:
            yield
            return
        kept: list[Any] = []
        handle = self._source.register_forward_hook(lambda module, args, output: kept.append(_copied(output)))
        try:
            with replaced_forward(self._layers, lambda *args, **kwargs: kept[-1]):
                yield
        finally:
            handle.remove()

    def check(self, base: SplitModel, model: SplitModel, row: torch.Tensor) -> None:
        """Do without what makes a difference: sharing layers, and running the models by parts.

        Args:
            base (`SplitModel`): The first model.
            model (`SplitModel`): The second model.
            row (`torch.Tensor`): Some token ids `[length]`.
        """
        ids, base_ids = row[None, :_PROBE].to(model.device), row[None, :_PROBE].to(base.device)

        def unchanged() -> bool:
            with self.shared():
                found = base.by_parts(base_ids), model.by_parts(ids)
            return same_logits(base.whole(base_ids), found[0]) and same_logits(model.whole(ids), found[1])

        if _tried(unchanged):
            return
        base.check(row)
        model.check(row)
        if self._layers and not _tried(unchanged):
            logger.info(
                "%s can't take over what %s computed, so both run whole", _name(model.model), _name(base.model)
            )
            self._layers, self._source = [], None


# --- whether two modules are the same ---------------------------------------------------------------------


def _same_around(base: PreTrainedModel, stack: DecoderStack, model: PreTrainedModel, other: DecoderStack) -> bool:
    """Whether all that comes before the first layer is the same: everything but layers, final norm and head."""
    found = []
    for one, where in ((base, stack), (model, other)):
        after = {where.path, find_final_norm(one, where), find_output_head(one)} - {None}
        ids = {id(t) for path in after for t in _tensors(one.get_submodule(path)).values()}
        embeddings = _tensors(one.get_input_embeddings())  # a tied head is among them
        rest = {name: t for name, t in _tensors(one).items() if id(t) not in ids}
        found.append({name.rpartition("base_model.model.")[2]: t for name, t in rest.items()} | embeddings)
    return _same_tensors(*found)


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers are the same: their classes, plain attributes and weights."""
    ours, theirs = list(one.modules()), list(other.modules())
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if type(a) is not type(b) or _plain(a) != _plain(b):
            return False
    return _same_tensors(_tensors(one), _tensors(other))


def _plain(module: nn.Module) -> dict[str, Any]:
    plain = int | float | str | bool | tuple | type(None)
    return {
        k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ("training", "_is_hf_initialized")
    }


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    for name, tensor in ours.items():
        other = theirs[name]
        if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
            return False
        if tensor.data_ptr() != other.data_ptr() and not torch.equal(tensor, other):
            return False
    return True


def _tried(check: Callable[[], bool]) -> bool:
    """Whether a check passes; one that fails in any way does not."""
    try:
        return check()
    except _TROUBLE as error:
        if is_out_of_memory(error):
            raise
        return False


def same_logits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same up to rounding.

    Args:
        one (`torch.Tensor`): Of any shape.
        other (`torch.Tensor`): Of any shape.

    Returns:
        `bool`: Kernels round differently with the shape of what they multiply, by a few units in the last place.
    """
    if one.shape != other.shape:
        return False
    tolerance = 16 * torch.finfo(one.dtype).eps
    one, other = one.float().nan_to_num(), other.to(one.device).float().nan_to_num()
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(one.abs().max().item(), 1e-6))


# --- running --------------------------------------------------------------------------------------------


@contextmanager
def replaced_forward(modules: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace what modules do.

    Args:
        modules (`list[nn.Module]`): Which modules.
        forward (`Callable`): What they do instead, while this lasts.
    """
    with ExitStack() as stack:
        for module in modules:
            if "forward" in vars(module):  # such as where accelerate moves weights to a device
                stack.callback(setattr, module, "forward", vars(module)["forward"])
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode and without gradients; afterwards, every module is in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def positions_at_once(length: int, batch: int, vocabulary: int, budget: int = LOGITS_BYTES) -> int:
    """How many positions of a text go through the head at once.

    Args:
        length (`int`): Tokens in a text.
        batch (`int`): Texts at once.
        vocabulary (`int`): Logits at a position.
        budget (`int`, defaults to `LOGITS_BYTES`): Bytes of float32 logits.

    Returns:
        `int`: Chunks of this size are as even as can be; where there are several, it is a multiple of 32 (also where
            fewer would fit), since processors multiply those faster.
    """
    most = max(1, budget // (4 * batch * vocabulary))
    chunks = -(-length // most)
    even = -(-length // chunks)
    return even if chunks == 1 else min(-(-even // 32) * 32, length)


def in_batches(
    rows: torch.Tensor, size: int, run: Callable[[torch.Tensor], None], advice: str = "use shorter texts"
) -> Iterator[int]:
    """Run something on a few rows at a time; where memory runs out, on half as many from then on.

    Args:
        rows (`torch.Tensor`): All rows.
        size (`int`): How many at a time, at first.
        run (`Callable`): What to run on some of them. It may be run again on rows on which it failed.
        advice (`str`): The way out where not even one fits.

    Yields:
        `int`: How many rows were done.

    Raises:
        LayerPruneError: Not even one row fits into memory.
    """
    start, size = 0, max(1, size)
    while start < len(rows):
        batch = rows[start : start + size]
        try:
            run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise LayerPruneError(
                    f"out of memory with a single text of {batch.shape[-1]} tokens; {advice}"
                ) from error
            size = len(batch) // 2
        else:
            start += len(batch)
            yield len(batch)
            continue
        free_memory()
        logger.warning("out of memory; going on with batches of %d", size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its GPU is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and (
        should_reduce_batch_size(error) or "not enough memory" in str(error) or "out of memory" in str(error)
    )


def free_memory() -> None:
    """Give back what the GPU's allocator holds and no tensor uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _positions(output: Any, positions: slice) -> Any:
    """A decoder's output with the hidden states of some positions only."""
    if isinstance(output, torch.Tensor):
        return output[:, positions]
    if hasattr(output, "last_hidden_state"):
        output = copy.copy(output)
        output.last_hidden_state = output.last_hidden_state[:, positions]
        return output
    return (output[0][:, positions], *output[1:])


def _copied(output: Any) -> Any:
    """A layer's output that later layers can't change in place."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(_copied(part) for part in output) if isinstance(output, tuple | list) else output


def _name(model: Any) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__
