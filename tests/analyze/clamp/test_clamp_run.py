"""The stage clamp, end to end: what it writes, which LM it takes, and the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from routesae import __version__
from routesae.analyze.clamp.run import clamp
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.inputs.lm import LMRecord, kept_of
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.harvest.corpus.tokens import Framing
from routesae.harvest.lm.model import load_lm, load_tokenizer, weights_hash
from routesae.machine.files import file_hash, signed
from routesae.reporting import Progress, WrongInput, visible
from routesae.train.folder.checkpoint import load_sae, read_config, save_sae
from routesae.train.run import train
from routesae.train.saes import Recipe, build
from routesae.train.settings import settings_of

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"latents": 64, "k": 8, "batch_tokens": 1024, "lr": 1e-3, "device": "cpu"}
PROMPTS = ("the router reads a row", "sparse", "a model writes the hidden state of the shard")
CHANGES: dict[str, Any] = {"add": ("3=6",), "set": ("5=-4", "9=8"), "ablate": ("7",), "multiply": ("11=3",)}


@pytest.fixture(scope="module")
def saes(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a topk of layer 3, a hard and a soft routesae, and a crosscoder."""
    out = tmp_path_factory.mktemp("saes")
    common = {"cache": str(tiny_cache.path), "out": str(out), **SMALL}
    train(settings_of({"sae": "topk", "layer": 3, "name": "topk", **common}))
    train(settings_of({"name": "routesae", **common}))
    train(settings_of({"name": "soft", "routing": "soft", **common}))
    train(settings_of({"sae": "crosscoder", "name": "crosscoder", **common}))
    return out


def clamped(folder: Path, *, report: Any = None, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"prompt": PROMPTS, "max_new_tokens": 8, "device": "cpu", **CHANGES}
    settings = ClampSettings(sae=str(folder), **{**options, **changes})
    return clamp(settings) if report is None else clamp(settings, report)


def with_config(folder: Path, to: Path, change: Any) -> Path:
    """A copy of an SAE whose cfg.json `change` has altered, and signed."""
    shutil.copytree(folder, to)
    config = read_config(to)
    change(config)
    config["metadata"]["routesae"] = signed(config["metadata"]["routesae"])
    (to / "cfg.json").write_text(json.dumps(config))
    return to


# ------------------------------------------------------------------------------------------------- what it gives


@pytest.mark.parametrize("name", ["topk", "routesae", "crosscoder"])
def test_the_result_holds_all_that_is_needed_to_have_it_again(saes: Path, tiny_model: Path, name: str) -> None:
    result = json.loads(json.dumps(clamped(saes / name, temperature=0.9, seed=3)))
    assert result["routesae"] == __version__
    assert result["sae"]["folder"] == str(saes / name)
    assert result["sae"]["recipe"]["sae"] == name
    lm = load_lm(str(tiny_model), device=CPU, lm_dtype="float32")
    assert (result["model"]["model"], result["model"]["weights_hash"]) == (str(tiny_model), weights_hash(lm))
    assert (result["model"]["device"], result["model"]["dtype"]) == ("cpu", "float32")
    for file, digest in result["sae"]["weights"].items():
        assert file_hash(saes / name / file) == digest
    assert set(result["sae"]["weights"]) == {path.name for path in (saes / name).glob("*.safetensors")}
    assert (result["model"]["dropped_ids"], result["model"]["skip_positions"]) == ([0, 1], 1)
    assert {(c["latent"], c["how"], c["value"]) for c in result["changes"]} == {
        (3, "add", 6.0),
        (5, "set", -4.0),
        (9, "set", 8.0),
        (7, "ablate", 0.0),
        (11, "multiply", 3.0),
    }
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in result["settings"].items()}
    again = clamp(ClampSettings(**settings))
    assert json.loads(json.dumps(again)) == result
    assert [text["original"] != text["clamped"] for text in result["texts"]] == [True] * 3


