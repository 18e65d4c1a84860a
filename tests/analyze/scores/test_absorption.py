"""The metric Absorption: what SAEBench calls absorbed, word by word, and an LM whose embeddings spell."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from routesae.analyze.scores import absorption
from routesae.analyze.scores.metrics import METRICS
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.settings import settings_of

LETTERS = "abcde"
WORDS = [letter + "".join(rest) for letter in LETTERS for rest in itertools.product("wxyz", repeat=3)]
WIDTH = 32


@pytest.fixture(scope="module")
def cache(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Of an LM whose hidden states are its embeddings nearly, which hold a direction for a word's first letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("spelling")
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "lm")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), initializer_range=0.01, bos_token_id=0, **sizes))
    with torch.no_grad():
        embeddings_VD = lm.model.embed_tokens.weight.normal_()
        directions_LD = torch.linalg.qr(torch.randn(WIDTH, len(LETTERS))).Q.T
        for word, token in fast.get_vocab().items():
            if word in WORDS:
                embeddings_VD[token] += 8 * directions_LD[LETTERS.index(word[0])]
    lm.save_pretrained(folder / "lm")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 60)) for _ in range(60)]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return harvest(
        tiny_settings(
            model=str(folder / "lm"),
            data=str(folder / "texts.txt"),
            tokens=3000,
            layers="1,2",
            out=str(folder / "shards"),
        )
    )


@pytest.fixture(scope="module")
def saes(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    runs = {"sae": ["topk", "routesae", "mlsae", "crosscoder"], "layer": 2, "latents": 48, "k": 4, "epochs": 4}
    train(settings_of({**runs, "cache": str(cache.path), "out": str(out), "batch_tokens": 256, "device": "cpu"}))
    return out


def scored(cache: Cache, out: Path, **changes: Any) -> list[dict[str, Any]]:
    chosen = {"metrics": ("Absorption",), "device": "cpu", **changes}
    rows: list[dict[str, Any]] = analyze(AnalyzeSettings(cache=str(cache.path), out=str(out), **chosen))["saes"]
    return rows


def test_every_kind_of_sae_is_scored_with_intervals_and_the_letters_that_there_are(cache: Cache, saes: Path) -> None:
    rows = scored(cache, saes)
    assert {row["variant"] for row in rows} == {"topk", "routesae", "mlsae", "crosscoder"}
    for row in rows:
        for name in METRICS["Absorption"].numbers:
            low, high = row["intervals"][name]
            assert 0 <= low <= row[name] <= high <= 1, row
    device, tokenizer = torch.device("cpu"), AutoTokenizer.from_pretrained(cache.manifest.model)
    opened = {row["variant"]: load_sae(Path(row["folder"]), device) for row in rows}
    everything = slice(0, cache.manifest.rows)
    found = absorption.absorption(opened, cache, everything, tokenizer, 0, lambda now: None)
    assert set(np.flatnonzero(found["topk"]["recognised"].sum(0))) == set(range(len(LETTERS)))
    # A word is read at four places at most, by an mlsae in each of its two layers.
    most = {name: sums["recognised"].max() for name, sums in found.items()}
    assert most == {"topk": 4, "routesae": 4, "mlsae": 8, "crosscoder": 4}


def test_saes_that_read_the_same_share_its_probes(cache: Cache, saes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, fit = list[Any](), absorption._probes
    monkeypatch.setattr(absorption, "_probes", lambda *given: fitted.append(given) or fit(*given))
    device, tokenizer = torch.device("cpu"), AutoTokenizer.from_pretrained(cache.manifest.model)
    sae = load_sae(next(saes.glob("topk*")), device)
    other = load_sae(next(saes.glob("mlsae*")), device)
    opened, everything = {"one": sae, "other": other, "same": sae}, slice(0, cache.manifest.rows)
    found = absorption.absorption(opened, cache, everything, tokenizer, 0, lambda now: None)
    assert len(fitted) == 2
    alone = absorption.absorption({"same": sae}, cache, everything, tokenizer, 0, lambda now: None)["same"]
    assert all((found["same"][name] == alone[name]).all() for name in alone)


def test_words_that_a_latent_of_their_own_stands_for_are_absorbed_and_no_others() -> None:
    from scipy.sparse import csr_array

    random = np.random.default_rng(0)
    word_R = np.repeat(np.arange(200), 4)
    letter_R = word_R % 4
    directions_LD = np.linalg.qr(random.standard_normal((16, 4))).Q.T
    x_RD = (3 * directions_LD[letter_R] + 0.3 * random.standard_normal((800, 16))).astype(np.float32)
    f_RF, W_dec_FD = np.zeros((800, 220), np.float32), np.zeros((220, 16), np.float32)
    f_RF[np.arange(800), letter_R] = 3  # latents 0 to 3 say the letter
    W_dec_FD[:4] = directions_LD
    absorbing = np.arange(0, 200, 20)  # of words of the first letter
    for word in absorbing:
        f_RF[word_R == word, 0] = 0
        f_RF[word_R == word, 10 + word] = 3
        W_dec_FD[10 + word] = directions_LD[0]
    sums = absorption._absorbed(x_RD, csr_array(f_RF), word_R, letter_R, W_dec_FD, 0, {})
    asked = sums["recognised"].sum(1) > 0
    assert 40 < asked.sum() == len(asked) < 80
    first = sums["recognised"][:, 0] > 0
    of_first = [round(x) for x in sums["absorbed"][first, 0] / sums["recognised"][first, 0]]
    assert 0 < sum(of_first) < 10
    assert sums["fully_absorbed"][:, 0].sum() == 4 * sum(of_first)
    assert sums["absorbed"][:, 1:].sum() == 0
    whole = {name: of_WA.sum(0)[None] for name, of_WA in sums.items()}
    numbers = {name: float(number(whole)[0]) for name, number in METRICS["Absorption"].numbers.items()}
    share = sum(of_first) / len(
        of_first
    )  # of the words of one letter of four; their latent is right where it is active
    expected = {"Absorption": share / 4, "Absorption_full": share / 4, "Letter_F1_input": 1.0}
    expected["Letter_F1"] = ((2 - 2 * share) / (2 - share) + 3) / 4
    assert numbers == pytest.approx(expected, abs=0.01)


def test_probes_are_trained_on_other_words_than_they_are_scored_on() -> None:
    from scipy.sparse import csr_array

    random = np.random.default_rng(0)
    word_R = np.repeat(np.arange(200), 4)
    x_RD = random.standard_normal((200, 300))[word_R].astype(
        np.float32
    )  # which says the word and nothing of a letter
    f_RF = csr_array(np.eye(200, dtype=np.float32)[word_R])
    with pytest.raises(WrongInput, match=r"4 of 26 have the words, and their best F1 is 0\.[0-5]"):
        absorption._absorbed(x_RD, f_RF, word_R, word_R % 4, np.eye(200, 300, dtype=np.float32), 0, {})


def naive(x_D: Any, f_F: Any, W_dec_FD: Any, direction_D: Any, main: list[int]) -> tuple[float, bool]:
    """(share absorbed, absorbed in full) of one reading, as SAEBench's evals/absorption says it."""
    whole = sum(a * b for a, b in zip(x_D, direction_D, strict=True))
    cosines, held = [], []
    for latent, row_D in enumerate(W_dec_FD):
        along = sum(a * b for a, b in zip(row_D, direction_D, strict=True))
        cosines.append(along / sum(a * a for a in row_D) ** 0.5)
        held.append(f_F[latent] * along)
    by_main = sum(held[latent] for latent in main)
    others = [held[i] for i in range(len(held)) if i not in main and cosines[i] >= 0.1 and held[i] > 0]
    by_others = sum(sorted(others)[-3:])
    if by_main >= whole or by_others / whole < 0.4:
        share = 0.0
    elif by_main <= 0:
        share = 1.0
    else:
        absorbed = min(by_others, whole - by_main)
        share = absorbed / (absorbed + by_main)
    top = max(range(len(held)), key=held.__getitem__)
    silent = all(f_F[latent] == 0 for latent in main)
    return share, silent and cosines[top] >= 0.025 and whole >= 0 and held[top] / whole >= 0.4


