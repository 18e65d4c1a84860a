"""Load the LM that an SAE was trained on, and the positions of a text at which it may be spliced in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from routesae.analyze.clamp.steps import Kept
from routesae.analyze.inputs.lm import lm_of_sae, load_lm_of
from routesae.harvest.corpus.tokens import Framing, framing
from routesae.harvest.lm.model import LanguageModel
from routesae.train.saes import SAE

log = logging.getLogger(__name__)

SINK_POSITIONS = 1  # first positions of a row left as they are where cfg.json does not say; harvest's default


class PromptLM(NamedTuple):
    """An LM with its tokenizer, the special tokens around a document, and the positions that may be replaced.

    model, revision: where it was loaded from.
    """

    lm: LanguageModel
    tokenizer: Any
    framing: Framing
    kept: Kept
    model: str
    revision: str | None

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from the model's generation config or else the tokenizer."""
        generation = getattr(self.lm.model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def load_prompt_lm(folder: Path, sae: SAE, *, model: str | None, device: str, lm_dtype: str) -> PromptLM:
    """Load the LM that `sae`, which is in `folder`, was trained on. model: where it is, or None if cfg.json says.

    Raises WrongInput where cfg.json does not name the LM, or `model` is another one.
    """
    record = lm_of_sae(folder, sae.recipe)
    loaded = load_lm_of([record], model, device=device, lm_dtype=lm_dtype)
    if "config_hash" not in record.facts:
        log.warning("cfg.json does not describe %s; only width and layers were compared", record.name)
    frame = framing(loaded.tokenizer)
    keeps_special = record.facts.get("keep_special")
    dropped_ids = () if keeps_special else tuple(record.facts.get("special_ids", frame.special_ids))
    kept = Kept(dropped_ids, int(record.facts.get("skip_positions", SINK_POSITIONS)))
    return PromptLM(loaded.lm, loaded.tokenizer, frame, kept, loaded.model, loaded.revision)
