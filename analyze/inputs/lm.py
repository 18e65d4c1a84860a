"""Check that an SAE, a cache and an LM belong together, and load the LM they belong to.

A cache records hashes of its LM's configuration, tokenizer and weights, and so does the cfg.json of an SAE that
`routesae train` wrote. Where the LM lies does not matter: the same hashes under another name are the same LM. SAEs
from elsewhere record at most a name, so only width and layers can be compared.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from routesae.harvest.cache.reader import Cache
from routesae.harvest.corpus.chat import BadConversation, Message, conversation_ids, messages_of
from routesae.harvest.corpus.tokens import Framing, framing, tokenizer_hash
from routesae.harvest.lm import model as loading
from routesae.harvest.lm.model import LanguageModel
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.machine.settings import LMSettings
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import read_source
from routesae.train.saes import SAE, Recipe

GIVE_MODEL = "give that LM with --model"
GIVE_CACHE = "give the cache that the SAE was trained on with --cache"
SINK_POSITIONS = 1  # first positions of a row left as they are where cfg.json does not say; harvest's default

Text = str | Sequence[Message]
"""A text, or a conversation that the tokenizer's chat template is filled with."""


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
        versions = self.facts.get("versions")
        return versions.get("transformers") if isinstance(versions, Mapping) else None


class Kept(NamedTuple):
    """The positions training used: all but the tokens of `dropped_ids` and the first `skip_positions` of a row."""

    dropped_ids: tuple[int, ...]
    skip_positions: int

    def at(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """bool [B, T]. positions_BT: of each token in its row."""
        dropped = torch.tensor(self.dropped_ids, dtype=torch.int64, device=ids_BT.device)
        return (positions_BT >= self.skip_positions) & ~torch.isin(ids_BT, dropped)


@dataclass(frozen=True)
class LM:
    """A causal LM and its tokenizer, in eval mode and without gradients of its weights.

    lm: the model and its decoder blocks. name, revision: where both were loaded from. Calling it is a forward pass of
    the transformers model `model`, and under `steer` both that and `generate` are steered.
    """

    lm: LanguageModel
    tokenizer: Any
    name: str
    revision: str | None = None

    @property
    def model(self) -> Any:
        """The model of transformers."""
        return self.lm.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @cached_property
    def framing(self) -> Framing:
        return framing(self.tokenizer)

    @cached_property
    def record(self) -> LMRecord:
        """What tells it from other LMs; to be looked at before its weights change."""
        facts = {
            "config_hash": loading.config_hash(self.model.config),
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
        }
        layers = range(loading.model_layers(self.model.config) + 1)
        weights = loading.weights_hash(self.lm)
        return _loaded(LMRecord("", {}, weights, self.lm.width, layers), self.name, **facts)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from the model's generation config or else the tokenizer."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)

    def ids(self, text: Text, *, reply: bool = False, new_tokens: int = 0) -> list[int]:
        """Token ids of a text, framed as harvest frames the start of a document, or of a conversation in the chat
        template; reply: with what the template has in front of the assistant's reply.

        Raises WrongInput for what has no token, is no text or conversation, or is longer than the LM's context, with
        `new_tokens` more.
        """
        ids, _ = self.ids_and_roles(text, reply=reply)
        room = self.positions
        if not ids:
            raise WrongInput(f"a text without a token for {self.name!r}; give a longer text")
        if room is not None and len(ids) + new_tokens > room:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            raise WrongInput(
                f"{len(ids)} tokens{more} are more than the {room} positions of {self.name!r}; shorten it"
            )
        return ids

    def ids_and_roles(self, text: Text, *, reply: bool = False) -> tuple[list[int], list[str | None] | None]:
        """The ids, and the role of the message that spells each token; of a text, and where it is not known, None."""
        if isinstance(text, str):
            require_unicode(text)
            return [*self.framing.before, *self.tokenizer(text, add_special_tokens=False)["input_ids"]], None
        try:
            messages = messages_of(text)
            for message in messages:
                require_unicode(message["content"])
            return conversation_ids(self.tokenizer, messages, reply=reply)
        except BadConversation as bad:
            raise WrongInput(str(bad)) from None

    @property
    def positions(self) -> int | None:
        """The longest text that the LM takes, in tokens; None if it names none."""
        positions: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions

    def generate(self, texts: Text | Sequence[Text], *, max_new_tokens: int | None = None, **options: Any) -> Any:
        """Continue a text or conversation, or several at once, by the likeliest tokens; return a str, or a list.

        max_new_tokens: None for 64, or as many as the LM has positions for; more than those are refused. options:
        further ones of transformers' `generate`, such as do_sample=True, temperature=0.7.
        """
        alone = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], Mapping))
        rows: Any = [texts] if alone or not texts else texts
        ids_BT, mask_BT = left_padded(
            [self.ids(text, reply=True, new_tokens=max_new_tokens or 1) for text in rows], self.lm.device
        )
        if max_new_tokens is None:
            max_new_tokens = min(64, (self.positions or ids_BT.shape[1] + 64) - ids_BT.shape[1])
        stops = set(self.stop_ids)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": sorted(stops) or None, **options}
        out_BT = self.model.generate(
            input_ids=ids_BT, attention_mask=mask_BT.long(), max_new_tokens=max_new_tokens, **options
        )
        written = [takewhile(lambda token: token not in stops, ids) for ids in out_BT[:, ids_BT.shape[1] :].tolist()]
        continued = [self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in written]
        return continued[0] if alone and len(continued) == 1 else continued  # num_return_sequences may be more


