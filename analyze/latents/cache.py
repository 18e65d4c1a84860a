"""A cache as a notebook reads it: a layer's rows, a document in reading order, shuffled batches.

Dimension letters: n kept tokens, m rows read, T tokens of a document, N of a batch, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.analyze.latents.text import pieces_of
from routesae.harvest.cache import reader
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.loading.batches import Selection, batch_memory, epoch_plans, load
from routesae.train.loading.rows import RowReader, reads_of_rows


class Cache:
    """Hidden states of an LM over a corpus, as harvest wrote them to a folder or URL (s3://…).

    layers: those harvested, from 1. width: D. tokens: n, those with hidden states. documents: how many there are.
    model: where the tokenizer is now, None for where the cache says. Raises WrongInput where there is no cache.
    """

    def __init__(self, path: str | Path, *, model: str | None = None):
        self.stored, self._model = reader.Cache(path), model
        manifest = self.stored.manifest
        self.path, self.layers, self.width = self.stored.path, manifest.layers, manifest.width
        self.tokens, self.documents = manifest.kept_tokens, manifest.documents

    def __repr__(self) -> str:
        size = f"{self.tokens:,} tokens x {len(self.layers)} layers x {self.width}"
        return f"Cache({str(self.path)!r}): {size}, {self.documents:,} documents"

    def hidden(self, layer: int) -> LayerRows:
        """All n rows of a layer, read from the shards as they are asked for. Raises WrongInput if it is not there."""
        return LayerRows(Selection(self.stored, 0, self.stored.manifest.rows, (layer,)))

    def document(self, number: int) -> Document:
        """The document of that number, from 0; the corpus may end within the last."""
        if not 0 <= number < self.documents:
            raise WrongInput(f"document {number}: {self.path} has documents 0 to {self.documents - 1}")
        manifest, tokens = self.stored.manifest, self.stored.tokens().reshape(-1)
        first, after = np.append(self.stored.document_starts(), len(tokens))[number : number + 2].tolist()
        ids, special = tokens[first:after].tolist(), set(manifest.special_ids)
        kept = self.stored.documents().slice(number, 1).to_pylist()[0]
        roles = self.stored.roles().reshape(-1)[first:after].tolist()
        return Document(
            number=number,
            corpus=manifest.corpus,
            data=kept.pop("data"),
            place=kept.pop("place"),
            fields=kept,
            roles=[manifest.roles[role - 1] if role else None for role in roles],
            row=first // manifest.context,
            position=first % manifest.context,
            text=self._tokenizer.decode([i for i in ids if i not in special], clean_up_tokenization_spaces=False),
            tokens=pieces_of(self._tokenizer, ids),
            token_ids=torch.tensor(ids),
            hidden=_ByLayer(self.stored, first, after),
        )

    def batches(
        self,
        layers: int | Sequence[int] | None = None,
        *,
        batch_tokens: int = 4096,
        seed: int = 0,
        held_out: bool = False,
        device: str = "cpu",
    ) -> Batches:
        """Shuffled batches of some layers or all, see Batches. held_out: of the rows that training never reads."""
        manifest = self.stored.manifest
        asked = self.layers if layers is None else layers
        several = (int(asked),) if isinstance(asked, int | np.integer) else tuple(asked)
        if not several:
            raise WrongInput(f"layers {layers!r} are none; {self.path} holds {', '.join(map(str, self.layers))}")
        rows = (manifest.train_rows, manifest.rows) if held_out else (0, manifest.train_rows)
        selection = Selection(self.stored, *rows, several)
        if len(selection) == 0 or batch_tokens < 1:
            raise WrongInput(f"batches of {batch_tokens} tokens of the {len(selection)} in these rows: there is none")
        return Batches(selection, batch_tokens, seed, pick_device(device))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer_of([lm_of_cache(self.stored)], self._model)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a cache, in reading order.

    number: in the corpus, from 0. data, place: the --data it is of, and where in that. fields: what --keep-fields
    kept of it. row, position: where it begins in the cache's tokens. text: without special tokens. tokens: the text
    of each of its T tokens, special ones too. roles: of the message that spells each, or None. token_ids: int64 [T].
    hidden: hidden[layer] is float32 [T, D], NaN where a position was not kept; a layer is read when it is asked for.
    kept: bool [T], where there are hidden states: `sae.encode(document.hidden[12][document.kept])`.
    """

    number: int
    corpus: str
    data: str
    place: str
    fields: dict[str, str | None]
    row: int
    position: int
    text: str
    tokens: list[str] = field(repr=False)
    roles: list[str | None] = field(repr=False)
    token_ids: Tensor = field(repr=False)
    hidden: dict[int, Tensor] = field(repr=False)

    @cached_property
    def kept(self) -> Tensor:
        assert isinstance(self.hidden, _ByLayer)
        return ~self.hidden[self.hidden.cache.manifest.layers[0]].isnan().all(1)


class LayerRows:
    """The rows of a layer, all n or those of a selection, in the shuffled order in which the shards hold them.

    rows[i] is [D]; rows[2:5] and rows[[7, 3]] are [m, D], in the cache's dtype (of int8 float16). positions: int64
    [n], where each row's token stands: row · context + position in the cache's tokens.
    """

    def __init__(self, selection: Selection):
        self._selection, self._reader = selection, RowReader(selection.cache.manifest, selection.layers)
        self._ends = np.cumsum([selection.count(shard) for shard in range(len(selection.shards))])
        self.shape = (len(selection), selection.cache.manifest.width)

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def positions(self) -> Tensor:
        of_shards = [self._selection.positions(shard) for shard in range(len(self._selection.shards))]
        return torch.from_numpy(np.concatenate(of_shards))

    def __getitem__(self, at: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Raises IndexError, and FailedRun where a file is gone, cut or altered."""
        asked = torch.arange(len(self))[at]
        ascending_m, back_m = np.unique(asked.numpy().reshape(-1), return_inverse=True)
        shard_m = np.searchsorted(self._ends, ascending_m, "right")
        memory = batch_memory(self._selection, max(1, len(ascending_m)))
        for shard in np.unique(shard_m).tolist():
            first, after = np.searchsorted(shard_m, [shard, shard + 1]).tolist()
            stored = ascending_m[first:after] - (self._ends[shard] - self._selection.count(shard))
            selected = self._selection.rows[shard]
            reads = reads_of_rows(
                self._selection.shards[shard], stored if selected is None else selected[stored], first
            )
            self._reader.read(reads, *(values.numpy() for values in memory))
        return memory[0][0, back_m].reshape(*asked.shape, self.shape[1])


class _ByLayer(dict[int, Tensor]):
    """{layer: float32 [T, D]} of positions first … after-1 of a cache's tokens, read when it is asked for."""

    def __init__(self, cache: reader.Cache, first: int, after: int):
        super().__init__()
        self.cache, self._first, self._after = cache, first, after

    def __missing__(self, layer: int) -> Tensor:
        context = self.cache.manifest.context
        span = self._first // context, -(-self._after // context)
        rows = LayerRows(Selection(self.cache, *span, (layer,)))
        here = torch.nonzero((rows.positions >= self._first) & (rows.positions < self._after)).squeeze(1)
        hidden_TD = torch.full((self._after - self._first, rows.shape[1]), torch.nan)
        hidden_TD[rows.positions[here] - self._first] = rows[here].float()
        return self.setdefault(layer, hidden_TD)


@dataclass
class Batches:
    """Batches of hidden states in a seeded random order, the very ones that `routesae train` trains on.

    A batch is [N, D] of one layer and [N, L, D] of several, as an SAE over these layers reads it, in the cache's
    dtype; the last of an epoch has what is left. len() is the number of batches of an epoch. Each time it is iterated
    over is the next epoch, in another order; `epoch` is the one that comes next. It takes the place of a torch
    DataLoader: blocks are read ahead by threads.
    """

    selection: Selection
    batch_tokens: int
    seed: int
    device: torch.device
    epoch: int = 0

    def __len__(self) -> int:
        return -(-len(self.selection) // self.batch_tokens)

    def __iter__(self) -> Iterator[Tensor]:
        plans = epoch_plans(self.selection, seed=self.seed, epoch=self.epoch, batch_tokens=self.batch_tokens)
        self.epoch += 1
        with closing(load(self.selection, plans, self.batch_tokens, self.device)) as batches:
            for batch in batches:  # whose memory is used again
                hidden_NLD = batch.hidden_LND.transpose(0, 1)
                alone = hidden_NLD[:, 0] if hidden_NLD.shape[1] == 1 else hidden_NLD
                yield alone.clone(memory_format=torch.contiguous_format)
