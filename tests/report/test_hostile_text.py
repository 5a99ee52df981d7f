"""Prompts, completions, names, settings and errors are untrusted: what they could do to a terminal, a file, a browser.

A policy whose every token is a payload is trained on payloads; then the console's bytes, the files and the report are
read. tests/report/test_hostile_browser.py opens the report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from stable_rlhf import errors
from stable_rlhf import text as text_module
from stable_rlhf.cli.main import main
from stable_rlhf.report import html
from tests.conftest import tiny_llama
from tests.report.test_report import Page, fake_rows, fake_run
from tests.tiny_runs import settings, trainer

ACTED = "document.title='ACTED';document.documentElement.setAttribute('data-acted','1')"
MARKUP = (
    f"<script>{ACTED}</script>",
    f'<img src=x onerror="{ACTED}">',
    "<img src=http://127.0.0.1:PORT/img>",
    f"</script></style></title></textarea></pre><script>{ACTED};fetch('http://127.0.0.1:PORT/fetch')</script>",
    f'<svg onload="{ACTED}"><image href=http://127.0.0.1:PORT/svg /></svg>',
    "<style>@import 'http://127.0.0.1:PORT/css';body{background:url(http://127.0.0.1:PORT/url)}</style>",
    "<iframe src=http://127.0.0.1:PORT/frame></iframe><link rel=stylesheet href=http://127.0.0.1:PORT/link>",
    '<a href="javascript:alert(1)">a</a> [b](javascript:alert(1))',
    "'\"><meta http-equiv=refresh content='0;url=http://127.0.0.1:PORT/refresh'>",
    "{{7*7}} {% raw %} ${7*7} #{7*7} <%= 7*7 %> {#",
    "<!-- --> ]]> &lt;b&gt; &#60;",
    "[bold red]markup[/] [link=file:///etc/passwd]x[/link] [/]",
)
TERMINAL = (
    "\x1b[31mred\x1b[2J\x1b[1;1H",  # CSI: colour, clear, home
    "\x1b]0;title\x07\x1b]8;;http://x/\x1b\\link\x1b]8;;\x1b\\",  # OSC 0 and 8
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # OSC 52: the clipboard
    "\x9b31m\x9d0;t\x9c\x90q\x9c",  # C1: CSI, OSC, DCS
    "\a\b\r\v\f\x00\x7f\x05\x0e",
    "\u202egnp.exe\u202c\u2066x\u2069\u200f\u061c\u200b\ufeff\u2028\u2029",
    "\U000e0041\ue000\ufff9",
    "Z" + "\u0301\u0489" * 300,
)
PAYLOADS = [*MARKUP, *TERMINAL]
BIG = "é<b>\x1b[1m" * 1_250_000  # 10 million characters


def acting(text: str, allowed: str = "\n") -> list[str]:
    """The characters of a text that a terminal, an editor or a browser would act on instead of showing them."""
    return [
        character
        for character in text
        if character not in allowed and (unicodedata.category(character)[0] == "C" or character in "\u2028\u2029")
    ]


def flooded(text: str) -> bool:
    """Whether more combining marks follow one another than any script has use for."""
    kinds = "".join("M" if unicodedata.category(character)[0] == "M" else "." for character in text)
    return "M" * (text_module.MARKS + 1) in kinds


def payload_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is a whole payload; what is none of them is one unknown token."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *PAYLOADS]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def hostile_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    return [len(completion) % 7 / 7 for completion in completions]


hostile_reward.__name__ = "\x1b]0;reward\x07<script>alert(1)<\\script>\u202e"


def raising(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    raise ValueError("".join(PAYLOADS) + BIG)


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a finished run of payloads, what it printed): as a process of its own would, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile") / "\x1b]0;run\x07<img src=x onerror=alert(1)>\n& rm"
    tokenizer = payload_tokenizer()
    rows = [{"prompt": payload} for payload in [*PAYLOADS, BIG]]
    config = settings(
        folder,
        max_steps=2,
        rollout={"batch_size": 16, "temperature": 2.0},  # so that each payload comes up
        log={"completions_steps": 1, "progress": True},
        data={"eval_size": 0},
    )
    made = trainer(
        config, tokenizer, hostile_reward,
        model=tiny_llama(len(tokenizer)), train_dataset=rows, eval_dataset=rows[::-1],
    )  # fmt: skip
    shown = folder.parent / "console"
    with pytest.MonkeyPatch.context() as patch, shown.open("w", encoding="utf-8") as console:
        patch.setattr(sys, "stdout", console)
        made._console.file = console
        evaluation = made.train()
        from stable_rlhf.report.summary import print_summary

        print_summary(folder, evaluation, f"stable-rlhf resume {folder}")
    return folder, shown.read_text(encoding="utf-8")


# --- the console -----------------------------------------------------------------------------------


def test_a_run_of_payloads_prints_nothing_that_a_terminal_acts_on(hostile_run: tuple[Path, str]) -> None:
    _, shown = hostile_run
    assert any(r"\x1b" in line for line in shown.splitlines())  # payloads were shown
    assert acting(shown) == []
    assert not flooded(shown)
    assert len(shown) < 20_000
    (line,) = [line for line in shown.splitlines() if line.startswith("Run: ")]
    assert line.endswith(r"/\x1b]0;run\x07<img src=x onerror=alert(1)>⏎& rm")


def test_the_closing_table_ends_no_run_for_a_character_that_the_terminal_lacks(tmp_path: Path) -> None:
    fake_run(tmp_path / "é漢", fake_rows(2))
    done = command("report", str(tmp_path / "é漢"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == f"{tmp_path}/\\xe9\\u6f22/report.html\n".encode()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    run = [sys.executable, "-m", "stable_rlhf", *arguments]
    return subprocess.run(run, capture_output=True, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize("payload", [*PAYLOADS, BIG], ids=range(len(PAYLOADS) + 1))
def test_an_error_shows_its_text_and_acts_on_no_terminal(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    payload = payload.replace("\0", "")  # no argument of a command can hold it
    for arguments in (
        ["train", f"--{payload}", "1"],
        ["train", "--preset", payload],
        ["train", "--output_dir", 300 * "\x1b"],
        ["report", payload],
        ["resume", payload],
        [payload],
    ):
        assert main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert acting(error) == []
        assert not flooded(error)
        assert error.count("\n") == 1
        assert 0 < len(error) < 12_000  # 1,000 characters, of which an escape takes up to 10 places


def test_a_reward_that_fails_with_payloads_is_shown_and_does_not_act(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ["a", *TERMINAL[:5]]))
    arguments = [
        *("--model.name", str(tiny_folder), "--data.train", str(tmp_path / "prompts.jsonl"), "--data.eval_size", "0"),
        *(
            "--reward.functions",
            '["tests.report.test_hostile_text:raising"]',
            "--rollout.batch_size",
            "2",
            "--model.device",
        ),
        *("cpu", "--output_dir", str(tmp_path / "run"), "--data.max_prompt_length", "20"),
    ]
    assert main(["train", *arguments]) == errors.Exit.REWARD
    out, error = capsys.readouterr()
    assert error.startswith("stable-rlhf: reward function 'raising' raised ValueError: ")
    assert acting(out + error) == []
    assert len(error) < 12_000


def test_tracebacks_warnings_and_log_lines_do_not_act() -> None:
    """What nobody foresaw, and what libraries say of a model's settings."""
    code = """if True:
        import json, logging, sys, warnings
        from stable_rlhf import cli
        cli.main(["--help"])
        text = "".join(json.loads(sys.argv[1]))
        warnings.warn(text)
        logging.getLogger("transformers").warning("of type %s", text)
        try:
            raise RuntimeError(text)
        except RuntimeError:
            logging.getLogger("transformers").exception("failed")
        raise KeyError("first") from ValueError(text + "x" * 10**7)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TERMINAL)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert acting(done.stderr) == []
    assert not flooded(done.stderr)
    assert done.stderr.count("\\x1b]52;c;cm0gLXJmIH4=\\x07") == 4
    assert "UserWarning: " in done.stderr
    assert "of type \\x1b[31mred" in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyError: 'first'"
    assert len(done.stderr) < 100_000


def test_what_is_cut_says_how_much() -> None:
    assert text_module.excerpt("abc\x1b", 7) == "abc\\x1b"
    assert text_module.excerpt("abc\x1bde", 6) == "abc… (3 more characters)"  # an escape is never cut in two
    assert text_module.ends("abcdefgh", 4) == "ab ... gh"
    assert text_module.clipped("ab\ud800cd", 3) == "ab\ufffd… (2 more characters)"
    assert text_module.quoted("x" * 100) == "'" + 75 * "x" + "...'"


# --- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "half.jsonl",
            b'{"prompt": "fine"}\n{"prompt": "a\\ud800"}\n',
            "row 2 is not JSON: 'utf-8' codec can't encode",
        ),
        ("bytes.jsonl", b'{"prompt": "a\xff"}\n', "row 1 is not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("deep.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "row 1 is not JSON: maximum recursion"),
        ("bytes.csv", b"prompt\na\xff\n", "could not be read: 'In CSV column #0: CSV conversion error to string: inv"),
        ("deep.yaml", b"a: " + b"[" * 100_000, "--config"),
    ],
)
def test_a_file_that_is_no_text_costs_a_sentence(
    name: str, content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    option = "--config" if name.endswith("yaml") else "--data.train"
    assert main(["train", option, str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_parquet_file_with_bytes_that_are_no_text_costs_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    offsets = pa.py_buffer((0).to_bytes(4, "little") + (3).to_bytes(4, "little"))
    prompts = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "bytes.parquet")
    assert main(["train", "--data.train", str(tmp_path / "bytes.parquet")]) == 2
    assert "Invalid UTF8 sequence" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run\udcff", "run\0"])
def test_a_run_folder_that_no_file_system_or_library_can_name_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--output_dir", name]) == 2
    error = capsys.readouterr().err
    remedy = "holds a NUL or a byte that is not UTF-8, which no file can hold; choose another"
    assert error == f"stable-rlhf: output_dir={name!r}: {remedy}\n"


# --- the files -------------------------------------------------------------------------------------


def test_the_files_of_a_run_of_payloads_hold_them_whole_as_data(hostile_run: tuple[Path, str]) -> None:
    folder, _ = hostile_run
    for name in ("metrics.jsonl", "timings.jsonl", "evaluation.json", "config.yaml"):
        text = (folder / name).read_bytes().decode("ascii")
        assert acting(text) == []
    files = sorted((folder / "completions").iterdir())
    completions = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert any("\x1b]52;c;cm0gLXJmIH4=\x07" in row["prompt"] for row in completions)
    for payload in PAYLOADS:
        assert any(payload in row["completion"] for row in completions), payload
    reward = yaml.safe_load((folder / "config.yaml").read_text())["reward"]["functions"]
    assert reward == ["tests.report.test_hostile_text:hostile_reward"]


def test_long_texts_stay_short_in_the_evaluation_and_in_the_report(hostile_run: tuple[Path, str]) -> None:
    folder, _ = hostile_run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    longest = evaluation["samples"][0]["prompt"]
    assert longest == BIG[:20_000] + "… (9980000 more characters)"
    assert (folder / "evaluation.json").stat().st_size < 300_000
    page = html.write_report(folder)
    assert page.stat().st_size < 1_000_000
    assert "more characters)" in page.read_text(encoding="utf-8")


def test_half_of_a_surrogate_pair_is_replaced_in_what_other_programs_read(tmp_path: Path) -> None:
    from stable_rlhf.runs import evaluation

    sample = {"prompt": "p\ud800", "completion": "c\udfff\ud83d\ude00", "reward": 1.0}
    evaluation.record(tmp_path, "before", {"reward": 1.0}, [sample])
    (kept,) = json.loads((tmp_path / "evaluation.json").read_text())["samples"]
    assert (kept["prompt"], kept["before"]) == ("p\ufffd", "c\ufffd\U0001f600")


# --- the report ------------------------------------------------------------------------------------


def everywhere(folder: Path, port: int) -> Path:
    """A run folder with the payloads in every text that a report shows; returns the report."""
    payloads = [payload.replace("PORT", str(port)) for payload in PAYLOADS]
    whole = "".join(payloads)
    rows = [
        row | {"safe/phase": payloads[n % len(payloads)], "safe/reason": whole} for n, row in enumerate(fake_rows(25))
    ]
    run = fake_run(folder, rows, text=whole)
    (run / "config.yaml").write_text(yaml.safe_dump({"preset": whole, "max_steps": whole, "x": payloads}))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "{torn")
    return html.write_report(run)


def test_no_payload_adds_a_tag_or_a_character_that_acts_to_the_report(
    tmp_path: Path, hostile_run: tuple[Path, str]
) -> None:
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "h3",
        "p",
        "ul",
        "li",
        "div",
        "b",
    }
    allowed |= {
        "span",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "colgroup",
        "col",
        "figure",
        "h4",
        "main",
        "dl",
        "dt",
        "dd",
        "i",
        "output",
        "small",
        "svg",
        "rect",
        "path",
        "script",
        "code",
        "pre",
        "footer",
    }
    for path in (html.write_report(hostile_run[0]), everywhere(tmp_path / MARKUP[2].replace("/", "\u2215"), 1)):
        page, text = Page(path), path.read_text(encoding="utf-8")
        assert {tag for tag, _ in page.tags} <= allowed
        assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
        assert page.named("script") == [{}]  # our own, whose hash the policy names
        assert [m["http-equiv"] for m in page.named("meta") if "http-equiv" in m] == ["Content-Security-Policy"]
        assert acting(text) == []
        assert not flooded(text)
    assert "{{7*7}} {% raw %}" in page.text  # a template would have made 49 of it


def test_a_report_stays_small_whatever_a_run_holds(tmp_path: Path) -> None:
    rows = [row | {"safe/phase": f"{n} {BIG[:2000]}", "safe/reason": "x"} for n, row in enumerate(fake_rows(40))]
    run = fake_run(tmp_path / "run", [*rows[:-1], rows[-1] | {"safe/reason": BIG}], text=BIG[:100_000])
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (run / "config.yaml").write_text(bomb + "preset: *i\n# " + "x" * 1_000_000)
    begun = time.perf_counter()
    assert html.write_report(run).stat().st_size < 1_000_000
    assert time.perf_counter() - begun < 30