def test_texts_are_those_of_their_ids_and_deltas_those_of_their_sums(saes: Path, tiny_model: Path) -> None:
    tokenizer, lm = load_tokenizer(str(tiny_model)), load_lm(str(tiny_model), device=CPU, lm_dtype="float32")
    for prompt, text in zip(PROMPTS, clamped(saes / "topk")["texts"], strict=True):
        assert text["prompt"] == prompt
        assert text["input"].endswith(prompt)
        for kind in ("original", "clamped"):
            assert text[kind] == tokenizer.decode(text[f"{kind}_ids"], skip_special_tokens=True)
        ids = text["input_ids"] + text["original_ids"]
        log_p_TV = torch.log_softmax(lm.model(input_ids=torch.tensor([ids])).logits[0], 1)
        start, length = len(text["input_ids"]) - 1, len(text["original_ids"])
        expected = sum(float(log_p_TV[start + at, token]) for at, token in enumerate(text["original_ids"]))
        assert text["log_p"] == pytest.approx(expected, abs=1e-3)
        assert text["delta_log_p"] == pytest.approx(text["log_p_clamped"] - text["log_p"])
        assert text["delta_log_p"] < -1
        assert text["delta_log_p_per_token"] == pytest.approx(text["delta_log_p"] / length)


def test_the_clamped_log_probability_is_of_the_whole_text_under_the_clamp(saes: Path, tiny_model: Path) -> None:
    """A topk of layer 3 needs no clean pass: one pass with a hook there scores the whole text."""
    sae, lm = load_sae(saes / "topk", CPU), load_lm(str(tiny_model), device=CPU, lm_dtype="float32")
    (text,) = clamped(saes / "topk", prompt=PROMPTS[:1], add=("3=6",), set=(), ablate=(), multiply=())["texts"]
    ids = torch.tensor(text["input_ids"] + text["original_ids"])
    kept_T1 = ((ids > 1) & (torch.arange(len(ids)) > 0))[:, None]

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        moved = hidden_BTD + kept_T1 * 6 * sae.W_dec_FD[3] * hidden_BTD.std(2, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = lm.blocks[2].register_forward_hook(hook)
    log_p_TV = torch.log_softmax(lm.model(input_ids=ids[None]).logits[0], 1)
    handle.remove()
    start = len(text["input_ids"]) - 1
    expected = sum(float(log_p_TV[start + at, token]) for at, token in enumerate(text["original_ids"]))
    assert text["log_p_clamped"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("temperature", [None, 1.5])
def test_texts_do_not_depend_on_the_batch(saes: Path, batch: int, temperature: float | None) -> None:
    whole, cut = (
        clamped(saes / "routesae", batch_sequences=size, temperature=temperature)["texts"] for size in (8, batch)
    )
    for one, other in zip(whole, cut, strict=True):
        assert (one["original_ids"], one["clamped_ids"]) == (other["original_ids"], other["clamped_ids"])
        assert one["delta_log_p"] == pytest.approx(other["delta_log_p"], abs=1e-3)


def test_without_the_error_term_the_text_is_that_of_the_reconstruction(saes: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(CHANGES, ())
    for text in clamped(saes / "topk", error_term=False, **nothing)["texts"]:
        assert text["delta_log_p"] != 0
    still = clamped(saes / "topk", **{**nothing, "add": ("3=0",)})["texts"]
    for text in still:
        assert (text["original_ids"], text["delta_log_p"]) == (text["clamped_ids"], 0)


def test_progress_counts_to_the_tokens_of_all_three_generations(saes: Path) -> None:
    seen: list[Progress] = []
    clamped(saes / "topk", report=seen.append, batch_sequences=2)
    assert [now.done for now in seen] == sorted({now.done for now in seen})
    assert {(now.stage, now.total, now.unit) for now in seen} == {("clamp", 3 * 3 * 8, "tokens")}
    assert seen[-1].done == seen[-1].total


def test_replies_of_the_data_stand_beside_the_texts(saes: Path, tmp_path: Path) -> None:
    pair = {"chosen": "\n\nHuman: a row\n\nAssistant: yes", "rejected": "\n\nHuman: a row\n\nAssistant: no"}
    (tmp_path / "hh.jsonl").write_text(json.dumps(pair))
    (text,) = clamped(saes / "topk", prompt=(), prompts=str(tmp_path / "hh.jsonl"))["texts"]
    assert (text["prompt"], text["chosen"], text["rejected"]) == ("a row", "yes", "no")


def test_prompts_are_of_the_field_asked_for_and_no_more_than_asked_for(saes: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"question": text, "prompt": "another"}) for text in PROMPTS]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    asked = {"prompts": str(tmp_path / "asked.jsonl"), "text_field": "question", "max_prompts": 2}
    texts = clamped(saes / "topk", prompt=("a shard",), max_new_tokens=1, **asked)["texts"]
    assert [text["prompt"] for text in texts] == ["a shard", PROMPTS[0]]


def test_a_chat_template_is_used_where_there_is_one(saes: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "chatty")
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %} model:"
    tokenizer.save_pretrained(model)
    by_default, without = (
        clamped(saes / "topk", model=str(model), chat=chat)["texts"][1]["input"] for chat in (None, False)
    )
    assert (by_default, without) == ("user: sparse model:", "sparse")
    with pytest.raises(WrongInput, match=r"--chat: the tokenizer of .* has no chat template"):
        clamped(saes / "topk", chat=True)


