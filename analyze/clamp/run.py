"""Run `routesae clamp`: generate from each prompt with and without changed latents, and compare the two texts.

The original text is what the unmodified LM gives after a prompt; the clamped text is what it gives with the latents
changed at every token, of the prompt and generated. The change in log-probability of the original text is

    Δ = Σ_t log P_clamped(y_t | prompt, y_<t) − Σ_t log P(y_t | prompt, y_<t)

over the tokens y of the original text (an end-of-text token included, the prompt not), in nats, at temperature 1: how
much less likely the clamp makes what the LM would have said. Both sums feed y token by token, as generating does.
"""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from routesae import __version__
from routesae.analyze.clamp import steps
from routesae.analyze.clamp.changes import CHANGES, Clamp, parse_change
from routesae.analyze.clamp.prompts import Prompt, read_prompts
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.inputs.lm import LM, Kept, kept_of, lm_of_sae, load_lm_of
from routesae.analyze.inputs.saes import one_sae, sae_identity
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.folder.checkpoint import load_sae

log = logging.getLogger(__name__)

Text = dict[str, Any]
"""A prompt and what came of it, as the results have it."""
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
    loaded = load_lm_of([record], settings.model, settings)
    if "config_hash" not in record.facts:
        log.warning("cfg.json does not describe %s; only width and layers were compared", record.name)
    steps.require_cached_attention(loaded.lm)
    has_template = getattr(loaded.tokenizer, "chat_template", None) is not None
    if settings.chat and not has_template:
        raise WrongInput(f"--chat: the tokenizer of {loaded.name!r} has no chat template; leave it out")
    chat = has_template if settings.chat is None else settings.chat
    kept = kept_of(record, loaded.framing)
    texts = [_asked(settings, loaded, prompt, chat) for prompt in prompts]
    for first in range(0, len(texts), settings.batch_sequences):
        numbers = range(len(texts))[first : first + settings.batch_sequences]
        _continue(settings, loaded, kept, change, texts, numbers, report)
    return {
        "routesae": __version__,
        "settings": settings.to_dict(),
        "changes": [asdict(change) for change in changes],
        "sae": {"folder": str(folder), **sae_identity(sae)},
        "model": {
            "model": loaded.name,
            "revision": loaded.revision,
            "config_hash": loaded.record.facts["config_hash"],
            "weights_hash": loaded.record.weights,
            "device": str(loaded.lm.device),  # another device or precision may choose another token
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "chat": chat,
            **kept._asdict(),
        },
        "texts": texts,
    }


def _asked(settings: ClampSettings, loaded: LM, prompt: Prompt, chat: bool) -> dict[str, Any]:
    """What is known of a text before it is generated."""
    try:
        text = prompt.messages if chat and prompt.messages else prompt.text
        ids = loaded.ids(text, reply=True, new_tokens=settings.max_new_tokens)
    except WrongInput as refusal:
        raise WrongInput(f"{prompt.origin}: {refusal}{'; or give --no-chat' if chat else ''}") from refusal
    return {
        "origin": prompt.origin,
        "prompt": prompt.messages[-1]["content"] if prompt.messages else prompt.text,
        "messages": [dict(message) for message in prompt.messages] if chat else [],
        "input": loaded.tokenizer.decode(ids),
        "input_ids": ids,
        **prompt.replies,
    }


def _continue(
    settings: ClampSettings, loaded: LM, kept: Kept, change: Clamp, texts: list[Text], numbers: range, report: Report
) -> None:
    """Generate and score one batch, the `numbers`-th of all texts, and add what comes of it to each."""
    limit, batch = settings.max_new_tokens, [texts[number] for number in numbers]

    def on_step(taken: int) -> None:
        done = GENERATIONS * numbers.start * limit + taken * len(numbers)
        report(Progress("clamp", done, GENERATIONS * len(texts) * limit, "tokens", {}))

    def pick() -> steps.Pick:  # a new one for each text: the same random numbers for both
        heat = settings.temperature
        return steps.greedy if heat is None else steps.sampling(heat, settings.seed, numbers)

    def run(nth: int, pick: steps.Pick, clamp: Clamp | None) -> list[steps.Continuation]:
        options: dict[str, Any] = {"max_new_tokens": limit, "stop_ids": loaded.stop_ids, "kept": kept, "clamp": clamp}
        prompts = [text["input_ids"] for text in batch]
        return steps.generate(loaded.lm, prompts, pick=pick, on_step=lambda n: on_step(nth * limit + n), **options)

    original, clamped = run(0, pick(), None), run(1, pick(), change)
    rescored = run(2, steps.replaying(original, loaded.lm.device), change)
    if max(len(text.token_ids) for text in original) < limit:
        on_step(GENERATIONS * limit)  # every text ended early: the remaining steps are not needed
    for text, one, two, three in zip(batch, original, clamped, rescored, strict=True):
        log_p, log_p_clamped = math.fsum(one.log_p), math.fsum(three.log_p)
        for name, of in (("original", one), ("clamped", two)):
            text[name] = loaded.tokenizer.decode(of.token_ids, skip_special_tokens=True)
            text[f"{name}_ids"] = of.token_ids
        text |= {"log_p": log_p, "log_p_clamped": log_p_clamped, "delta_log_p": log_p_clamped - log_p}
        text["delta_log_p_per_token"] = (log_p_clamped - log_p) / len(one.token_ids)
