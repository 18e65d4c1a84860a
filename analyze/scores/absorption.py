"""Feature absorption on first letters (2409.14507, measured as SAEBench does, 2503.09532), from a cache alone.

An SAE absorbs a feature where the latent for "begins with s" stays silent on "snake" because the latent for snakes
covers it. All words here are single tokens, each read at a few places of the corpus.

    probe     for each letter a logistic regression on what the SAE reads, x; p̂ is its direction
    main      the latents that best tell the letter, as many as each raise F1 by another 0.03
    absorbed  over words of the letter that the probe recognises: the share of x·p̂ that other latents stand in for
    full      the share of those words on which no main latent is active and one other holds 0.4 of x·p̂ or more

Probes are trained and latents ranked on 70 % of the words; the others, the test words, say how many latents are main
and are scored. An SAE whose latents know nothing of letters absorbs nothing, so the F1 of its main latents and of the
probe stand beside it.

Dimension letters: V vocabulary, N tokens, D width of what the SAE reads, F latents, R readings, r those of the
W test words.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from routesae.harvest.cache.reader import Cache
from routesae.machine.device import require_packages
from routesae.reporting import Progress, Report, WrongInput
from routesae.train.evaluate import read_in_order
from routesae.train.saes import SAE

log = logging.getLogger(__name__)
LETTERS = 26
PLACES = 4  # of one word, drawn from all of its places
MOST_READINGS = 24_000
TRAIN_SHARE = 0.7  # of the words
LEAST_WORDS = 10  # of a letter, among training and test words each
PENALTY = 0.01  # scikit-learn's C for the probe: it has as many numbers as words
# SAEBench's, in its evals/absorption.
LEAST_F1, F1_RISE, MOST_MAIN = 0.6, 0.03, 10
ABSORBER_COSINE, FULL_COSINE, ABSORBERS, LEAST_SHARE = 0.1, 0.025, 3, 0.4

# Over test readings, by word and letter: how many begin with the letter; how many the probe of the input, and the
# main latents, take for it; how many each takes for it rightly; and what is absorbed of those that the probe does.
SUMS = ("of_letter", "by_input", "by_latents", "recognised", "recognised_by_latents", "absorbed", "fully_absorbed")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Probe(NamedTuple):
    """Of a letter: p̂, the test readings that it takes for the letter, and how well it does."""

    direction_D: Floats
    predicted_r: npt.NDArray[np.bool_]
    f1: float


@torch.no_grad()
def absorption(
    saes: Mapping[str, SAE], cache: Cache, rows: slice, tokenizer: Any, seed: int, report: Report
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """For each SAE what the metric Absorption is a function of, each [W, 26]: sums over a word's readings by letter.

    An SAE on whose input no probe can tell letters is left out with a warning. Raises WrongInput if none is left, the
    rows hold no words, or scikit-learn is missing.
    """
    require_packages("Absorption", "probe", "sklearn")
    from scipy.sparse import csr_array, vstack

    context = cache.manifest.context
    word_N = cache.tokens()[rows].reshape(-1).astype(np.int64)
    letter_V = first_letters(tokenizer)
    letter_V = np.pad(letter_V, (0, max(0, word_N.max() + 1 - len(letter_V))), constant_values=-1)  # of a padded LM
    usable_N = cache.kept(rows.start, rows.stop).reshape(-1) & (letter_V[word_N] >= 0)
    if not usable_N.any():
        raise WrongInput(f"Absorption needs words, and no kept token of {cache.path} is one of a to z alone")
    chosen_N = spread(word_N, usable_N, seed)
    read: dict[str, list[tuple[Floats, Any, Ints]]] = {name: [] for name in saes}
    for hidden, position_N in read_in_order(cache, rows, list(saes.values()), report, "read words"):
        at_N = position_N.cpu().numpy() - rows.start * context
        chosen_n = np.flatnonzero(chosen_N[at_N])
        few, word_n = hidden.at(torch.from_numpy(chosen_n).to(position_N.device)), word_N[at_N[chosen_n]]
        for name, sae in saes.items() if len(word_n) else ():
            out = sae.eval()(few)  # some variants read a token once in each layer
            word_R = np.tile(word_n, len(out.x_ND) // len(word_n))
            reading_M, latent_M, value_M = (part.cpu().numpy() for part in out.latents.active())
            f_RF = csr_array((value_M.astype(np.float32), (reading_M, latent_M)), (len(word_R), sae.latents))
            read[name].append((out.x_ND.cpu().numpy(), f_RF, word_R))
    results, fitted = {}, dict[str, dict[int, Probe]]()
    for done, (name, parts) in enumerate(read.items()):
        report(Progress("absorption", done, len(read), "SAEs", {}))
        x_RD, f_RF = np.concatenate([x_RD for x_RD, _, _ in parts]), vstack([f_RF for _, f_RF, _ in parts]).tocsr()
        word_R, W_dec_FD = np.concatenate([word_R for *_, word_R in parts]), saes[name].dictionary.W_dec_FD
        try:
            results[name] = _absorbed(x_RD, f_RF, word_R, letter_V[word_R], W_dec_FD.cpu().numpy(), seed, fitted)
        except WrongInput as refusal:
            if done == len(read) - 1 and not results:
                raise
            log.warning("%s is left out: %s", name, refusal)
    return results


def first_letters(tokenizer: Any) -> npt.NDArray[np.int8]:
    """int8 [V]: 0 to 25 where a token is a word of a to z alone with a blank before it, or else -1."""
    twice = tokenizer.batch_decode([[token, token] for token in range(len(tokenizer))])
    words = [parts[0] if len(parts) == 2 else "" for parts in map(str.split, twice)]  # the blank parts the two
    return np.array(
        [ord(word[0].lower()) - ord("a") if word.isascii() and word.isalpha() else -1 for word in words], np.int8
    )


def spread(word_N: Ints, usable_N: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.bool_]:
    """bool [N]: at most PLACES of each word's usable places, drawn evenly, and MOST_READINGS of all."""
    random = np.random.default_rng(seed)
    shuffled = random.permutation(np.flatnonzero(usable_N))
    by_word = shuffled[np.argsort(word_N[shuffled], kind="stable")]
    _, starts, counts = np.unique(word_N[by_word], return_index=True, return_counts=True)
    nth = np.arange(len(by_word)) - np.repeat(starts, counts)
    chosen_N = np.zeros(len(word_N), bool)
    chosen_N[random.permutation(by_word[nth < PLACES])[:MOST_READINGS]] = True
    return chosen_N


