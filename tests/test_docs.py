"""The pages: every link leads somewhere, and docs/method.md finds each equation, figure and table of the paper in the
code. Plain text; no torch.

``python tests/test_docs.py`` moves the line anchors of docs/method.md to where the symbols stand now, and writes
docs/settings.md.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scores import QUOTES, in_words, requote  # noqa: E402

from bundle.__main__ import settings_page  # noqa: E402

METHOD, SETTINGS_PAGE = ROOT / "docs" / "method.md", ROOT / "docs" / "settings.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
ANCHORED = re.compile(r"\[`([\w.#]+)`\]\((\.\./[\w./]+)#L(\d+)\)")
NUMBERS = re.compile(
    r"\b(Eq|Fig|Table)s?\.?\s+((?:\d+|[IVX]+)(?:(?:,\s*|\s+and\s+|\s+to\s+|\s*-\s*)(?:\d+|[IVX]+)\b)*)"
)
ROMAN = {"I": 1, "II": 2, "III": 3}


def numbers(text: str, kind: str) -> set[int]:
    """The equations (``Eq``), figures (``Fig``) or tables (``Table``) that a text names, ranges spelled out."""
    found: set[int] = set()
    for what, listed in NUMBERS.findall(text):
        parts = re.split(r"(,\s*|\s+and\s+|\s+to\s+|\s*-\s*)", listed) if what == kind else []
        values = [ROMAN.get(part) or int(part) for part in parts[::2]]
        for before, joint, after in zip([0, *values], ["", *parts[1::2]], values):
            found |= set(range(before, after + 1)) if joint.strip() in ("to", "-") else {after}
    return found


@cache
def symbols(path: Path) -> dict[str, int]:
    """Where the classes, functions and constants of a module, or the keys of a config, are defined: name to line."""
    text = path.read_text()
    if path.suffix == ".yaml":
        keys = re.compile(r"^([\w#]+):", re.MULTILINE)
        return {match[1]: text.count("\n", 0, match.start()) + 1 for match in keys.finditer(text)}
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.Assign, ast.AnnAssign)) and not prefix:
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update({target.id: child.lineno for target in targets if isinstance(target, ast.Name)})

    visit(ast.parse(text), "")
    return found


@cache
def docstrings(path: Path) -> str:
    """All docstrings of a module."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return "\n".join(filter(None, map(ast.get_docstring, nodes)))


def rows() -> list[list[str]]:
    """The cells of every table row of method.md."""
    lines = [line for line in METHOD.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings_that_are_there(page):
    for _, link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), link
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_every_line_of_method_is_where_its_symbol_is_defined():
    links = ANCHORED.findall(METHOD.read_text())
    assert len(links) > 60
    wrong = [
        f"{name}: {path}#L{line}, now {symbols(METHOD.parent / path).get(name, 'gone')}"
        for name, path, line in links
        if symbols(METHOD.parent / path).get(name) != int(line)
    ]
    assert not wrong, "python tests/test_docs.py moves lines:\n" + "\n".join(wrong)


def test_every_link_into_the_code_has_its_line_and_names_its_symbol():
    for text, link in LINK.findall(METHOD.read_text()):
        if (
            re.search(r"\.(py|yaml)(#|$)", link)
            and text.startswith("`")
            and not text.strip("`").endswith((".py", ".yaml"))
        ):
            assert ANCHORED.fullmatch(f"[{text}]({link})"), (text, link)


@pytest.mark.parametrize(("kind", "last"), [("Eq", 14), ("Fig", 4), ("Table", 3)])
def test_everything_in_the_paper_has_a_row_whose_code_says_so_in_a_docstring(kind, last):
    for number in range(1, last + 1):
        (row,) = (cells for cells in rows() if number in numbers(cells[0], kind))
        files = {METHOD.parent / path for _, path, _ in ANCHORED.findall(row[2])}
        assert any(number in numbers(docstrings(path), kind) for path in files if path.suffix == ".py"), (kind, number)
        tests = ANCHORED.findall(row[3])
        assert tests and all(path.startswith("../tests/") for _, path, _ in tests), row[0]


def test_numbers_are_read_with_their_ranges():
    text = "Eqs. 1, 2 and 7, Eqs. 3 to 6 (Eq. 12), Eqs. 9-11; Fig. 2; Figs. 3 and 4; Tables I and II"
    assert numbers(text, "Eq") == {1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12}
    assert numbers(text, "Fig") == {2, 3, 4} and numbers(text, "Table") == {1, 2}