def require_unicode(text: str, origin: str = "the text") -> None:
    """Refuse the lone surrogates that JSON's \\ud800 or a stray byte of the shell makes; no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WrongInput(f"{origin}: holds a lone surrogate, which is not a character") from None


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids_BT, each row's tokens at its right end, and bool mask_BT, where they are. Padding is id 0, masked."""
    tokens = [torch.tensor(ids) for ids in rows]
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in rows]
    ids_BT, mask_BT = (pad_sequence(each, batch_first=True, padding_side="left") for each in (tokens, masks))
    return ids_BT.to(device), mask_BT.to(device)


def kept_of(record: LMRecord, framing: Framing) -> Kept:
    """The positions that an SAE of the recorded LM was trained on, as far as it says. Raises WrongInput if it says
    nonsense."""
    dropped = () if record.facts.get("keep_special") else record.facts.get("special_ids", framing.special_ids)
    skipped = record.facts.get("skip_positions", SINK_POSITIONS)
    if not isinstance(dropped, list | tuple) or not all(type(one) is int and one >= 0 for one in (skipped, *dropped)):
        raise WrongInput(
            f"{record.name}: special_ids {dropped!r} or skip_positions {skipped!r} are no token positions"
        )
    return Kept(tuple(dropped), skipped)


def require_lm_of(sae: SAE, lm: LM) -> Kept:
    """The positions that the SAE was trained on. Raises WrongInput if it is on another device, or of another LM."""
    if not isinstance(sae, SAE) or not isinstance(lm, LM):
        raise WrongInput(f"give load_lm's LM and load_sae's SAE, not {type(lm).__name__} and {type(sae).__name__}")
    if sae.device != lm.lm.device:
        raise WrongInput(f"the SAE is on {sae.device} and the LM on {lm.lm.device}; load both on one device")
    if sae.folder is None:
        return kept_of(lm.record._replace(facts={}), lm.framing)
    record = lm_of_sae(sae.folder, sae.recipe)
    require_same_lm(record, lm.record, "load that LM with load_lm")
    return kept_of(record, lm.framing)


def lm_of_cache(cache: Cache) -> LMRecord:
    manifest = cache.manifest
    name = f"the LM of the cache {cache.path}"
    return LMRecord(name, manifest.to_dict(), manifest.weights_hash, manifest.width, manifest.layers)


