"""One door to the benchmarks: `python -m benches` lists them, `python -m benches <name>` runs one.

What follows the name goes to the benchmark, which says with --help what it takes. Each can also be
run as a script, and imports its neighbours as a script does.
"""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

# gpu.py runs first_call.py and peers.py itself.
PROGRAMS = (
    "cpu", "gpu", "configurations", "batches", "train_step", "recompute", "diagnostics_step",
    "mesh_step", "pipeline_step", "training", "plots",
)  # fmt: skip


def listing() -> str:
    """The programs, each with the first line of its docstring."""
    lines = ["python -m benches <name> [--help | options]", ""]
    for name in PROGRAMS:
        text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
        lines.append(f"{name:18}{text.splitlines()[0]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return
    name, *options = arguments
    if name not in PROGRAMS:
        sys.exit(f"benches: name: expected one of {', '.join(PROGRAMS)}, got {name}.")
    script = FOLDER / f"{name}.py"
    sys.argv = [str(script), *options]
    sys.path[0] = str(FOLDER)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
