"""The Python API gives what the commands, the cache, SAELens and transformers give, by their names in `routesae`."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import routesae
from routesae.analyze.clamp.run import clamp
from routesae.analyze.clamp.settings import ClampSettings
from routesae.harvest.cache import reader
from routesae.train.folder.checkpoint import read_config, save_sae
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.saes.normalise import Hidden, places_of

CPU = torch.device("cpu")
VARIANTS = ("topk", "batchtopk", "routesae", "crosscoder", "mlsae")
TEXT = "the router reads a hidden state, and the sparse model writes."
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def saes(tiny_cache: reader.Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, routesae.SAE]:
    """A few steps of each variant, by one call."""
    trained = routesae.train(
        cache=tiny_cache.path,
        sae=VARIANTS,
        latents=64,
        k=8,
        batch_tokens=1000,
        lr=3e-3,
        device="cpu",
        out=tmp_path_factory.mktemp("saes"),
    )
    return dict(zip(VARIANTS, trained, strict=True))


@pytest.fixture(scope="module")
def cache(tiny_cache: reader.Cache) -> routesae.Cache:
    return routesae.Cache(tiny_cache.path)


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> routesae.LM:
    return routesae.load_lm(str(tiny_model), device="cpu", lm_dtype="float32")


def read_by(sae: routesae.SAE, document: routesae.Document) -> Tensor:
    """Its kept hidden states as the SAE reads them."""
    hidden = [document.hidden[layer][document.kept] for layer in sae.layers]
    return hidden[0] if sae.one_layer else torch.stack(hidden, 1)


# ------------------------------------------------------------------------------------------------------- the package


def test_importing_routesae_takes_no_time_and_no_torch() -> None:
    code = """
import sys, time
took = []
for _ in range(3):
    began = time.perf_counter()
    import routesae
    took.append(time.perf_counter() - began)
    del sys.modules["routesae"]
import routesae
assert {"Cache", "load_sae", "load_lm", "latents", "steer", "harvest", "train", "analyze"} <= set(dir(routesae))
assert not {"torch", "numpy", "pydantic", "importlib.metadata"} & set(sys.modules)
assert min(took) < 0.05, took
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_every_name_of_the_package_is_one_of_the_api() -> None:
    from routesae import api

    assert sorted(routesae.API) == sorted(api.__all__)
    for name in routesae.API:
        if name in ("harvest", "train", "analyze"):  # rooms, which can be called
            assert callable(getattr(routesae, name)), name
        else:
            assert getattr(routesae, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="has no attribute 'lode_sae'"):
        routesae.lode_sae  # noqa: B018


# --------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_document_is_what_the_lm_gives_on_its_rows_in_reading_order(
    dtype: str, tiny_cache: reader.Cache, int8_cache: reader.Cache, lm: routesae.LM, tiny_corpus: Path
) -> None:
    stored = tiny_cache if dtype == "float16" else int8_cache
    cache, manifest = routesae.Cache(stored.path), stored.manifest
    tokens, starts = np.asarray(stored.tokens()), stored.document_starts()
    texts = [json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()]
    with torch.no_grad():
        states = lm.model(input_ids=torch.tensor(tokens).long(), output_hidden_states=True).hidden_states
    for number in (0, 7, cache.documents - 1):
        document = cache.document(number)
        begin = int(starts[number])
        span = slice(begin, begin + len(document.tokens))
        assert document.token_ids.tolist() == tokens.reshape(-1)[span].tolist()
        assert (document.row, document.position) == divmod(begin, manifest.context)
        assert document.corpus == manifest.corpus
        last = number == cache.documents - 1
        assert texts[number].startswith(document.text) if last else document.text == texts[number]
        assert document.kept.sum() > 10
        assert cache.layers == (2, 3, 4, 5)
        for layer in cache.layers:
            hidden_TD = document.hidden[layer]
            expected_TD = states[layer].flatten(0, 1)[span]
            assert hidden_TD.isnan().all(1).tolist() == (~document.kept).tolist()
            bound = 2e-3 if dtype == "float16" else 0.1
            error = (hidden_TD - expected_TD)[document.kept].norm() / expected_TD[document.kept].norm()
            assert error < bound
    for number in (-1, cache.documents):
        with pytest.raises(routesae.WrongInput, match=f"document {number}: .*documents 0 to {cache.documents - 1}"):
            cache.document(number)


