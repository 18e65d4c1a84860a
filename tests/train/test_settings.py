"""Settings of a pass: flags over a TOML file over the defaults, every combination a run, what is wrong refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from routesae.reporting import WrongInput
from routesae.train.saes import SAES
from routesae.train.settings import ONLY_FOR, PENALISED, RunSettings, TrainSettings, settings_of


def write(folder: Path, text: str) -> str:
    path = folder / "train.toml"
    path.write_text(text)
    return str(path)


def told_apart(settings: TrainSettings, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(run, name) for name in names) for run in settings.runs]


# -------------------------------------------------------------------------------------------- where values come from


def test_nothing_given_is_one_routesae_of_the_defaults() -> None:
    assert settings_of({}) == TrainSettings(runs=(RunSettings(),))
    assert (RunSettings().sae, RunSettings().k, RunSettings().lr, RunSettings().normalize) == (
        "routesae",
        64,
        5e-4,
        "token",
    )


def test_every_run_table_is_a_run_and_the_files_other_names_hold_for_all(tmp_path: Path) -> None:
    text = """
    cache = "states"
    seed = 3
    lr = 1e-3
    [[run]]
    sae = "topk"
    layer = 3
    k = 32
    [[run]]
    sae = "vanilla"
    sparsity = 0.01
    lr = 2e-3
    """
    settings = settings_of({}, write(tmp_path, text))
    assert (settings.cache, settings.seed, settings.batch_tokens) == ("states", 3, 4096)
    assert settings.runs == (
        RunSettings(sae="topk", layer=3, k=32, lr=1e-3),
        RunSettings(sae="vanilla", sparsity=0.01, lr=2e-3),
    )


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    text = """
    seed = 3
    batch_tokens = 512
    k = 16
    [[run]]
    sae = "topk"
    lr = 1e-3
    [[run]]
    sae = "gated"
    lr = 2e-3
    """
    settings = settings_of({"seed": 5, "lr": 3e-3}, write(tmp_path, text))
    assert (settings.seed, settings.batch_tokens, settings.log_every_steps) == (5, 512, 10)
    assert told_apart(settings, "sae", "lr", "k") == [("topk", 3e-3, 16), ("gated", 3e-3, 16)]


def test_hyphens_and_underscores_spell_the_same_names(tmp_path: Path) -> None:
    def text(mark: str) -> str:
        names = ("batch_tokens = 77", "checkpoint_every = 5", "log_every_steps = 2", "anneal_k_from = 80")
        table = 'sae = "jumprelu"\npre_act_loss = 3e-6'
        return "\n".join([*names, "[[run]]", table]).replace("_", mark)

    hyphens = settings_of({}, write(tmp_path, text("-")))
    assert hyphens == settings_of({}, write(tmp_path, text("_")))
    assert (hyphens.batch_tokens, hyphens.checkpoint_every_steps, hyphens.log_every_steps) == (77, 5, 2)
    assert (hyphens.runs[0].anneal_k_from, hyphens.runs[0].pre_act_loss) == (80, 3e-6)


def test_lists_of_the_file_become_combinations_prefixes_and_trackers(tmp_path: Path) -> None:
    text = 'log = ["tensorboard", "wandb"]\nlatents = 64\n[[run]]\nsae = "matryoshka"\nk = [4, 8]\nprefixes = [8, 64]'
    settings = settings_of({}, write(tmp_path, text))
    assert settings.log == ("tensorboard", "wandb")
    assert told_apart(settings, "k", "prefixes") == [(4, (8, 64)), (8, (8, 64))]


# --------------------------------------------------------------------------------------------------- combinations


def test_several_k_make_as_many_runs() -> None:
    assert told_apart(settings_of({"k": (32, 64, 128)}), "sae", "k") == [
        ("routesae", 32),
        ("routesae", 64),
        ("routesae", 128),
    ]


def test_several_values_of_several_flags_make_every_combination() -> None:
    settings = settings_of({"sae": ("topk", "batchtopk"), "layer": (2, 3), "k": (8, 16)})
    expected = [(sae, layer, k) for sae in ("topk", "batchtopk") for layer in (2, 3) for k in (8, 16)]
    assert told_apart(settings, "sae", "layer", "k") == expected


def test_a_flag_that_is_for_one_variant_is_left_out_of_the_others_and_makes_no_doubles() -> None:
    given = {"sae": ("topk", "vanilla", "routesae"), "layer": (2, 3), "sparsity": (0.1, 0.2), "router": "top2"}
    settings = settings_of(given)
    assert told_apart(settings, "sae", "layer", "sparsity", "router") == [
        ("topk", 2, None, None),
        ("topk", 3, None, None),
        *[("vanilla", layer, sparsity, None) for layer in (2, 3) for sparsity in (0.1, 0.2)],
        ("routesae", None, None, "top2"),
    ]


def test_a_flag_goes_to_the_tables_it_is_for(tmp_path: Path) -> None:
    file = write(tmp_path, '[[run]]\nsae = "topk"\n[[run]]\nsae = "routesae"')
    assert told_apart(settings_of({"layer": (4,)}, file), "sae", "layer") == [("topk", 4), ("routesae", None)]


NOT_FOR = {
    "layer": ("routesae", 3),
    "sparsity": ("topk", 0.1),
    "pre_act_loss": ("topk", 0.1),
    "prefixes": ("topk", (8, 64)),
    "routing": ("topk", "soft"),
    "aggregate": ("topk", "mean"),
    "routed": ("topk", "gated"),
    "router": ("topk", "top2"),
    "balance": ("topk", 0.01),
}


@pytest.mark.parametrize("name", ONLY_FOR)
def test_a_flag_that_is_for_none_of_the_runs_is_refused(name: str, tmp_path: Path) -> None:
    sae, value = NOT_FOR[name]
    flag = name.replace("_", "-")
    with pytest.raises(WrongInput, match=rf"--{flag} .* is not for {sae}: "):
        settings_of({"sae": (sae,), name: value})
    line = f"{name} = {list(value) if isinstance(value, tuple) else repr(value)}"
    with pytest.raises(WrongInput, match=rf"--{flag} .* is not for {sae}: "):
        settings_of({}, write(tmp_path, f'[[run]]\nsae = "{sae}"\n{line}\n[[run]]\nsae = "jumprelu"'))


def test_layer_with_the_default_variant_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"--layer 3 is not for routesae: it reads every layer"):
        settings_of({"layer": (3,)})


def test_what_is_for_a_variant_is_for_a_routesae_around_it() -> None:
    settings_of({"routed": "vanilla", "sparsity": (0.1,)})
    settings_of({"routed": "jumprelu", "pre_act_loss": 0.1})
    settings_of({"routed": "matryoshka", "prefixes": (8, 64)})
    with pytest.raises(WrongInput, match=r"--sparsity 0\.1 is not for routesae"):
        settings_of({"sparsity": (0.1,)})


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("text", "where"),
    [("sead = 3", "train.toml: sead"), ("[[run]]\nseed = 3", r"train.toml, \[\[run\]\]: seed"), ("[sae]", "--sae")],
)
def test_an_unknown_name_in_the_file_is_refused_naming_it_and_its_place(
    text: str, where: str, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput, match=where):
        settings_of({}, write(tmp_path, text))


def test_an_unknown_flag_is_refused_naming_it_and_what_there_is() -> None:
    with pytest.raises(WrongInput, match=r"sead is no setting; there are .*seed"):
        settings_of({"sead": 3})


@pytest.mark.parametrize("text", ["run = 5", "[run]\nk = 3", "run = [1]"])
def test_runs_that_are_no_list_of_tables_are_refused_with_how_to_write_them(text: str, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"train.toml: run is not a list of tables; write \[\[run\]\]"):
        settings_of({}, write(tmp_path, text))


def test_a_file_that_is_missing_or_no_toml_is_refused_naming_it(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.toml")
    with pytest.raises(WrongInput, match=rf"--config {absent} does not exist"):
        settings_of({}, absent)
    for text in ("k = ", "k = 1\nk = 2", "lr: 3"):
        with pytest.raises(WrongInput, match=r"--config .*train.toml cannot be read: .*\(at "):
            settings_of({}, write(tmp_path, text))
    (tmp_path / "train.toml").write_bytes(b"name = '\xff'")
    for path in (tmp_path / "train.toml", tmp_path):
        with pytest.raises(WrongInput, match=rf"--config {path} cannot be read"):
            settings_of({}, str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", '"64"'),
        ("k", "6.5"),
        ("k", "true"),
        ("lr", '"x"'),
        ("lr", "true"),
        ("latents", '"1k"'),
        ("latents", "64.0"),
        ("anneal_k_from", "9.5"),
        ("clip", '"1"'),
        ("name", "5"),
        ("normalize", "1"),
        ("prefixes", "64"),
        ("epochs", "1.5"),
        ("tokens", '"10M"'),
        ("batch_tokens", "10.5"),
        ("seed", "1.0"),
        ("seed", '"0"'),
        ("sparsity_warmup", '"half"'),
        ("precision", "16"),
        ("checkpoint_every", "2.5"),
        ("log_every_steps", "true"),
        ("log", '"tensorboard"'),
        ("cache", "5"),
        ("out", "5"),
        ("device", "0"),
        ("overwrite", '"yes"'),
        ("resume", "1"),
        ("sae", "5"),
        ("sae", "{}"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_naming_it(name: str, value: str, tmp_path: Path) -> None:
    sae = '\nsae = "matryoshka"' if name == "prefixes" else ""
    with pytest.raises(WrongInput, match=rf"--{name.replace('_', '-')} "):
        settings_of({}, write(tmp_path, f"{name} = {value}{sae}"))


def test_a_whole_number_will_do_where_any_number_will(tmp_path: Path) -> None:
    settings = settings_of({}, write(tmp_path, "lr = 1\nclip = 0\nsparsity_warmup = 1"))
    assert (settings.runs[0].lr, settings.runs[0].clip, settings.sparsity_warmup) == (1, 0, 1)


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    for text in ("run = []", "sae = []", "k = []"):
        with pytest.raises(WrongInput, match="no SAE to train"):
            settings_of({}, write(tmp_path, text))


def test_resume_and_overwrite_are_refused_together() -> None:
    with pytest.raises(WrongInput, match="--resume goes on with what --overwrite would delete; give one"):
        settings_of({"resume": True, "overwrite": True})


@pytest.mark.parametrize("sae", SAES)
def test_the_published_recipe_needs_a_sparsity_where_there_is_a_penalty(sae: str) -> None:
    if sae not in PENALISED:
        assert settings_of({"sae": (sae,), "recipe": "published"}).runs[0].sparsity is None
        return
    with pytest.raises(WrongInput, match=rf"--recipe published needs --sparsity for {sae}"):
        settings_of({"sae": (sae,), "recipe": "published"})
    assert settings_of({"sae": (sae,), "recipe": "published", "sparsity": (0.1,)}).runs[0].sparsity == 0.1


def test_the_published_recipe_of_a_routed_penalised_variant_needs_a_sparsity_too() -> None:
    with pytest.raises(WrongInput, match="--recipe published needs --sparsity for routesae"):
        settings_of({"routed": "vanilla", "recipe": "published"})


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != "pipeline.toml"], ids=lambda p: p.name)
def test_the_examples_are_settings(path: Path) -> None:  # pipeline.toml: tests/analyze/test_pipeline.py
    assert len(settings_of({}, str(path)).runs) == 6


@pytest.mark.parametrize("flags", [{"routing": "soft"}, {"router": "frozen"}, {"router": "random"}])
def test_a_balance_that_could_do_nothing_is_refused(flags: dict[str, str]) -> None:
    with pytest.raises(WrongInput, match=r"--balance 0.01 has nothing to spread with"):
        settings_of({"balance": 0.01, **flags})


def test_what_holds_for_all_runs_of_a_file_is_left_out_where_it_is_for_none_of_the_variants_own(
    tmp_path: Path,
) -> None:
    file = tmp_path / "runs.toml"
    file.write_text('layer = 3\n[[run]]\nsae = "topk"\n[[run]]\nsae = "routesae"\n')
    assert [run.layer for run in settings_of({}, str(file)).runs] == [3, None]
    file.write_text('[[run]]\nsae = "topk"\nlayer = 3\n[[run]]\nsae = "routesae"\nlayer = 3\n')
    with pytest.raises(WrongInput, match="--layer 3 is not for routesae"):
        settings_of({}, str(file))