# what stands in more than one place


def metadata() -> dict:
    return json.loads((ROOT / "configs" / "metadata.json").read_text())


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith(("#", "-r "))}


def test_the_changelog_has_the_versions_of_the_metadata_newest_first():
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings == list(metadata()["changelog"]) and headings[0] == metadata()["version"]


def test_package_and_citation_have_the_version_of_the_metadata():
    assert project()["version"] == metadata()["version"]
    assert f"\nversion: {metadata()['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_extras_are_the_development_requirements():
    extras = project()["optional-dependencies"]
    assert sorted(extras["dev"] + extras["export"]) == sorted(pins("requirements-dev.txt"))
    assert extras["viewer"] == list(pins("requirements-viewer.txt"))
    assert not pins("requirements-dev.txt") & pins("requirements.txt")


def test_readme_opens_with_the_two_commands_that_do_all_set_up():
    block = re.search(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-fast", "lint"} <= set(targets)


def test_readmes_scores_are_those_of_the_model_card():
    """Every row of README's table of accuracy is in docs/README.md, figure for figure."""
    table = re.findall(
        r"^\| (?:\*\*)?(3D-WLDM|3D U-Net|MR intensity|0 HU)[^|]*\|(.*)\|$", (ROOT / "README.md").read_text(), re.M
    )
    card = (ROOT / "docs" / "README.md").read_text()
    assert len(table) >= 4
    for name, figures in table:
        assert figures.strip() in card, (name, figures)


def record() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "scores.json").read_text())


def test_the_record_of_scores_is_that_of_the_shipped_weights():
    shipped = (ROOT / "models" / "model.pt.sha256").read_text().split()[0]
    assert record()["weights"] == shipped


@pytest.mark.parametrize(("page", "quote"), [(page, quote) for page, quotes in QUOTES.items() for quote in quotes])
def test_pages_quote_the_record_of_scores(page, quote):
    text = " ".join((ROOT / page).read_text().split())
    assert quote.format(**in_words(record())) in text


def test_a_quote_is_brought_up_to_date_wherever_its_line_breaks():
    page = "bone is 162 HU\n  too soft on average, in 162 HU"
    assert requote(page, "bone is 162 HU too soft", "bone is 9 HU too soft") == (
        "bone is 9 HU\n  too soft on average, in 162 HU"
    )


def test_the_metadata_has_the_record_of_scores():
    mean = record()["test"]["mean"]["3D-WLDM"]
    for name, value in metadata()["eval_metrics"].items():
        decimals = len(str(value).partition(".")[2])
        assert value == pytest.approx(mean[name], abs=0.5 * 10**-decimals + 1e-9), name


def test_the_page_of_settings_is_that_of_the_table():
    assert SETTINGS_PAGE.read_text() == settings_page()


def test_troubleshooting_names_every_measure_of_the_guard_and_only_messages_that_there_are():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    guard = (ROOT / "custom_modules" / "inference" / "guard.py").read_text()
    measures = re.findall(r'^    "(.+?)": \("', guard, re.MULTILINE)
    assert len(measures) == 12 and all(f"`{measure}`" in text for measure in measures)
    code = "".join(
        path.read_text() for folder in ("custom_modules", "bundle") for path in (ROOT / folder).rglob("*.py")
    )
    refusals = re.findall(r"^\| `(.+?)` \|", text.split("## Refusals")[1].split("## The viewer")[0], re.MULTILINE)
    viewer = code + (ROOT / "bundle" / "pages" / "templates" / "viewer.js").read_text()
    shown = re.findall(r"^\| \*(.+?)\* \|", text, re.MULTILINE)
    assert len(refusals) > 10 and [message for message in refusals if message not in code] == []
    assert len(shown) == 4 and [message for message in shown if message not in viewer] == []


if __name__ == "__main__":
    SETTINGS_PAGE.write_text(settings_page())

    def moved(match: re.Match) -> str:
        line = symbols(METHOD.parent / match[2]).get(match[1])
        if line is None:
            print(f"{match[1]} is not in {match[2]}")
        return f"[`{match[1]}`]({match[2]}#L{line or match[3]})"

    METHOD.write_text(ANCHORED.sub(moved, METHOD.read_text()))