def test_rows_of_a_layer_are_those_of_the_shards_and_know_their_positions(
    cache: routesae.Cache, tiny_cache: reader.Cache
) -> None:
    rows = cache.hidden(4)
    expected = np.concatenate([shard.read("layer_04") for shard in tiny_cache.shards()])
    assert rows.shape == expected.shape == (cache.tokens, cache.width)
    assert torch.equal(rows[:], torch.from_numpy(expected))
    picked = [5000, 3, 3, len(rows) - 1, -2]
    for at in (picked, torch.tensor(picked), slice(2040, 2060)):
        assert torch.equal(rows[at], torch.from_numpy(expected[np.asarray(at) if not isinstance(at, slice) else at]))
    assert torch.equal(rows[-1], torch.from_numpy(expected[-1]))
    assert rows[[]].shape == (0, cache.width)
    with pytest.raises(IndexError):
        rows[len(rows)]
    document = cache.document(7)
    first = document.row * tiny_cache.manifest.context + document.position
    at = int(torch.nonzero(rows.positions == first + int(document.kept.nonzero()[3])))
    assert torch.equal(rows[at].float(), document.hidden[4][document.kept][3])
    with pytest.raises(routesae.WrongInput, match="layer 9 was not harvested"):
        cache.hidden(9)


def test_batches_are_bitwise_those_that_training_reads(cache: routesae.Cache, tiny_cache: reader.Cache) -> None:
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.train_rows, (3, 5))
    several = cache.batches(layers=[3, 5], batch_tokens=1000, seed=4)
    alone = cache.batches(layers=3, batch_tokens=1000, seed=4)
    for epoch in range(2):
        plans = epoch_plans(selection, seed=4, epoch=epoch, batch_tokens=1000)
        kept, single = list(several), list(alone)  # batches outlive the loader's memory
        assert len(kept) == len(several) == len(alone) == len(single)
        with closing(load(selection, plans, 1000, CPU)) as expected:
            for batch, one, of_training in zip(kept, single, expected, strict=True):
                assert torch.equal(batch, of_training.hidden_LND.transpose(0, 1))
                assert torch.equal(one, of_training.hidden_LND[0])
    held_out = torch.cat(list(cache.batches(3, held_out=True)))
    assert len(held_out) + sum(len(batch) for batch in single) == cache.tokens
    assert next(iter(cache.batches())).shape[1:] == (4, 32)
    with pytest.raises(routesae.WrongInput, match="layer 9 was not harvested"):
        cache.batches(layers=[9])
    with pytest.raises(routesae.WrongInput, match=r"layers \[\] are none; .* holds 2, 3, 4, 5"):
        cache.batches(layers=[])
    assert torch.equal(next(iter(cache.batches(np.int64(3)))), next(iter(cache.batches(3))))
    with pytest.raises(routesae.WrongInput, match="layer '3' was not harvested"):
        cache.hidden("3")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- SAEs