def test_what_is_absorbed_is_what_a_naive_reading_of_the_definition_gives() -> None:
    from scipy.sparse import csr_array

    random = np.random.default_rng(0)
    readings, latents, width = 400, 24, 6
    W_dec_FD = random.standard_normal((latents, width)).astype(np.float32)
    direction_D = random.standard_normal(width).astype(np.float32)
    direction_D /= np.linalg.norm(direction_D)
    across_D = W_dec_FD[5] - W_dec_FD[5] @ direction_D * direction_D
    W_dec_FD[5] = 100 * across_D / np.linalg.norm(across_D) + 2 * direction_D  # much along it, at a cosine of 0.02
    x_RD = (random.standard_normal((readings, width)) + 1.5 * direction_D).astype(np.float32)
    f_RF = (random.random((readings, latents)) < 0.15) * random.random((readings, latents)).astype(np.float32) * 1.5
    main = np.array([3, 11])
    absorbed_R, full_R = absorption._shares(x_RD, csr_array(f_RF), W_dec_FD, direction_D, main)
    expected = [naive(x_D, f_F, W_dec_FD, direction_D, [3, 11]) for x_D, f_F in zip(x_RD, f_RF, strict=True)]
    np.testing.assert_allclose(absorbed_R, [share for share, _ in expected], atol=1e-5)
    assert full_R.tolist() == [full for _, full in expected]
    kinds = [sum(share == 0 for share, _ in expected), sum(0 < share < 1 for share, _ in expected)]
    kinds += [sum(share == 1 for share, _ in expected), int(full_R.sum())]
    assert min(kinds) > 10, kinds


