"""The tutorial works as it stands: its blocks run in order, in an empty folder. The other pages' Python runs too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stable_rlhf.cli.main import main

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", flags=re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def run(page: str, kind: str, code: str, names: dict[str, object]) -> None:
    if kind == "python":
        exec(compile(code, page, "exec"), names)  # noqa: S102  our own text
        return
    for line in code.splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "stable-rlhf"
        if command[1] != "serve-reward":  # it serves until it is stopped; tests/rewards has it
            assert main(command[1:]) == 0, line


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "tutorial"}
    for kind, code in blocks("tutorial.md"):
        run("tutorial.md", kind, code, names)
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()
    assert len((tmp_path / "runs" / "tutorial" / "metrics.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert capsys.readouterr().out.splitlines()[-1].strip()  # the merged model's text


@pytest.mark.parametrize("page", ["how-to.md", "from-trl.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    found = [code for kind, code in blocks(page) if kind == "python"]
    assert found
    for code in found:
        run(page, "python", code, names)
    assert list(tmp_path.glob("runs/*/metrics.jsonl"))
