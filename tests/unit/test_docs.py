"""Documents and code agree: generated pages, a row for every part, links, commands, the workflow's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml
from pydantic import Field
from torch import Tensor

from atr_scale.data.corpora import CORPORA
from atr_scale.encoders import AUDIO_ENCODERS, TEXT_ENCODERS
from atr_scale.errors import UserError
from atr_scale.losses import LOSS_TERMS, LossTerm, TermSection
from atr_scale.scorers import SCORERS
from atr_scale.sections import Section
from atr_scale.version import __version__
from tests.commands import ROOT, configuration, parse
from tools.write_docs import config_page as pages
from tools.write_docs.api_page import api_page
from tools.write_docs.config_page import config_page

FOLDERS = ("docs", "examples", "tests", "tools")
MARKDOWN = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
# Python blocks of these are signatures, or run in test_self_contained.py and in the two test_extending.py.
RUN_ELSEWHERE = ("docs/api.md", "README.md", "docs/extending.md")
NO_SHELL = re.compile(r"\.\.\.|\$@|\bCONFIG\b|[A-Z_]{3,}\.yaml")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("page", "text"), [("config.md", config_page), ("api.md", api_page)])
def test_generated_page_is_current(page: str, text: Callable[[], str]) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == text(), "run python -m tools.write_docs"


def test_a_key_needs_a_description_and_a_number_a_unit() -> None:
    class Silent(Section):
        width: int = 1

    class Unitless(Section):
        fog: float | None = None

    Unitless.model_fields["fog"].description = "thickness of the fog"
    with pytest.raises(UserError, match=r"model\.width has no description"):
        pages._table(Silent, "model.")
    with pytest.raises(UserError, match=r"model\.fog is a number without a unit"):
        pages._table(Unitless, "model.")


def test_a_loss_brings_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    class MoreSection(TermSection):
        omega: float = Field(1.0, description="strength of more")

    class More(LossTerm):
        """A loss that asks for more."""

        Section = MoreSection

        def dense(self, scores: Tensor) -> Tensor:
            return scores.mean()

    monkeypatch.setitem(LOSS_TERMS, "more", More)
    text = config_page()
    assert "A loss that asks for more. Defined in" in text
    assert "| `objective.more.omega` | float | `1.0` |  | Strength of more. |" in text


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("scorers.md", SCORERS),
        ("losses.md", LOSS_TERMS),
        ("encoders.md", [key for key in AUDIO_ENCODERS if not key.startswith("tiny_")]),
        ("encoders.md", TEXT_ENCODERS),
        ("data.md", CORPORA),
    ],
    ids=["scorers", "losses", "audio encoders", "text encoders", "corpora"],
)
def test_every_part_has_a_row(page: str, names: Iterable[str]) -> None:
    """A row begins with the names that it is about: | `mn04` `mn10` | ..."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    described = {found for row in rows for found in re.findall(r"`([^`]+)`", row)}
    assert set(names) <= described


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_commands_are_right(path: Path) -> None:
    """Indented lines with a command of the package: the verb, the options and the keys of a shipped configuration."""
    for line in re.findall(r"^ {4}((?:.*\\\n)*.*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        found = re.match(r"(?:[A-Z]+=\S+ )*(.*-m atr_scale\.train|.*-m atr_scale\.cli|atr-scale) (.+)", line, re.DOTALL)
        if found is None or NO_SHELL.search(line):
            continue
        train = "train " if found[1].endswith("train") else ""
        command = f"atr-scale {train}{found[2]}".replace("\\\n", " ")
        verb, given = parse(command)
        if verb in ("train", "plan") and given["config"].startswith("configs/") and "plugins=" not in command:
            configuration(command)


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_files_in_commands_exist(path: Path) -> None:
    shown = "\n".join(re.findall(r"^ {4}(.*)", path.read_text(encoding="utf-8"), re.MULTILINE))
    files = re.findall(r"(?<!\S)(?:\./)?((?:launch|slurm|configs|examples|tools|\.ci)/[\w./-]*\w)", shown)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_readme_is_short_and_says_what_was_tested() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for word in ("gloo", "SLURM", "S3", "GPU"):
        assert word in text.partition("## Two commands")[0]


@pytest.mark.parametrize("path", [path for path in MARKDOWN if name(path) not in RUN_ELSEWHERE], ids=name)
def test_python_blocks_run(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, name(path), "exec"), {})


def test_readme_has_the_one_block_that_is_run() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("```python") == 1


def test_the_version_has_its_section_in_the_changelog() -> None:
    assert f"\n## {__version__} - 2026-" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_what_contributors_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]


def test_the_hooks_are_the_checks_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    checks = script.partition('echo "== lint"')[2].partition('echo "== tests"')[0]
    commands = [line for line in checks.splitlines() if line and not line.startswith(("echo", "#"))]
    for command in commands:
        tool = "shellcheck --external-sources" if "shellcheck" in command else command
        assert tool in entries, command
