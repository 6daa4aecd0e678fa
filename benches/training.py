"""Makes a record of a comparison that examples/train_gpt.py has written.

    python examples/train_gpt.py --preset h200 --out results
    python benches/training.py --comparison results

writes benches/results/<gpu>/<date>-training.json and .md: the options, a table, and of each run
what was measured on held-out text. Run it on the machine that trained.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import common
import tyro
from tabulate import tabulate

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from gpt.report import STYLES, columns  # noqa: E402 - found by the line above

__all__ = ["STYLES", "describe", "table"]


@dataclasses.dataclass
class Options:
    """What to read and where to write."""

    comparison: Path
    """Folder in which train_gpt.py left summary.json."""
    output: Path = Path("benches/results")
    """Folder for the record, in <gpu>/."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""


def describe(record: dict[str, Any]) -> str:
    """The configuration in a line."""
    s = record["settings"]
    return (
        f"{s['depth']} blocks ({2 * s['depth']} sublayers), width {s['width']}, "
        f"{s['heads']} heads, "
        f"{s['streams']} streams, {s['dtype']}; {s['steps']} steps of {s['batch']} × {s['seq']} "
        f"bytes, learning rate {s['learning_rate']:g}; seeds {', '.join(map(str, s['seeds']))}. "
        f"Text: {record['text']}"
    )


def table(record: dict[str, Any]) -> str:
    """A row for each connection: means over the seeds, ± half of their range."""
    kept = {
        "num_params": "parameters",
        "validation_loss": "validation loss",
        "beside_residual": "beside plain residual",
        "max_grad_norm": "largest gradient norm",
        "max_gain_forward": "largest gain forward",
        "max_gain_backward": "backward",
        "tokens_per_s": "1000 tokens/s",
    }
    results = record["results"]
    of_residual = {
        r["seed"]: r["validation_loss"] for r in results if r["connection"] == "residual"
    }
    for result in results:
        result["beside_residual"] = result["validation_loss"] - of_residual[result["seed"]]
    styles = ",.0f", ".4f", "+.4f", ".3g", ".4g", ".4g", ",.0f"
    rows = [
        [label, len([r for r in results if STYLES[r["connection"]][0] == label]), *cells]
        for label, cells in columns(results, list(zip(kept, styles, strict=True)))
    ]
    headers = ["connection", "seeds", *kept.values()]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(options: Options) -> None:
    summary = json.loads((options.comparison / "summary.json").read_text())
    for result in summary["results"]:
        result["tokens_per_s"] /= 1e3
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        **summary,
    }
    if not record["commit"]:
        raise SystemExit("training.py: expected a git repository, got none; give --commit")
    text = "\n".join(
        [
            f"# Training with several residual connections, {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). {describe(record)}. Means over the seeds, ± half of "
            "their range.",
            "",
            table(record),
            "",
        ]
    )
    print(text)
    common.write(record, text, options.output / common.gpu_folder(record), "-training")


if __name__ == "__main__":
    main(tyro.cli(Options))