# ------------------------------------------------------------------------------------------------------ which LM


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))


def other_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)


def other_weights(folder: Path) -> None:
    lm = load_lm(str(folder), device=CPU, lm_dtype="float32")
    lm.model.get_input_embeddings().weight.data[0] += 1
    lm.model.save_pretrained(folder)


@pytest.mark.parametrize("differing", ["config", "tokenizer", "weights"])
def test_a_different_model_is_refused_naming_what_differs(
    saes: Path, tiny_model: Path, tmp_path: Path, differing: str
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    {"config": other_config, "tokenizer": other_tokenizer, "weights": other_weights}[differing](other)
    with pytest.raises(WrongInput, match=rf"is not the LM of the SAE .*: its {differing} differ") as refused:
        clamped(saes / "topk", model=str(other))
    assert str(other) in str(refused.value)
    assert str(tiny_model) in str(refused.value)


def made_elsewhere(folder: Path, *, width: int = 32, layer: int = 3) -> Path:
    """An SAE whose cfg.json says nothing of its LM."""
    sae = build(Recipe(sae="topk", layers=(layer,), width=width, latents=64, k=8), torch.Generator().manual_seed(0))
    folder.mkdir()
    save_sae(folder, sae, {})
    return folder


def test_an_sae_made_elsewhere_needs_a_model_that_fits(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made_elsewhere(tmp_path / "topk")
    with pytest.raises(WrongInput, match=r"does not say what the LM of the SAE .* is; give it with --model"):
        clamped(folder)
    result = clamped(folder, model=str(tiny_model))
    assert (result["model"]["dropped_ids"], result["model"]["skip_positions"]) == ((0, 1), 1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"cfg.json does not describe the LM of the SAE {folder}; only width and layers were compared"
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"width": 16}, "is not the LM of the SAE .*: its width is 32, not 16; give that LM with --model"),
        ({"layer": 7}, "it has no layer 7"),
        ({"layer": 0}, "layer 0, the embedding"),
    ],
)
def test_a_model_that_cannot_be_the_saes_is_refused(
    tiny_model: Path, tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(WrongInput, match=message):
        clamped(made_elsewhere(tmp_path / "topk", **shape), model=str(tiny_model))


def test_positions_are_those_that_training_used(saes: Path, tmp_path: Path) -> None:
    def keep_all(config: dict[str, Any]) -> None:
        config["metadata"]["routesae"]["source"]["cache"] |= {"keep_special": True, "skip_positions": 0}

    changed = with_config(saes / "topk", tmp_path / "all", keep_all)
    before, after = (clamped(folder, prompt=PROMPTS[:1]) for folder in (saes / "topk", changed))
    assert (after["model"]["dropped_ids"], after["model"]["skip_positions"]) == ((), 0)
    assert before["texts"][0]["delta_log_p"] != after["texts"][0]["delta_log_p"]


@pytest.mark.parametrize("odd", [{"skip_positions": "1"}, {"special_ids": [-1]}, {"special_ids": {"a": 1}}])
def test_positions_that_are_none_are_refused(odd: dict[str, Any]) -> None:
    record = LMRecord("the LM of a stranger", odd, None, 32, (3,))
    with pytest.raises(WrongInput, match=r"the LM of a stranger: special_ids .* are no token positions"):
        kept_of(record, Framing((), (), (0, 1)))


# -------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is below 1"),
        ({"batch_sequences": 0}, "--batch-sequences 0 is below 1"),
        ({"max_prompts": 0}, "--max-prompts 0 is below 1"),
        ({"temperature": 0.0}, "--temperature 0 is not above 0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"seed": -1}, "--seed -1 is below 0"),
        ({"hh": "both"}, "--hh 'both' is none of conversation, text"),
        (dict.fromkeys(CHANGES, ()), "no latent to change; give --add"),
        ({"max_new_tokens": 64}, "--prompt 1: .* more than the 64 positions"),
        ({"ablate": ("64",)}, "no latent 64"),
        ({"ablate": ("3",)}, "latent 3 is changed twice, by --add 3=6 and --ablate 3"),
    ],
)
def test_impossible_settings_are_refused(saes: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        clamped(saes / "topk", **changes)


def test_soft_routing_is_refused_before_the_lm_is_looked_for(saes: Path) -> None:
    with pytest.raises(WrongInput, match=r"soft routing.*no inverse"):
        clamped(saes / "soft", model="/nowhere")


# -------------------------------------------------------------------------------------------------- command line


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["clamp", *map(str, arguments)])


