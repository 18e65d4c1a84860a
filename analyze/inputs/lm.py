"""Check that an SAE, a cache and an LM belong together, and load the LM they belong to.

A cache records hashes of its LM's configuration, tokenizer and weights, and so does the cfg.json of an SAE that
`routesae train` wrote. Where the LM lies does not matter: the same hashes under another name are the same LM. SAEs
from elsewhere record at most a name, so only width and layers can be compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import read_config
from routesae.train.saes import Recipe

if TYPE_CHECKING:
    from routesae.harvest.lm.model import LanguageModel

GIVE_MODEL = "give that LM with --model"
GIVE_CACHE = "give the cache that the SAE was trained on with --cache"


class LMRecord(NamedTuple):
    """What is known of an LM.

    name: how messages call it. facts: as a cache's manifest has them, of which an SAE keeps a copy; of a stranger's
    SAE no more than the model's name. weights: their hash, or None. layers: those that the LM has, the cache holds or
    the SAE reads.
    """

    name: str
    facts: Mapping[str, Any]
    weights: str | None
    width: int
    layers: Collection[int]

    @property
    def transformers(self) -> Any:
        return _mapping(self.facts.get("versions")).get("transformers")


class LoadedLM(NamedTuple):
    """An LM, its tokenizer, and where they were loaded from."""

    lm: LanguageModel
    tokenizer: Any
    model: str
    revision: str | None


def lm_of_cache(cache: Cache) -> LMRecord:
    manifest = cache.manifest
    name = f"the LM of the cache {cache.path}"
    return LMRecord(name, manifest.to_dict(), cache.weights_hash(), manifest.width, manifest.layers)


def lm_of_sae(folder: Path, recipe: Recipe) -> LMRecord:
    """The LM that cfg.json records. The file may be a stranger's, so nothing is taken for granted."""
    metadata = _mapping(read_config(folder).get("metadata"))
    source = _mapping(_mapping(metadata.get("routesae")).get("source"))
    weights = _mapping(_mapping(source.get("identity")).get("cache")).get("lm_weights")
    facts = _mapping(source.get("cache")) or {"model": metadata.get("model_name")}
    return LMRecord(f"the LM of the SAE {folder}", facts, weights, recipe.width, recipe.layers)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def require_same_lm(recorded: LMRecord, other: LMRecord, remedy: str) -> None:
    """Compare width, layers, and the hashes that both sides have. Raises WrongInput naming what differs."""
    reason = None
    if recorded.width != other.width:
        reason = f"its width is {other.width}, not {recorded.width}"
    elif absent := sorted(set(recorded.layers) - set(other.layers)):
        reason = f"it has no layer {absent[0]}"
    compared = {
        "config differs": (recorded.facts.get("config_hash"), other.facts.get("config_hash")),
        "tokenizer differs": (recorded.facts.get("tokenizer_hash"), other.facts.get("tokenizer_hash")),
        "weights differ": (recorded.weights, other.weights),
    }
    for what, (one, another) in compared.items():
        if reason is None and None not in (one, another) and one != another:
            there, here = (
                f"{lm.facts.get('model')!r} with transformers {lm.transformers}" for lm in (recorded, other)
            )
            reason = f"its {what} ({there} there, {here} here)"
    if reason is not None:
        raise WrongInput(f"{other.name} is not {recorded.name}: {reason}; {remedy}")


def require_same_lm_as_cache(sae: LMRecord, cache: LMRecord) -> str | None:
    """Returns a warning, or None, and raises WrongInput if an SAE was trained on another LM than a cache is of.

    An SAE reads hidden states, so the tokenizer does not matter. The hash of a configuration changes with the version
    of transformers, so if the versions differ the weights decide.
    """
    facts = {name: value for name, value in cache.facts.items() if name != "tokenizer_hash"}
    if sae.transformers != cache.transformers and None not in (sae.weights, cache.weights):
        del facts["config_hash"]
    require_same_lm(sae, cache._replace(facts=facts), GIVE_CACHE)
    if "config_hash" in sae.facts:
        return None
    return (
        f"cfg.json does not describe {sae.name}, so only width and layers were compared with those of the cache; "
        f"the SAE names {sae.facts.get('model')!r}, the cache {cache.facts['model']!r}"
    )


def load_tokenizer_of(records: Sequence[LMRecord], model: str | None) -> Any:
    """The tokenizer of the LM that all records are of; see load_lm_of."""
    from routesae.harvest.corpus.tokens import tokenizer_hash
    from routesae.harvest.lm.model import load_tokenizer

    name, revision = _place(records[0], model)
    tokenizer = load_tokenizer(name, revision)
    for record in records:
        require_same_lm(record, _loaded(record, name, tokenizer_hash=tokenizer_hash(tokenizer)), GIVE_MODEL)
    return tokenizer


def load_lm_of(records: Sequence[LMRecord], model: str | None, *, device: str, lm_dtype: str) -> LoadedLM:
    """The whole LM that all records are of. model: where it is now, or None for where the first record says.

    Raises WrongInput if the record does not say where the LM is, or `model` is another one.
    """
    from routesae.harvest.lm import model as lm

    name, revision = _place(records[0], model)
    config = lm.load_config(name, revision)
    width, layers = int(config.get_text_config().hidden_size), range(lm.model_layers(config) + 1)
    for record in records:
        found = _loaded(record, name, config_hash=lm.config_hash(config))
        require_same_lm(record, found._replace(width=width, layers=layers), GIVE_MODEL)
    tokenizer = load_tokenizer_of(records, model)
    picked = pick_device(device)
    loaded = lm.load_lm(name, revision, device=picked, lm_dtype=pick_lm_dtype(lm_dtype, picked))
    weights = lm.weights_hash(loaded)
    for record in records:
        require_same_lm(record, _loaded(record, name)._replace(weights=weights), GIVE_MODEL)
    return LoadedLM(loaded, tokenizer, name, revision)


def _place(record: LMRecord, model: str | None) -> tuple[str, str | None]:
    """Where to load the LM from, and the revision of it."""
    recorded = record.facts.get("model")
    name = model or recorded
    if not isinstance(name, str):
        raise WrongInput(f"cfg.json does not say what {record.name} is; give it with --model")
    return name, record.facts.get("revision") if name == recorded else None


def _loaded(record: LMRecord, model: str, **hashes: str) -> LMRecord:
    """What has been seen so far of the LM in `model`; of all else it is as in `record`."""
    import transformers

    facts = {"model": model, "versions": {"transformers": transformers.__version__}, **hashes}
    return LMRecord(f"model {model!r}", facts, None, record.width, record.layers)
