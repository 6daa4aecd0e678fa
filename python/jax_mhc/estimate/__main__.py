"""The command `python -m jax_mhc.estimate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from jax_mhc._stack.remat import Recompute
from jax_mhc.estimate import GPUS, estimate
from jax_mhc.estimate._estimate import CONSTRAINTS, DTYPES


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_mhc.estimate",
        description="What mHC adds to a training step of a model on a GPU: bytes, time, memory.",
        epilog=f"GPUs: {', '.join(GPUS)}.",
    )
    parser.add_argument("--hidden", type=int, required=True, help="C, the width of the model")
    parser.add_argument("--layers", type=int, required=True, help="of the model")
    parser.add_argument("--tokens", type=int, required=True, help="of a step on one GPU")
    parser.add_argument("--streams", type=int, default=4, help="n; default 4")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--constraint", default="birkhoff", help=", ".join(CONSTRAINTS))
    parser.add_argument(
        "--sublayers-per-layer", type=int, default=2, help="connections of a layer; default 2"
    )
    parser.add_argument("--gpu", default="H200", help="a name of those below; default H200")
    parser.add_argument(
        "--bandwidth", type=float, help="GB/s of a copy there, in place of the datasheet's"
    )
    parser.add_argument(
        "--every", default="1", help="sublayers of a stretch of mhc.Recompute, or auto; default 1"
    )
    parser.add_argument(
        "--policy", choices=("streams", "mhc"), default="streams", help="of mhc.Recompute"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = vars(parser.parse_args(arguments))
    as_json, every, policy = given.pop("json"), given.pop("every"), given.pop("policy")
    try:
        every = int(every) if every.isdecimal() else every
        found = estimate(**given, recompute=Recompute(every=every, policy=policy))
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else found)


if __name__ == "__main__":
    _main(sys.argv[1:])
