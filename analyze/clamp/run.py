"""Run `routesae clamp`: generate from each prompt with and without changed latents, and compare the two texts.

The original text is what the unmodified LM gives after a prompt; the clamped text is what it gives with the latents
changed at every token, of the prompt and generated. The change in log-probability of the original text is

    Δ = Σ_t log P_clamped(y_t | prompt, y_<t) − Σ_t log P(y_t | prompt, y_<t)

over the tokens y of the original text (an end-of-text token included, the prompt not), in nats, at temperature 1: how
much less likely the clamp makes what the LM would have said. Both sums feed y token by token, as generating does.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from routesae import __version__
from routesae.analyze.clamp.changes import CHANGES, Clamp, parse_change
from routesae.analyze.clamp.prompts import Prompt, prompt_ids, read_prompts
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.clamp.steps import (
    Continuation,
    Pick,
    generate,
    greedy,
    replaying,
    require_cached_attention,
    sampling,
)
from routesae.analyze.inputs.lm import LM, Kept, kept_of, lm_of_sae, load_lm_of
from routesae.analyze.inputs.saes import one_sae
from routesae.harvest.lm.model import config_hash, weights_hash
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.folder.checkpoint import load_sae

log = logging.getLogger(__name__)

GENERATIONS = 3  # of a batch: the original, the clamped, and the original again under the clamp


def clamp(settings: ClampSettings, report: Report = silent) -> dict[str, Any]:
    """The texts with their tokens and log-probabilities, and everything needed to make them again.

    Raises WrongInput where SAE, changes, prompts and LM do not fit together.
    """
    changes = [parse_change(how, text) for how in CHANGES for text in getattr(settings, how)]
    folder, _ = one_sae(settings.sae, Path(settings.out))
    sae = load_sae(folder, pick_device(settings.device))
    change = Clamp(sae, changes, error_term=settings.error_term)
    prompts = read_prompts(settings)
    record = lm_of_sae(folder, sae.recipe)
    loaded = load_lm_of([record], settings.model, device=settings.device, lm_dtype=settings.lm_dtype)
    if "config_hash" not in record.facts:
        log.warning("cfg.json does not describe %s; only width and layers were compared", record.name)
    require_cached_attention(loaded.lm)
    has_template = getattr(loaded.tokenizer, "chat_template", None) is not None
    if settings.chat and not has_template:
        raise WrongInput(f"--chat: the tokenizer of {loaded.name!r} has no chat template; leave it out")
    chat = has_template if settings.chat is None else settings.chat
    kept = kept_of(record, loaded.framing)
    ids = [prompt_ids(prompt, loaded.tokenizer, loaded.framing, chat=chat) for prompt in prompts]
    _require_room(prompts, ids, settings.max_new_tokens, loaded)
    texts: list[dict[str, Any]] = []
    for first in range(0, len(prompts), settings.batch_sequences):
        rows = range(first, min(first + settings.batch_sequences, len(prompts)))
        texts += _texts_of_batch(settings, loaded, kept, change, prompts, ids, rows, report)
    return {
        "routesae": __version__,
        "settings": settings.to_dict(),
        "changes": [asdict(change) for change in changes],
        "sae": {
            "folder": str(folder),
            "recipe": sae.recipe.to_dict(),
            "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sae.files()},
        },
        "model": {
            "model": loaded.name,
            "revision": loaded.revision,
            "config_hash": config_hash(loaded.model.config),
            "weights_hash": weights_hash(loaded.lm),
            "device": str(loaded.lm.device),  # another device or precision may choose another token
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "chat": chat,
            **kept._asdict(),
        },
        "texts": texts,
    }


def _require_room(prompts: Sequence[Prompt], ids: Sequence[list[int]], new_tokens: int, loaded: LM) -> None:
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, prompt_tokens in zip(prompts, ids, strict=True):
        if not prompt_tokens:
            raise WrongInput(f"{prompt.origin} has no token; give some text to continue")
        if room is not None and len(prompt_tokens) + new_tokens > room:
            raise WrongInput(
                f"{prompt.origin}: {len(prompt_tokens)} tokens and --max-new-tokens {new_tokens} are more than the "
                f"{room} positions of {loaded.name!r}; shorten one of them"
            )


def _texts_of_batch(
    settings: ClampSettings,
    loaded: LM,
    kept: Kept,
    change: Clamp,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    rows: range,
    report: Report,
) -> list[dict[str, Any]]:
    """Generate the texts of the prompts numbered `rows`, all in one batch."""
    limit = settings.max_new_tokens

    def on_step(steps: int) -> None:
        done = GENERATIONS * rows.start * limit + steps * len(rows)
        report(Progress("clamp", done, GENERATIONS * len(prompts) * limit, "tokens", {}))

    def pick() -> Pick:  # a new one for each text: the same random numbers for both
        return greedy if settings.temperature is None else sampling(settings.temperature, settings.seed, rows)

    def run(number: int, pick: Pick, clamp: Clamp | None) -> list[Continuation]:
        return generate(
            loaded.lm,
            [ids[row] for row in rows],
            pick=pick,
            max_new_tokens=limit,
            stop_ids=loaded.stop_ids,
            kept=kept,
            clamp=clamp,
            on_step=lambda step: on_step(number * limit + step),
        )

    original, clamped = run(0, pick(), None), run(1, pick(), change)
    rescored = run(2, replaying(original, loaded.lm.device), change)
    if max(len(text.token_ids) for text in original) < limit:
        on_step(GENERATIONS * limit)  # every text ended early: the remaining steps are not needed
    texts = zip(rows, original, clamped, rescored, strict=True)
    return [_text(prompts[row], ids[row], one, two, three, loaded.tokenizer) for row, one, two, three in texts]


def _text(
    prompt: Prompt,
    ids: list[int],
    original: Continuation,
    clamped: Continuation,
    rescored: Continuation,
    tokenizer: Any,
) -> dict[str, Any]:
    log_p, log_p_clamped = math.fsum(original.log_p), math.fsum(rescored.log_p)
    return {
        "origin": prompt.origin,
        "prompt": prompt.messages[-1]["content"] if prompt.messages else prompt.text,
        "input": tokenizer.decode(ids),
        "input_ids": ids,
        "original": tokenizer.decode(original.token_ids, skip_special_tokens=True),
        "original_ids": original.token_ids,
        "clamped": tokenizer.decode(clamped.token_ids, skip_special_tokens=True),
        "clamped_ids": clamped.token_ids,
        "log_p": log_p,
        "log_p_clamped": log_p_clamped,
        "delta_log_p": log_p_clamped - log_p,
        "delta_log_p_per_token": (log_p_clamped - log_p) / len(original.token_ids),
        **prompt.replies,
    }
