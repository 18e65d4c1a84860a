"""Which latents are active on a text: run the LM over it, encode each token, list the strongest latents.

Only the positions that training used are encoded, so special tokens and a row's first position have no latents. What
is said of a latent is its explanation where `routesae interpret` wrote one into the SAE's folder, or else its
strongest context where `routesae contexts` did.

Dimension letters: T tokens, n tokens that are encoded, L layers, D width.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.contexts.file import read_contexts
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.lm import LM, Text, lm_of_sae, load_lm_of, require_lm_of
from routesae.analyze.inputs.saes import one_sae
from routesae.analyze.interpret.summary import read_interpretations
from routesae.analyze.latents.settings import LatentsSettings
from routesae.harvest.lm.passes import capturing, run_until
from routesae.machine.device import pick_device
from routesae.machine.files import read_bytes, reading
from routesae.reporting import Report, Table, WrongInput, silent, visible
from routesae.train.folder.checkpoint import load_sae
from routesae.train.saes import SAE, Crosscoder, RouteSAE
from routesae.train.saes.normalise import Hidden, places_of
from routesae.train.sparse.pairs import Latents

NOTED = 32  # characters of a context or explanation in a table of 80 columns


class TextLatents(Table):
    """A row for each token and each of its strongest latents: position, token, latent, activation, layer, note; of a
    conversation also the role of the message that spells the token, None of what the chat template writes.

    A token that is not encoded, or has no active latent, has one row whose latent is None. activation: in the units
    of the SAE's normalised input. layer: that the token was read from, None if from all.
    tokens: the text of each of the T tokens. kept: whether each is encoded. latents: of the n that are, [n, …].
    """

    tokens: list[str]
    kept: list[bool]
    latents: Latents

    def by_token(self) -> list[list[dict[str, Any]]]:
        """For each token the rows of its latents, strongest first."""
        return [
            [row for row in self if row["position"] == at and row["latent"] is not None]
            for at in range(len(self.tokens))
        ]

    def by_latent(self) -> Table:
        """The latents, strongest first: where each is, on how many tokens it is listed, its note in short."""
        best: dict[int, dict[str, Any]] = {}
        for row in sorted(chain.from_iterable(self.by_token()), key=lambda row: -row["activation"]):
            seen = {name: row[name] for name in ("latent", "activation", "token")}
            seen = best.setdefault(row["latent"], {**seen, "tokens": 0, "note": short(row["note"])})
            seen["tokens"] += 1
        return Table(best.values())

    def __str__(self) -> str:
        listed = (", ".join(f"{row['latent']} ({row['activation']:.1f})" for row in of) for of in self.by_token())
        roles = {row["position"]: {"role": row["role"]} for row in self if "role" in row}
        rows = (
            {"token": token, **roles.get(at, {}), "latents (activations)": of}
            for at, (token, of) in enumerate(zip(self.tokens, listed, strict=True))
        )
        return f"{Table(rows)}\n\n{self.by_latent()}"

    def _repr_html_(self) -> str:
        """The tokens coloured by their strongest latent, and the latents."""
        strongest, spans = max((row["activation"] or 0 for row in self), default=0) or 1, []
        for token, of_token in zip(self.tokens, self.by_token(), strict=True):
            said = "\n".join(f"{row['latent']}: {row['activation']:.1f} {short(row['note'])}" for row in of_token)
            share = of_token[0]["activation"] / strongest if of_token else 0
            style = f"background:rgba(255,140,0,{share:.2f});white-space:pre-wrap"
            spans.append(f'<span title="{escape(said)}" style="{style}">{escape(visible(token))}</span>')
        return f"<p>{''.join(spans)}</p>{self.by_latent()._repr_html_()}"


def latents(
    lm: LM, sae: SAE, text: Text, *, top: int = 5, beside: Path | None = None, noted: bool = True
) -> TextLatents:
    """The `top` strongest latents of each token of a text, or of a conversation in the LM's chat template.

    beside: the folder of the SAE's contexts and explanations, its own if None. noted: whether they are read. Raises
    WrongInput if SAE and LM do not belong together, or the text is empty or longer than the LM's context.
    """
    kept, ids, (_, roles) = require_lm_of(sae, lm), lm.ids(text), lm.ids_and_roles(text)
    if top < 1:
        raise WrongInput(f"top {top} is below 1")
    if 0 in sae.layers:
        raise WrongInput("the SAE reads layer 0, the embedding, and only outputs of decoder blocks are read here")
    ids_1T = torch.tensor([ids], device=lm.lm.device)
    position_1T = torch.arange(len(ids), device=ids_1T.device)[None]
    kept_T = kept.at(ids_1T, position_1T)[0]
    hidden: dict[int, Tensor] = {}
    with capturing(lm.lm, sae.layers, hidden.__setitem__):
        run_until(lm.lm, ids_1T, max(sae.layers))
    hidden_LnD = torch.cat([hidden[layer][:, kept_T] for layer in sae.layers])
    read = Hidden(hidden_LnD, place_N=places_of(ids_1T, position_1T)[0, kept_T], layers=sae.layers)
    with torch.no_grad():
        encoded = sae.encode(read)
        values, indices = (part.flatten(1) for part in encoded.top(top))
        values, at = values.topk(min(top, values.shape[1]), dim=1)  # an mlsae has as many of each layer
        layer_nk = at // (indices.shape[1] // (encoded.layers or 1))
        if isinstance(sae, RouteSAE) and sae.recipe.routing == "hard":
            layer_nk = sae.routes(read).at_R[:, None].expand_as(at)
    mixed = isinstance(sae, Crosscoder) or sae.recipe.routing == "soft"
    strongest = iter(zip(indices.gather(1, at).tolist(), values.tolist(), layer_nk.tolist(), strict=True))
    notes = notes_of(sae, beside or sae.folder, set(indices.flatten().tolist())) if noted else {}
    rows = TextLatents()
    rows.tokens, rows.kept, rows.latents = pieces_of(lm.tokenizer, ids), kept_T.tolist(), encoded
    for position, (token, is_kept) in enumerate(zip(rows.tokens, rows.kept, strict=True)):
        of_token = list(zip(*next(strongest), strict=True)) if is_kept else []
        for latent, value, layer in [one for one in of_token if one[1] > 0] or [(None, None, None)]:
            where = None if mixed or layer is None else sae.layers[layer]
            row = {"latent": latent, "activation": value, "layer": where, "note": notes.get(latent)}
            of_role = {} if roles is None else {"role": roles[position]}
            rows.append({"position": position, "token": token, **of_role, **row})
    return rows


def latents_of_text(settings: LatentsSettings, report: Report = silent) -> TextLatents:
    """The table of `routesae latents`."""
    text: Text = settings.text or ""
    with reading(f"--file {settings.file}" if settings.file else "--messages", "give a file of text, or JSON"):
        if settings.file is not None:
            text = read_bytes(settings.file).decode()
        elif settings.messages is not None:
            text = json.loads(settings.messages)
    folder, beside = one_sae(settings.sae, Path(settings.out))
    sae = load_sae(folder, pick_device(settings.device))
    of_sae = lm_of_sae(folder, sae.recipe)
    lm = load_lm_of([of_sae], settings.model, settings)
    return latents(lm, sae, text, top=settings.top, beside=beside)


_vocabulary = lru_cache(2)(Vocabulary)


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the whole."""
    return list(_vocabulary(tokenizer).pieces(np.array(ids, np.int32), np.array([len(ids)])))


