"""Comments of Python source, by the statement that they explain."""

import ast
import io
import tokenize


class Comments:
    """The comments of a piece of source: behind a statement, and in the lines right above it."""

    def __init__(self, source: str) -> None:
        self._behind: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        lines = source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and not token.string.startswith("# noqa"):
                row, column = token.start
                own_line = not lines[row - 1][:column].strip()
                (self._alone if own_line else self._behind)[row] = token.string.lstrip("#: ").strip()

    def behind(self, node: ast.stmt) -> str:
        """What stands behind a statement, on any of its lines."""
        rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        return " ".join(self._behind[row] for row in rows if row in self._behind)

    def above(self, node: ast.stmt) -> str:
        """The comment lines that end right above a statement."""
        row, found = node.lineno - 1, []
        while row in self._alone:
            found.append(self._alone[row])
            row -= 1
        return " ".join(reversed(found))

    def of(self, node: ast.stmt) -> str:
        """Both, as one text."""
        return _joined(self.above(node), self.behind(node))


def _joined(first: str, second: str) -> str:
    if not first or not second:
        return first or second
    return f"{first.rstrip('.')}. {second}"
