"""Put something else in the place of a decoder block's output, and run the LM on from there.

A clean pass runs the whole LM once over a batch of rows. A spliced pass begins at the first spliced layer with
the hidden states that the clean pass had there: everything below is the same in both, so it is not run again.
Logits are formed a chunk of positions at a time; [B, T, vocabulary] never exists whole.

Dimension letters: B rows, T context, D width, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routesae.harvest.lm.model import LanguageModel, block_hidden, capturing

Edit = Callable[[Tensor], Tensor]
"""hidden_BTD of one layer → what stands in its place; takes nothing it may not read and changes nothing."""


class CleanPass(NamedTuple):
    """final_BTD: after the final norm, what the head reads. hidden: {layer: hidden_BTD} of the layers asked for.

    in_tuples: whether this LM's blocks put their output in a tuple.
    """

    final_BTD: Tensor
    hidden: dict[int, Tensor]
    in_tuples: bool


@torch.inference_mode()
def clean_pass(lm: LanguageModel, token_ids_BT: Tensor, layers: Sequence[int]) -> CleanPass:
    """The LM as it is, over rows without padding."""
    hidden: dict[int, Tensor] = {}
    outputs: list[bool] = []
    handle = lm.blocks[0].register_forward_hook(lambda block, inputs, out: outputs.append(isinstance(out, tuple)))
    try:
        with capturing(lm, layers, hidden.__setitem__):
            final_BTD = lm.body(input_ids=token_ids_BT, use_cache=False)[0]
    finally:
        handle.remove()
    return CleanPass(final_BTD, hidden, outputs[0])


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
        stack.enter_context(_starting_at(lm, first, start_BTD, in_tuple=clean.in_tuples))
        stack.enter_context(editing(lm, {layer: edit for layer, edit in edits.items() if layer != first}))
        final_BTD = lm.body(input_ids=token_ids_BT, use_cache=False)[0]
    assert isinstance(final_BTD, Tensor)
    return final_BTD


@contextmanager
def editing(lm: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """While open, every forward pass has edits[ℓ] applied to the output of each layer ℓ."""
    with ExitStack() as stack:
        for layer, edit in edits.items():
            stack.callback(lm.blocks[layer - 1].register_forward_hook(_hook(edit)).remove)
        yield


def _hook(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden_BTD = edit(block_hidden(output))
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    return hook


@contextmanager
def _starting_at(lm: LanguageModel, layer: int, hidden_BTD: Tensor, *, in_tuple: bool) -> Iterator[None]:
    """While open, blocks 1 … `layer` do nothing, and the last of them puts out hidden_BTD.

    The embedding still runs, which is cheap, so that the LM itself prepares masks and positions.
    """

    def start(*args: Any, **kwargs: Any) -> Any:
        return (hidden_BTD,) if in_tuple else hidden_BTD

    with ExitStack() as stack:
        for block in lm.blocks[:layer]:  # each but the last is given, and gives on, what nobody will read
            stack.enter_context(_forward_replaced(block, start))
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, calling the module (hooks included) runs `forward` in place of its own."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


class _BodyOutput:
    """Stands for what an LM's body puts out: final states, and None for every optional part of an output."""

    def __init__(self, final_1CD: Tensor):
        self.last_hidden_state = final_1CD

    def __getitem__(self, at: int | slice) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


@torch.inference_mode()
def logits(lm: LanguageModel, final_CD: Tensor) -> Tensor:
    """float32 [C, V] of positions whose final hidden states are given, by the LM's own head.

    The head is reached through the LM's forward, with its body replaced by the states given, so that whatever
    the model does to its logits (soft-capping, scaling) is done.
    """

    def given(*args: Any, **kwargs: Any) -> _BodyOutput:
        return _BodyOutput(final_CD[None])

    placeholder = torch.zeros(1, len(final_CD), dtype=torch.int64, device=final_CD.device)
    with _forward_replaced(lm.body, given):
        out: Tensor = lm.model(input_ids=placeholder, use_cache=False).logits[0].float()
    return out