def lm_of_sae(folder: Path, recipe: Recipe) -> LMRecord:
    """The LM that cfg.json records. The file may be a stranger's, so nothing is taken for granted."""
    source = read_source(folder)
    trained_on = source.identity.get("cache")
    weights = trained_on.get("lm_weights") if isinstance(trained_on, dict) else None
    facts = source.cache or {"model": source.model}
    return LMRecord(f"the LM of the SAE {folder}", facts, weights, recipe.width, recipe.layers)


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
    name, revision = place_of_lm(records[0], model)
    tokenizer = loading.load_tokenizer(name, revision)
    for record in records:
        require_same_lm(record, _loaded(record, name, tokenizer_hash=tokenizer_hash(tokenizer)), GIVE_MODEL)
    return tokenizer


def load_lm(
    model: str,
    revision: str | None = None,
    *,
    device: str = "auto",
    lm_dtype: str = "auto",
    device_map: str | None = None,
) -> LM:
    """The LM and tokenizer of a hub id, folder, .gguf file or "demo".

    device: "auto" (CUDA where there is any), "cpu", "cuda:1" …. lm_dtype: "float32", "bfloat16", or "auto", which is
    bfloat16 where the device multiplies it natively. device_map: for an LM larger than the device, "auto", or JSON or
    a file of it such as {"model.layers": "disk", "": 0}. Raises WrongInput where it cannot be loaded.
    """
    on = pick_device(device)
    lm = loading.load_lm(model, revision, device=on, lm_dtype=pick_lm_dtype(lm_dtype, on), device_map=device_map)
    loaded = LM(lm, loading.load_tokenizer(model, revision), model, revision)
    if getattr(lm.model, "is_quantized", False):
        _ = loaded.record  # now: the first pass unpacks some quantised weights for good
    return loaded


def load_lm_of(records: Sequence[LMRecord], model: str | None, settings: LMSettings) -> LM:
    """The whole LM that all records are of. model: where it is now, or None for where the first record says.

    --lm-dtype auto is the precision that the first record's cache was harvested in, if it says so: an SAE that is
    spliced into the LM then meets the hidden states that it was trained on, rounded as they were.
    Raises WrongInput if the record does not say where the LM is, or `model` is another one.
    """
    name, revision = place_of_lm(records[0], model)
    config, tokenizer = loading.load_config(name, revision), loading.load_tokenizer(name, revision)
    hashes = {"config_hash": loading.config_hash(config), "tokenizer_hash": tokenizer_hash(tokenizer)}
    width, layers = int(config.get_text_config().hidden_size), range(loading.model_layers(config) + 1)
    for record in records:
        require_same_lm(record, _loaded(record, name, **hashes)._replace(width=width, layers=layers), GIVE_MODEL)
    device = pick_device(settings.device)
    lm_dtype = pick_lm_dtype(settings.lm_dtype, device, recorded=records[0].facts.get("lm_dtype"))
    loaded = loading.load_lm(name, revision, device=device, lm_dtype=lm_dtype, device_map=settings.device_map)
    lm = LM(loaded, tokenizer, name, revision)
    for record in records:
        require_same_lm(record, lm.record, GIVE_MODEL)
    return lm


def place_of_lm(record: LMRecord, model: str | None) -> tuple[str, str | None]:
    """Where to load the LM from, and the revision of it."""
    recorded = record.facts.get("model")
    name = model or recorded
    if not isinstance(name, str):
        raise WrongInput(f"cfg.json does not say what {record.name} is; give it with --model")
    return name, record.facts.get("revision") if name == recorded else None


def _loaded(record: LMRecord, model: str, **hashes: str) -> LMRecord:
    """What has been seen so far of the LM in `model`; of all else it is as in `record`."""
    facts = {"model": model, "versions": {"transformers": version("transformers")}, **hashes}
    return record._replace(name=f"model {model!r}", facts=facts)
