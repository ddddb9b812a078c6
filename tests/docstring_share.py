"""Print the share of public functions, methods and classes that have a docstring, and fail below the floor.

The floor is `documented` under [tool.fedqc] in pyproject.toml: the share of the last commit, in per cent.
Where the share has risen by more than half a point, raise the floor with the same commit. The last line also
names the branch coverage that `make coverage` measured last, if it did.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("client", "server", "common")
COVERAGE = Path(".coverage-share.json")
"""Written by `make coverage`: the branch coverage of the quick suite in per cent, and the commit measured."""


def public_definitions(
    body: list[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """All functions and classes of a module, and methods of its classes, whose names have no leading
    underscore. What is defined inside a function is not public.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def docstring_share(root: Path) -> tuple[int, int]:
    """The number of documented public definitions, and of all."""
    nodes = [
        node
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        for node in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body)
    ]
    return sum(ast.get_docstring(node) is not None for node in nodes), len(nodes)


def main(root: Path = ROOT) -> int:
    """Print both shares; 1 when fewer definitions are documented than the floor demands."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    floor = float(settings["tool"]["fedqc"]["documented"])
    documented, total = docstring_share(root)
    share = 100 * documented / total
    line = f"documented: {documented} of {total} public definitions, {share:.1f} % (floor {floor:.1f} %)"
    if (root / COVERAGE).exists():
        measured = json.loads((root / COVERAGE).read_text(encoding="utf-8"))
        line += f"; branch coverage: {measured['percent']:.1f} % at commit {measured['commit']}"
    else:
        line += "; branch coverage: not measured here (make coverage)"
    if share < floor:
        print(f"{line}\nfewer public definitions have a docstring than at the last commit: write them")
        return 1
    if share > floor + 0.5:
        print(f"raise `documented` in pyproject.toml to {int(share * 10) / 10}")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
