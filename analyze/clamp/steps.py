"""Generate continuations of a batch of prompts token by token, with an SAE's latents changed or as the LM is.

A step feeds the new tokens of every row, the whole prompt at first and then one token, with a key/value cache. Every
forward pass of the LM that `steering` sees, of these steps or of anybody else, is two:

    1. clean pass     only where the SAE has a router or is a crosscoder: the LM runs over the new tokens unmodified,
                      on a copy of the cache that the clamped steps before left. It gives the routes of the new
                      tokens, or the hidden states that the crosscoder reads.
    2. clamped pass   the LM runs over the same tokens with the edits, and the cache keeps what this pass put there.

So a token's clean state is the unmodified token after a clamped past; within the prompt, which is fed in one step, it
is the unmodified prompt. Recomputing every step from the first token without a cache gives the same tokens. An SAE
over one layer needs no clean pass: what it reads lies below all of its edits.

Rows are padded on the left, masked and have their own positions, so that each is as if it were alone. Edits apply at
the positions training used: not at padding, a row's first positions or special tokens.

Dimension letters: B rows, T tokens fed in a step, S tokens so far, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from routesae.analyze.clamp.changes import Clamp
from routesae.analyze.inputs.lm import Kept, left_padded
from routesae.analyze.scores.replacement import spliced_layers
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import Edit, capturing, editing, logits
from routesae.reporting import WrongInput
from routesae.train.saes.normalise import places_of

Pick = Callable[[int, Tensor], Tensor]
"""(step, log_p_BV on the LM's device) → the next token ids_B."""

CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # whose past is keys and values alone


class Continuation(NamedTuple):
    """The tokens that follow one prompt, an end-of-text token included, and each one's log p in nats."""

    token_ids: list[int]
    log_p: list[float]


def require_cached_attention(lm: LanguageModel) -> None:
    """Raises WrongInput for an LM whose past cannot be copied and kept, such as one with recurrent layers."""
    kinds = set(getattr(lm.model.config.get_text_config(), "layer_types", None) or ())
    has_cache = "past_key_values" in inspect.signature(lm.body.forward).parameters
    if other := sorted(kinds - CACHED_LAYERS) or ([] if has_cache else ["no key/value cache"]):
        raise WrongInput(
            f"{type(lm.model).__name__} has {', '.join(other)}: clamping runs new tokens twice on the LM's past, "
            "which needs attention layers only; analyze and train work on it"
        )


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    pick: Pick,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    kept: Kept,
    clamp: Clamp | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Continuation]:
    """Continue each prompt by up to `max_new_tokens` tokens, or to the first of `stop_ids`.

    on_step: called after each token with the number of tokens so far.
    """
    from transformers import DynamicCache

    # Without a config every layer of the cache keeps its whole past; the mask does the sliding.
    inputs: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": True}
    takes_positions = "position_ids" in inspect.signature(lm.body.forward).parameters
    ids_BT, mask_BS = left_padded(prompts, lm.device)
    stops = torch.tensor(sorted(stop_ids), device=lm.device)
    live_B = mask_BS.any(1)
    picked: list[Tensor] = []
    log_p: list[Tensor] = []
    lengths_B = torch.zeros(len(prompts), dtype=torch.int64, device=lm.device)
    for step in range(max_new_tokens):
        if takes_positions:
            inputs["position_ids"] = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        with nullcontext() if clamp is None else steering(lm, clamp, kept):
            # Rows that have ended are fed too, to no effect: no row sees another.
            final_BTD = lm.body(input_ids=ids_BT, attention_mask=mask_BS.long(), **inputs)[0].to(lm.device)
        log_p_BV = torch.log_softmax(logits(lm, final_BTD[:, -1]), dim=1)
        next_B = pick(step, log_p_BV)
        picked.append(next_B)
        log_p.append(log_p_BV.gather(1, next_B[:, None])[:, 0])
        lengths_B += live_B
        live_B = live_B & ~torch.isin(next_B, stops)
        on_step(step + 1)
        if not bool(live_B.any()):
            break
        ids_BT = next_B[:, None]
        mask_BS = torch.cat([mask_BS, torch.ones_like(ids_BT, dtype=torch.bool)], 1)
    rows = zip(torch.stack(picked, 1).tolist(), torch.stack(log_p, 1).tolist(), lengths_B.tolist(), strict=True)
    return [Continuation(ids[:length], row_log_p[:length]) for ids, row_log_p, length in rows]


