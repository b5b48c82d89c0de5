"""The structure of the code: which package may import which, and no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# each room imports from those above it and from itself only
LAYERS = [
    {"errors", "messages", "tiling", "distributed"}, {"files", "settings", "memory"},
    {"config_check"}, {"networks", "data"},
    {"inference", "clinical"}, {"training", "evaluation"}, {"baselines"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if not {"lib", "model"} & set(path.parts)]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules("custom_modules"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_those_below_it_only(path):
    room = path.relative_to(ROOT / "custom_modules").parts[0].removesuffix(".py")
    for module in imports(path):
        parts = module.split(".")
        assert parts[0] != "bundle"
        if parts[0] == "custom_modules" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != room:
            assert LEVEL[parts[1]] < LEVEL.get(room, len(LAYERS)), f"{room} imports {module}"


def test_every_room_has_its_level_and_a_sentence():
    for path in (ROOT / "custom_modules").iterdir():
        if path.is_dir() and (path / "__init__.py").is_file():
            assert path.name in LEVEL
            assert ast.get_docstring(ast.parse((path / "__init__.py").read_text())).endswith(".")


@pytest.mark.parametrize("package", ["custom_modules", "bundle"])
def test_no_module_imports_itself_by_a_detour(package):
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules(package)}
    graph = {name: {m for m in imports(path) if m in names and m != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