def test_the_direction_is_that_of_the_probe_in_the_units_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.sparse import csr_array

    random, directions = np.random.default_rng(0), []
    word_R = np.repeat(np.arange(200), 4)
    x_RD = random.standard_normal((800, 8)).astype(np.float32) * 0.1
    x_RD[np.arange(800), word_R % 4] += 3
    x_RD[:, 4:] *= 10_000  # outlier dimensions, which say nothing of letters

    def keep(x_RD: Any, f_RF: Any, W_dec_FD: Any, direction_D: Any, main: Any) -> Any:
        directions.append(direction_D)
        return np.zeros(len(x_RD)), np.zeros(len(x_RD), bool)

    monkeypatch.setattr(absorption, "_shares", keep)
    f_RF = csr_array(np.eye(4, dtype=np.float32)[word_R % 4])
    absorption._absorbed(x_RD, f_RF, word_R, word_R % 4, np.zeros((4, 8), np.float32), 0, {})
    for letter, direction_D in enumerate(directions):
        along_R = x_RD @ direction_D
        assert along_R[word_R % 4 == letter].min() > along_R[word_R % 4 != letter].max()
    assert len(directions) == 4


def test_main_latents_are_fitted_on_the_training_words() -> None:
    from scipy.sparse import csr_array

    is_R, test_R = np.arange(600) % 2 == 0, np.arange(600) >= 200
    f_RF = (is_R != test_R).astype(np.float32)[:, None]  # on the letter in training, off it on the many test words
    _, by_latents_r = absorption._main_latents(csr_array(f_RF), is_R, test_R)
    assert (by_latents_r == f_RF[test_R, 0]).all()


def test_main_latents_are_those_that_each_raise_f1() -> None:
    from scipy.sparse import csr_array

    random = np.random.default_rng(0)
    is_R, test_R = np.arange(600) % 5 == 0, random.random(600) < 0.3
    f_RF = np.where(random.random((600, 30)) < 0.05, 1, 0).astype(np.float32)
    f_RF[is_R & (np.arange(600) % 3 > 0), 7] = 2  # two thirds of the letter
    f_RF[is_R & (np.arange(600) % 3 == 0), 20] = 1  # and the other third
    main, by_latents_r = absorption._main_latents(csr_array(f_RF), is_R, test_R)
    assert main.tolist() == [7, 20]
    assert by_latents_r[is_R[test_R]].all()
    f_RF[:, 20] = 0
    main, by_latents_r = absorption._main_latents(csr_array(f_RF), is_R, test_R)
    assert main.tolist() == [7]
    assert 0.5 < by_latents_r[is_R[test_R]].mean() < 0.8


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece"])
def test_words_are_told_from_pieces_of_words_by_any_kind_of_tokenizer(kind: str) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    blank = {"byte-level": "Ġ", "metaspace": "▁", "wordpiece": ""}[kind]
    piece = "##" if kind == "wordpiece" else ""
    pieces = [
        f"{blank}snake",
        f"{blank}Zebra",
        f"{piece}ing",
        f"{blank}12",
        f"{blank}don't",
        f"{blank}été",
        f"{piece}.",
    ]
    model = models.WordPiece if kind == "wordpiece" else models.WordLevel
    tokenizer = Tokenizer(model({one: number for number, one in enumerate(["?", *pieces])}, unk_token="?"))
    tokenizer.decoder = {
        "byte-level": decoders.ByteLevel(),
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
    }[kind]
    letter_V = absorption.first_letters(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert letter_V.tolist()[:4] == [-1, 18, 25, -1]
    assert set(letter_V.tolist()[4:]) == {-1}


def test_readings_are_spread_over_words_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    word_N = np.array([1] * 1000 + [2] * 2 + [3] * 50 + [4] * 5)
    usable_N = word_N != 3
    chosen_N = absorption.spread(word_N, usable_N, 0)
    assert np.bincount(word_N[chosen_N]).tolist() == [0, 4, 2, 0, 4]
    assert np.flatnonzero(chosen_N)[:4].max() > 200  # not the first four of the corpus
    monkeypatch.setattr(absorption, "MOST_READINGS", 5)
    assert absorption.spread(word_N, usable_N, 0).sum() == 5


def test_what_cannot_be_scored_is_refused_or_left_out(
    cache: Cache, saes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "0 of 26 have the words, and their best F1 is 0.00; score more tokens"
    with pytest.raises(WrongInput, match=reason):
        scored(cache, saes, tokens=100)
    assert caplog.text.count("is left out: Absorption needs letters with 10 test words and a probe") == 3
    with monkeypatch.context() as patch:
        shares = absorption._absorbed

        def only_of_one_layer(x_RD: Any, *rest: Any) -> Any:
            if x_RD.shape[1] > WIDTH:
                raise WrongInput("no letters here")
            return shares(x_RD, *rest)

        patch.setattr(absorption, "_absorbed", only_of_one_layer)
        rows = {row["variant"]: row for row in scored(cache, saes)}
    assert {name for name, row in rows.items() if "Absorption" in row} == {"topk", "routesae", "mlsae"}
    monkeypatch.setattr(absorption, "first_letters", lambda tokenizer: np.full(len(tokenizer), -1, np.int8))
    with pytest.raises(WrongInput, match=r"no kept token of .* is one of a to z alone"):
        scored(cache, saes)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(WrongInput, match=r"needs sklearn: pip install 'routesae\[probe\]'"):
        scored(cache, saes)
