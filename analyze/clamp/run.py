"""The stage clamp: an SAE, changes to its latents and prompts in; original and clamped text of each prompt out.

Original is what the LM, as it is, gives after a prompt; clamped, what it gives with the latents changed at every
token, those of the prompt and those generated. The change in log-probability of the original text is

    Δ = Σ_t log P_clamped(y_t | prompt, y_<t) − Σ_t log P(y_t | prompt, y_<t)

over the tokens y of the original text (an end-of-text token included, the prompt not), in nats, at temperature 1: how
much less likely the clamp makes what the LM would have said. Both sums feed y token by token, as generating does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from routesae import __version__
from routesae.analyze.clamp.changes import Clamp, parse_change
from routesae.analyze.clamp.model import SpokenLM, load_lm_of
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
from routesae.harvest.lm.model import config_hash, weights_hash
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.folder.checkpoint import find_saes, load_sae, read_config
from routesae.train.folder.hub import fetch_sae
from routesae.train.saes import SAE

GENERATIONS = 3  # of a batch: the original, the clamped, and the original again under the clamp


def clamp(settings: ClampSettings, report: Report = silent) -> dict[str, Any]:
    """Everything a program wants to know of the texts, and all that is needed to have them again.

    Raises WrongInput where SAE, changes, prompts and LM do not fit together.
    """
    given = {how: getattr(settings, how) for how in ("add", "multiply", "set", "ablate")}
    changes = [parse_change(how, text) for how, texts in given.items() for text in texts]
    folder = _one_sae(settings)
    sae, config = load_sae(folder, pick_device(settings.device)), read_config(folder)
    clamping = Clamp(sae, changes, error_term=settings.error_term)
    prompts = read_prompts(
        settings.prompt,
        settings.prompts,
        text_field=settings.text_field,
        hh=settings.hh,
        limit=settings.max_prompts,
    )
    spoken = load_lm_of(sae, config, model=settings.model, device=settings.device, lm_dtype=settings.lm_dtype)
    require_cached_attention(spoken.lm)
    chat = _uses_chat(settings.chat, spoken)
    ids = [prompt_ids(prompt, spoken.tokenizer, spoken.framing, chat=chat) for prompt in prompts]
    _require_room(prompts, ids, settings.max_new_tokens, spoken)
    return {
        "routesae": __version__,
        "settings": asdict(settings),
        "changes": [asdict(change) for change in changes],
        "sae": {"folder": str(folder), "recipe": asdict(sae.recipe), "sha256": _digests(folder, sae)},
        "model": {**_identity(spoken), "chat": chat, **spoken.kept._asdict()},
        "texts": _texts(settings, spoken, clamping, prompts, ids, report),
    }


def _digests(folder: Path, sae: SAE) -> dict[str, str]:
    """{file: sha256} of the weights in `folder`."""
    digests = {}
    for name in sae.files():
        with (folder / name).open("rb") as opened:
            digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _identity(spoken: SpokenLM) -> dict[str, Any]:
    """Which LM it was, and how it ran: another device or precision may choose another token."""
    return {
        "model": spoken.model,
        "revision": spoken.revision,
        "config_hash": config_hash(spoken.lm.model.config),
        "weights_hash": weights_hash(spoken.lm),
        "device": str(spoken.lm.device),
        "dtype": str(spoken.lm.model.dtype).removeprefix("torch."),
    }


def _one_sae(settings: ClampSettings) -> Path:
    if settings.sae is not None:
        return fetch_sae(settings.sae)
    found = find_saes(Path(settings.out))
    if len(found) > 1:
        raise WrongInput(
            f"{len(found)} SAEs under {settings.out}, and one is clamped; name it with --sae: "
            f"{', '.join(map(str, found[:8]))}{' …' * (len(found) > 8)}"
        )
    return found[0]


def _uses_chat(asked: bool | None, spoken: SpokenLM) -> bool:
    has_one = getattr(spoken.tokenizer, "chat_template", None) is not None
    if asked and not has_one:
        raise WrongInput(f"--chat: the tokenizer of {spoken.model!r} has no chat template; leave it out")
    return has_one if asked is None else asked


def _require_room(prompts: Sequence[Prompt], ids: Sequence[list[int]], new_tokens: int, spoken: SpokenLM) -> None:
    room = getattr(spoken.lm.model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, prompt_tokens in zip(prompts, ids, strict=True):
        if not prompt_tokens:
            raise WrongInput(f"{prompt.origin} has no token; give some text to go on from")
        if room is not None and len(prompt_tokens) + new_tokens > room:
            raise WrongInput(
                f"{prompt.origin}: {len(prompt_tokens)} tokens and --max-new-tokens {new_tokens} are more than the "
                f"{room} positions of {spoken.model!r}; shorten one of them"
            )


def _texts(
    settings: ClampSettings,
    spoken: SpokenLM,
    clamping: Clamp,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    report: Report,
) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = []
    total = GENERATIONS * len(prompts) * settings.max_new_tokens
    for start in range(0, len(prompts), settings.batch_sequences):
        rows = range(start, min(start + settings.batch_sequences, len(prompts)))
        done = GENERATIONS * start * settings.max_new_tokens
        on_step = partial(_report_steps, report, done=done, rows=len(rows), total=total)

        original, clamped, again = _generations(settings, spoken, clamping, [ids[row] for row in rows], rows, on_step)
        for at, row in enumerate(rows):
            texts.append(_text(prompts[row], ids[row], original[at], clamped[at], again[at], spoken.tokenizer))
        if max(len(text.token_ids) for text in original) < settings.max_new_tokens:
            on_step(GENERATIONS * settings.max_new_tokens)  # all ended before; what was left will not be needed
    return texts


def _report_steps(report: Report, steps: int, *, done: int, rows: int, total: int) -> None:
    """`steps` steps into a batch of `rows` rows, with `done` tokens of earlier batches."""
    report(Progress("clamp", done + steps * rows, total, "tokens", {}))


def _generations(
    settings: ClampSettings,
    spoken: SpokenLM,
    clamping: Clamp,
    ids: Sequence[list[int]],
    rows: Sequence[int],
    on_step: Callable[[int], None],
) -> list[list[Continuation]]:
    """Of one batch: the LM's own continuations, the clamped ones, and its own again as the clamp scores them."""

    def pick() -> Pick:  # a new one for each text: the same random numbers for both
        return greedy if settings.temperature is None else sampling(settings.temperature, settings.seed, rows)

    def run(number: int, pick: Pick, clamp: Clamp | None) -> list[Continuation]:
        return generate(
            spoken.lm,
            ids,
            pick=pick,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=_stop_ids(spoken),
            kept=spoken.kept,
            clamp=clamp,
            on_step=lambda step: on_step(number * settings.max_new_tokens + step),
        )

    original = run(0, pick(), None)
    clamped = run(1, pick(), clamping)
    return [original, clamped, run(2, replaying(original, spoken.lm.device), clamping)]


def _stop_ids(spoken: SpokenLM) -> tuple[int, ...]:
    """Tokens that end a text: those of the model's generation config, or else the tokenizer's."""
    generation = getattr(spoken.lm.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = spoken.tokenizer.eos_token_id if ends is None else ends
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def _text(
    prompt: Prompt, ids: list[int], original: Continuation, clamped: Continuation, again: Continuation, tokenizer: Any
) -> dict[str, Any]:
    log_p, log_p_clamped = math.fsum(original.log_p), math.fsum(again.log_p)
    return {
        "origin": prompt.origin,
        "given": prompt.messages[-1]["content"] if prompt.messages else prompt.text,
        "prompt": tokenizer.decode(ids),
        "prompt_ids": ids,
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