@pytest.mark.parametrize("name", VARIANTS)
def test_encode_of_a_documents_raw_states_is_what_the_cache_gives(
    name: str, saes: dict[str, routesae.SAE], cache: routesae.Cache, tiny_cache: reader.Cache
) -> None:
    """The cache's route: float16 rows with their stored means and deviations, in another order."""
    sae, document = saes[name], cache.document(7)
    found = sae.encode(read_by(sae, document)).dense()
    selection = Selection(tiny_cache, 0, tiny_cache.manifest.rows, sae.layers)
    position_n = np.concatenate([selection.positions(shard) for shard in range(len(selection.shards))])
    first = document.row * tiny_cache.manifest.context + document.position
    place_of = {int(position): row for row, position in enumerate(position_n)}
    rows = [place_of[first + int(at)] for at in document.kept.nonzero()]
    plans = iter([[block] for block in selection.blocks()])
    with closing(load(selection, plans, 256, CPU)) as batches:
        whole = [
            torch.cat(parts, 1) for parts in zip(*([t.clone() for t in batch] for batch in batches), strict=True)
        ]
    hidden = Hidden(*(part[:, rows] for part in whole), layers=sae.layers)
    assert (found > 0).any()
    torch.testing.assert_close(found, sae.encode(hidden).dense(), **CLOSE)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_encode_of_a_documents_raw_states_is_what_saelens_gives(
    name: str, saes: dict[str, routesae.SAE], cache: routesae.Cache
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae, document = routesae.load_sae(str(saes[name].folder), device="cpu"), cache.document(7)
    theirs = sae_lens.SAE.load_from_disk(sae.folder)
    hidden_nD = read_by(sae, document)
    with torch.no_grad():
        expected = theirs.encode(hidden_nD)
        torch.testing.assert_close(sae.encode(hidden_nD).dense(), expected, **CLOSE)
        torch.testing.assert_close(sae.decode(sae.encode(hidden_nD)), theirs.decode(expected), **CLOSE)


def test_what_an_sae_cannot_read_or_decode_is_refused_by_its_type(saes: dict[str, routesae.SAE], lm: Any) -> None:
    sae, given = saes["topk"], np.zeros((3, 32), np.float32)
    assert str(sae) == f"TopK(layers {sae.layers[0]}, 64 latents, k 8)"
    for call in (sae, sae.encode):
        with pytest.raises(routesae.WrongInput, match=r"a ndarray; give a torch.Tensor: torch.as_tensor"):
            call(given)
    dense = sae.encode(torch.from_numpy(given)).dense()
    with pytest.raises(routesae.WrongInput, match=r"decode takes the Latents of encode, not a Tensor"):
        sae.decode(dense)  # as SAELens' decode takes it
    with pytest.raises(routesae.WrongInput, match="load_sae's SAE, not TopK and LM"):
        routesae.latents(sae, lm, TEXT)  # type: ignore[arg-type]
    with pytest.raises(routesae.WrongInput, match="load_sae's SAE, not LM and str"):
        routesae.steer(lm, str(sae.folder), {3: 1.0})  # type: ignore[arg-type]
    with pytest.raises(routesae.WrongInput, match="top -1 is below 1"):
        routesae.latents(lm, sae, TEXT, top=-1)


def test_generate_returns_every_continuation_that_was_asked_for(lm: routesae.LM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}
    assert len(lm.generate("the router", **options)) == 2
    assert isinstance(lm.generate("the router", max_new_tokens=3), str)
    assert lm.positions == 64
    long = "the router " * 20
    left = 64 - len(lm.ids(long))
    assert 0 < left < 64
    assert lm.generate(long) == lm.generate(long, max_new_tokens=left)
    with pytest.raises(routesae.WrongInput, match=r"are more than the \d+ positions of"):
        lm.generate("the router", max_new_tokens=10**6)


# ----------------------------------------------------------------------------------------------- latents of a text


@pytest.mark.parametrize("name", VARIANTS)
def test_latents_of_a_text_are_those_of_its_hidden_states(
    name: str, saes: dict[str, routesae.SAE], lm: routesae.LM
) -> None:
    sae = saes[name]
    found = routesae.latents(lm, sae, TEXT, top=4)
    ids = lm.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        states = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        hidden = torch.stack([states[layer][0, 1:] for layer in sae.layers], 1)
        dense = sae.encode(hidden[:, 0] if sae.one_layer else hidden).dense()
    assert "".join(found.tokens) == TEXT
    assert found.kept == [False, *(True for _ in ids[1:])]
    torch.testing.assert_close(found.latents.dense(), dense, **CLOSE)
    by_token = found.by_token()
    assert by_token[0] == []
    for of_token, expected in zip(by_token[1:], dense, strict=True):
        values, at = expected.flatten().topk(4)
        assert [row["activation"] for row in of_token] == pytest.approx(values[values > 0].tolist(), abs=1e-4)
        assert [row["latent"] for row in of_token] == (at % 64)[values > 0].tolist()
        if name == "mlsae":
            assert [row["layer"] for row in of_token] == [sae.layers[i] for i in (at // 64)[values > 0].tolist()]
    frame = found.to_pandas()
    assert list(frame.columns) == ["position", "token", "latent", "activation", "layer", "note"]
    assert len(frame) == len(found) > 10


def test_a_random_routers_layers_are_those_of_generation(lm: routesae.LM) -> None:
    """It goes by each token's id and position, which `latents` must hand on."""
    from routesae.train.saes import Recipe, build

    sae = build(Recipe(sae="routesae", layers=(2, 3, 4), width=32, latents=64, k=8, router="random"))
    sae = sae.requires_grad_(False).eval()
    found = routesae.latents(lm, sae, TEXT)
    ids = torch.tensor(lm.ids(TEXT))
    places = places_of(ids, torch.arange(len(ids)))
    layers = [{row["layer"] for row in of_token} for of_token in found.by_token()[1:]]
    routes = sae.routes(Hidden(torch.zeros(3, len(ids), 32), place_N=places)).at_R[1:]
    assert layers == [{sae.layers[at]} for at in routes.tolist()]
    assert len(set(routes.tolist())) > 1


def test_messages_go_through_the_chat_template(saes: dict[str, routesae.SAE], tiny_model: Path) -> None:
    lm = routesae.load_lm(str(tiny_model), device="cpu", lm_dtype="float32")
    messages = [{"role": "user", "content": "the router"}]
    with pytest.raises(routesae.WrongInput, match="no chat template"):
        lm.ids(messages)
    lm.tokenizer.chat_template = TEMPLATE
    found = routesae.latents(lm, saes["topk"], messages)
    assert "".join(found.tokens) == "<s>user: the router"
    assert found.kept[:2] == [False, True]
    for wrong in ("", [], [{"role": "user"}], ["text"], [{"role": "user", "content": 3}], "a " * 100, "\ud800"):
        with pytest.raises(routesae.WrongInput):
            routesae.latents(lm, saes["topk"], wrong)


def test_what_a_text_spells_neither_becomes_markup_nor_acts_where_it_is_shown(
    saes: dict[str, routesae.SAE], lm: routesae.LM
) -> None:
    found = routesae.latents(lm, saes["topk"], "<b>a</b>\u202e\x1b[2J\n")
    shown = found._repr_html_()
    assert "&lt;" in shown
    assert "<U+000A>" not in shown
    assert "&lt;U+000A&gt;" in shown
    assert "&lt;U+001B&gt;" in shown
    for text in (shown, str(found)):
        assert not set(text) & {"\u202e", "\x1b"}
        assert "<b>" not in text


def test_an_sae_of_another_lm_is_refused(saes: dict[str, routesae.SAE], tiny_model: Path) -> None:
    other = routesae.load_lm(str(tiny_model), device="cpu", lm_dtype="float32")
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(routesae.WrongInput, match=r"weights differ.*load that LM with load_lm"):
        routesae.latents(other, saes["topk"], TEXT)
    with pytest.raises(routesae.WrongInput, match="weights differ"):
        routesae.steer(other, saes["topk"], {3: 1.0})


# --------------------------------------------------------------------------------------------------------- steering


@pytest.mark.parametrize("name", VARIANTS)
def test_steer_is_the_clamp_command_token_for_token(
    name: str, saes: dict[str, routesae.SAE], lm: routesae.LM, tiny_model: Path
) -> None:
    sae = saes[name]
    prompts = ["the router reads", "a sparse model of a hidden state writes the", "block"]
    strong = routesae.latents(lm, sae, prompts[1]).by_latent()[0]["latent"]
    changes = {strong: 6.0, 3: -4.0}
    before = lm.generate(prompts, max_new_tokens=8)
    steered = {}
    for mode in ("set", "add", "multiply"):
        flags: dict[str, Any] = {mode: [f"{latent}={value}" for latent, value in changes.items()]}
        settings = ClampSettings(
            sae=str(sae.folder), model=str(tiny_model), prompt=prompts, max_new_tokens=8, device="cpu", **flags
        )
        texts = clamp(settings)["texts"]
        with routesae.steer(lm, sae, changes, mode=mode):
            steered[mode] = lm.generate(prompts, max_new_tokens=8)
            for prompt, text in zip(prompts, texts, strict=True):
                out = lm.model.generate(torch.tensor([lm.ids(prompt)]), max_new_tokens=8, do_sample=False)
                assert out[0, len(text["input_ids"]) :].tolist() == text["clamped_ids"]
        assert steered[mode] == [text["clamped"] for text in texts]
        assert before == [text["original"] for text in texts]
    assert steered["set"] != before != steered["add"]
    assert lm.generate(prompts, max_new_tokens=8) == before  # and nothing is left of it


@pytest.mark.parametrize("name", ["topk", "routesae", "crosscoder"])
def test_a_steered_forward_pass_with_padding_or_a_cache_is_that_of_each_row_alone(
    name: str, saes: dict[str, routesae.SAE], lm: routesae.LM
) -> None:
    from transformers import DynamicCache

    rows = [lm.ids("the router reads a hidden"), lm.ids("block")]
    longest = max(map(len, rows))
    with routesae.steer(lm, saes[name], {3: 9.0}, mode="add"):
        alone = [lm(input_ids=torch.tensor([ids])).logits[0] for ids in rows]
        plain = torch.tensor([[*ids, *[7] * (longest - len(ids))] for ids in rows])
        mask = torch.tensor([[at < len(ids) for at in range(longest)] for ids in rows]).long()
        right = lm(input_ids=plain, attention_mask=mask).logits
        past = DynamicCache()
        steps = [lm.model(torch.tensor([[token]]), past_key_values=past).logits[0] for token in rows[0]]
        with pytest.raises(routesae.WrongInput, match="reads input_ids"):
            lm.model(inputs_embeds=torch.zeros(1, 2, 32))
    for logits, ids, expected in zip(right, rows, alone, strict=True):
        torch.testing.assert_close(logits[: len(ids)], expected, **CLOSE)
    if name == "topk":  # a router and a crosscoder read what a token is after a steered past
        torch.testing.assert_close(torch.cat(steps), alone[0], **CLOSE)
    assert not torch.allclose(alone[0][1:], lm(input_ids=torch.tensor([rows[0]])).logits[0, 1:], atol=1e-2)
    torch.testing.assert_close(alone[0][0], lm(input_ids=torch.tensor([rows[0]])).logits[0, 0], **CLOSE)


def test_steering_refuses_what_it_cannot_do(saes: dict[str, routesae.SAE], lm: routesae.LM) -> None:
    with pytest.raises(routesae.WrongInput, match="mode 'sett' is none of add, multiply, set"):
        routesae.steer(lm, saes["topk"], {3: 1.0}, mode="sett")
    with pytest.raises(routesae.WrongInput, match="64 latents, 0 to 63, and no latent 64"):
        routesae.steer(lm, saes["topk"], {64: 1.0})
    with pytest.raises(routesae.WrongInput, match="not a finite number"):
        routesae.steer(lm, saes["topk"], {3: float("nan")})


# ------------------------------------------------------------------------------------------------- two SAEs compared


def permuted(sae: routesae.SAE, folder: Path, order: Tensor) -> Path:
    """The same SAE with its latents in another order."""
    other = deepcopy(sae)
    for parameter in other.parameters():
        if len(parameter) == len(order):
            parameter.copy_(parameter[order].clone())
    folder.mkdir()
    save_sae(folder, other, read_config(sae.folder)["metadata"]["routesae"]["source"])
    return folder


def test_an_sae_shares_every_latent_with_itself_in_another_order(
    saes: dict[str, routesae.SAE], cache: routesae.Cache, tmp_path: Path
) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other = permuted(saes["topk"], tmp_path / "other", order)
    found = routesae.compare(saes["topk"].folder, other, cache=cache.path, threshold=0.99)
    place = {int(latent): at for at, latent in enumerate(order)}
    assert found["pairs"]
    assert all(row["B"] == place[row["A"]] for row in found["pairs"])
    by = {row["by"]: row["shared"] for row in found["counts"]}
    active = int(
        (torch.cat([saes["topk"].encode(b).dense() for b in cache.batches(4, held_out=True)]) > 0).any(0).sum()
    )
    assert by == {"decoder": 64, "activations": active, "both": active}
    assert "mean_nearest" in str(found)
    json.dumps(found)


@pytest.mark.parametrize("other", ["batchtopk", "routesae", "crosscoder", "mlsae"])
def test_likeness_is_the_correlation_of_activations_and_the_cosine_of_decoder_rows(
    other: str, saes: dict[str, routesae.SAE], cache: routesae.Cache
) -> None:
    """Over the held-out tokens of different layers, as numpy says."""
    one, two = saes["topk"], saes[other]
    found = routesae.compare(one.folder, two.folder, cache=cache.path, threshold=0.05)
    hidden = torch.cat(list(cache.batches(held_out=True)))
    at = [cache.layers.index(layer) for layer in two.layers]
    f = one.encode(hidden[:, cache.layers.index(one.layers[0])]).dense()
    g = two.encode(hidden[:, at[0]] if two.one_layer else hidden[:, at]).dense()
    g = g.sum(1) if other == "mlsae" else g
    with np.errstate(invalid="ignore"):
        both = np.nan_to_num(np.corrcoef(f.T.numpy(), g.T.numpy())[:64, 64:])
    W = two.dictionary.W_dec_FD.view(64, -1, 32).sum(1)
    cosine = torch.nn.functional.cosine_similarity(one.W_dec_FD[:, None], W[None], dim=2).numpy()
    assert found["tokens"] == len(hidden)
    for name, likeness in (("activations", both), ("decoder", cosine)):
        pairs = {(row["A"], row["B"]): row[name] for row in found["pairs"] if row[name] is not None}
        expected = {
            (a, int(b)): likeness[a, b]
            for a, b in enumerate(likeness.argmax(1))
            if likeness[:, b].argmax() == a and likeness[a, b] >= 0.05
        }
        assert pairs.keys() == expected.keys()
        assert all(pairs[pair] == pytest.approx(value, abs=1e-4) for pair, value in expected.items())


# --------------------------------------------------------------------------------------------------------- commands


def test_the_commands_are_calls_with_their_settings_by_name(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = routesae.harvest(
        model=tiny_model, data=tiny_corpus, tokens="3k", context=16, layers=[3, 4], device="cpu", lm_dtype="float32"
    )
    assert (cache.layers, cache.width) == ((3, 4), 32)
    Path("a.toml").write_text(
        'latents = 64\nk = 8\nbatch_tokens = 500\n[[run]]\nsae = "matryoshka"\nprefixes = "16,64"\n'
    )
    (sae,) = routesae.train(config="a.toml", layer=4, device="cpu", lr=3e-3)
    assert sae.recipe.prefixes == (16, 64)
    assert sae.layers == (4,)
    (again,) = routesae.train(config="a.toml", layer=4, device="cpu", lr=3e-3, resume=True)
    assert torch.equal(again.W_dec_FD, sae.W_dec_FD)
    (row,) = routesae.analyze(metric=["NormMSE", "L0"], device="cpu")
    assert 0 < row["NormMSE"] < 2
    of_objects = routesae.analyze(cache=cache, sae=[sae], metric="NormMSE", tokens=np.int64(64), device="cpu")
    assert "NormMSE" in of_objects._repr_html_()
    options = {"latents": np.int64(64), "batch_tokens": 500, "device": "cpu", "lr": 3e-3, "out": "swept"}
    swept = routesae.train(cache=cache, sae="topk", layer=range(3, 5), k=np.array([4, 8]), **options)
    assert [(one.layers, one.recipe.k) for one in swept] == [((3,), 4), ((3,), 8), ((4,), 4), ((4,), 8)]
    (row,) = routesae.contexts(threshold=0.5, device="cpu")
    assert row["contexts"] > 0
    lm = routesae.load_lm(str(tiny_model), device="cpu", lm_dtype="float32")
    notes = [row["note"] for row in routesae.latents(lm, sae, TEXT) if row["note"]]
    assert notes
    assert all("«" in note for note in notes)


def test_a_wrong_setting_is_a_value_error_in_one_line() -> None:
    for call, message in (
        (lambda: routesae.harvest(tokns=5), "unknown setting 'tokns'; did you mean 'tokens'"),
        (lambda: routesae.harvest(tokens=-5), "--tokens -5 is below 1"),
        (lambda: routesae.train(sae="topkk"), "'topkk' is none of .*did you mean 'topk'"),
        (lambda: routesae.analyze(metric="NormMSEE"), "'NormMSEE' is none of"),
        (lambda: routesae.Cache("nowhere"), "nowhere is not a cache folder"),
        (lambda: routesae.load_sae("nowhere"), "nowhere is not an SAE folder"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert isinstance(raised.value, routesae.WrongInput)
        assert "\n" not in str(raised.value)
