"""The cells that a command line or a file asks for, and what is refused before the first one starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_rlhf.config import Config, load_config
from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.grid import Sweep, difference, make_sweep, split_values, value_text

OUT = Path("SWEEP")


def asked(*sets: str, seeds: str | None = None, preset: str | None = None, settings: tuple[str, ...] = ()) -> Sweep:
    return make_sweep(settings, OUT, seeds, preset, sets)


def refused(*sets: str, **given) -> str:
    with pytest.raises(ConfigError) as error:
        asked(*sets, **given)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- cells ----------------------------------------------------------------------------------------------------------


def test_the_cells_are_the_product_and_seeds_vary_slowest() -> None:
    sweep = asked("optim.learning_rate=1e-4,3e-4", preset="ppo,safe", seeds="2")
    names = [cell.name for cell in sweep.cells]
    assert names == [
        f"preset={preset},optim.learning_rate={rate},seed={seed}"
        for seed in (0, 1)
        for preset in ("ppo", "safe")
        for rate in ("0.0001", "0.0003")
    ]
    assert sweep.grid == {"preset": ["ppo", "safe"], "optim.learning_rate": [1e-4, 3e-4]}
    assert sweep.seeds == [0, 1]
    assert sweep.cells[1].arm == sweep.cells[5].arm == "preset=ppo,optim.learning_rate=0.0003"


def test_a_cells_configuration_is_that_of_train_with_the_same_settings() -> None:
    sweep = asked("optim.lam=0.9,0.8", "kl.settings.budget=0.2", seeds="7,", settings=("--max_steps", "9"))
    cell = sweep.cells[1]
    typed = ["--optim.lam", "0.8", "--kl.settings.budget", "0.2", "--seed", "7", "--max_steps", "9"]
    assert cell.config == load_config([*typed, "--output_dir", f"SWEEP/cells/{cell.name}"])
    assert sweep.base == {"max_steps": 9}


def test_a_cells_settings_are_checked_together() -> None:
    """A preview needs a bound, which `adaptive` does not set: refused only where no flag turns the preview off."""
    flags = ("--kl.controller", "adaptive", "--optim.preview", "false", "--kl.settings.target", "0.2")
    (cell,) = asked(preset="safe", settings=flags).cells
    assert cell.config == load_config([*flags, "--output_dir", f"SWEEP/cells/{cell.name}"])
    assert len(asked("kl.controller=adaptive,safe", settings=("--optim.preview", "false")).cells) == 2
    assert len(asked("kl.settings.target=0.1,0.2", settings=flags[:4]).cells) == 2  # a setting of `adaptive`
    assert "optim.preview=True: has no bound on an update with kl.controller=adaptive" in refused(settings=flags[:2])


def test_a_file_names_the_sweep_and_flags_override_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "max_steps: 70\nsweep:\n  seeds: [3, 5]\n  preset: [ppo, safe]\n  set:\n    optim.lam: [0.9, 0.8]\n"
        "    optim.gamma: [1.0]\n"
    )
    sweep = make_sweep([str(file)], OUT, None, None, [])
    assert (sweep.seeds, sweep.base) == ([3, 5], {"max_steps": 70})
    assert sweep.grid == {"preset": ["ppo", "safe"], "optim.lam": [0.9, 0.8], "optim.gamma": [1.0]}
    given = make_sweep([str(file), "--max_steps", "80"], OUT, "1", "safe", ["optim.lam=0.5"])
    assert (given.seeds, given.base) == ([0], {"max_steps": 80})
    assert given.grid == {"preset": ["safe"], "optim.lam": [0.5], "optim.gamma": [1.0]}


def test_without_a_preset_the_files_is_every_cells(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: ppo\noptim: {lam: 0.9}\n")
    sweep = make_sweep([str(file)], OUT, None, None, [])
    assert [cell.name for cell in sweep.cells] == ["preset=ppo,seed=0"]
    assert sweep.base == {"optim": {"lam": 0.9}}
    assert [cell.config.preset for cell in make_sweep(["recipe:ppo"], OUT, None, "safe", []).cells] == ["safe"]
    assert asked().grid == {"preset": ["safe"]}


def test_a_value_of_the_file_gives_way_to_the_grid(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lam: 0.9, gamma: 0.99}\n")
    sweep = make_sweep([str(file)], OUT, None, None, ["optim.lam=0.5,0.6"])
    assert sweep.base == {"optim": {"gamma": 0.99}}
    assert [cell.config.optim.lam for cell in sweep.cells] == [0.5, 0.6]


def test_settings_of_one_controller_are_those_of_the_cells_own(tmp_path: Path) -> None:
    sweep = asked("kl.controller=fixed,adaptive", "kl.in_reward=true", preset="ppo")
    assert [type(cell.config.kl.settings).__name__ for cell in sweep.cells] == ["FixedSettings", "AdaptiveSettings"]
    both = asked("kl.settings.beta=0.1,0.2", preset="ppo")
    assert [cell.config.kl.settings.beta for cell in both.cells] == [0.1, 0.2]


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4, 3", ["1e-4", "3"]),
        ("[a, b], [c]", [["a", "b"], ["c"]]),
        ("'a,b', \"c\"", ["a,b", "c"]),
        ("'x',1e2,null", ["x", 100.0, None]),
        ("{a: 1}", [{"a": 1}]),
    ],
)
def test_values_with_brackets_or_quotes_are_a_yaml_list(text: str, values: list) -> None:
    assert split_values("--set x", text) == values


@pytest.mark.parametrize("text", ["", "1,,2", "1,"])
def test_an_empty_value_is_refused(text: str) -> None:
    assert "has an empty value" in refused(f"optim.lam={text}")


def test_values_have_the_types_of_their_settings() -> None:
    sweep = asked(
        "model.revision=1e5,null,main",
        "rollout.batch_size=1e1,32",
        "guard.max_kl_ratio=null,2",
        settings=("--model.name", "me/hub", "--optim.num_mini_batches", "2"),
    )
    assert sweep.grid["model.revision"] == ["1e5", None, "main"]
    assert sweep.grid["rollout.batch_size"] == [10, 32]
    assert sweep.grid["guard.max_kl_ratio"] == [None, 2]
    assert "model.revision=%221e5%22" in sweep.cells[0].name  # it would read as a number
    lists = asked("reward.functions=builtin,[builtin,'a:b']")
    assert lists.grid["reward.functions"] == [["builtin"], ["builtin", "a:b"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1e-4, "0.0001"), (1, "1"), (1.0, "1"), (1e-05, "1e-05"), (True, "true"), (None, "null"), ("safe", "safe")),
        *(("null", '"null"'), (["a", 0.5], "[a,0.5]"), ({"a": 1}, "{a:1}"), (0.1 + 0.2, "0.30000000000000004")),
    ],
)
def test_a_value_is_written_as_people_do(value: object, text: str) -> None:
    assert value_text(value) == text


def test_a_name_shows_no_secret_of_a_url_and_stays_unique() -> None:
    urls = [f"http://host/score?key={secret}" for secret in ("s3cret", "other")]
    sweep = asked("reward.functions=" + ",".join(urls))
    names = [cell.name for cell in sweep.cells]
    assert len(set(names)) == 2
    assert not any("s3cret" in name or "other" in name for name in names)


def test_a_name_is_safe_as_a_file_name_and_never_too_long() -> None:
    sweep = asked(f"model.revision=../x y,{'é' * 300},{'é' * 299}a", settings=("--model.name", "me/hub"))
    for cell in sweep.cells:
        assert "/" not in cell.name
        assert " " not in cell.name
        assert len(cell.name.encode()) <= 200
    assert len({cell.name for cell in sweep.cells}) == 3


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("5", [0, 1, 2, 3, 4]), ("3,7,11", [3, 7, 11]), ("7,", [7]), ("[4]", [4]), ("1e1", list(range(10)))],
)
def test_seeds_are_a_number_of_them_or_a_list(given: str, seeds: list[int]) -> None:
    assert asked(seeds=given).seeds == seeds


# -- refused --------------------------------------------------------------------------------------------------------


def test_what_is_no_setting_or_no_value_of_it_names_the_cell() -> None:
    unknown = (
        "cell preset=safe,optim.learning_rat=1e-4: unknown setting 'optim.learning_rat'. Did you mean optim.learning"
    )
    assert refused("optim.learning_rat=1e-4,1e-3").startswith(unknown)
    assert "optim is a section: give one of its settings, such as optim." in refused("optim=1")
    assert refused("optim.lam=0.9,7").startswith("cell preset=safe,optim.lam=7: optim.lam=7: ")
    assert refused("optim.lam=high").startswith(
        "cell preset=safe,optim.lam=high: optim.lam='high': give a finite number"
    )
    assert "preset='pp0': choose one of safe" in refused(preset="safe,pp0")
    assert "--optim.lamm" in refused(settings=("--optim.lamm", "1"))
    assert "optim.num_mini_batches=3" in refused("optim.num_mini_batches=3", settings=("--rollout.batch_size", "8"))


def test_a_setting_of_another_presets_controller_names_the_cell() -> None:
    said = refused("kl.settings.budget=0.2,0.3", preset="safe,ppo")
    assert said.startswith("cell preset=ppo,kl.settings.budget=0.2: unknown setting 'kl.settings.budget'")
    assert "it belongs to kl.controller=safe (preset safe), not to kl.controller=fixed" in said


@pytest.mark.parametrize("name", ["seed", "output_dir", "overwrite_output_dir"])
def test_what_the_sweep_gives_to_each_cell_cannot_be_set(name: str, tmp_path: Path) -> None:
    assert f"--set {name}: a sweep gives each cell its own" in refused(f"{name}=1")
    assert f"--{name}: a sweep gives each cell its own" in refused(settings=(f"--{name}=1",))
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    assert f"run.yaml: {name}: " in refused(settings=(str(tmp_path / "run.yaml"),))


def test_a_value_given_twice_is_refused() -> None:
    assert refused("optim.lam=0.9,9e-1").startswith("optim.lam=0.9 is given twice")
    assert refused(preset="safe,safe").startswith("preset=safe is given twice")
    assert "3 is given twice" in refused(seeds="3,3")
    assert "--set optim.lam is given twice" in refused("optim.lam=1", "optim.lam=0.5")
    assert "preset is given twice" in refused("preset=safe", preset="ppo")
    assert "--optim.lam is given, and the sweep varies optim.lam" in refused(
        "optim.lam=1", settings=("--optim.lam", "1")
    )


@pytest.mark.parametrize("seeds", ["0", "-1", "x", "1.5", "", "1,x", "99999999", "[]"])
def test_seeds_that_are_none_cost_a_sentence(seeds: str) -> None:
    assert refused(seeds=seeds).startswith("--seeds")


def test_too_many_cells_are_refused_before_they_are_made() -> None:
    many = [f"optim.{name}=" + ",".join(map(str, range(200))) for name in ("lam", "gamma")]
    assert refused(*many).startswith("this is a sweep of 40,000 cells")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sweep: 3\n", "sweep=3: give a mapping of seeds, preset and set"),
        ("sweep: {seds: 3}\n", "sweep has no 'seds'"),
        ("sweep: {seeds: many}\n", "--seeds many: give a number of seeds"),
        ("sweep: {seeds: [1, x]}\n", "--seeds [1, 'x']: give a number of seeds"),
        ("sweep: {set: 3}\n", "sweep.set=3: give a mapping of settings to lists"),
        ("sweep: {set: {optim.lam: 0.9}}\n", "optim.lam=0.9: give a list of values"),
        ("sweep: {preset: safe}\n", "preset='safe': give a list of values"),
        ("sweep: {set: {optim.lamb: [1]}}\n", "unknown setting 'optim.lamb'"),
        ("optim: {lamb: 1}\n", "unknown setting 'optim.lamb'"),
    ],
)
def test_a_file_with_a_wrong_sweep_costs_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert said in refused(settings=(str(tmp_path / "run.yaml"),))


def test_one_repository_for_all_cells_is_refused() -> None:
    said = refused(seeds="2", settings=("--push_to_hub", "true", "--hub_model_id", "me/x"))
    assert said.startswith("hub_model_id='me/x': every cell would upload to it")


def test_options_without_their_form_cost_a_sentence() -> None:
    assert refused("optim.lam").startswith("--set optim.lam: give SETTING=VALUE")
    assert "give a value as YAML has it" in refused("optim.lam=[1")


# -- the same sweep again -------------------------------------------------------------------------------------------


def on_disk(sweep: Sweep) -> dict:
    return {"version": 1, "base": sweep.base, "grid": sweep.grid, "seeds": sweep.seeds}


def test_more_values_and_seeds_are_the_same_sweep_and_anything_else_is_named() -> None:
    there = on_disk(asked("optim.lam=0.9,0.8", seeds="2", settings=("--max_steps", "9")))

    def differs(*sets: str, seeds: str = "2", steps: str = "9", preset: str = "safe") -> str | None:
        return difference(asked(*sets, seeds=seeds, preset=preset, settings=("--max_steps", steps)), there)

    assert differs("optim.lam=0.9,0.8") is None
    assert differs("optim.lam=0.8,0.7,0.9", seeds="5", preset="ppo,safe") is None
    assert differs("optim.lam=0.9,0.8", steps="10") == "max_steps is '10' here and '9' there"
    assert differs("optim.lam=0.9,0.8", "optim.gamma=1") == "optim.gamma varies here, and not there"
    assert differs() == "optim.lam varies there, and not here"
    assert differs("optim.lam=0.9", seeds="2") is not None
    assert "it has optim.lam 0.8, not asked for here" in str(differs("optim.lam=0.9"))
    assert "it has seeds 1, not asked for here" in str(differs("optim.lam=0.9,0.8", seeds="1"))
    assert differs("optim.lam=0.9,0.8", preset="ppo") == (
        "it has preset safe, not asked for here (more values may be asked for, not fewer)"
    )


def test_a_cell_keeps_its_name_however_its_value_is_written() -> None:
    names = {asked(f"optim.lam={text}").cells[0].name for text in ("1", "1.0", "1e0")}
    assert names == {"preset=safe,optim.lam=1,seed=0"}
    assert isinstance(asked().cells[0].config, Config)
