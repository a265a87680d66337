"""What README and docs say exists."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as torchrun
from typer.testing import CliRunner

from ugicm.cli import app
from ugicm.server.app import create_app
from ugicm.server.settings import Settings
from ugicm_train.cli import COMMANDS, _parser
from ugicm_train.evaluation import report

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("model_store/*/*.md")]
)
README, TRAINING, HISTORY = (
    ROOT / page for page in ("README.md", "docs/training.md", "docs/model-history.md")
)


def commands(program: str, page: Path = README) -> list[list[str]]:
    """Command lines of a page's shell blocks that start with `program`, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = (shlex.split(line.removeprefix("OMP_NUM_THREADS=1 "), comments=True) for line in lines)
    return [line for line in words if line[:1] == [program]]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in commands("make")}
    assert named >= {"serve", "test"}
    assert named <= targets


def test_ugicm_options_exist() -> None:
    examples = commands(".venv/bin/ugicm")
    assert {words[1] for words in examples} == {"encode", "decode", "info", "bench"}
    for words in examples:
        shown = CliRunner().invoke(app, [words[1], "--help"]).stdout
        for word in words[2:]:
            if word.startswith("-"):
                assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown), words


def test_training_understands_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ugicm_train.mix.model_path", Path)  # there need not be such models
    examples = commands(".venv/bin/ugicm-train")
    examples += commands("ugicm-train", TRAINING) + commands("ugicm-train", HISTORY)
    for words in commands("torchrun", TRAINING) + commands("torchrun", HISTORY):
        launched = torchrun(words[1:])
        assert (launched.module, launched.training_script) == (True, "ugicm_train")
        examples.append(["ugicm-train", *launched.training_script_args])
    assert {words[1] for words in examples} == {
        "run",
        "export",
        "average",
        "calibrate",
        "polish",
        "mix",
        "robustness",
        "rd",
        "evaluate",
    }
    for words in examples:
        assert _parser(words[1]).parse_args(words[1:]).command == words[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_the_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = _parser(command)
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args([command, "--help"])
    shown = capsys.readouterr().out
    (subparsers,) = (action for action in parser._actions if isinstance(action.choices, dict))
    for option in subparsers.choices[command]._actions:
        if option.help and type(option.default) in (int, float, str) and option.default != argparse.SUPPRESS:
            assert re.search(rf"\(default:\s+{re.escape(str(option.default))}[,)]", shown), option.dest


def test_requests_are_in_the_schema() -> None:
    schema = create_app(Settings()).openapi()
    examples = commands("curl")
    assert len(examples) >= 4
    for words in examples:
        url = next(word for word in words if word.startswith("http://127.0.0.1:8000"))
        path, _, query = url.removeprefix("http://127.0.0.1:8000").partition("?")
        known = {parameter["name"] for parameter in schema["paths"][path]["post"]["parameters"]}
        assert {pair.partition("=")[0] for pair in query.split("&") if pair} <= known, url


MINUS = "\N{MINUS SIGN}"
ROWS = {
    "human view, labels": ("ugicm-s human", False),
    "WebP, labels": ("webp", False),
    "AVIF, labels": ("avif", False),
    "human view": ("ugicm-s human", True),
    "this codec before it had teachers": ("plain ugicm-s", True),
    "WebP": ("webp", True),
    "AVIF": ("avif", True),
}
"""First cell of the model card's rows: codec in ``tasks.json``, and whether the row is of agreement.

Those of agreement are there with other photos, too: ``tasks-exchanged.json``.
"""


def test_the_card_says_what_was_measured() -> None:
    folder = ROOT / "model_store/ugicm-s"
    tasks, exchanged = (
        json.loads((folder / f"{name}.json").read_text())["tasks"] for name in ("tasks", "tasks-exchanged")
    )
    card = (folder / "README.md").read_text()
    stored = json.loads((folder / "config.json").read_text())
    measured_rates = json.loads((folder / "rd.json").read_text())
    assert measured_rates["model_digest"] == stored["digest"]
    assert f"`{stored['digest']}`" in card
    assert f'"model": "{stored["digest"]}"' in (ROOT / "docs/api.md").read_text()
    assert report.table(measured_rates) in card
    assert report.summary(measured_rates) in README.read_text()
    for name in ("tasks", "tasks-exchanged"):
        identity = json.loads((folder / f"{name}.json").read_text())["identities"]["ugicm-s"]
        assert identity.startswith(stored["sha256"])
    rows = [(row, codec, tasks, agreement) for row, (codec, agreement) in ROWS.items()]
    rows += [(f"{row}, photos exchanged", codec, exchanged, True) for row, codec, _, of in rows if of]
    for row, codec, source, agreement in rows:
        (cells,) = re.findall(rf"^\| {row} \| (.*) \|$", card, re.MULTILINE)
        measured = [task for name, task in source.items() if ("agreement" in name) is agreement]
        assert len(measured) == 3
        for cell, task in zip(cells.split(" | "), measured, strict=True):
            found = re.fullmatch(rf"([{MINUS}+][\d.]+) ± ([\d.]+) %", cell)
            assert found, cell
            for text, value in (
                (found[1].replace(MINUS, "-"), task["bd_rate_percent"][codec]),
                (found[2], task["bd_rate_error"][codec]),
            ):
                digits = len(text.partition(".")[2])
                assert abs(float(text) - value) <= 0.51 / 10**digits, (row, cell, value)