def _absorbed(
    x_RD: Floats,
    f_RF: Any,
    word_R: Ints,
    letter_R: Ints,
    W_dec_FD: Floats,
    seed: int,
    fitted: dict[str, dict[int, Probe]],
) -> dict[str, npt.NDArray[np.float64]]:
    """The sums of one SAE over the test words. fitted: the probes of each x_RD, by its hash; SAEs of one layer mostly
    read the same. Raises WrongInput if no letter can be scored."""
    words = np.random.default_rng(seed).permutation(np.unique(word_R))
    test_W = np.sort(words[round(TRAIN_SHARE * len(words)) :])
    test_R = np.isin(word_R, test_W)
    test, place = np.flatnonzero(test_R), np.searchsorted(test_W, word_R[test_R])
    sums = {name: np.zeros((len(test_W), LETTERS)) for name in SUMS}
    if (key := xxhash.xxh3_128_hexdigest(x_RD.data)) not in fitted:
        fitted[key] = _probes(x_RD, word_R, letter_R, test_R)
    scored = {letter: probe for letter, probe in fitted[key].items() if probe.f1 >= LEAST_F1}
    for letter, probe in scored.items():
        is_R = letter_R == letter
        is_r, by_input_r = is_R[test], probe.predicted_r
        main, by_latents_r = _main_latents(f_RF, is_R, test_R)
        recognised = test[is_r & by_input_r]
        shares = np.zeros((2, len(test)))
        shares[:, is_r & by_input_r] = _shares(x_RD[recognised], f_RF[recognised], W_dec_FD, probe.direction_D, main)
        seen = (is_r, by_input_r, by_latents_r, is_r & by_input_r, is_r & by_latents_r, *shares)
        for name, numbers_r in zip(SUMS, seen, strict=True):
            np.add.at(sums[name][:, letter], place, numbers_r)
    if not sums["recognised"].any():
        best = max((probe.f1 for probe in fitted[key].values()), default=0.0)
        raise WrongInput(
            f"Absorption needs letters with {LEAST_WORDS} test words and a probe of F1 {LEAST_F1} or more; "
            f"{len(fitted[key])} of 26 have the words, and their best F1 is {best:.2f}; "
            "score more tokens or another layer"
        )
    mean_f1 = np.mean([probe.f1 for probe in scored.values()])
    log.info("Absorption scores %d letters; mean F1 of their probes %.2f", len(scored), mean_f1)
    return sums