@contextmanager
def steering(lm: LanguageModel, clamp: Clamp, kept: Kept) -> Iterator[None]:
    """While open, every forward pass of the LM, also one of its `generate`, is clamped at the kept positions.

    A token's position in its row is told from an attention mask [B, S] where there is one, else from the past.
    Raises WrongInput from a pass that is not given token ids, or a mask of another shape.
    """
    body, edits, is_clean = lm.body, dict[int, Edit](), False
    names = list(inspect.signature(body.forward).parameters)

    def decide(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal is_clean
        if is_clean:
            return
        edits.clear()
        inputs = dict(zip(names, args, strict=False)) | kwargs
        ids_BT, mask_BS, past = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids_BT is None or (mask_BS is not None and mask_BS.ndim != 2):
            raise WrongInput("a clamped LM reads input_ids, and an attention_mask [rows, tokens]: call it with these")
        if mask_BS is None:
            before = 0 if past is None else past.get_seq_length()
            mask_BS = torch.ones(len(ids_BT), before + ids_BT.shape[1], dtype=torch.bool, device=lm.device)
        positions_BT = (mask_BS.long().cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        kept_BT = mask_BS[:, -ids_BT.shape[1] :].bool() & kept.at(ids_BT, positions_BT)
        hidden: dict[int, Tensor] = {}
        if clamp.layers_read and bool(kept_BT.any()):
            if past is not None:  # the copy shares what is there: layers put new tensors in the place of old ones
                inputs["past_key_values"] = copied = copy(past)
                copied.layers = [copy(layer) for layer in past.layers]
            is_clean = True
            try:
                with capturing(lm, clamp.layers_read, hidden.__setitem__):
                    body(**inputs)
            finally:
                is_clean = False
        edits.update(clamp.edits(hidden, kept_BT, places_of(ids_BT, positions_BT)))

    def edit_of(layer: int) -> Edit:
        return lambda hidden_BTD: edits[layer](hidden_BTD) if layer in edits else hidden_BTD

    handle = body.register_forward_pre_hook(decide, with_kwargs=True)
    try:
        with editing(lm, {layer: edit_of(layer) for layer in spliced_layers(clamp.sae)}):
            yield
    finally:
        handle.remove()


def greedy(step: int, log_p_BV: Tensor) -> Tensor:
    """Pick the likeliest token of each row."""
    return log_p_BV.argmax(1)


def sampling(temperature: float, seed: int, prompts: Sequence[int]) -> Pick:
    """Draw at `temperature`. prompts: the number of each row's prompt, which with `seed` seeds its random numbers.

    So a row's text depends neither on its batch nor on the device, and two runs of one seed differ only by their LM.
    """
    seeds = [int(np.random.SeedSequence((seed, prompt)).generate_state(1)[0]) for prompt in prompts]
    generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]

    def pick(step: int, log_p_BV: Tensor) -> Tensor:
        p_BV = torch.softmax(log_p_BV.cpu() / temperature, dim=1)
        drawn = [torch.multinomial(p_V, 1, generator=one) for p_V, one in zip(p_BV, generators, strict=True)]
        return torch.cat(drawn).to(log_p_BV.device)

    return pick


def replaying(continuations: Sequence[Continuation], device: torch.device) -> Pick:
    """Pick the tokens of finished texts, so that `generate` gives their log-probabilities."""
    ids_BS = pad_sequence([torch.tensor(text.token_ids) for text in continuations], batch_first=True).to(device)
    return lambda step, log_p_BV: ids_BS[:, step]
