"""Tables: print those of the results, or write them into docs/performance.md.

    python -m benchmarks.tables                 # print all
    python -m benchmarks.tables --write         # into the page, between its marks
    python -m benchmarks.tables --check         # fail when the page shows something else

A table has a row for everything that the benchmark is asked for, and "not run" where no result has it; a table without
any result is one line with the commands that make it. The last columns are the load of the machine and the number of
the run; the lines below say its device, versions, date, command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.specs import LOAD, TABLES, Column, Row
from nvit_jax.errors import UserError
from nvit_jax.files import read_json, write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def cell(row: Row, column: Column) -> str:
    """A number, "not run" with the reason where a rival says one, or nothing where there is nothing to say."""
    value: Any = row
    for name in column.path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is not None:
        return column.show(value)
    why = row.get("not_run")
    if isinstance(why, dict):
        why = why.get(column.rival)
    return f"not run: {why}".replace("|", "/") if why else ""


def commands(name: str, platform: str) -> list[str]:
    """Those that make a table whole."""
    return [f"python -m benchmarks.{name} {words}".rstrip() for words in TABLES[name].words.get(platform, ("",))]


def table(name: str, platform: str, rows: Sequence[Row]) -> str:
    """In Markdown, with its runs and the commands of what is missing below; these alone where nothing has been run."""
    spec = TABLES[name]
    missing = "\n\n".join(f"Not run yet: `{command}`" for command in commands(name, platform))
    if not rows:
        return missing
    key = lambda row: tuple(str(row.get(k, "")) for k in spec.keys)  # noqa: E731
    found = {key(row): row for row in rows}
    wanted = {key(row): row for row in spec.expected.get(platform, [])}
    shown = [(k, found.get(k)) for k in wanted] + [(k, row) for k, row in found.items() if k not in wanted]
    runs: dict[str, int] = {}
    columns = (*spec.columns, LOAD)
    titles = [*spec.keys, *(column.title for column in columns), "run"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name_of, row in shown:
        if row is None:
            cells = ["not run", *[""] * len(columns)]
        else:
            number = runs.setdefault(describe(row["run"]), len(runs) + 1)
            cells = [*(cell(row, column) for column in columns), str(number)]
        lines.append(f"| {' | '.join([*name_of, *cells])} |")
    lines += ["", *(f"{number}. {text}" for text, number in runs.items())]
    if not wanted.keys() <= found.keys():
        lines += ["", missing]
    return "\n".join(lines)


def describe(run: Row) -> str:
    """Device, versions, date, load and command of a run."""
    names = ("nvit_jax", "jax", "torch", "onnxruntime")
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in names if name in run["versions"])
    settings = "".join(f", {name}={value}" for name, value in run["settings"].items())
    return f"{run['device']}; {versions}; {run['date']}{settings}: `{run['command']}`"


def load_rows(name: str, platform: str) -> list[Row]:
    """Of a result; none where it does not exist."""
    path = RESULTS / f"{name}_{platform}.json"
    rows: list[Row] = read_json(path)["rows"] if path.exists() else []
    return rows


def blocks() -> dict[str, str]:
    """{"inference cpu": its table, ...}"""
    return {
        f"{name} {platform}": table(name, platform, load_rows(name, platform))
        for name, spec in TABLES.items()
        for platform in spec.expected
    }


def filled(text: str, found: dict[str, str]) -> str:
    """The page with the tables between their marks. UserError for a mark without a table, or a table without a mark."""
    for name, content in found.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        if begin not in text:
            raise UserError(f" has no mark {begin.strip()}", str(PAGE))
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content}\n\n{end}{rest.partition(end)[2]}"
    return text


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--write", action="store_true", help="into the page")
    found.add_argument("--check", action="store_true", help="that the page shows what the results say")
    return found


def main(words: Sequence[str]) -> None:
    """Print, write or compare."""
    options = parser().parse_args(words)
    found = blocks()
    if not (options.write or options.check):
        for name, content in found.items():
            print(f"{name}\n\n{content}\n")
        return
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old, found)
    if options.check and new != old:
        raise UserError(" does not show the results; python -m benchmarks.tables --write", str(PAGE))
    if options.write:
        write_text(PAGE, new)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