def _probes(x_RD: Floats, word_R: Ints, letter_R: Ints, test_R: npt.NDArray[np.bool_]) -> dict[int, Probe]:
    """The probe of every letter that has enough words."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x_RD[~test_R])
    scaled_RD, probes = scaler.transform(x_RD), {}
    for letter in range(LETTERS):
        is_R = letter_R == letter
        if min(len(np.unique(word_R[is_R & part_R])) for part_R in (test_R, ~test_R)) < LEAST_WORDS:
            continue
        model = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000)
        predicted_r = model.fit(scaled_RD[~test_R], is_R[~test_R]).predict(scaled_RD[test_R])
        direction_D = (model.coef_[0] / scaler.scale_).astype(np.float32)
        direction_D /= np.linalg.norm(direction_D)
        probes[letter] = Probe(direction_D, predicted_r, float(f1_score(is_R[test_R], predicted_r)))
    return probes


def _main_latents(
    f_RF: Any, is_R: npt.NDArray[np.bool_], test_R: npt.NDArray[np.bool_]
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The latents that best tell the letter, those most active on it beyond other letters first, while F1 rises; and
    which test readings a logistic regression on them takes for it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    more_F = f_RF[is_R & ~test_R].mean(0) - f_RF[~is_R & ~test_R].mean(0)
    best = np.argsort(-more_F, kind="stable")[:MOST_MAIN]
    f_Rk, f1, main, by_latents_r = f_RF[:, best].toarray(), -1.0, best[:0], is_R[test_R]
    for k in range(1, len(best) + 1):
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        predicted_r = model.fit(f_Rk[~test_R, :k], is_R[~test_R]).predict(f_Rk[test_R, :k])
        if (score := f1_score(is_R[test_R], predicted_r)) < f1 + F1_RISE:
            break
        f1, main, by_latents_r = score, best[:k], predicted_r
    return main, by_latents_r


def _shares(
    x_RD: Floats, f_RF: Any, W_dec_FD: Floats, direction_D: Floats, main: Ints
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """For readings of a letter: the share of x·p̂ that is absorbed, and whether one latent absorbed it in full."""
    toward_F = W_dec_FD @ direction_D
    cosine_F = toward_F / np.maximum(np.linalg.norm(W_dec_FD, axis=1), 1e-12)
    whole_R = x_RD @ direction_D
    held_RF = f_RF.multiply(toward_F[None]).toarray()
    by_main_R = held_RF[:, main].sum(1)
    silent_R = f_RF[:, main].sum(1) == 0
    top_R = held_RF.argmax(1)
    is_enough_R = (held_RF.max(1) >= LEAST_SHARE * whole_R) & (whole_R > 0)
    full_R = silent_R & is_enough_R & (cosine_F[top_R] >= FULL_COSINE)
    held_RF[:, main] = 0
    held_RF[:, cosine_F < ABSORBER_COSINE] = 0
    most = min(ABSORBERS, held_RF.shape[1])
    by_others_R = np.partition(held_RF.clip(min=0), -most, axis=1)[:, -most:].sum(1)
    is_absorbed_R = (by_main_R < whole_R) & (by_others_R >= LEAST_SHARE * whole_R) & (whole_R > 0)
    by_absorbers_R = np.minimum(by_others_R, whole_R - by_main_R)
    absorbed_R = np.zeros_like(whole_R)
    np.divide(by_absorbers_R, by_absorbers_R + by_main_R.clip(min=0), out=absorbed_R, where=is_absorbed_R)
    return absorbed_R, full_R
