"""Prove by what it does, on two short rows, that an LM can be harvested and scored, before a corpus is paid for.

Dimension letters: B rows, T tokens, D width.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import capturing, clean_pass, logits, run_until, spliced_pass
from routesae.reporting import WrongInput, is_out_of_memory

TOKENS = 16  # a row of the proof
# How far, relative to its norm, a vector may be from an equal one that was computed in another batch.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# The names that configurations have for the number of positions: max_position_embeddings, n_ctx, max_seq_len …
_POSITIONS = re.compile(
    r"(max|n)_(\w+_)?(positions?(_embeddings)?|ctx|seq(uence)?_?len(gth)?|context_?len(gth)?)"
    r"|(seq(uence)?|context|ctx)_?len(gth)?|model_max_len(gth)?"
)


@torch.inference_mode()
def prove(lm: LanguageModel, name: str, tokenizer: Any, layers: Sequence[int], context: int) -> int | None:
    """Raises WrongInput, saying in one line what is wrong, if the LM cannot be harvested at `layers` and scored.

    Returns where transformers has layer ℓ: in hidden_states[ℓ + the number returned], or None if nowhere.
    """
    embedded = lm.model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= embedded:
        raise WrongInput(
            f"the tokenizer of {name} has the id {largest} ({token!r}), but the embedding has only {embedded} rows; "
            "resize the embedding, or give the tokenizer that the model was trained with"
        )
    for key, positions in lm.model.config.get_text_config().to_dict().items():
        if type(positions) is int and 1 < positions < context and _POSITIONS.fullmatch(key):
            raise WrongInput(f"--context {context} is more than the {positions} positions that {name} has ({key})")
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(embedded) if i not in special] or [0])
    drawn = torch.randint(len(plain), (3, context), generator=torch.Generator().manual_seed(0))
    ids_BT = plain[drawn].to(lm.device)
    try:
        run_until(lm, ids_BT[2:], 1)  # a whole row, as far as positions are looked up
        own_BTV, offset = _prove_blocks(lm, ids_BT[:2, :TOKENS], layers)
        _prove_splice(lm, ids_BT[:2, :TOKENS], layers, own_BTV)
    except WrongInput as unfit:
        raise WrongInput(f"{name} ({type(lm.model).__name__}) cannot be harvested: {unfit}") from None
    except Exception as error:  # from a stranger's code, on a plain row of tokens: whatever it is, it is the answer
        if is_out_of_memory(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise WrongInput(
            f"{name} ({type(lm.model).__name__}) cannot be harvested: its forward pass fails with "
            f"{type(error).__name__}: {reason[:200]}"
        ) from error
    return offset


def _prove_blocks(lm: LanguageModel, ids_BT: Tensor, layers: Sequence[int]) -> tuple[Tensor, int | None]:
    """Every block returns one hidden state a token, and no token of a row's first half sees one of its second.

    Returns the LM's own logits, and what `prove` returns.
    """
    last = layers[-1]
    changed_BT, half = ids_BT.clone(), TOKENS // 2
    changed_BT[1, half:] = ids_BT[0, half:]
    changed_BT[1, -1] = ids_BT[0, 0] if ids_BT[0, 0] != ids_BT[1, -1] else ids_BT[0, 1]
    passes = []
    for token_ids_BT in (ids_BT, changed_BT):
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in range(1, last + 1)}
        with capturing(lm, list(hidden), lambda layer, state_BTD: hidden[layer].append(state_BTD)):  # noqa: B023
            out = lm.model(input_ids=token_ids_BT, use_cache=False, output_hidden_states=True)
        passes.append((hidden, out))
    (hidden, out), (after, out_after) = passes
    for layer, states in hidden.items():
        shapes = [tuple(state.shape) for state in states]
        if shapes != [(*ids_BT.shape, lm.width)]:
            raise WrongInput(
                f"block {layer} returns {shapes or 'nothing'} for {list(ids_BT.shape)} tokens, not one hidden state "
                f"of width {lm.width} a token"
            )
        if not torch.isfinite(states[0]).all():
            raise WrongInput(f"block {layer} returns NaN or infinite values for plain tokens; try --lm-dtype float32")
    for what, one_BTD, other_BTD in (
        (f"block {last}", hidden[last][0], after[last][0]),
        ("the LM", out.logits, out_after.logits),
    ):
        differs_BT = _differs(lm, one_BTD, other_BTD)
        if not differs_BT[1, -1]:
            raise WrongInput(f"the last token of a row changes nothing in what {what} returns for it")
        # Rounding may change with the batch, as in a mixture whose experts get other tokens, but then in row 0 too.
        moved_BT = (one_BTD != other_BTD).any(dim=2)
        moved_alone = not moved_BT[0].any() and moved_BT[1, :half].sum() > half // 2
        if moved_alone or differs_BT[0].any() or differs_BT[1, :half].any():
            raise WrongInput(f"{what} sees the tokens after each token, so it is not a causal LM")
    of_transformers = getattr(out, "hidden_states", None) or ()
    for offset in (0, -1, 1):
        pairs = [(hidden[layer][0], layer + offset) for layer in range(1, min(last, len(lm.blocks) - 1) + 1)]
        if pairs and all(
            at < len(of_transformers) and torch.equal(one_BTD, of_transformers[at]) for one_BTD, at in pairs
        ):
            return out.logits, offset
    return out.logits, None


def _prove_splice(lm: LanguageModel, ids_BT: Tensor, layers: Sequence[int], own_BTV: Tensor) -> None:
    """A layer's output put in its own place gives the LM's own logits, and another in its place gives others."""
    clean = clean_pass(lm, ids_BT, layers)
    edits = {layers[0]: lambda hidden_BTD: hidden_BTD, layers[-1]: lambda hidden_BTD: hidden_BTD}
    for layer, edit in edits.items():
        final_BTD = spliced_pass(lm, ids_BT, clean, {layer: edit})
        if _differs(lm, own_BTV, logits(lm, final_BTD.flatten(0, 1)).view_as(own_BTV)).any():
            raise WrongInput(
                f"the LM goes on differently after layer {layer} is replaced by itself, so it cannot be scored"
            )
    final_BTD = spliced_pass(lm, ids_BT, clean, {layers[-1]: lambda hidden_BTD: hidden_BTD.roll(1, dims=2)})
    if not _differs(lm, own_BTV, logits(lm, final_BTD.flatten(0, 1)).view_as(own_BTV)).any():
        raise WrongInput(
            f"the LM does not use what stands in the place of layer {layers[-1]}, so it cannot be scored"
        )


def _differs(lm: LanguageModel, one_BTD: Tensor, other_BTD: Tensor) -> Tensor:
    """bool [B, T]: whether two vectors are further apart than rounding explains."""
    one_BTD, other_BTD = one_BTD.float(), other_BTD.float()
    distance_BT: Tensor = torch.linalg.vector_norm(one_BTD - other_BTD, dim=2)
    limit_BT: Tensor = TOLERANCES[lm.model.dtype] * torch.linalg.vector_norm(one_BTD, dim=2)
    return distance_BT > limit_BT
