"""doctor --trl: literal files of TRL's arguments, for the built-in pair or a tiny model, and the lines they get."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stable_rlhf.cli.main import main
from stable_rlhf.doctor.trl import checks
from stable_rlhf.integrations.trl import figures

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

REWARDS = "tests.doctor.trl.given_rewards"

BUILTIN = """
model_name_or_path: builtin
dataset_name: builtin
reward_model_name_or_path: builtin
use_cpu: true
bf16: false
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 32
beta: 0.04
learning_rate: 1e-5
"""


@pytest.fixture(autouse=True)
def few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "GROUPS", 4)


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The arguments of a run of the tiny policy, which is not trained, on 20 prompts of 5 or 6 tokens (a byte each)."""
    rows = "".join(json.dumps({"prompt": f"row {number}"}) + "\n" for number in range(20))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    return {
        "model_name_or_path": str(tiny_folder),
        "dataset_name": str(tmp_path / "data"),
        "reward_funcs": [f"{REWARDS}.length"],
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "beta": 0.04,
        "output_dir": str(tmp_path / "run"),
    }


def doctor(tmp_path: Path, content: str | dict[str, Any], *arguments: str) -> int:
    file = tmp_path / "grpo.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return main(["doctor", "--trl", str(file), *arguments])


def lines(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """(verdict, text) of what was printed."""
    return [(line[:9].strip(), line[9:]) for line in capsys.readouterr().out.splitlines()]


def line(found: list[tuple[str, str]], begins: str) -> tuple[str, str]:
    return next(each for each in found if each[1].startswith(begins))


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without the program's and the file's name."""
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error.removeprefix(f"stable-rlhf: --trl {tmp_path / 'grpo.yaml'}").rstrip("\n")


# --- a run that is good -----------------------------------------------------------------------------


def test_the_builtin_pair_is_described_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, BUILTIN) == 0
    found = lines(capsys)
    texts = [text for _, text in found]
    assert texts[0].startswith(f"file: {tmp_path / 'grpo.yaml'} is read as the arguments of TRL 1.")
    assert line(found, "batch:") == (
        "ok",
        "batch: per_device_train_batch_size=8 x 1 process x steps_per_generation=1 = 8 completions a generation, "
        "2 prompts x num_generations=4; num_iterations=1 passes over each",
    )
    assert line(found, "beta=")[0] == "ok"
    assert line(found, "data:") == ("ok", "data: 1024 prompts, 1000 of them looked at, of 4 to 12 tokens (median 8)")
    assert line(found, "completions:")[0] == "ok"
    assert line(found, "completions:")[1].startswith("completions: 0 of 16 are cut off by max_completion_length=32; ")
    assert line(found, "reward:")[0] == "ok"
    assert line(found, "groups:") == ("ok", "groups: in 0 of 4 groups of num_generations=4 all rewards are equal")


def test_a_folder_of_data_is_read_and_nothing_is_written(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["max_completion_length"] = 16
    assert doctor(tmp_path, tiny) in (0, 1)  # the tiny model may end none of its texts
    found = lines(capsys)
    assert line(found, "data:")[1] == "data: 20 prompts, of 5 to 6 tokens (median 5.5)"
    assert line(found, "prompt 1:")[1] == "prompt 1: row 0"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "grpo.yaml"}


def test_rloo_has_its_own_defaults(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del tiny["beta"]
    doctor(tmp_path, tiny, "--script", "rloo")
    found = lines(capsys)
    assert found[0][1].endswith("`trl rloo`")
    assert line(found, "beta=")[1].startswith("beta=0.05: TRL measures the KL to a reference")
    doctor(tmp_path, tiny)
    assert line(lines(capsys), "beta=")[1].startswith("beta=0.0: ")


# --- findings ---------------------------------------------------------------------------------------


def test_beta_0_is_said(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(tmp_path, tiny | {"beta": 0.0})
    assert line(lines(capsys), "beta=") == (
        "warning",
        "beta=0.0: TRL loads no reference and measures no KL, so nothing can hold the policy near where it began, and "
        "SAFECallback of stable_rlhf.integrations.trl refuses such a run; set beta to another value, such as 0.04, "
        "which the callback then replaces",
    )


def test_completions_that_are_all_cut_off_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(tmp_path, BUILTIN.replace("max_completion_length: 32", "max_completion_length: 3")) == 1
    verdict, text = line(lines(capsys), "completions:")
    assert verdict == "failed"
    assert text.startswith(
        "completions: 16 of 16 are cut off by max_completion_length=3; a cut answer is scored without its end. Within "
        "6 tokens only 0 of 16 end: set max_completion_length above 6, or see whether the model writes its end token ("
    )


def test_the_length_that_would_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(tmp_path, BUILTIN.replace("max_completion_length: 32", "max_completion_length: 14"))
    verdict, text = line(lines(capsys), "completions:")
    assert verdict == "warning"
    length = int(text.split("Set max_completion_length=")[1].split(",")[0])
    assert text.endswith(f"Set max_completion_length={length}, within which 95% of them end")
    assert 14 < length <= 32
    assert length % 8 == 0


@pytest.mark.parametrize(
    ("reward", "begins", "verdict", "sentence"),
    [
        ("constant", "reward:", "failed", "every text gets the same score: check that it reads the completion"),
        ("constant", "groups:", "failed", "give a reward with steps in between, raise num_generations or temperature"),
        ("by_prompt", "groups: in 4 of 4", "failed", "the reward differs between prompts and not between the answers"),
        ("unsolved", "reward:", "warning", "it can tell texts apart, but not those that the model writes now"),
        ("noisy", "reward:", "warning", "advantages are partly noise; make the reward deterministic"),
        ("silent", "reward:", "failed", "it scores none of the completions: find out why it returns None"),
        ("sometimes", "reward:", "warning", "4 have no score, and TRL then leaves this reward out of their sum"),
        ("not_a_number", "reward:", "failed", "returned nan for sample 1"),
        ("raises", "reward:", "failed", "raised KeyError: \"'\\\\x1b[31mno lexicon\\\\u202e'\""),
        ("strict", "reward:", "failed", "strict does not take 'completion_ids', which TRL passes to every reward"),
    ],
)
def test_a_reward_that_cannot_teach_is_named(
    reward: str,
    begins: str,
    verdict: str,
    sentence: str,
    tiny: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = doctor(tmp_path, tiny | {"reward_funcs": [f"{REWARDS}.{reward}"]})
    found = lines(capsys)
    assert line(found, begins)[0] == verdict
    assert sentence in line(found, begins)[1]
    assert code == int("failed" in [each for each, _ in found])


def test_groups_without_variance_say_what_is_lost(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, tiny | {"reward_funcs": [f"{REWARDS}.by_prompt"]}) == 1
    assert line(lines(capsys), "groups:") == (
        "failed",
        "groups: in 4 of 4 groups of num_generations=4 all rewards are equal, so that all advantages are 0 there and "
        "nothing is learned from them except by the KL's term; the reward differs between prompts and not between the "
        "answers to one: check that it reads the completion",
    )


def test_rewards_are_added_up_with_their_weights(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A constant reward next to one that differs leaves no group flat, unless the other has the weight 0."""
    both = tiny | {"reward_funcs": [f"{REWARDS}.constant", f"{REWARDS}.length"]}
    doctor(tmp_path, both)
    assert not line(lines(capsys), "groups:")[1].startswith("groups: in 4 of 4")
    doctor(tmp_path, both | {"reward_weights": [1.0, 0.0]})
    assert line(lines(capsys), "groups:")[1].startswith("groups: in 4 of 4")


def test_names_of_trl_and_ours_are_found(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(tmp_path, tiny | {"reward_funcs": ["get_soft_overlong_punishment", f"{REWARDS}:length"]})
    found = lines(capsys)
    assert line(found, "reward: get_soft_overlong_punishment gives 0 to 16 completions, and 0 and 0")[0] == "failed"
    assert line(found, "reward_funcs:") == (
        "warning",
        f"reward_funcs: doctor reads '{REWARDS}:length', but TRL's script only '{REWARDS}.length': write that",
    )


def test_prompts_beyond_the_context_fail(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "short"}] * 9 + [{"prompt": "x" * 50}]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = json.loads((Path(tiny["model_name_or_path"]) / "config.json").read_text())["max_position_embeddings"]
    limit = context - 20
    assert doctor(tmp_path, tiny | {"max_completion_length": limit}) == 1
    assert line(lines(capsys), "data:") == (
        "failed",
        f"data: 10 prompts, of 5 to 50 tokens (median 5); 1 of them and max_completion_length={limit} do not fit the "
        f"model's context of {context}: lower max_completion_length to {context - 50}, or leave these prompts out, "
        "since TRL cuts none",
    )


def test_fewer_prompts_than_a_generation_takes_fail(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, tiny | {"per_device_train_batch_size": 84}) == 1
    verdict, text = line(lines(capsys), "data:")
    assert verdict == "failed"
    assert "a generation takes 21, and TRL leaves an incomplete one out, so there would be no step" in text


def test_code_of_a_model_runs_only_where_the_file_says_so(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(tmp_path, tiny | {"trust_remote_code": True})
    name = tiny["model_name_or_path"]
    assert lines(capsys)[1] == (
        "",
        f"trust_remote_code=true: the Python code that comes with {name!r} is run, as TRL will run it",
    )


def test_a_file_of_prompts_is_read_and_said_not_to_be_trls(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data" / "train.jsonl"
    doctor(tmp_path, tiny | {"dataset_name": str(file)})
    assert line(lines(capsys), "dataset_name=") == (
        "warning",
        f"dataset_name={str(file)!r}: doctor reads this file, but TRL's script looks for a folder or a hub name; write "
        f"datasets: [{{path: json, data_files: {file}}}]",
    )
    tiny.pop("dataset_name")
    doctor(tmp_path, tiny | {"datasets": [{"path": "json", "data_files": str(file)}]})
    assert line(lines(capsys), "data:")[1].startswith("data: 20 prompts, of 5 to 6 tokens")


def test_hostile_text_is_shown_as_escapes(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "\x1b]0;title\x07 \u202e[bold]row"}
    (tmp_path / "data" / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    doctor(tmp_path, tiny)
    out = capsys.readouterr().out
    assert "prompt 1: \\x1b]0;title\\x07 \\u202e[bold]row" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_a_language_model_as_reward_model_fails(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL would give it a head of random weights, and train on that."""
    assert doctor(tmp_path, tiny | {"reward_model_name_or_path": tiny["model_name_or_path"]}) == 1
    found = lines(capsys)
    assert line(found, "reward:")[0] == "failed"
    assert "A language model must first be trained as one" in line(found, "reward:")[1]
    assert found[-1] == ("", "no completion was sampled: fix what failed first")


def test_sampling_ends_at_the_deadline(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SECONDS", 0)
    doctor(tmp_path, tiny)
    assert line(lines(capsys), "sampled ")[1].startswith("sampled 1 group of num_generations=4 in ")


def test_a_stream_is_read_and_the_environment_is_set(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLE_RLHF_TRIED", "0")
    doctor(tmp_path, tiny | {"dataset_streaming": True, "env": {"STABLE_RLHF_TRIED": 1}})
    assert line(lines(capsys), "data:")[1].startswith("data: a stream, 20 of them looked at, of 5 to 6 tokens")
    assert os.environ["STABLE_RLHF_TRIED"] == "1"


def test_the_documented_example_gets_the_verdicts_that_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "trl-doctor.md").read_text(encoding="utf-8")
    file, code, shown = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("yaml", "python", "text"))
    monkeypatch.setitem(sys.modules, "my_rewards", None)  # taken away at the end, as other tests have one too
    del sys.modules["my_rewards"]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor(tmp_path, file) == 1
    names = [(each[:9].strip(), each[9:].split(":")[0]) for each in shown.splitlines()[1:] if each[0] != " "]
    assert [(verdict, text.split(":")[0]) for verdict, text in lines(capsys) if verdict] == names


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"num_generation": 8},
            ": neither `trl grpo` nor `accelerate launch` has an argument 'num_generation'. Did you mean "
            "num_generations?",
        ),
        ({"zzz\x1b[31m": 8}, ": neither `trl grpo` nor `accelerate launch` has an argument 'zzz\\x1b[31m'. Remove it."),
        (
            {"num_generations": 3},
            ": per_device_train_batch_size=8 x 1 process x gradient_accumulation_steps=1 = 8 completions a generation, "
            "which is not divisible by num_generations=3: groups must be whole; set gradient_accumulation_steps to 3 "
            "or a multiple of it, or num_generations to 2 or 4 or 8",
        ),
        (
            {"generation_batch_size": 20},
            ": generation_batch_size=20 is not divisible by both per_device_train_batch_size=8 x 1 process = 8 and "
            "num_generations=4; set generation_batch_size to 8 or a multiple of it",
        ),
        ({"num_generations": 1}, ": num_generations=1: GRPO compares the completions of one prompt; set 2 or more"),
        ({"num_generations": "four"}, ": num_generations='four': TRL reads a whole number there"),
        ({"num_generations": [4]}, ": num_generations=[4]: TRL reads a whole number there"),
        ({"learning_rate": "fast"}, ": learning_rate='fast': TRL reads a number there"),
        ({"reward_funcs": "a.b"}, ": reward_funcs='a.b': TRL reads a list there; write [a.b]"),
        ({"reward_weights": [1.0, 2.0]}, ": reward_weights=[1.0, 2.0]: give 1, one weight for each reward"),
        ({"model_name_or_path": None}, ": model_name_or_path is missing: name the model to train"),
        ({"dataset_name": None}, ": dataset_name and datasets are missing: give one of them"),
        ({"reward_funcs": None}, ": reward_funcs and reward_model_name_or_path are missing: give one of them"),
        ({1: 2}, ": the key 1 is an int; TRL's keys are names"),
    ],
)
def test_what_trl_refuses_is_refused_by_name(
    change: dict[Any, Any],
    sentence: str,
    tiny: dict[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor(tmp_path, tiny | change) == 2
    assert refusal(tmp_path, capsys) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- a", ": is a list; give the arguments of TRL's script, such as `beta: 0.04`"),
        ("", ": is empty; give the arguments of TRL's script, such as `beta: 0.04`"),
        ("a: [1", ", line 1: expected ',' or ']', but got '<stream end>'; repair the YAML"),
        ("a: !!python/object/apply:os.system [ls]", ", line 1: could not determine a constructor for the tag "),
        ("a: " + "[" * 5000, ": maximum recursion depth exceeded"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, content) == 2
    assert refusal(tmp_path, capsys).startswith(sentence)


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--trl", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"stable-rlhf: --trl {tmp_path / 'none.yaml'}: No such file or directory; check the path\n"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward_funcs": ["zzz"]}, ": reward_funcs: TRL's script does not know 'zzz': name one of accuracy_reward, "),
        ({"model_name_or_path": "/none"}, ": model_name_or_path='/none': "),
        ({"dataset_name": "/none.jsonl"}, ": prompt file /none.jsonl does not exist."),
    ],
)
def test_what_is_not_there_is_named(
    change: dict[str, Any], sentence: str, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path, tiny | change) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the progress bars of datasets
    assert last.startswith(f"stable-rlhf: --trl {tmp_path / 'grpo.yaml'}{sentence}")


def test_a_set_without_prompts_is_told_in_trls_names(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "train.jsonl").write_text('{"question": "why?"}\n')
    assert doctor(tmp_path, tiny) == 2
    assert capsys.readouterr().err.endswith(
        "has the columns 'question'; the format 'prompt' needs 'prompt'. TRL reads no other column: rename the one "
        "that holds the prompts.\n"
    )


def test_a_version_that_was_not_tested_is_refused(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures.importlib.metadata, "version", lambda name: "1.17.0")
    assert doctor(tmp_path, tiny) == 2
    assert capsys.readouterr().err.startswith("stable-rlhf: TRL 1.17.0 is not supported: pip install 'trl>=1.12,<1.17'")


def test_processes_come_from_the_file_or_the_command(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tiny | {"per_device_train_batch_size": 2}
    assert doctor(tmp_path, few) == 2
    assert "2 x 1 process x gradient_accumulation_steps=1 = 2 completions" in capsys.readouterr().err
    doctor(tmp_path, few | {"num_processes": 2})
    verdict, text = line(lines(capsys), "batch:")
    assert verdict == "warning"
    assert "per_device_train_batch_size=2 x 2 processes x steps_per_generation=1 = 4 completions" in text
    assert "But `trl grpo` reads the file in one process before it starts the others, and refuses it there" in text
    doctor(tmp_path, tiny, "--num_processes", "3")
    assert line(lines(capsys), "batch:")[0] == "ok"
