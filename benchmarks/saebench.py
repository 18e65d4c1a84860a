"""SAEBench's sparse probing of an SAE that `routesae train` wrote, on hidden states out of a cache: no hub, no LM.

    benchmarks/environment.sh
    git clone https://github.com/adamkarvonen/SAEBench
    PYTHONPATH=SAEBench JAXTYPING_DISABLE=1 benchmarks/.venv/bin/python benchmarks/saebench.py CACHE 15 SAE …

The SAE is opened by SAELens, and everything after the hidden states is SAEBench's `run_eval_single_dataset`. What it
would load from the hub, its data set and a HookedTransformer, is replaced by documents of the cache with the labels
that `harvest --keep-fields label` kept. (Its annotations collide under the jaxtyping that SAELens 6.54 takes.)
"""

from __future__ import annotations

import sys
import tempfile

import torch
from sae_bench.evals.sparse_probing import main
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens import SAE

import routesae

TOKENS, TRAIN, TEST = 128, 80, 20  # of a document; documents of a label
Activations = dict[str, torch.Tensor]


def activations(cache: routesae.Cache, layer: int) -> tuple[Activations, Activations]:
    """Of each label [documents, TOKENS, D], to train probes and to test them."""
    of: dict[str, list[torch.Tensor]] = {}
    for number in range(cache.documents):
        document = cache.document(number)
        found = of.setdefault(document.fields["label"] or "", [])
        if len(found) < TRAIN + TEST and int(document.kept.sum()) >= TOKENS:
            found.append(document.hidden[layer][document.kept][:TOKENS])
        if len(of) > 1 and all(len(found) == TRAIN + TEST for found in of.values()):
            break
    stacked = {label: torch.stack(found) for label, found in of.items() if len(found) == TRAIN + TEST}
    train = {label: hidden[:TRAIN] for label, hidden in stacked.items()}
    return train, {label: hidden[TRAIN:] for label, hidden in stacked.items()}


if __name__ == "__main__":
    shards, layer, *folders = sys.argv[1:]
    states = activations(routesae.Cache(shards), int(layer))
    main.get_dataset_activations = lambda *_: tuple(dict(of) for of in states)
    config = SparseProbingEvalConfig(model_name="", llm_batch_size=1, llm_dtype="float32", k_values=[1, 5, 20])
    for folder in folders:
        torch.manual_seed(0)
        sae = SAE.load_from_disk(folder, device="cpu")
        with tempfile.TemporaryDirectory() as kept:
            results, _ = main.run_eval_single_dataset("", config, sae, None, int(layer), "", "cpu", kept, False)
        print(folder, {name: round(value, 3) for name, value in results.items()})
