"""SAEBench on an SAE that `routesae train` wrote and hidden states out of a cache, without hub and LM.

    benchmarks/environment.sh
    git clone https://github.com/adamkarvonen/SAEBench
    PYTHONPATH=SAEBench JAXTYPING_DISABLE=1 benchmarks/.venv/bin/python benchmarks/saebench.py CACHE 15 SAE …

Sparse probing: the SAE is opened by SAELens, and everything after the hidden states is SAEBench's
`run_eval_single_dataset`. What it would load from the hub, its data set and a HookedTransformer, is replaced by
documents of the cache with the labels that `harvest --keep-fields label` kept. (Its annotations collide under the
jaxtyping that SAELens 6.54 takes.)

Absorption: what `routesae analyze --metric Absorption` calls absorbed, beside SAEBench's
`FeatureAbsorptionCalculator` on the same hidden states, directions and main latents. Its LM is replaced by one that
returns those states.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import torch
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.sparse_probing import main
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens import SAE
from scipy.sparse import csr_array

import routesae
from routesae.analyze.scores.absorption import _shares

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


class Recorded:
    """For SAEBench an LM that returns x_RD, prompt by prompt, and an SAE that returns f_RF."""

    device = torch.device("cpu")

    def __init__(self, x_RD: torch.Tensor, f_RF: torch.Tensor, W_dec_FD: torch.Tensor):
        self.x_RD, self.f_RF, self.W_dec, self.read = x_RD, f_RF, W_dec_FD, 0

    def to_tokens(self, prompt: str) -> torch.Tensor:
        return torch.zeros(1, 1)  # all prompts are of one length

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        self.now = slice(self.read, self.read + len(prompts))
        self.read = self.now.stop
        return None, {names_filter[0]: self.x_RD[self.now, None]}

    def encode(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.f_RF[self.now]


@torch.no_grad()
def absorbed_alike(folder: str, hidden_RD: torch.Tensor) -> str:
    """How far the two are apart, over directions near decoder rows that are active, and what was absorbed at all."""
    sae = routesae.load_sae(folder)
    out = sae(hidden_RD)
    f_RF, W_dec_FD = out.latents.dense(), sae.dictionary.W_dec_FD
    apart, different, counts = 0.0, 0, torch.zeros(3, dtype=torch.int64)
    for latent in f_RF.sum(0).topk(20).indices.tolist():
        direction_D = torch.nn.functional.normalize(W_dec_FD[latent] + 0.5 * W_dec_FD[:8].sum(0), dim=0)
        active_R = f_RF[:, latent] > 0
        x_RD, seen_RF = out.x_ND[active_R], f_RF[active_R].clone()
        seen_RF[::2, latent] = 0  # else it is silent nowhere
        lens = Recorded(x_RD, seen_RF, W_dec_FD)
        theirs = FeatureAbsorptionCalculator(
            model=lens, icl_word_list=["example"], max_icl_examples=1, word_token_pos=0
        )
        found = theirs.calculate_absorption(
            lens, ["word"] * len(x_RD), direction_D, [latent, 0], layer=0, show_progress=False
        ).word_results
        ours_R, full_R = _shares(
            x_RD.numpy(), csr_array(seen_RF.numpy()), W_dec_FD.numpy(), direction_D.numpy(), np.array([latent, 0])
        )
        theirs_R = np.array([result.absorption_fraction for result in found])
        apart = max(apart, float(np.abs(ours_R - theirs_R).max()))
        different += int((full_R != np.array([result.is_full_absorption for result in found])).sum())
        counts += torch.tensor([len(found), int((ours_R > 0).sum()), int(full_R.sum())])
    return f"absorption apart by {apart:.1e} and full absorption in {different} of {counts.tolist()} readings"


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
        print(folder, absorbed_alike(folder, torch.cat([of.flatten(0, 1) for of in states[1].values()])[:8192]))
