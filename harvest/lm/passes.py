"""Run an LM: read its blocks' outputs, stop after one of them, or put something else in their place and run on.

A clean pass runs the whole LM once over a batch of rows. A spliced pass begins at the first spliced layer with
the hidden states that the clean pass had there: everything below is the same in both, so it is not run again.
Logits are formed a chunk of positions at a time; [B, T, vocabulary] never exists whole.

Dimension letters: B rows, T context, D width, C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routesae.harvest.lm.model import LanguageModel

Edit = Callable[[Tensor], Tensor]
"""hidden_BTD of one layer → what stands in its place; must not change its argument."""
Context = AbstractContextManager[None]


# ------------------------------------------------------------------------------------------ reading blocks' outputs


class _Stop(Exception):
    """Ends a forward pass."""


def block_hidden(output: Any) -> Tensor:
    """The hidden state [B, T, D] in what a decoder block returns: the tensor, or the first of a tuple or list."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise TypeError(f"a decoder block returns {type(hidden).__name__}, not a tensor")
    return hidden


def _with_hidden(output: Any, hidden_BTD: Tensor) -> Any:
    """`output` of a decoder block with another hidden state in it."""
    return type(output)((hidden_BTD, *output[1:])) if isinstance(output, (tuple, list)) else hidden_BTD


def capturing(lm: LanguageModel, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Context:
    """While open, every forward pass hands take(layer, hidden_BTD) each requested layer's output."""
    return _hooks(lm, layers, lambda layer, output: take(layer, block_hidden(output).to(lm.device)))


@torch.inference_mode()
def run_until(lm: LanguageModel, token_ids_BT: Tensor, last_layer: int) -> None:
    """A forward pass that ends after block `last_layer`: no final norm, no head, no key/value cache."""

    def stop(layer: int, output: Any) -> None:
        raise _Stop

    with _hooks(lm, [last_layer], stop), suppress(_Stop):
        lm.model(input_ids=token_ids_BT, use_cache=False)


@contextmanager
def _hooks(lm: LanguageModel, layers: Iterable[int], change: Callable[[int, Any], Any]) -> Iterator[None]:
    """While open, change(ℓ, …) sees what block ℓ returns; what it returns in its turn, if not None, replaces that."""
    with ExitStack() as stack:
        for layer in layers:
            hook = lm.blocks[layer - 1].register_forward_hook(lambda block, _, out, layer=layer: change(layer, out))
            stack.callback(hook.remove)
        yield


# --------------------------------------------------------------------------------------- replacing blocks' outputs


class CleanPass(NamedTuple):
    """final_BTD: after the final norm, what the head reads. hidden: {layer: hidden_BTD} of the requested layers.

    returned: what each block up to the last requested one returned, so that a block can be skipped.
    """

    final_BTD: Tensor
    hidden: dict[int, Tensor]
    returned: dict[int, Any]


@torch.inference_mode()
def clean_pass(lm: LanguageModel, token_ids_BT: Tensor, layers: Sequence[int]) -> CleanPass:
    """The LM as it is, over rows without padding."""
    hidden: dict[int, Tensor] = {}
    returned: dict[int, Any] = {}

    def keep(layer: int, output: Any) -> None:
        if layer in layers:
            hidden[layer] = block_hidden(output).to(lm.device)
        returned[layer] = _small_parts(output, block_hidden(output).numel())

    with _hooks(lm, range(1, max(layers, default=0) + 1), keep):
        final_BTD = lm.body(input_ids=token_ids_BT, use_cache=False)[0].to(lm.device)
    return CleanPass(final_BTD, hidden, returned)


def _small_parts(output: Any, largest: int) -> Any:
    """What a block returns, without its hidden state and without larger tensors, such as attention weights."""
    if not isinstance(output, (tuple, list)):
        return None
    parts = (None if isinstance(part, Tensor) and part.numel() > largest else part for part in output[1:])
    return type(output)((None, *parts))


@torch.inference_mode()
def spliced_pass(lm: LanguageModel, token_ids_BT: Tensor, clean: CleanPass, edits: Mapping[int, Edit]) -> Tensor:
    """final_BTD with edits[ℓ] applied to the output of each layer ℓ as it comes in this pass.

    clean: of the same rows, with the first edited layer among its hidden states. Without an edit its final
    states are the answer.
    """
    if not edits:
        return clean.final_BTD
    first = min(edits)
    start_BTD = edits[first](clean.hidden[first])
    with ExitStack() as stack:
        # The embedding still runs, which is cheap, so that the LM itself prepares masks and positions. Each skipped
        # block but the last passes on what nobody reads.
        for layer in range(1, first + 1):
            output = _with_hidden(clean.returned[layer], start_BTD)
            skip = lambda *args, output=output, **kwargs: output  # noqa: E731
            stack.enter_context(_forward_replaced(lm.blocks[layer - 1], skip))
        stack.enter_context(editing(lm, {layer: edit for layer, edit in edits.items() if layer != first}))
        final_BTD: Tensor = lm.body(input_ids=token_ids_BT, use_cache=False)[0].to(lm.device)
    return final_BTD


def editing(lm: LanguageModel, edits: Mapping[int, Edit]) -> Context:
    """While open, every forward pass has edits[ℓ] applied to the output of each layer ℓ."""

    def change(layer: int, output: Any) -> Any:
        return _with_hidden(output, edits[layer](block_hidden(output).to(lm.device)))

    return _hooks(lm, edits, change)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, calling the module (hooks included) runs `forward` in place of its own."""
    own = module.__dict__.get("forward")  # accelerate's, where there is a device map
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


# --------------------------------------------------------------------------------------------------------- the head


class _BodyOutput:
    """Stands for what an LM's body returns: final states, and None for every optional part of an output."""

    def __init__(self, final_1CD: Tensor):
        self.last_hidden_state = final_1CD

    def __getitem__(self, at: int | slice) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def logits(lm: LanguageModel, final_CD: Tensor) -> Tensor:
    """float32 [C, V] of positions whose final hidden states are given, by the LM's own head.

    The head is reached through the LM's forward with its body replaced, so that whatever the model does to its
    logits (soft-capping, scaling) is done.
    """
    placeholder = torch.zeros(1, len(final_CD), dtype=torch.int64, device=final_CD.device)
    with _forward_replaced(lm.body, lambda *args, **kwargs: _BodyOutput(final_CD[None])):
        out: Tensor = lm.model(input_ids=placeholder, use_cache=False).logits[0].float()
    return out
