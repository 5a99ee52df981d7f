"""Names, defaults, files and commands that the documents give are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.cli import sweep as sweep_command
from stable_rlhf.config.algorithm import OptimConfig
from stable_rlhf.config.config import Config
from stable_rlhf.config.loading import load_config
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import (
    CONTROLLERS,
    Action,
    GuardConfig,
    guard_rules,
    paper,
    safe,
    settings_class,
)
from stable_rlhf.errors import Exit
from stable_rlhf.evidence import Sweep, make_sweep
from stable_rlhf.runs.incidents import FIELDS
from stable_rlhf.runs.names import METRICS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "stable_rlhf"
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks/README.md"])
# The log tells what was typed on a day; its settings may have gone since. Its links may not.
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
OF_TODAY = [path for path in DOCUMENTS if path.name != "LOG.md"]
ALGORITHM = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = (".safetensors", ".json", ".jsonl", ".py", ".md", ".yaml")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(path: Path) -> list[str]:
    """Every code span, and every line of every code block (joined where a backslash ends it)."""
    blocks = re.findall(r"```\w*\n(.*?)```", text(path), flags=re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", text(path), flags=re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(path), flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *indented, *spans]


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table's rows, without heading and rule."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")][1:]


def section(heading: str, level: str) -> str:
    """What stands below a heading of algorithm.md, up to the next of its level or above."""
    end = rf"(?=^#{{2,{len(level)}}} |\Z)"
    found = re.search(rf"^{level} {re.escape(heading)}\n(.*?){end}", ALGORITHM, re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_table_of_a_controllers_settings_is_its_settings(name: str) -> None:
    """Names, order, defaults and their types; unit and meaning of each."""
    tables = [rows(part) for part in section(f"`{name}`", "###").split("\n\n") if part.startswith("| setting |")]
    shown = tables[0] if tables else []
    documented = [(cells[0].strip("`"), ast.literal_eval(cells[1])) for cells in shown]
    assert [(k, repr(v)) for k, v in documented] == [(k, repr(v)) for k, v in defaults(name).items()]
    assert all(len(cells) == 4 and all(cells) for cells in shown)


def test_every_controller_has_a_section_and_no_section_is_of_another() -> None:
    assert sorted(re.findall(r"^### `([\w-]+)`$", ALGORITHM, flags=re.MULTILINE)) == sorted(CONTROLLERS)


def test_defaults_that_the_text_gives_are_the_defaults() -> None:
    given = re.findall(r"`(\w+)\.(\w+)` = (-?[\d.]+\d|\d)", ALGORITHM.split("\n## Presets\n")[0])
    assert len(given) >= 8
    for name, field, value in given:
        assert getattr(getattr(Config(), name), field) == float(value), f"{name}.{field}"


def test_every_section_and_field_that_is_named_exists() -> None:
    names = "|".join(SECTIONS)
    known = {f"{name}.{field.name}" for name, part in SECTIONS.items() for field in dataclasses.fields(part)}
    for path in OF_TODAY:
        spans = " ".join(code(path))
        mentioned = set(re.findall(rf"(?<![\w./])(?:--)?((?:{names})\.[a-z_]\w*)", spans))
        assert sorted(name for name in mentioned - known if not name.endswith(FILES)) == [], path.name


def test_every_setting_of_a_controller_that_is_named_exists() -> None:
    known = {name for controller in CONTROLLERS for name in defaults(controller)}
    mentioned = {name for path in OF_TODAY for name in re.findall(r"kl\.settings\.(\w+)", text(path))}
    assert mentioned
    assert mentioned <= known


def test_every_command_to_train_that_is_shown_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [span for path in OF_TODAY for span in code(path) if re.search(r"(^|/)stable-rlhf train(?: |$)", span)]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command.split("stable-rlhf train")[1], comments=True)
        if arguments[:1] == ["run.yaml"]:  # a file of the reader's
            arguments = arguments[1:]
        if arguments in (["--help"], ["--help-all"]):
            continue
        assert isinstance(load_config(arguments), Config), command


def test_every_sweep_that_is_shown_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = text(ROOT / "docs" / "sweep.md")
    (tmp_path / "run.yaml").write_text("optim: {lam: 0.9}\n")  # a file of the reader's
    (tmp_path / "sweep.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (count,) = re.findall(r"These are (\d+) runs", page)
    assert len(sweep_of(["sweep.yaml", "--out", "SWEEP"]).cells) == int(count)
    commands = [span for path in OF_TODAY for span in code(path) if "stable-rlhf sweep " in span and "--out" in span]
    assert len(commands) >= 2
    sizes = [len(sweep_of(shlex.split(c.split("stable-rlhf sweep")[1], comments=True)).cells) for c in commands]
    assert int(count) in sizes


def test_every_option_of_a_sweep_is_in_its_table() -> None:
    shown = rows(text(ROOT / "docs" / "sweep.md").split("## Where cells run")[0])
    named = {name for cells in shown for name in re.findall(r"--[a-z-]+", cells[0])}
    made = sweep_command.parser()
    assert named == {option for action in made._actions for option in action.option_strings} - {"-h", "--help"}


def sweep_of(arguments: list[str]) -> Sweep:
    given, settings = sweep_command.parser().parse_known_args(arguments)
    return make_sweep(settings, given.out, given.seeds, given.preset, given.set)


def test_every_preset_that_is_named_exists_and_all_are_listed() -> None:
    for path in OF_TODAY:
        whole = text(path)
        named = set(re.findall(r"--preset (\w[\w-]*)|^preset: (\S+)|from_preset\(\"([^\"]+)\"", whole, re.MULTILINE))
        spans = re.findall(r"`((?:safe|ppo)-[\w-]+)`", whole)
        assert {name for found in named for name in found if name} | set(spans) <= set(PRESETS), path.name
    assert [cells[0].strip("`") for cells in rows(section("Presets", "##"))] == list(PRESETS)
    readme = text(ROOT / "README.md").split("## Presets\n")[1].split("\n## ")[0]
    assert {name for cells in rows(readme) for name in re.findall(r"`([^`]+)`", cells[0])} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_of_presets_says_what_they_set(preset: str) -> None:
    (cells,) = [cells for cells in rows(section("Presets", "##")) if cells[0] == f"`{preset}`"]
    _, critic, rewards, kl, other = cells
    config = Config(preset=preset)
    assert critic.startswith({0: "none", 1: "one head", 2: "two heads"}[config.critic.heads])
    assert rewards == f"`{config.reward.normalise}`"
    place = ", in the reward" if config.kl.in_reward else f", in the loss (`{config.kl.in_loss}`)"
    assert kl == f"`{config.kl.controller}`" + ("" if config.kl.controller == "none" else place)
    given, usual = dataclasses.asdict(config.kl.settings), defaults(config.kl.controller)
    changed: dict[str, Any] = {name: value for name, value in given.items() if value != usual[name]}
    shown = [f"`{name}` {value}" for name, value in changed.items()]
    if config.rollout.num_generations > 1:
        shown.append(f"`rollout.num_generations` = {config.rollout.num_generations}")
    for name in ("advantage", "importance", "denominator"):
        if (value := getattr(config.optim, name)) != getattr(OptimConfig, name):
            shown.append(f"`optim.{name}` = `{value}`")
    if config.optim.num_iterations * config.optim.num_mini_batches == 1:
        shown.append("one optimiser step")
    if config.optim.entropy_coef:
        shown.append(f"`optim.entropy_coef` = {config.optim.entropy_coef}")
    for name in ("adaptive_kl", "length_alpha", "epsilon_high", "max_update_kl"):
        if (value := getattr(config.optim, name)) is not None:
            shown.append(f"`optim.{name}` = {value}")
    if config.critic.warmup_steps:
        shown.append(f"`critic.warmup_steps` = {config.critic.warmup_steps}")
    if not config.optim.preview:
        shown.append("no preview")
    if preset.startswith("safe-") and not config.guard.enabled:  # of the others the text above says so
        shown.append("no guard")
    elif config.guard.enabled and config.guard.max_kl is config.guard.max_kl_ratio is None:
        shown.append("no ceiling for the KL")
    assert other == "; ".join(shown)


def defaults(controller: str) -> dict[str, Any]:
    return dataclasses.asdict(settings_class(controller)())


def test_the_help_of_preset_lists_the_presets() -> None:
    """The docstring of Config.preset, which a reader meets in `train --help-all`."""
    (made,) = [
        node for node in ast.parse(text(PACKAGE / "config" / "config.py")).body if getattr(node, "name", "") == "Config"
    ]
    assert isinstance(made, ast.ClassDef)
    below = next(made.body[i + 1] for i, node in enumerate(made.body) if ast.unparse(node).startswith("preset: str"))
    listed = re.findall(
        r"\b(?:safe|ppo|paper|asymmetric|pid|kl|vapo|grpo|dr|rloo)(?:-\w+)*",
        ast.unparse(below).partition("come from: ")[2],
    )
    assert listed.count("safe") == 3  # "...; safe with a layer ...: ...; or safe without one layer: ..."
    assert [name for at, name in enumerate(listed) if name != "safe" or at == 0] == list(PRESETS)


README_KL = {
    "none": "0",
    "fixed": "stays at {beta}",
    "adaptive": "rises above a KL of {target} and falls below it (Ziegler et al. 2019)",
    "asymmetric": "rises with a KL above {threshold}, and with its growth",
    "pid-lagrangian": "a PID controller's, on a KL above {limit} (Stooke et al. 2020)",
    "safe": "follows the KL to keep it near {budget} nats per token, a budget that opens while the reward climbs and "
    "closes when it falls",
    "paper": "as in the paper's published code, with constants that act",
}


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("safe-")])
def test_the_readmes_table_of_presets_says_what_they_set(preset: str) -> None:
    table = rows(text(ROOT / "README.md").split("## Presets\n")[1].split("\n## ")[0])
    (cells,) = [cells for cells in table if cells[0].split(" ")[0] == f"`{preset}`"]
    config = Config(preset=preset)
    critic = {0: "none", 1: "one", 2: "two, the lower prediction counts more"}[config.critic.heads]
    critic += "" if config.critic.bootstrap == "online" else "; slow copies give part of the goal"
    place = "the reward" if config.kl.in_reward else "the loss"
    kl = README_KL[config.kl.controller].format(**dataclasses.asdict(config.kl.settings))
    assert cells[1:] == [critic, kl, "nowhere" if config.kl.controller == "none" else place]
    assert ("(default)" in cells[0]) == (preset == Config().preset)


def test_the_presets_that_are_said_to_have_no_guard_have_none() -> None:
    assert "All but `safe` and `safe-*` have no guard either." in section("Presets", "##")
    without = {preset for preset in PRESETS if not Config(preset=preset).guard.enabled}
    assert without == {"safe-no-guard", *(preset for preset in PRESETS if not preset.startswith("safe"))}
    operations = " ".join(OPERATIONS.split())
    assert re.search(r"In `safe` and all of its ablations (but|except) `safe-no-guard` a guard judges", operations)
    assert "the other presets have none" in operations
    assert set(PRESETS) - without == {name for name in PRESETS if name.startswith("safe")} - {"safe-no-guard"}


# --- the guard -------------------------------------------------------------------------------------


def test_the_guards_rules_are_those_of_the_table_in_their_order_with_their_bounds() -> None:
    table = rows(section("Guard", "##"))
    assert [cells[0].strip("`") for cells in table] == list(guard_rules.RULES)
    bounds = {cells[0].strip("`"): re.search(r"(?:[<>] |< )(-?[\d.]+)", cells[1]) for cells in table}
    settings = dataclasses.asdict(GuardConfig())
    shown = {name: float(found[1]) for name, found in bounds.items() if found is not None}
    assert shown == {name: value for name, value in settings.items() if name in bounds and value is not None}
    assert f"`guard.max_kl_ratio` = {settings['max_kl_ratio']:g} \N{MULTIPLICATION SIGN} `safe/threshold`" in section(
        "Guard", "##"
    )
    assert f"D > {guard_rules.ERRORS:g} standard errors" in section("Guard", "##")
    at_once = [cells[0].strip("`") for cells in table if cells[2] == "at once"]
    assert at_once == [name for name, rule in guard_rules.RULES.items() if rule.at_once]


def test_each_rule_of_the_guard_except_two_has_a_setting_of_its_name_and_a_row_of_what_to_do() -> None:
    assert "Each except the first and third has a setting of its name in `guard`" in section("Guard", "##")
    settings = {field.name for field in dataclasses.fields(GuardConfig)}
    rules = list(guard_rules.RULES)
    assert [name for name in rules if name not in settings] == [rules[0], rules[2]]
    table = rows(OPERATIONS.split("## In the run itself\n")[1].split("\n## ")[0])
    named = {name for cells in table for name in re.findall(r"`guard\.(\w+)`", cells[0])}
    assert named == {"max_kl_ratio", *rules[1:2], *rules[3:], "max_rollbacks"}


def test_the_table_of_an_incident_is_its_fields_and_its_actions() -> None:
    table = rows(text(ROOT / "docs" / "metrics.md").split("## incidents.jsonl\n")[1].split("\n## ")[0])
    assert [name for cells in table for name in re.findall(r"`(\w+)`", cells[0])] == list(FIELDS)
    (actions,) = [cells[1] for cells in table if cells[0] == "`action`"]
    assert re.findall(r"`([^`]+)`", actions) == [action.value for action in Action if action is not Action.GO_ON]


# --- the phases ------------------------------------------------------------------------------------


def test_the_factors_of_the_phases_are_those_of_the_controllers() -> None:
    own = {cells[0]: float(cells[2]) for cells in rows(section("`safe`", "###")) if cells[0].isupper()}
    assert own == {phase.value: factor for phase, factor in safe.MULTIPLE.items()}
    published = dict(re.findall(r"\b([A-Z]+) \u00d7 ([\d.]+\d)", section("`paper`", "###")))
    assert {name: float(factor) for name, factor in published.items()} == {
        phase.value: factor for phase, factor in paper.MULTIPLIER.items()
    }


# --- exit codes ------------------------------------------------------------------------------------


def test_the_table_of_exit_codes_is_that_of_the_command() -> None:
    shown = rows(OPERATIONS.split("## Exit codes\n")[1].split("\n## ")[0])
    assert [(int(cells[0]), cells[1].strip("`")) for cells in shown] == [(code.value, code.name) for code in Exit]
    assert all(len(cells) == 4 and all(cells) for cells in shown)


def test_every_exit_code_that_is_said_in_passing_is_one() -> None:
    """In brackets after what ends with it, in operations.md; in a sentence, there and in rewards.md."""
    said = [int(code) for found in re.findall(r"\((\d+(?: or \d+)?)\)", OPERATIONS) for code in found.split(" or ")]
    assert {Exit.GUARD, Exit.REWARD, Exit.DISK, Exit.INTERRUPTED, Exit.TERMINATED} <= set(said) <= set(Exit)
    doctor = OPERATIONS.split("It exits with ")[1].split(".\n")[0]
    assert [int(code) for code in re.findall(r"\b\d+\b", doctor)] == [Exit.DONE, Exit.FAILED, Exit.BAD_INPUT]
    server = re.search(r"with the exit codes (\d+) and (\d+)", text(ROOT / "docs" / "rewards.md"))
    assert server is not None
    assert (int(server[1]), int(server[2])) == (Exit.DONE, Exit.INTERRUPTED)


# --- metrics ---------------------------------------------------------------------------------------


def test_every_metric_that_is_named_is_one_that_a_run_writes() -> None:
    families = "|".join(sorted({name.split("/")[0] for name in METRICS if "/" in name} - {"rewards"}))
    for path in OF_TODAY:
        named = {name for span in code(path) for name in re.findall(rf"^((?:{families})/\w+)$", span)}
        assert sorted(named - set(METRICS)) == [], path.name


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*DOCUMENTS, PACKAGE / "assets" / "README.md"], ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text(path))
    relative = [target.split("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    assert [target for target in relative if not (path.parent / target).exists()] == []


GONE = {"benchmarks/stability.py"}
"""Named by older figures, with the commits that have them."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_of_the_repository_that_is_named_exists(path: Path) -> None:
    folders = "docs|tests|benchmarks|scripts|configs|src"
    named = {m for span in code(path) for m in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", span)}
    assert sorted(name for name in named - GONE if not (ROOT / name).exists()) == []


@pytest.mark.parametrize(
    "path", [path for path in OF_TODAY if path.name != "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_no_page_for_users_sends_its_reader_to_the_log(path: Path) -> None:
    assert "LOG.md" not in text(path)


# --- the map of the source -------------------------------------------------------------------------


def rooms() -> dict[str, str]:
    """Room -> the files that its row of CONTRIBUTING.md names."""
    return {
        re.findall(r"\w+", cells[0])[0]: cells[2]
        for cells in rows(CONTRIBUTING.split("## The rooms\n")[1].split("\n## ")[0])
    }


def test_the_map_has_every_room_and_no_other() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(rooms()) == folders
    singles = set(re.findall(r"`(\w+\.py)`", CONTRIBUTING.split("\nSingle files: ")[1].split("\n\n")[0]))
    assert singles == {path.name for path in PACKAGE.glob("*.py")}


def test_every_file_that_the_map_names_is_in_its_room() -> None:
    for room, files in rooms().items():
        named = re.findall(r"`([\w.]+)`", files)
        assert named, room
        assert [name for name in named if not (PACKAGE / room / name).exists()] == [], room


def test_the_layers_that_are_shown_are_those_that_are_checked() -> None:
    contracts = tomllib.loads(text(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    rules = CONTRIBUTING.split("## Rules of the house\n")[1].split("\n## ")[0]
    assert re.findall(r"^    (\S.*)$", rules, flags=re.MULTILINE) == layers


# --- functions and files of the algorithm ----------------------------------------------------------


def test_every_function_that_is_named_with_its_file_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", ALGORITHM)
    assert len(named) > 15
    for file, function in named:
        body: list[Any] = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
        for part in function.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            assert found, f"{file}:{function}"
            body = found[0].body
    files = set(re.findall(r"`((?:\w+/)?\w+\.py)`", ALGORITHM))
    assert sorted(file for file in files if not (PACKAGE / file).is_file()) == []
