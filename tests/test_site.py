"""The site's pages say what the code does: papers, TRL's names, the notebook, links; and the package's metadata."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import stable_rlhf
from stable_rlhf.config import probable_setting
from stable_rlhf.config.config import Config
from stable_rlhf.config.elsewhere import ELSEWHERE
from stable_rlhf.config.names import setting_types
from stable_rlhf.config.sections import SECTIONS as SECTIONS_OF_SETTINGS
from stable_rlhf.control import CONTROLLERS
from stable_rlhf.runs.names import METRICS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Homepage"]
NOTEBOOKS = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(DOCS.glob("*.ipynb"))}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def tables(text: str) -> list[list[str]]:
    """Cells of every row of every table, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = {i for i, row in enumerate(rows) if set("".join(row)) <= set("-")}
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


def value_of(config: Config, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# -- papers ---------------------------------------------------------------------------------------------------------

SECTIONS = re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##|\Z)", page("papers.md"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("preset", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_the_settings_of_a_method_are_those_of_its_preset(preset: str, text: str) -> None:
    config = Config(preset=preset)
    shown = {cells[0].strip("`"): ast.literal_eval(cells[1]) for cells in tables(text)}
    assert len(shown) >= 4
    assert shown == {name: value_of(config, name) for name in shown}
    assert all(cells[2] for cells in tables(text))


def test_every_preset_that_is_a_method_has_its_paper() -> None:
    named = [name for name, _ in SECTIONS]
    assert named == [
        *("safe", "paper", "ppo", "ppo-adaptive", "asymmetric", "pid-lagrangian", "kl-adaptive-lr", "vapo", "grpo"),
        *("dr-grpo", "rloo"),
    ]  # the others take one layer away, or put one in


# -- TRL ------------------------------------------------------------------------------------------------------------


def trl_source(file: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    return (Path(spec.origin).parent / file).read_text(encoding="utf-8")


def trl_defaults(file: str) -> dict[str, Any]:
    """Field -> default of TRL's settings class, from its source: importing it takes seconds."""
    (made,) = [node for node in ast.parse(trl_source(file)).body if isinstance(node, ast.ClassDef)]
    found: dict[str, Any] = {}
    for node in made.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and isinstance(node.target, ast.Name):
            defaults = [word.value for word in node.value.keywords if word.arg == "default"]
            found[node.target.id] = ast.literal_eval(defaults[0]) if defaults else None
    return found


def section(heading: str) -> str:
    return page("from-trl.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("heading", "file", "preset"),
    [
        ("Settings of PPO", "experimental/ppo/ppo_config.py", "ppo"),
        ("Settings of GRPO", "trainer/grpo_config.py", "grpo"),
    ],
)
def test_names_and_defaults_of_trl_and_of_ours_are_true(heading: str, file: str, preset: str) -> None:
    theirs, ours = trl_defaults(file), Config(preset=preset)
    rows = tables(section(heading))
    assert len(rows) >= 10
    for their_name, their_default, our_name, our_default in rows:
        assert theirs[their_name.strip("`")] == ast.literal_eval(their_default), their_name
        assert value_of(ours, our_name.strip("`")) == ast.literal_eval(our_default), our_name


def test_a_setting_of_trl_that_is_given_here_is_told_the_name_that_the_page_has() -> None:
    for heading in ("Settings of PPO", "Settings of GRPO"):
        for their_name, _, our_name, _ in tables(section(heading)):
            theirs, ours = their_name.strip("`"), our_name.strip("`")
            assert ours in probable_setting(theirs), theirs
    (without,) = re.findall(r"(`top_p`.*) have no counterpart", section("Settings of GRPO"), flags=re.DOTALL)
    for theirs in re.findall(r"`(\w+)`", without):
        assert probable_setting(theirs).startswith("; here there is none"), theirs
    (batch,) = re.findall(r"`(per_device_train_batch_size)` and", section("Settings of GRPO"))
    assert "rollout.batch_size" in probable_setting(batch)


def test_every_setting_that_other_libraries_names_lead_to_is_there() -> None:
    ours = {name for controller in CONTROLLERS for name in setting_types(Config, controller)}
    for theirs, text in ELSEWHERE.items():
        named = re.findall(rf"\b(?:{'|'.join(SECTIONS_OF_SETTINGS)})\.[a-z_.]*[a-z_]", text)
        assert set(named) <= ours, theirs
        assert theirs not in ours, theirs
        assert named or text.startswith(("none", "max_steps", "eval_steps", "save_steps", "`stable-rlhf resume")), (
            theirs
        )


def test_metrics_of_trl_that_are_named_are_those_of_its_trainers() -> None:
    text = section("Metrics")
    same = re.findall(r"`([\w/]+)`", text.split("have the same name and meaning: ")[1].split(". One differs")[0])
    assert len(same) > 10
    source = trl_source("experimental/ppo/ppo_trainer.py")
    assert [name for name in same if f'metrics["{name}"]' not in source or name not in METRICS] == []
    source = trl_source("trainer/grpo_trainer.py")
    for theirs, ours, _ in tables(text):
        assert f'["{theirs.strip("`")}"]' in source
        assert ours.strip("`") in METRICS


# -- the notebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_stored_as_it_ran_from_top_to_bottom_without_an_error_that_is_not_meant(name: str) -> None:
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert name != "break-ppo.ipynb" or any("image/png" in output.get("data", {}) for output in outputs)
    assert "/tmp/" not in json.dumps(outputs)
    assert "site-packages" not in json.dumps(outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_name_that_a_notebook_imports_is_there(name: str) -> None:
    source = "\n".join("".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


# -- links ----------------------------------------------------------------------------------------------------------


def test_the_readme_renders_outside_the_repository_and_its_links_lead_to_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    inside = [target for target in targets if target.startswith(REPOSITORY)]
    assert len(inside) > 5
    for target in inside:
        path = re.match(rf"{re.escape(REPOSITORY)}/(?:blob|tree|raw)/main/([^#]+)", target)
        assert path is not None, target
        assert (ROOT / path[1]).exists(), target


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entries: list[Any]) -> list[str]:
        values = [value for entry in entries for value in entry.values()]
        return [file for value in values for file in (files(value) if isinstance(value, list) else [value])]

    pages = {path.name for path in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]} - {"LOG.md"}
    assert sorted(files(site["nav"])) == sorted(pages)
    assert site["repo_url"] == REPOSITORY
    assert site["site_url"] == PROJECT["urls"]["Documentation"]


def test_a_link_out_of_the_pages_leads_to_the_repository_and_a_dead_one_ends_the_build() -> None:
    absolute = script("site_links").absolute
    text = "[a](../src) [b](../README.md#figures) [c](metrics.md) [d](#x) [e](https://x.y/z) [f](LOG.md)"
    assert absolute(text, DOCS, "https://h/r") == (
        "[a](https://h/r/tree/main/src) [b](https://h/r/blob/main/README.md#figures) [c](metrics.md) [d](#x) "
        "[e](https://x.y/z) [f](https://h/r/blob/main/docs/LOG.md)"
    )
    with pytest.raises(FileNotFoundError, match=r"\.\./no\.md leads nowhere"):
        absolute("[a](../no.md)", DOCS, "https://h/r")


def test_the_api_page_has_every_public_name() -> None:
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page("api.md"), flags=re.MULTILINE)}
    assert set(stable_rlhf.__all__) <= shown
    for path in re.findall(r"^::: (\S+)$", page("api.md"), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


# -- the package ----------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere() -> None:
    assert script("release_checks").faults(PROJECT["version"]) == []
    assert script("release_checks").faults("9.9.9") == [
        f"pyproject.toml: its version is {PROJECT['version']}, not 9.9.9",
        f"CITATION.cff: its version is {PROJECT['version']}, not 9.9.9",
        f"CHANGELOG.md: it has Unreleased, {PROJECT['version']}, not 9.9.9",
    ]


def test_the_citation_is_of_this_software_and_of_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= cited.keys()
    assert (cited["license"], cited["repository-code"]) == (PROJECT["license"], REPOSITORY)
    (paper,) = cited["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2602.04651"
    assert paper["authors"] == [{"family-names": "Maity", "given-names": "Dipan"}]


def test_the_package_says_that_it_is_typed_and_every_dependency_of_an_extra_is_pinned() -> None:
    assert (ROOT / "src" / "stable_rlhf" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    wanted = {
        re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-")
        for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for requirement in requirements
    }
    assert wanted - pins - {"stable-rlhf"} == set()


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_the_forms_and_workflows_are_yaml_that_names_what_is_there(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    for path in re.findall(r"python (scripts/\w+\.py)", file.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file()


def test_a_release_is_published_by_a_trusted_workflow_without_a_token_after_its_files_were_tested() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert (jobs["publish"]["needs"], jobs["test"]["needs"]) == ("test", "build")
    assert "secrets." not in text
    assert "password" not in text


def test_what_the_docker_image_copies_is_there() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert len(copied) >= 4
    assert [name for name in copied if not (ROOT / name).exists()] == []
    python = next(line for line in lines if line.startswith("FROM python:"))
    assert f">={python.removeprefix('FROM python:').split('-')[0]}" == PROJECT["requires-python"]