def notes_of(sae: SAE, folder: Path | None, latents: Iterable[int]) -> dict[int, str]:
    """What is said of some latents in an SAE's folder. Raises WrongInput where that is of other weights."""
    if folder is None:
        return {}
    trained_on = None if sae.folder is None else lm_of_sae(sae.folder, sae.recipe).facts.get("tokens_hash")
    if (contexts := read_contexts(folder, trained_on) or read_contexts(folder)) is None:
        return {}
    lines, notes = read_interpretations(folder), dict[int, str]()
    if contexts.facts["sae"]["weights"] != sae.hashes:
        raise WrongInput(f"{folder} has contexts of other weights; run routesae contexts again")
    for latent in contexts.latents(set(latents)):
        found = [*latent.top, *latent.chosen, *(context for sample in latent.samples.values() for context in sample)]
        notes[latent.latent] = max(found, key=lambda context: context.activation).marked("«", "»")
    explained = {latent: lines[latent].get("explanation") for latent in latents if latent in lines}
    return notes | {latent: said for latent, said in explained.items() if said}


def short(note: str | None) -> str:
    """A note's part around the marks, on one line."""
    text = visible(" ".join((note or "").split()))
    start = max(0, text.find("«") - NOTED // 2)
    return f"{'…' * (start > 0)}{text[start : start + NOTED]}{'…' * (len(text) > start + NOTED)}"
