"""Report of the installation, and of why fused kernels are used or not: `python -m jax_mhc.info`.

`--json` gives the same as JSON. Please add either to bug reports.
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

from jax_mhc._call import dispatch, library


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
    if parser.parse_args(arguments).json:
        print(json.dumps(collect(), indent=2))
    else:
        print("\n".join(_lines(collect())))


if __name__ == "__main__":
    _main(sys.argv[1:])
