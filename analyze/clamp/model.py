"""Load the LM that an SAE was trained on, and the positions of a text at which it may be spliced in.

cfg.json of an SAE of `routesae train` records the LM's config, tokenizer and weights, and each is compared with the
LM that is loaded. Other SAEs record at most a name, so only width and layers can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from routesae.analyze.clamp.steps import Kept
from routesae.analyze.scores.replacement import spliced_layers
from routesae.harvest.corpus.tokens import Framing, framing, tokenizer_hash
from routesae.harvest.lm.model import LanguageModel, config_hash, load_config, load_lm, load_tokenizer, weights_hash
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import WrongInput
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


def load_lm_of(sae: SAE, config: Mapping[str, Any], *, model: str | None, device: str, lm_dtype: str) -> PromptLM:
    """Load the LM that `sae` was trained on. config: its cfg.json. model: where the LM is, or None if cfg.json says.

    Raises WrongInput where cfg.json does not name the LM, or `model` is another one.
    """
    metadata = _mapping(config.get("metadata"))
    source = _mapping(_mapping(metadata.get("routesae")).get("source"))
    cache = _mapping(source.get("cache"))
    recorded = cache.get("model") or metadata.get("model_name")
    name = model or recorded
    if not isinstance(name, str):
        raise WrongInput("the SAE's cfg.json does not say which LM it was trained on; give it with --model")
    revision = cache.get("revision") if name == recorded else None
    lm_config, tokenizer = load_config(name, revision), load_tokenizer(name, revision)
    _require_width_and_layers(sae, lm_config, name)
    if not cache:
        log.warning("cfg.json does not describe the SAE's LM; only width and layers of %s were compared", name)

    def require_same(what: str, loaded: str, trained_on: object) -> None:
        if trained_on is not None and loaded != trained_on:
            raise WrongInput(
                f"model {name!r} is not the one the SAE was trained on: its {what} differs (trained on "
                f"{recorded!r}); give that model with --model"
            )

    require_same("config", config_hash(lm_config), cache.get("config_hash"))
    require_same("tokenizer", tokenizer_hash(tokenizer), cache.get("tokenizer_hash"))
    picked = pick_device(device)
    lm = load_lm(name, revision, device=picked, lm_dtype=pick_lm_dtype(lm_dtype, picked))
    identity = _mapping(_mapping(source.get("identity")).get("cache"))
    require_same("weights", weights_hash(lm), identity.get("lm_weights"))
    frame = framing(tokenizer)
    dropped_ids = () if cache.get("keep_special") else tuple(cache.get("special_ids", frame.special_ids))
    kept = Kept(dropped_ids, int(cache.get("skip_positions", SINK_POSITIONS)))
    return PromptLM(lm, tokenizer, frame, kept, name, revision)


def _mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one: cfg.json may be a stranger's."""
    return value if isinstance(value, Mapping) else {}


def _require_width_and_layers(sae: SAE, lm_config: Any, model: str) -> None:
    text_config, layers = lm_config.get_text_config(), sae.recipe.layers
    width, depth = int(text_config.hidden_size), int(text_config.num_hidden_layers)
    if sae.recipe.width != width:
        raise WrongInput(
            f"the SAE has width {sae.recipe.width} and model {model!r} has {width}; give the LM it was trained on "
            "with --model"
        )
    if max(layers) > depth:
        raise WrongInput(
            f"the SAE reads layer {max(layers)} and model {model!r} has {depth}; give the LM it was trained on "
            "with --model"
        )
    if 0 in spliced_layers(sae):
        raise WrongInput(
            "the SAE reads layer 0, the embedding, and only the output of a decoder block can be replaced"
        )
