"""The command line: what it accepts, and how every mistake ends as one sentence and an exit code."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from stable_rlhf import errors
from stable_rlhf.cli.main import USAGE, main
from stable_rlhf.cli.parser import Parser
from stable_rlhf.config import loading
from stable_rlhf.config.algorithm import CriticConfig
from stable_rlhf.config.config import Config
from stable_rlhf.config.help import COMMON
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import AdaptiveSettings, FixedSettings, NoneSettings, SafeSettings

INTERRUPT_AT = 2  # the call of the reward at which Ctrl-C is pressed in the test below: the second step's
calls = 0


def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in completion) / 8 for completion in completions]


def broken(prompts, completions, **columns):
    raise KeyError("no such lexicon")


def pressed(prompts, completions, **columns):
    """Ctrl-C while the second step is scored."""
    global calls
    calls += 1
    if calls == INTERRUPT_AT:
        raise KeyboardInterrupt
    return vowels(prompts, completions)


def tiny_run(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Settings of a run that takes a tenth of a second a step."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(8)))
    return [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "0"),
        *("--reward.functions", '["tests.cli.test_main:vowels"]', "--rollout.batch_size", "4", "--max_steps", "2"),
        *("--rollout.max_completion_length", "4", "--output_dir", str(tmp_path / "run"), "--log.progress", "false"),
        *("--save_steps", "1", "--model.device", "cpu"),
    ]


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> list[str]:
    return tiny_run(tiny_folder, tmp_path)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without the program's name."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("stable-rlhf: ")
    return lines[0].removeprefix("stable-rlhf: ")


# -- settings -------------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_the_preset_the_preset_to_the_file_and_the_file_to_the_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: ppo\nmax_steps: 7\noptim:\n  lam: 0.9\n  gamma: 0.99\nkl:\n  settings:\n    beta: 1e-3\n")
    config = loading.load_config(["--optim.lam", "0.8", "--config", str(file)])
    assert (config.optim.lam, config.optim.gamma, config.max_steps) == (0.8, 0.99, 7)
    assert config.optim.learning_rate == 1e-4  # default
    preset = {"zero_init": False, "learning_rate": None, "cliprange_value": 0.2, "clip_reduction": "max"}
    assert config.critic == CriticConfig(heads=1, loss="mse", **preset)
    assert config.kl.settings == FixedSettings(beta=0.001)
    other = loading.load_config(["--config", str(file), "--kl.settings.beta", "0.5"])
    assert other.kl.settings == FixedSettings(beta=0.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_line_gives_the_presets_own_object(preset: str) -> None:
    assert loading.load_config(["--preset", preset]) == Config(preset=preset) == Config.from_preset(preset)


def test_settings_of_the_presets_controller_stay_unless_the_controller_is_another_one() -> None:
    kept = loading.load_config(["--preset", "safe-no-threshold", "--kl.settings.budget", "0.2"])
    assert kept.kl.settings == SafeSettings(threshold_on=False, budget=0.2)
    assert kept == Config.from_preset("safe-no-threshold", kl={"settings": {"budget": 0.2}})
    other = loading.load_config(["--preset", "ppo", "--kl.controller", "adaptive"])
    assert other.kl.settings == AdaptiveSettings()
    assert PRESETS["ppo"]["kl"]["settings"] == {"beta": 0.05}


def test_the_settings_are_those_of_the_controller_that_is_chosen_wherever_it_is(tmp_path: Path) -> None:
    fixed, safe = tmp_path / "fixed.yaml", tmp_path / "safe.yaml"
    fixed.write_text("kl: {controller: fixed, settings: {beta: 0.1}}\n")
    safe.write_text("kl: {controller: safe}\n")
    for arguments in (
        ["--kl.controller", "fixed", "--kl.settings.beta", "0.1"],
        [
            "--kl.settings.beta=0.1",
            "--kl.controller=fixed",
            "--preset=paper",
            "--kl.in_reward=true",
            "--kl.in_loss=none",
        ],
        ["--config", str(fixed)],
        ["--config", str(safe), "--config", str(fixed)],
        ["--kl.settings", "{beta: 0.1}", "--config", str(safe), "--kl.controller", "fixed"],
    ):
        kl = loading.load_config([*arguments, "--optim.preview=false"]).kl  # which has no bound by `fixed`
        assert (kl.controller, kl.settings) == ("fixed", FixedSettings(beta=0.1))
    back = loading.load_config(["--config", str(safe), "--preset", "safe-no-threshold", "--kl.settings.budget", "0.2"])
    assert back.kl.settings == SafeSettings(budget=0.2, threshold_on=False)


def test_a_controller_without_settings_takes_an_empty_mapping_of_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: ppo-nokl\nkl: {controller: none, settings: {}}\n")
    assert loading.load_config(["--config", str(file)]).kl.settings == NoneSettings()


def test_a_first_argument_that_is_not_an_option_is_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\nreward: {functions: a:f}\n")
    assert loading.load_config([str(file), "--seed", "1"]) == Config.from_preset(
        max_steps=7, seed=1, reward={"functions": ["a:f"]}
    )
    assert loading.load_config([str(file), "--reward.functions+", "b:g"]).reward.functions == ["a:f", "b:g"]


@pytest.mark.parametrize(
    ("arguments", "section", "field", "value"),
    [
        ("--max_steps 1e2", "", "max_steps", 100),
        ("--max_steps=1.2E+2", "", "max_steps", 120),
        ("--seed 9007199254740993", "", "seed", 9007199254740993),
        ("--optim.microbatch_tokens 1e4", "optim", "microbatch_tokens", 10000),
        ("--optim.learning_rate 1e-5", "optim", "learning_rate", 1e-5),
        ("--optim.max_update_kl None", "optim", "max_update_kl", None),
        ("--optim.max_update_kl null", "optim", "max_update_kl", None),
        ("--output_dir None", "", "output_dir", None),
        ("--data.limit=None", "data", "limit", None),
        ("--reward.normalise none", "reward", "normalise", "none"),
        ("--reward.functions length", "reward", "functions", ["length"]),
        ("--reward.functions=http://127.0.0.1:1/x", "reward", "functions", ["http://127.0.0.1:1/x"]),
        ("--reward.weights 2", "reward", "weights", [2.0]),
        ("--model.lora_r 2 --model.lora_target_modules q_proj", "model", "lora_target_modules", ["q_proj"]),
    ],
)
def test_values_are_read_as_people_write_them(arguments: str, section: str, field: str, value: object) -> None:
    config = loading.load_config(arguments.split())
    assert getattr(getattr(config, section) if section else config, field) == value


@pytest.mark.parametrize(("text", "number"), [("100", 100), ("1e2", 100), ("1.5e1", 15), ("-3", -3), ("2.0", 2)])
def test_the_numbers_of_other_commands_are_read_the_same_way(text: str, number: int) -> None:
    made = Parser()
    made.add_argument("--port", type=int)
    assert made.parse_args([f"--port={text}"]).port == number
    for wrong in ("1.5", "1e-1", "x"):
        with pytest.raises(errors.ConfigError, match=r"^argument --port: "):
            made.parse_args(["--port", wrong])


def test_help_says_null_as_the_command_line_and_yaml_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "--reward.gold" in shown
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "(type: str | null, default: null)" in " ".join(shown.split())
    assert shown.startswith("usage: stable-rlhf train [FILE] [--config FILE] [--section.field VALUE ...]\n")
    assert "smollm2-sentiment" in shown


def test_a_list_can_be_replaced_or_added_to() -> None:
    assert loading.load_config(["--reward.functions", "[a:f, b:g]"]).reward.functions == ["a:f", "b:g"]
    assert loading.load_config(["--reward.functions+", "a:f"]).reward.functions == ["builtin", "a:f"]
    assert loading.load_config(["--reward.functions+", "a:f,b:g"]).reward.functions == ["builtin", "a:f", "b:g"]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a:f,builtin", ["a:f", "builtin"]),
        ("a:f, builtin", ["a:f", "builtin"]),
        ('["http://h/a,b"]', ["http://h/a,b"]),
        ('"http://h/a,b",builtin', ["http://h/a,b", "builtin"]),
    ],
)
def test_commas_separate_the_texts_of_a_list_unless_brackets_or_quotes_hold_them(text: str, items: list[str]) -> None:
    assert loading.load_config(["--reward.functions", text]).reward.functions == items
    assert loading.load_config([f"--reward.functions={text}"]).reward.functions == items


def test_one_text_of_a_list_is_taken_as_it_is_and_an_empty_one_is_refused() -> None:
    assert loading.load_config(["--rollout.stop_strings", ' "x: ']).rollout.stop_strings == [' "x: ']
    for text in ("a,", ",", "a, ,b"):
        with pytest.raises(errors.ConfigError, match=r"^rollout\.stop_strings='.*': commas separate .* brackets and"):
            loading.load_config(["--rollout.stop_strings", text])
    with pytest.raises(errors.ConfigError, match=r"^rollout\.stop_strings='\[\"a,b\]': .*; give a value as YAML"):
        loading.load_config(["--rollout.stop_strings", '"a,b'])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--critic.loss foo", "critic.loss='foo': choose one of huber, mse"),
        ("--critic.heads 3", "critic.heads='3': choose one of 0, 1, 2"),
        ("--max_steps 5.5", "max_steps='5.5': give a whole number"),
        ("--max_steps", "max_steps has no value: give a whole number"),
        ("--optim.lam nan", "optim.lam='nan': give a finite number"),
        (
            "--reward.weights [1,x]",
            "reward.weights=\"[1.0, 'x']\": give a list of numbers, such as [1.0, 0.5], or null",
        ),
        (
            "--kl.settings x",
            "--kl.settings is a section: give its fields one by one, such as --kl.settings.budget VALUE",
        ),
        ("--kl.settings.bugdet 1", "unknown setting --kl.settings.bugdet. Did you mean kl.settings.budget?"),
        ('--kl.settings {"bugdet":1}', "unknown setting --kl.settings.bugdet. Did you mean kl.settings.budget?"),
        ("--kl.budget 1", "unknown setting --kl.budget. Did you mean kl.settings.budget?"),
        ("--budget 1", "unknown setting --budget. Did you mean kl.settings.budget?"),
        ("--preset ppo --kl.settings.bet 0.1", "unknown setting --kl.settings.bet. Did you mean kl.settings.beta?"),
        (
            "--preset ppo --kl.settings.budget 0.1",
            "unknown setting --kl.settings.budget; it belongs to kl.controller=safe (preset safe)",
        ),
        (
            "--preset ppo-nokl --kl.settings.beta 1",
            "unknown setting --kl.settings.beta; it belongs to kl.controller=fixed (preset ppo)",
        ),
        ("--kl.settings.budget abc", "kl.settings.budget='abc': give a finite number"),
        ("--kl.settings.budget", "kl.settings.budget has no value: give a finite number"),
        ("--kl.settings.window 20.5", "kl.settings.window='20.5': give a whole number"),
        ("--kl.settings.budget -1", "kl.settings.budget=-1.0 is out of range: give a finite number > 0"),
        ("--kl.controller sfae", "kl.controller='sfae': choose one of none, fixed, "),
        ("--kl.controller", "kl.controller has no value: choose one of none, fixed, "),
        ("--guard.max_kl -1", "guard.max_kl=-1.0: must be greater than 0"),
        ("--guard.patience 0", "guard.patience=0: must be greater than 0"),
        ("--guard.patience x", "guard.patience='x': give a whole number"),
        ("--preset ppo --guard.max_kl 1", "guard.max_kl=1.0: has no effect unless guard.enabled=true; leave it out"),
        ("--optim.learning_rat 1", "unknown setting --optim.learning_rat. Did you mean optim.learning_rate?"),
        ("--max_step 5", "unknown setting --max_step. Did you mean max_steps?"),
        ("--lam 1", "unknown setting --lam. Did you mean optim.lam or critic.lam?"),
        ("--zzz 1", "unknown setting --zzz; `stable-rlhf train --help-all` lists them"),
        ("data.jsonl", "--config data.jsonl: No such file or directory; check the path"),
        ("--seed 1 data.jsonl", "unexpected 'data.jsonl': a setting is given as --section.field VALUE, a file as "),
        ("recipe:smolm2-hh", "--config recipe:smolm2-hh: there is no such recipe. Did you mean recipe:smollm2-hh?"),
        ("--max_steps 1.5", "max_steps='1.5': give a whole number"),
        ("--max_steps None", "max_steps='None': give a whole number"),
        ("--optim x", "--optim is a section: give its fields one by one, such as --optim.learning_rate VALUE"),
        ("--preset safer", f"preset='safer': choose one of {', '.join(PRESETS)}"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value_and_the_remedy(
    arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments.split()]) == 2
    assert said(capsys).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1, 2\n", ", line 2: expected ',' or ']', but got '<stream end>'; repair the YAML"),
        ("- 1\n- 2\n", ": is a list; give a mapping of settings, such as `preset: safe`"),
        ("", ": is empty; give a mapping of settings, such as `preset: safe`"),
        ("optimm:\n  lam: 1\n", ": unknown setting 'optimm'. Did you mean optim?"),
        ("optim:\n  lamm: 1\n", ": unknown setting 'optim.lamm'. Did you mean optim.lam?"),
        ("kl: {settings: {bugdet: 1}}\n", ": unknown setting 'kl.settings.bugdet'. Did you mean kl.settings.budget?"),
        ("kl: {budget: 1}\n", ": unknown setting 'kl.budget'. Did you mean kl.settings.budget?"),
        (
            "preset: ppo\nkl: {settings: {budget: 1}}\n",
            ": unknown setting 'kl.settings.budget'; it belongs to kl.controller=safe (preset safe)",
        ),
        ("kl: {settings: null}\n", ": kl.settings=None: a section is a mapping of its fields: budget, "),
        ("kl: {settings: 5}\n", ": kl.settings=5: a section is a mapping of its fields: budget, "),
        ("kl: {settings: {budget: 1, budget: 2}}\n", ", line 1: 'budget' is given twice; repair the YAML"),
        ("optim: 5\n", ": optim=5: a section is a mapping of its fields: learning_rate, "),
        ("optim: {lam: 1}\nseed: 1\noptim: {gamma: 1}\n", ", line 3: 'optim' is given twice; repair the YAML"),
        ("optim: {lam: 1, lam: 0}\n", ", line 1: 'lam' is given twice; repair the YAML"),
        ("config: other.yaml\n", ": unknown setting 'config'"),
    ],
)
def test_a_broken_file_is_named_with_the_place(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    assert said(capsys).startswith(f"--config {file}{sentence}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    assert said(capsys) == f"--config {tmp_path / 'no.yaml'}: No such file or directory; check the path"
    assert main(["train", f"--config={tmp_path}"]) == 2
    assert said(capsys) == f"--config {tmp_path}: Is a directory; check the path"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["train", "--config", str(tmp_path / "binary.yaml")]) == 2
    assert said(capsys) == f"--config {tmp_path / 'binary.yaml'}: is not UTF-8 text; give a YAML file"


def test_a_file_cannot_make_python_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: !!python/object/apply:pathlib.Path.mkdir [!!python/object/apply:pathlib.Path [{tmp_path}/x]]\n"
    )
    assert main(["train", "--config", str(file)]) == 2
    assert "could not determine a constructor for the tag" in said(capsys)
    assert not (tmp_path / "x").exists()


def test_bad_settings_are_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from stable_rlhf import cli; code = cli.main(['train', '--kl.settings.budget', '-1']); "
        "print(code, [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


def test_help_explains_every_setting_with_the_presets_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    fields = [(section, field.name) for section, part in SECTIONS.items() for field in dataclasses.fields(part)]
    fields.remove(("kl", "settings"))  # a group of its own
    for section, field in [*fields, *(("kl.settings", field.name) for field in dataclasses.fields(SafeSettings))]:
        option = shown.index(f"--{section}.{field} ", shown.index("options:"))
        text = shown[option:].partition("(type:")[0]
        assert len(text.split()) >= 6, f"{section}.{field} has no help: {text}"
    assert "--kl.settings.budget BUDGET Base KL budget, in nats per `budget_per`: the KL " in shown
    budget = shown.partition("--kl.settings.budget BUDGET Base")[2].partition("--kl.")[0]
    assert budget.endswith("(type: float, default: 0.3) ")
    assert (
        "GAE's lambda for the advantages (Schulman et al. 2016). Only with advantage=gae. (type: float, default: 0.95)"
        in shown
    )
    assert all(preset in shown.replace("- ", "-") for preset in PRESETS)  # a line may end at a hyphen
    assert main(["train", "--preset", "ppo", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    tail = (
        "what takes its place, and no other setting of this section has an effect. (type: Literal[0, 1, 2], default: 1)"
    )
    assert tail in shown
    assert "--kl.settings.beta BETA Reward per nat. " in shown
    assert "--kl.settings.budget" not in shown
    assert main(["train", "--preset", "safe-no-threshold", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the ablation without a moving threshold. (type: bool, default: False)" in shown
    assert main(["train", "--kl.controller", "adaptive", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--kl.settings.horizon HORIZON Rollouts in which the coefficient changes by at most 22 % " in shown
    assert main(["train", "--preset", "ppo-nokl", "--help-all"]) == 0
    assert "kl.settings" not in capsys.readouterr().out
    assert main(["doctor", "--help-all"]) == 0
    assert capsys.readouterr().out.startswith("usage: stable-rlhf doctor ")


def test_help_is_a_screen_or_two_of_the_settings_that_runs_change_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert 40 < len(shown.splitlines()) < 80
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.startswith("usage: stable-rlhf train [FILE] [--config FILE] [--section.field VALUE ...]\n")
    assert "`stable-rlhf train --help-all` lists every setting" in " ".join(shown.split())
    listed = re.findall(r"^  --([\w.]+) ", shown, flags=re.MULTILINE)
    assert {*listed, "kl.settings.beta"} == {name for names in COMMON.values() for name in names}
    for preset in ("safe", "ppo"):
        assert main(["doctor", "--preset", preset, "-h"]) == 0
        words = " ".join(capsys.readouterr().out.split())
        for name in [
            name for name in re.findall(r"--([\w.]+) ", words) if name in listed or name == "kl.settings.beta"
        ]:
            value: Any = loading.load_config(["--preset", preset])
            for part in name.split("."):
                value = getattr(value, part)
            default = yaml.safe_load(words.split(f"--{name} ")[1].partition("(default: ")[2].partition(")")[0])
            assert default == value, (preset, name)


def test_usage_is_shown_when_asked_for_and_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["--help"]), main([])) == (0, 2)
    assert capsys.readouterr().out == 2 * (USAGE + "\n")
    assert main(["trian"]) == 2
    assert said(capsys) == "there is no command 'trian'. Did you mean train?"
    assert main(["zzz"]) == 2
    assert said(capsys).endswith(
        "no command 'zzz'; the commands are train, resume, sweep, compare, report, watch, doctor, serve-reward, export"
    )
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stable-rlhf {metadata.version('stable-rlhf')}\n"


def test_the_package_runs_as_a_module_as_launchers_start_it() -> None:
    command = [sys.executable, "-m", "stable_rlhf", "trian"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == errors.Exit.BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.startswith("stable-rlhf: there is no command 'trian'. Did you mean train?")
    assert done.stderr.count("\n") == 1


# -- runs -----------------------------------------------------------------------------------------------------------


def test_train_writes_the_run_folder_and_its_config_gives_the_same_run(tiny: list[str], tmp_path: Path) -> None:
    assert main(["train", *tiny]) == 0
    run = tmp_path / "run"
    assert {"config.yaml", "metrics.jsonl", "timings.jsonl", "checkpoints", "final", "report.html"} <= {
        path.name for path in run.iterdir()
    }
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert (again / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    one, two = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, again))
    assert one | {"output_dir": None} == two | {"output_dir": None}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.name", "no/such-model"], "model.name='no/such-model': "),
        (["--model.name", "{tmp}/nothing"], "model.name='{tmp}/nothing': "),
        (["--model.name", "{tmp}"], "model.name='{tmp}': Unrecognized model in {tmp}"),
        (["--model.gguf_file", "no.gguf"], "model.name='{tiny}', model.gguf_file='no.gguf': {tiny} does not appear to"),
        (["--model.device", "gpu"], "model.device='gpu': give auto, cpu, cuda or cuda:NUMBER"),
        (["--model.device", "cuda:99"], "model.device='cuda:99': this machine has "),
        (["--model.lora_r", "2", "--model.lora_target_modules", "[nope]"], "model.lora_target_modules=['nope']: "),
        (["--log.report_to", "[nope]"], "log.report_to=['nope']: there is no tracker 'nope'; "),
        (["--data.train", "{tmp}/no.jsonl"], "prompt file {tmp}/no.jsonl does not exist. Check the path"),
        (["--data.eval_size", "8"], "data.eval_size=8: the training set has only 8 rows; lower it or set data.eval"),
        (["--rollout.max_completion_length", "64"], "{tmp}/prompts.jsonl, row 1: the prompt has 5 tokens, which "),
        (["--reward.functions", '["tests.no_such:f"]'], "reward 'tests.no_such:f': importing 'tests.no_such'"),
        (["--reward.functions", '["{tmp}/nothing"]'], "the reward model '{tmp}/nothing' could not be loaded: "),
        (["--output_dir", "{tmp}/prompts.jsonl/run"], "output_dir='{tmp}/prompts.jsonl/run': {tmp}/prompts.jsonl is a"),
    ],
)
def test_an_input_that_is_not_there_is_named_before_training(
    arguments: list[str],
    sentence: str,
    tiny: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"tmp": tmp_path, "tiny": tiny_folder}
    arguments = [argument.format(**places) if "{" in argument else argument for argument in arguments]
    assert main(["train", *tiny, *arguments]) == 2
    assert said(capsys).startswith(sentence.format(**places))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_from_the_models_folder_are_named(
    tiny: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["train", *tiny, "--model.name", str(folder)]) == 2
    sentence = said(capsys)
    assert sentence.startswith(f"model.name='{folder}': ")
    assert "model.safetensors" in sentence


def test_a_model_that_is_no_language_model_is_refused_in_a_few_lines(
    tiny: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    assert main(["train", *tiny, "--model.name", str(folder)]) == 2
    sentence = said(capsys)
    assert sentence.startswith(f"model.name='{folder}': Unrecognized configuration class ")
    assert sentence.endswith("in safetensors or GGUF, or a hub name")
    assert len(sentence) < 1100


def test_a_reward_that_fails_in_the_run_is_a_failure_of_the_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny, "--reward.functions", '["tests.cli.test_main:broken"]']) == errors.Exit.REWARD
    assert said(capsys).startswith("reward function 'broken' raised KeyError: ")


def test_a_bug_keeps_its_traceback(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("stable_rlhf.training.trainer.SAFETrainer._after_step", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train", *tiny])


def test_a_terminal_never_acts_on_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data.train", "\x1b[31mred\n.jsonl"]) == 2
    assert said(capsys).startswith("prompt file \\x1b[31mred .jsonl does not exist.")


def test_ctrl_c_says_how_to_go_on_and_writes_the_report(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    global calls
    calls = 0
    tiny += ["--reward.functions", '["tests.cli.test_main:pressed"]']
    assert main(["train", *tiny]) == 130
    run = tmp_path / "run"
    assert said(capsys) == f"interrupted after 1 step. `stable-rlhf resume {run}` continues from step 1."
    assert (run / "report.html").exists()
    assert main(["resume", str(run)]) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_ctrl_c_before_the_first_checkpoint_says_so(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    global calls
    calls = 0
    tiny += ["--reward.functions", '["tests.cli.test_main:pressed"]', "--save_steps", "0"]
    assert main(["train", *tiny]) == 130
    assert (
        said(capsys)
        == "interrupted after 1 step. There is no checkpoint to resume from yet: start again, with another output_dir."
    )
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert said(capsys).startswith(f"{tmp_path / 'run'} has no checkpoint to resume from; start again with ")


def test_a_folder_with_a_run_in_it_is_left_alone(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert main(["train", *tiny]) == 2
    assert said(capsys).startswith(f"output_dir='{tmp_path / 'run'}': holds a run already")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


# -- resume, report -------------------------------------------------------------------------------------------------
