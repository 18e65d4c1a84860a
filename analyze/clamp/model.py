"""An SAE's cfg.json in; the LM that it was trained on out, checked to be that one, and the positions of its training.

What an SAE of `routesae train` says of its LM, its config, tokenizer and weights, is compared with the LM found. Of
an SAE made elsewhere, which says no more than a name, width and layers are.
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
from routesae.train.saes import SAE, Recipe

log = logging.getLogger(__name__)

SINK_POSITIONS = 1  # at the start of a row, not replaced where the SAE does not say; harvest's default


class SpokenLM(NamedTuple):
    """An LM with its tokenizer, what that puts around documents, and the positions that may be replaced.

    model, revision: where it was loaded from.
    """

    lm: LanguageModel
    tokenizer: Any
    framing: Framing
    kept: Kept
    model: str
    revision: str | None


def load_lm_of(sae: SAE, config: Mapping[str, Any], *, model: str | None, device: str, lm_dtype: str) -> SpokenLM:
    """The LM that `sae` belongs to. config: its cfg.json. model: where the LM is; None for where cfg.json says.

    Raises WrongInput where cfg.json names none, or `model` is another one.
    """
    metadata = _mapping(config.get("metadata"))
    source = _mapping(_mapping(metadata.get("routesae")).get("source"))
    origin = _mapping(source.get("cache"))
    named = origin.get("model") or metadata.get("model_name")
    wanted = model or named
    if not isinstance(wanted, str):
        raise WrongInput("the SAE's cfg.json does not say which LM it was trained on; give it with --model")
    revision = origin.get("revision") if wanted == named else None
    lm_config, tokenizer = load_config(wanted, revision), load_tokenizer(wanted, revision)
    _require_width_and_layers(sae, lm_config, wanted)
    if not origin:
        log.warning("cfg.json does not describe the SAE's LM; only width and layers of %s were compared", wanted)
    recorded_weights = _mapping(_mapping(source.get("identity")).get("cache")).get("lm_weights")
    _require_same("config", config_hash(lm_config), origin.get("config_hash"), wanted, named)
    _require_same("tokenizer", tokenizer_hash(tokenizer), origin.get("tokenizer_hash"), wanted, named)
    picked = pick_device(device)
    lm = load_lm(wanted, revision, device=picked, lm_dtype=pick_lm_dtype(lm_dtype, picked))
    _require_same("weights", weights_hash(lm), recorded_weights, wanted, named)
    frame = framing(tokenizer)
    dropped_ids = () if origin.get("keep_special") else tuple(origin.get("special_ids", frame.special_ids))
    kept = Kept(dropped_ids, int(origin.get("skip_positions", SINK_POSITIONS)))
    return SpokenLM(lm, tokenizer, frame, kept, wanted, revision)


def _mapping(value: object) -> Mapping[str, Any]:
    """What a stranger's cfg.json has where a mapping should be."""
    return value if isinstance(value, Mapping) else {}


def _require_width_and_layers(sae: SAE, lm_config: Any, model: str) -> None:
    recipe: Recipe = sae.recipe
    text_config = lm_config.get_text_config()
    width, depth = int(text_config.hidden_size), int(text_config.num_hidden_layers)
    if recipe.width != width:
        raise WrongInput(
            f"the SAE's width {recipe.width} is not the {width} of model {model!r}; give the LM it was trained on "
            "with --model"
        )
    if max(recipe.layers) > depth:
        raise WrongInput(
            f"the SAE reads layer {max(recipe.layers)}, and model {model!r} has {depth}; give the LM it was "
            "trained on with --model"
        )
    if 0 in spliced_layers(sae):
        raise WrongInput("the SAE reads layer 0, the embedding, which is no decoder block's output to be replaced")


def _require_same(what: str, found: str, recorded: object, model: str, named: object) -> None:
    if recorded is not None and found != recorded:
        raise WrongInput(
            f"model {model!r} is not the one the SAE was trained on: its {what} differs (trained on {named!r}); "
            "give that model with --model"
        )