def test_help_says_where_no_error_term_differs_from_the_published_code() -> None:
    """Read in its hooks: all positions are replaced; a routesae's only in passes as long as the prompt, unscaled."""
    said = " ".join(invoke("--help").stdout.split())
    assert "clamps the prompt alone, takes the routes from all layers of the LM, and does not scale" in said
    assert "replaces special tokens and a row's first position" in said


def test_the_command_shows_both_texts_and_writes_them(saes: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.json"
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    flags = ("--set", "5=-4", "--set", "9=8", "--add", "3=6", "--max-new-tokens", 8, "--device", "cpu")
    result = invoke("--sae", saes / "routesae", *given, *flags, "--json", file)
    assert (result.exit_code, result.exception) == (0, None), result.output
    written = json.loads(file.read_text())
    expected = clamped(saes / "routesae", set=("5=-4", "9=8"), multiply=(), ablate=())
    assert written == json.loads(json.dumps(expected))
    blocks = re.split("^> ", result.stdout, flags=re.MULTILINE)[1:]
    for prompt, block, text in zip(PROMPTS, blocks, written["texts"], strict=True):
        given_line, *lines = block.splitlines()
        assert given_line == prompt
        heads = lines[1]
        assert heads.split() == ["original", "clamped"]
        column = heads.index("clamped")
        cells = lines[3 : lines.index("", 3)]
        for kind, part in (("original", slice(0, column)), ("clamped", slice(column, None))):
            shown = "".join(line[part] for line in cells)
            assert "".join(shown.split()) == "".join("".join(map(visible, text[kind].split("\n"))).split())
        assert f"{text['log_p']:.2f} nats, clamped {text['log_p_clamped']:.2f}: {text['delta_log_p']:+.2f}" in block


def test_the_only_sae_is_the_default_and_several_must_be_told_apart(saes: Path, tmp_path: Path) -> None:
    flags = ("--prompt", "a row", "--ablate", 3, "--max-new-tokens", 2, "--device", "cpu")
    several = invoke("--out", saes, *flags)
    assert several.exit_code == 2
    assert f"4 SAEs under {saes}, and this takes one; name it with --sae: {saes / 'crosscoder'}, " in several.stderr
    shutil.copytree(saes / "topk", tmp_path / "topk")
    assert invoke("--out", tmp_path, *flags).exit_code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "3"), "--set '3' is not LATENT=VALUE such as 1234=20"),
        (("--ablate", "3=1"), "--ablate '3=1' is not LATENT such as 1234"),
        (("--set", "3=1", "--prompts", "missing.txt"), "missing.txt does not exist"),
        (("--set", "3=1", "--json", "no/such/folder.json"), "there is no folder no/such"),
        (("--set", "3=1"), "no prompt; give --prompt TEXT or --prompts FILE"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(saes: Path, flags: tuple[str, ...], message: str) -> None:
    result = invoke("--sae", saes / "topk", *flags)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("routesae: ")
    assert message in line
