"""List the benchmarks, one line each."""

import ast
from pathlib import Path

COMMANDS = (
    "inference",
    "training",
    "scores",
    "decision",
    "waiting",
    "growth",
    "memory",
    "parts",
    "attention",
    "finetuned",
    "check",
    "tables",
)


def first_line(name: str) -> str:
    """What a command does, from the first line of its docstring."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def main() -> None:
    """Print the list."""
    for name in COMMANDS:
        print(f"python -m benchmarks.{name:<10} {first_line(name)}")
    print("\nEach has --help. Results lie in benchmarks/results/; `bash benchmarks/gpu.sh` runs what a GPU can show.")


if __name__ == "__main__":
    main()
