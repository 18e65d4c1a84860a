"""Rows of prompt tokens in; their continuations out, token by token, with an SAE's latents changed or without.

A step feeds the new tokens of every row, all of the prompt at first and then one, to the LM and its key/value cache:

    1. clean pass     where the SAE has a router or is a crosscoder: the LM runs over the new tokens, unmodified, with
                      the cache as the clamped steps before left it. It gives the routes of the new tokens, or the
                      hidden states that the crosscoder reads. The cache is then cropped back by as many tokens.
    2. clamped pass   the LM runs over them again with the edits, and the cache keeps what this pass put there.

So what counts as clean for a token is this token unmodified after a past that is clamped; within the prompt, whose
tokens come all in one step, it is the prompt unmodified. Recomputing every step from its first token, without a
cache, gives the same tokens. An SAE over one layer needs no clean pass: what it reads lies below all of its edits.

Rows of a batch are padded on the left, masked and given their own positions, so that each is as if it were alone. Of
a row, those positions are replaced that training used: no padding, no first positions, no special tokens.

Dimension letters: B rows, T tokens fed in a step, S tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.clamp.changes import Clamp
from routesae.analyze.scores.splice import editing, logits
from routesae.harvest.lm.model import LanguageModel, capturing
from routesae.reporting import WrongInput

Pick = Callable[[int, Tensor], Tensor]
"""(step, log_p_BV on the LM's device) → the next token ids_B."""

CACHED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")  # whose past is keys and values alone


class Kept(NamedTuple):
    """Which positions training used: not those of `dropped_ids`, nor a row's first `skip_positions`."""

    dropped_ids: tuple[int, ...]
    skip_positions: int


class Continuation(NamedTuple):
    """What followed one prompt, an end-of-text token included. log_p: of each token in nats, at temperature 1."""

    token_ids: list[int]
    log_p: list[float]


def require_cached_attention(lm: LanguageModel) -> None:
    """Raises WrongInput for an LM whose past cannot be taken back by a token, such as one with recurrent layers."""
    kinds = set(getattr(lm.model.config.get_text_config(), "layer_types", None) or CACHED_LAYERS)
    accepts = inspect.signature(lm.body.forward).parameters
    if kinds <= set(CACHED_LAYERS) and "past_key_values" in accepts:
        return
    other = ", ".join(sorted(kinds - set(CACHED_LAYERS))) or "no key/value cache"
    raise WrongInput(
        f"{type(lm.model).__name__} has {other}: clamping takes single tokens back out of the LM's past, which needs "
        "attention layers only; analyze and train work on it"
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
    """One continuation a prompt, up to `max_new_tokens` tokens or the first of `stop_ids`.

    on_step: called after each token with the number of tokens so far.
    """
    rows = Rows(lm, kept, clamp)
    ids_BT, real_BT = left_padded(prompts, lm.device)
    stops = torch.tensor(sorted(stop_ids), device=lm.device)
    live_B = real_BT.any(1)
    log_p_BV = rows.feed(ids_BT, mask_BT=real_BT, live_B=live_B)
    ids, log_p, lengths_B = [], [], torch.zeros(len(prompts), dtype=torch.int64, device=lm.device)
    for step in range(max_new_tokens):
        next_B = pick(step, log_p_BV)
        ids.append(next_B)
        log_p.append(log_p_BV.gather(1, next_B[:, None])[:, 0])
        lengths_B += live_B
        live_B = live_B & ~torch.isin(next_B, stops)
        on_step(step + 1)
        if step + 1 == max_new_tokens or not bool(live_B.any()):
            break
        # Rows that have ended are fed too, unedited and to no effect: no row sees another.
        new_B1 = next_B[:, None]
        log_p_BV = rows.feed(new_B1, mask_BT=torch.ones_like(new_B1, dtype=torch.bool), live_B=live_B)
    columns = zip(torch.stack(ids, 1).tolist(), torch.stack(log_p, 1).tolist(), lengths_B.tolist(), strict=True)
    return [Continuation(row_ids[:length], row_log_p[:length]) for row_ids, row_log_p, length in columns]


class Rows:
    """A batch that grows by a step at a time: its key/value cache, its attention mask, and the clamp on it."""

    def __init__(self, lm: LanguageModel, kept: Kept, clamp: Clamp | None):
        from transformers import DynamicCache

        self.lm = lm
        self.clamp = clamp
        self.skip_positions = kept.skip_positions
        self.dropped = torch.tensor(kept.dropped_ids, dtype=torch.int64, device=lm.device)
        # Without a config every layer keeps its whole past, sliding ones too (the mask does the sliding), so that
        # cropping by a token always leaves what was there before it.
        self.cache = DynamicCache()
        self.mask_BS: Tensor | None = None
        self.takes_positions = "position_ids" in inspect.signature(lm.body.forward).parameters

    def feed(self, ids_BT: Tensor, *, mask_BT: Tensor, live_B: Tensor) -> Tensor:
        """log_p_BV of the token after these. mask_BT: bool, what is no padding. live_B: bool, rows to be clamped."""
        fed = ids_BT.shape[1]
        self.mask_BS = mask_BT if self.mask_BS is None else torch.cat([self.mask_BS, mask_BT], 1)
        positions_BT = (self.mask_BS.cumsum(1) - 1).clamp(min=0)[:, -fed:]
        kept_BT = mask_BT & live_B[:, None] & (positions_BT >= self.skip_positions)
        kept_BT &= ~torch.isin(ids_BT, self.dropped)
        edits = {}
        if self.clamp is not None and bool(kept_BT.any()):
            hidden: dict[int, Tensor] = {}
            if self.clamp.layers_read:
                with capturing(self.lm, self.clamp.layers_read, hidden.__setitem__):
                    self._forward(ids_BT, positions_BT)
                self.cache.crop(-fed)
            edits = self.clamp.edits(hidden, kept_BT)
        with editing(self.lm, edits):
            final_BTD = self._forward(ids_BT, positions_BT)
        return torch.log_softmax(logits(self.lm, final_BTD[:, -1]), dim=1)

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        assert self.mask_BS is not None
        positions: dict[str, Any] = {"position_ids": positions_BT} if self.takes_positions else {}
        final_BTD: Tensor = self.lm.body(
            input_ids=ids_BT,
            attention_mask=self.mask_BS.long(),
            past_key_values=self.cache,
            use_cache=True,
            **positions,
        )[0]
        return final_BTD


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids_BT, each prompt at the right end of its row, and bool real_BT, where it is. Padding is id 0, masked."""
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
    real_BT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        real_BT[row, longest - len(prompt) :] = True
    return ids_BT.to(device), real_BT.to(device)


def greedy(step: int, log_p_BV: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return log_p_BV.argmax(1)


def sampling(temperature: float, seed: int, prompts: Sequence[int]) -> Pick:
    """Draw at `temperature`. prompts: the number of each row's prompt, which with `seed` decides its random numbers.

    So a row's text depends neither on its batch nor on the device, and two runs of one seed differ only by their LM.
    """
    seeds = [int(np.random.SeedSequence((seed, prompt)).generate_state(1)[0]) for prompt in prompts]
    generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]

    def pick(step: int, log_p_BV: Tensor) -> Tensor:
        p_BV = torch.softmax(log_p_BV.cpu() / temperature, dim=1)
        drawn = [torch.multinomial(p_V, 1, generator=own) for p_V, own in zip(p_BV, generators, strict=True)]
        return torch.cat(drawn).to(log_p_BV.device)

    return pick


def replaying(continuations: Sequence[Continuation], device: torch.device) -> Pick:
    """The tokens of texts that exist, so that `generate` gives their log-probabilities."""
    longest = max(len(text.token_ids) for text in continuations)
    ids_BS = torch.zeros(len(continuations), longest, dtype=torch.int64)
    for row, text in enumerate(continuations):
        ids_BS[row, : len(text.token_ids)] = torch.tensor(text.token_ids)
    ids_BS = ids_BS.to(device)
    return lambda step, log_p_BV: ids_BS[:, step]
