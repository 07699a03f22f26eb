"""Runs a notebook top to bottom and keeps the pictures that its cells end with.

    python tests/notebook.py colab/mergevq.ipynb steps="4, 16" --skip 1 --out docs/colab_mergevq.png

`name=value` replaces the value of a form field. The cell that installs the library is left out.
"""

import argparse
import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

INSTALL = "install"  # id of the cell that installs the library
FIELD = re.compile(r"^(?P<name>\w+) = (?P<value>.*?)  # @param(?P<form>.*)$", re.MULTILINE)
GAP = 8  # pixels between pictures


def code_cells(path: Path) -> dict[str, str]:
    """Source of each code cell by the cell's id."""
    cells = json.loads(path.read_text())["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def fields(source: str) -> dict[str, Any]:
    """Names and values of the form fields in a cell."""
    return {match["name"]: ast.literal_eval(match["value"]) for match in FIELD.finditer(source)}


def with_values(cells: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """The cells with other values of form fields.

    Raises:
        ValueError: a name that is not the name of exactly one field.
    """
    names = [name for source in cells.values() for name in fields(source)]
    if wrong := [name for name in values if names.count(name) != 1]:
        raise ValueError(f"{', '.join(wrong)}: no such field, or several; there are {', '.join(names)}")

    def replace(match: re.Match) -> str:
        old, new = ast.literal_eval(match["value"]), values.get(match["name"])
        return match[0] if new is None else f"{match['name']} = {type(old)(new)!r}"

    return {name: FIELD.sub(replace, source) for name, source in cells.items()}


def run(cells: Mapping[str, str]) -> list[Image.Image]:
    """Runs cells in one namespace; returns the pictures that they end with."""
    names: dict[str, Any] = {"__name__": "__main__"}
    pictures = []
    for cell, source in cells.items():
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell, "exec"), names)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), cell, "eval"), names)
            pictures += [shown] if isinstance(shown, Image.Image) else []
    return pictures


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """The pictures one below the other."""
    size = max(each.width for each in pictures), sum(each.height + GAP for each in pictures) - GAP
    whole = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + GAP
    return whole


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("values", nargs="*", metavar="name=value")
    parser.add_argument("--out", type=Path, help="PNG of the pictures, one below the other")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first pictures")
    args = parser.parse_args()
    cells = {name: source for name, source in code_cells(args.notebook).items() if name != INSTALL}
    pictures = run(with_values(cells, dict(value.split("=", 1) for value in args.values)))
    print(f"{len(pictures)} pictures")
    if args.out:
        stacked(pictures[args.skip :]).quantize(255).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
