"""Report of the installation, and of why fused kernels are used or not: `python -m jax_mhc.info`.

With `--streams` and `--hidden` the report is of one configuration: the kernels that its calls get
on a GPU, and what was measured of them. `--json` gives the same as JSON. Please add the report of
the installation to bug reports.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import sys
from importlib import metadata
from typing import Any

import jax

from jax_mhc import _errors, presets
from jax_mhc._call import dispatch, faster, library
from jax_mhc._errors import Refusal
from jax_mhc._limits import KERNEL_DTYPES, MAX_PERMUTED_STREAMS, MAX_STREAMS

_MOST_TOKENS = 1 << 30

SCHEDULES = ("immediate", "delayed")
CONSTRAINTS = ("birkhoff", "none", "identity", "permutations", "static", "head")


def collect() -> dict[str, Any]:
    """Describes the installation. Starts JAX's default backend, asks the CUDA driver, never raises.

    Returns:
        A dictionary that `json.dumps` takes:

        - `versions` of jax-mhc, jax, jaxlib and Python, and `os`;
        - `devices`: their number by platform, and `devices_error` where JAX finds none;
        - `library`: what the shared library tells of itself (version, commit, version of XLA's FFI,
          architecture, the instruction set that the kernels use here, its handlers by platform),
          its `path`, and the `error` that keeps it from being used;
        - `cuda`: the GPU `architectures` that the library holds kernels for and their `compiler`,
          the version of CUDA that the `driver` is for, `devices` (name, compute capability, and the
          `error` that keeps one from being used) and the `error` that keeps all of them from it;
        - `fused`: for the CPU and JAX's default platform, "registered" or the reason why the
          kernels are not.
    """
    devices: dict[str, int] = {}
    devices_error = None
    platforms = ["cpu"]
    try:
        devices = dict(collections.Counter(device.platform for device in jax.devices()))
        platforms += [dispatch.default_platform()]
    except RuntimeError as error:
        devices_error = str(error)
    return {
        "versions": {
            "jax-mhc": _version("jax-mhc"),
            "jax": _version("jax"),
            "jaxlib": _version("jaxlib"),
            "Python": platform.python_version(),
        },
        "os": platform.platform(),
        "devices": devices,
        "devices_error": devices_error,
        "library": library.status(),
        "cuda": library.cuda_status(),
        "fused": {name: library.missing(name) or "registered" for name in platforms},
    }


def configuration(
    streams: int,
    hidden: int,
    dtype: str = "bfloat16",
    constraint: str = "birkhoff",
    *,
    norm: bool = False,
    schedule: str = "immediate",
    tokens: int = 8192,
    capability: str | None = None,
) -> dict[str, Any]:
    """Describes what a configuration gets on an NVIDIA GPU.

    Args:
        streams: n, from 1 to 16.
        hidden: C.
        dtype: of the streams.
        constraint: that of the config; "static" for static coefficients, "head" for a head.
        norm: whether the layer's input is normalised.
        schedule: that of the config. In the delayed one the norm is plain JAX, and no call has it.
        tokens: their number.
        capability: compute capability of the GPU, such as "9.0"; None: that of the GPU here.

    Returns:
        A dictionary that `json.dumps` takes:

        - `configuration` and `gpu`, as text;
        - `implementation`: "fused" or "reference", what None takes there;
        - `measured`: the nearest configuration that was measured, on which `gpu`, and the
          microseconds of a sublayer with its gradients: `fused_us`, `plain_us`;
        - `calls`: of each call of the sublayer its `schedule` and `kernels`, by the call's name.

    Raises:
        ValueError: sizes or names out of range, no GPU here and no capability, or a GPU for which
            there are no kernels.
        RuntimeError: the shared library cannot be used.
    """
    op = "info.configuration"
    _errors.choice(op, "dtype", dtype, KERNEL_DTYPES["cuda"])
    _errors.choice(op, "constraint", constraint, CONSTRAINTS)
    most = MAX_PERMUTED_STREAMS if constraint == "permutations" else MAX_STREAMS
    _errors.integer(op, "streams", streams, 1, most, "The number of streams is small.")
    _errors.width(op, hidden)
    _errors.integer(op, "tokens", tokens, 0, _MOST_TOKENS, "The kernels take no more.")
    _errors.choice(op, "schedule", schedule, SCHEDULES)
    is_delayed, is_head = schedule == "delayed", constraint == "head"
    if is_head and is_delayed:
        raise Refusal(ValueError, op, "schedule").expected(
            "'immediate' with constraint 'head'", "'delayed'", "The delayed schedule has no head."
        )
    if is_head and norm:
        raise Refusal(ValueError, op, "norm").expected(
            "none with constraint 'head'", "one", "Leave it out: a head normalises nothing."
        )
    gpu, number = _gpu(capability)
    calls = {
        name: library.plan(
            name,
            dtype,
            tokens,
            streams,
            hidden,
            constraint="birkhoff" if constraint in ("static", "head") else constraint,
            sinkhorn_iters=presets.PAPER.sinkhorn_iters,
            dynamic=constraint != "static",
            norm=norm and not is_delayed,
            given=is_delayed,
            capability=number,
        )
        for of_op in (["head"] if is_head else ["pre", "post", "post_pre"])
        for name in (f"{of_op}_fwd", f"{of_op}_bwd")
    }
    own = faster.Configuration(streams, hidden, dtype, tokens, constraint, norm)
    row = faster.nearest(own)
    measured = None
    if row is not None:
        measured = {
            "configuration": str(row.configuration),
            "gpu": faster.description()["gpu"],
            "fused_us": row.fused_us,
            "plain_us": row.plain_us,
        }
    return {
        "configuration": str(own),
        "gpu": gpu,
        "implementation": "reference" if faster.plain(own) else "fused",
        "measured": measured,
        "calls": calls,
    }


def _gpu(capability: str | None) -> tuple[str, tuple[int, int]]:
    """A GPU as text, and its compute capability."""
    remedy = "Name the compute capability of a GPU: --capability 9.0 for an H100 or H200."
    name = f"compute capability {capability}"
    if capability is None:
        devices = library.cuda_status()["devices"]
        usable = [device for device in devices if device["error"] is None]
        if not usable:
            raise Refusal(ValueError, "info.configuration", "capability").expected(
                "an NVIDIA GPU that can be used", "none", remedy
            )
        capability = usable[0]["capability"]
        name = f"{usable[0]['name']}, compute capability {capability}"
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise Refusal(ValueError, "info.configuration", "capability").expected(
            "two numbers, such as 9.0", capability, remedy
        )
    return name, (int(major), int(minor))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _lines(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            text = "\n".join(map(_line, value)) if isinstance(value, list) else str(value)
            first, *rest = text.split("\n")
            lines += [f"{indent}{name:<18} {first}", *(f"{indent}{'':<18} {line}" for line in rest)]
    return lines


def _line(value: Any) -> str:
    """An element of a list."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {field}" for name, field in value.items())
    return str(value)


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_mhc.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    of_one = parser.add_argument_group("one configuration")
    of_one.add_argument("--streams", type=int, help="n")
    of_one.add_argument("--hidden", type=int, help="C")
    of_one.add_argument("--dtype", default="bfloat16", help=", ".join(KERNEL_DTYPES["cuda"]))
    of_one.add_argument("--constraint", default="birkhoff", help=", ".join(CONSTRAINTS))
    of_one.add_argument("--norm", action="store_true", help="the layer's input is normalised")
    of_one.add_argument("--schedule", default="immediate", help=", ".join(SCHEDULES))
    of_one.add_argument("--tokens", type=int, default=8192, help="their number")
    of_one.add_argument("--capability", help="of a GPU, such as 9.0; that of the GPU here")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    if given["streams"] is None and given["hidden"] is None:
        asked = {name for name, value in given.items() if value != parser.get_default(name)}
        if asked:
            parser.error(
                f"--streams and --hidden: expected both with --{', --'.join(sorted(asked))}"
            )
        described = collect()
    elif None in (given["streams"], given["hidden"]):
        parser.error("--streams and --hidden: expected both, got one")
    else:
        try:
            described = configuration(**given)
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))
    print(json.dumps(described, indent=2) if as_json else "\n".join(_lines(described)))


if __name__ == "__main__":
    _main(sys.argv[1:])
