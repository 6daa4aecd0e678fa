"""Train a byte-level GPT with several residual connections and compare them.

The same model (same initial weights, same batches) is trained in turn with the plain residual
connection, with unconstrained hyper-connections (HC, arXiv 2409.19606) and with
manifold-constrained hyper-connections (mHC, arXiv 2512.24880), by default on the sources of the
Python standard library; --connections has others. Ends with a table, a figure (train_gpt.png) and
the records (records.csv, summary.json). With --preset h200 the model is a larger one for an H200,
each run has checkpoints, and --resume goes on where an earlier call stopped.
"""

import argparse
import time

import tyro
from gpt import report, text, training
from gpt.settings import PRESETS, Settings, check
from rich.console import Console


def main(settings: Settings) -> None:
    """Run the comparison."""
    start = time.perf_counter()
    deadline = start + 60 * settings.minutes
    check(settings)
    *data, of_text = text.load(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"text: {of_text}")
    runs, results = [], []
    for seed in settings.seeds:
        for connection in settings.connections:
            told = training.train(connection, seed, settings, data, console, deadline)
            if told is None:
                console.print("Time is up. The same command with --resume goes on from here.")
                return
            names = dict(connection=connection, seed=seed)
            runs.append(names | told)
            results.append(names | training.summarize(told, settings))
    report.save(runs, results, settings, of_text)
    console.print(f"\n{report.describe(settings)}")
    console.print(report.make_table(results))
    console.print(
        "Losses in nats a byte. A composite gain of 1 means that the residual path neither "
        "amplifies nor damps over the whole depth."
    )
    console.print(f"{time.perf_counter() - start:.0f} s in all. Now look at", end=" ")
    console.print(settings.out / "train_gpt.png", soft_wrap=True)


def parse() -> Settings:
    """The options; the preset among them says what the others are by default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="demo")
    preset = parser.parse_known_args()[0].preset
    return tyro.cli(Settings, description=__doc__, default=PRESETS.get(preset, Settings()))


if __name__ == "__main__":
    main(parse())
