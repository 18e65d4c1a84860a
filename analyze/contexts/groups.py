"""Find the latents that are on in the documents of one group and not in the others.

A latent is on in a document if it is active above the threshold on any of its tokens. For a group of documents

    score = P(on | a document of the group) − P(on | a document of another group)

over the documents that have a token in the rows read. It is from -1 to 1, and (1 + score) / 2 is the AUROC of telling
the group by whether the latent is on. Documents are counted and not tokens, which depend on each other: one long text
that repeats a word would outweigh many. The counts are shown beside the score, as few documents make any score.

Dimension letters: F latents, D documents, G groups, M activations, N tokens.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput

MOST_GROUPS = 100
SHOWN = 5  # latents of a group

Ints = npt.NDArray[np.int64]


class Groups:
    """In how many documents of each group each of F latents is on, counted shard by shard."""

    def __init__(self, cache: Cache, field: str, latents: int):
        documents = cache.documents()
        if field not in documents.column_names:
            raise WrongInput(
                f"--group-by {field}: {cache.path} has {', '.join(documents.column_names)} of its documents; "
                f"harvest with --keep-fields {field}"
            )
        values = documents[field].cast(pa.large_string()).combine_chunks().dictionary_encode()
        self.names: list[str] = values.dictionary.to_pylist()
        if not 2 <= len(self.names) <= MOST_GROUPS:
            raise WrongInput(f"--group-by {field}: {len(self.names)} groups, and 2 to {MOST_GROUPS} are compared")
        self.group_D: Ints = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        self.seen_D = np.zeros(len(self.group_D), bool)
        self.on_FG: Ints = np.zeros((latents, len(self.names)), np.int64)
        self._starts_D, self._latents = np.asarray(cache.document_starts()), latents
        self._keys = np.empty(0, np.int64)  # document · F + latent, of this shard and of the document it begins in

    def add(self, position_N: Ints, latent_M: Ints, position_M: Ints) -> None:
        """Tokens that were read, in any order within a shard, and the latents that are on."""
        seen = self._documents(position_N)
        self.seen_D[seen[seen >= 0]] = True
        document_M = self._documents(position_M)
        grouped_M = (document_M >= 0) & (self.group_D[document_M] >= 0)
        fresh = np.setdiff1d(document_M[grouped_M] * self._latents + latent_M[grouped_M], self._keys)
        np.add.at(self.on_FG, (fresh % self._latents, self.group_D[fresh // self._latents]), 1)
        self._keys = np.union1d(self._keys, fresh)

    def end_shard(self, after: int) -> None:
        """Forget the shard's documents but the one that goes on at position `after` of the tokens."""
        self._keys = self._keys[self._keys // self._latents == self._documents(np.array(after - 1))]

    def _documents(self, position: Ints) -> Ints:
        """The document that each position stands in, or -1 in front of the first."""
        return np.searchsorted(self._starts_D, position, "right") - 1

    def strongest(self) -> list[dict[str, Any]]:
        """For each group the latents with the highest scores.

        on: documents of the group in which the latent is on, of `documents`; elsewhere: those of other groups.
        """
        size_G = np.bincount(self.group_D[self.seen_D & (self.group_D >= 0)], minlength=len(self.names))
        on_F1, rest_G = self.on_FG.sum(1, keepdims=True), size_G.sum() - size_G
        score_FG = self.on_FG / size_G.clip(min=1) - (on_F1 - self.on_FG) / rest_G.clip(min=1)
        return [
            {
                "group": name,
                "latent": latent,
                "score": float(score_FG[latent, group]),
                "on": int(self.on_FG[latent, group]),
                "documents": int(size_G[group]),
                "elsewhere": int(on_F1[latent, 0] - self.on_FG[latent, group]),
                "others": int(rest_G[group]),
            }
            for group, name in enumerate(self.names)
            for latent in np.argsort(-score_FG[:, group], kind="stable")[:SHOWN].tolist()
            if score_FG[latent, group] > 0
        ]
