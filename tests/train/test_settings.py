"""Settings of a pass: flags over a TOML file over the defaults, every combination a run, what is wrong refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from routesae.reporting import WrongInput
from routesae.train.saes import PENALISED, SAES
from routesae.train.saes.sae import ROUTERS
from routesae.train.settings import ConvertSettings, RunSettings, TrainSettings, register, settings_of, variants


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
        None,
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


NOT_FOR: dict[str, Any] = {
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


def test_the_table_above_is_of_every_setting_that_is_not_for_all() -> None:
    assert NOT_FOR.keys() == {name for name, one in RunSettings.described.items() if one.only_for}


@pytest.mark.parametrize("name", NOT_FOR)
def test_a_flag_that_is_for_none_of_the_runs_is_refused(name: str, tmp_path: Path) -> None:
    sae, value = NOT_FOR[name]
    flag = name.replace("_", "-")
    with pytest.raises(WrongInput, match=rf"--{flag} .* is not for {sae}: "):
        settings_of({"sae": (sae,), name: value})
    line = f"{name} = {list(value) if isinstance(value, tuple) else repr(value)}"
    with pytest.raises(WrongInput, match=rf"--{flag} .* is not for {sae}: "):
        settings_of({}, write(tmp_path, f'[[run]]\nsae = "{sae}"\n{line}\n[[run]]\nsae = "jumprelu"'))


def test_names_shown_without_importing_torch_are_those_of_the_registry() -> None:
    assert variants() == list(SAES)
    assert set(RunSettings.described["router"].choices) == set(ROUTERS)


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
    ("text", "line"),
    [
        ("sead = 3", "train.toml: unknown setting 'sead'; did you mean 'seed'?"),
        ("[[run]]\nseed = 3", "train.toml, [[run]]: unknown setting 'seed'"),
        ("[[run]]\nlatent = 3", "train.toml, [[run]]: unknown setting 'latent'; did you mean 'latents'?"),
        ("[sae]", "--sae {} is not text"),
        ("run = 5", "train.toml: run is not a list of tables; write [[run]] above each"),
        ("[run]\nk = 3", "train.toml: run is not a list of tables; write [[run]] above each"),
        ("run = [1]", "train.toml: run is not a list of tables; write [[run]] above each"),
        ("run = []", "no SAE to train"),
        ("k = []", "no SAE to train"),
        ("latents = 64\nexpansion = 2", "--latents 64 and --expansion 2 exclude each other"),
        ("checkpoint_every = 2.5", "--checkpoint-every 2.5 is not a whole number"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line_with_its_place(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(WrongInput) as raised:
        settings_of({}, write(tmp_path, text))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_takes_what_help_shows_in_the_same_spelling(tmp_path: Path) -> None:
    text = 'sae = "matryoshka"\nprefixes = "8,64"\nlatents = "64"\ntokens = "2M"\ncheckpoint-every = "1k"\n'
    settings = settings_of({}, write(tmp_path, text))
    assert (settings.runs[0].prefixes, settings.runs[0].latents) == ((8, 64), 64)
    assert (settings.tokens, settings.checkpoint_every_steps) == (2_000_000, 1000)
    listed = settings_of({}, write(tmp_path, text.replace('"8,64"', "[8, 64]")))
    assert listed == settings


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("epochs = 3", {"tokens": 1000}, {"tokens": 1000, "epochs": None}),
        ("tokens = 1000", {"epochs": 3}, {"tokens": None, "epochs": 3}),
        ("latents = 64", {"expansion": 2}, {"latents": None, "expansion": 2}),
        ("expansion = 2\n[[run]]\nlatents = 64", {}, {"latents": 64, "expansion": None}),
        ("[[run]]\nlatents = 64", {"expansion": 2}, {"latents": None, "expansion": 2}),
    ],
)
def test_the_later_of_two_alternatives_wins(
    text: str, flags: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_of(flags, write(tmp_path, text))
    values = {**settings.to_dict(), **settings.runs[0].to_dict()}
    assert {name: values[name] for name in expected} == expected


def test_a_whole_number_will_do_where_any_number_will(tmp_path: Path) -> None:
    settings = settings_of({}, write(tmp_path, "sae = 'jumprelu'\nlr = 1\nclip = 0\nsparsity_warmup = 1"))
    assert (settings.runs[0].lr, settings.runs[0].clip, settings.sparsity_warmup) == (1, 0, 1)


@pytest.mark.parametrize(
    "name",
    [
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a/b",
        "../x",
        "a\\b",
        "a\nb",
        "ä",
        "a:b",
        "a*",
        "$x",
        "x" * 201,
        "a\x00",
    ],
)
def test_a_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(WrongInput, match="is not a plain folder name; use letters, digits and"):
        settings_of({"name": name})
    with pytest.raises(WrongInput, match="is not a plain folder name"):
        ConvertSettings(file="x.pt", name=name)


@pytest.mark.parametrize("name", ["topk_layer3_64_k8_lambda1e-05", "v1.2+b=3", "_x", "0"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert settings_of({"name": name}).runs[0].name == name


def test_resume_and_overwrite_are_refused_together() -> None:
    with pytest.raises(WrongInput, match="--resume goes on with what --overwrite would delete; give one of them"):
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


EXAMPLES = [Path(__file__).parents[2] / "examples" / name for name in ("demo.toml", "llama.toml")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_settings(path: Path) -> None:  # those of `run`: tests/analyze/pipeline/test_pipeline.py
    assert len(settings_of({}, str(path)).runs) == 6


@pytest.mark.parametrize("flags", [{"routing": "soft"}, {"router": "frozen"}, {"router": "random"}])
def test_a_balance_that_could_do_nothing_is_refused(flags: dict[str, str]) -> None:
    with pytest.raises(WrongInput, match=r"--balance 0.01 is not for routesae: there is nothing to spread with"):
        settings_of({"balance": 0.01, **flags})


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"sae": "vanilla", "sparsity": 0.1, "anneal_k_from": 80}, "--anneal-k-from 80 is not for vanilla: a fixed"),
        ({"router": "random", "aggregate": "mean"}, "--aggregate mean is not for routesae: --router random reads no"),
        ({"sae": "topk", "sparsity_warmup": 0.5}, "--sparsity-warmup 0.5 is not for topk: it has no --anneal-k-from"),
        ({"sae": "gated", "sparsity_warmup": "0.1"}, "--sparsity-warmup 0.1 is not for gated: "),
        ({"routed": "vanilla", "sparsity_warmup": 0.5}, "--sparsity-warmup 0.5 is not for routesae: "),
        (
            {"sae": "jumprelu", "sparsity": 0.1, "recipe": "published", "sparsity_warmup": 0.5},
            "--sparsity-warmup 0.5 is not for jumprelu: ",
        ),
        ({"log_project": "x"}, "--log-project x is for --log wandb and trackio; leave it out"),
        (
            {"log_project": "x", "log": ("tensorboard",)},
            "--log-project x is for --log wandb and trackio; leave it out",
        ),
    ],
)
def test_a_setting_that_another_takes_the_effect_from_is_refused(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(WrongInput) as raised:
        settings_of(flags)
    assert str(raised.value).startswith(line)
    assert str(raised.value).endswith("; leave it out")


def test_a_setting_goes_to_the_runs_that_it_does_something_for() -> None:
    given = {"sae": ("topk", "vanilla"), "sparsity": 0.1, "anneal_k_from": 80, "sparsity_warmup": 0.5}
    settings = settings_of(given)
    assert told_apart(settings, "sae", "sparsity", "anneal_k_from") == [("topk", None, 80), ("vanilla", 0.1, None)]
    assert settings.sparsity_warmup == 0.5
    settings_of({"log_project": "x", "log": ("tensorboard", "trackio")})


def test_what_holds_for_all_runs_of_a_file_is_left_out_where_it_is_for_none_of_the_variants_own(
    tmp_path: Path,
) -> None:
    file = tmp_path / "runs.toml"
    file.write_text('layer = 3\n[[run]]\nsae = "topk"\n[[run]]\nsae = "routesae"\n')
    assert [run.layer for run in settings_of({}, str(file)).runs] == [3, None]
    file.write_text('[[run]]\nsae = "topk"\nlayer = 3\n[[run]]\nsae = "routesae"\nlayer = 3\n')
    with pytest.raises(WrongInput, match="--layer 3 is not for routesae"):
        settings_of({}, str(file))


def test_a_class_of_ones_own_cannot_take_the_name_of_a_variant_that_is_there() -> None:
    with pytest.raises(WrongInput, match="'topk' is a variant already"):
        register("topk", SAES["vanilla"])
