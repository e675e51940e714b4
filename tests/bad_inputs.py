"""bad_inputs.txt, read: commands with something wrong, what is prepared for each, and the one line that answers it.

    # A kind of mistake
    set W/summary.json dense.top1 "high"     (before the command: set drop cut deep write remove)
    $ run --config tiny.py --workdir W --stage report
    error: ...

`PYTHONPATH=tests python -m tests.run.test_bad_inputs` runs all of them and writes the lines anew, to be read before
they are committed.
"""

import json
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

FILE = pathlib.Path(__file__).with_name("bad_inputs.txt")


class Case(NamedTuple):
    """One command."""

    kind: str
    edits: tuple[str, ...]
    command: str
    line: str

    def words(self) -> list[str]:
        r"""The command line; \x00 and \udcff stand for what cannot be typed."""
        words = shlex.split(self.command)
        return [w.encode().decode("unicode_escape") if "\\" in w else w for w in words]


def cases(text: str | None = None) -> Iterator[Case]:
    """All of bad_inputs.txt, in order."""
    kind, edits, command = "", [], ""
    for line in (FILE.read_text(encoding="utf-8") if text is None else text).splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line.startswith("$ "):
            command = line[2:]
        elif line.startswith("error: "):
            yield Case(kind, tuple(edits), command, line)
            edits = []
        elif line:
            edits.append(line)


def counts() -> dict[str, int]:
    """How many there are of each kind."""
    found: dict[str, int] = {}
    for case in cases():
        found[case.kind] = found.get(case.kind, 0) + 1
    return found


def markdown() -> list[str]:
    """How many there are of each kind, with one of them: the table of docs/errors.md."""
    first: dict[str, str] = {}
    for case in cases():
        first.setdefault(case.kind, case.line.replace("|", r"\|"))
    rows = [f"| {kind} | {count} | `{first[kind]}` |" for kind, count in counts().items()]
    total = sum(counts().values())
    return ["| kind | tested | one of them |", "|---|---|---|", *rows, "", f"Together these are {total} bad inputs."]


def prepare(edit: str) -> None:
    """Make one edit, below the working directory."""
    what, name, *rest = edit.split(" ", 2)
    path, text = pathlib.Path(name), rest[0] if rest else ""
    if what == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.encode().decode("unicode_escape"))
    elif what == "cut":
        # Of JSON the beginning, which stays the same when there are more keys.
        kept = 40 if path.suffix.startswith(".json") else path.stat().st_size * 2 // 5
        path.write_bytes(path.read_bytes()[:kept])
    elif what == "deep":
        path.write_text("[" * 100_000)
    elif what == "remove":
        path.unlink()
    else:
        key, _, value = text.partition(" ")
        content = json.loads(path.read_text())
        *parents, last = key.split(".")
        node: Any = content
        for parent in parents:
            node = node[parent]
        if what == "set":
            node[last] = json.loads(value)
        else:
            del node[last]
        path.write_text(json.dumps(content))
