"""The shared library with the fused kernels: checked, loaded and registered on import.

Programs that were exported or compiled elsewhere hold calls of these handlers, and run in processes
that trace no op; so the handlers of all platforms are there once the package is imported. That
takes 2 ms, starts no backend and no thread, and leaves the CUDA driver alone, which is asked when
an op is traced for an NVIDIA GPU. XLA refuses a handler that it does not know how to call when a
backend starts, and then no JAX program runs at all; so everything is checked before anything is
registered.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import re
import struct
import sys
import threading
from importlib import metadata
from pathlib import Path
from platform import machine
from typing import Any, TypedDict

import jax
import jaxlib.version

OLDEST_JAXLIB = (0, 9)

_PATH = Path(__file__).parents[1] / (
    "libjax_mhc_xla" + (".dylib" if sys.platform == "darwin" else ".so")
)


class DescribedCall(TypedDict):
    """A row as the library describes it."""

    name: str
    operands: list[DescribedValue]
    results: list[DescribedValue]
    adds_in_place: bool
    has_config: bool
    attributes: list[dict[str, str]]


class DescribedValue(TypedDict):
    """A value as the library describes it."""

    name: str
    precision: str
    has_tokens: bool
    dims: list[str]
    group: str | None


class Handler(TypedDict, total=False):
    """A handler as the library describes it: one function, or one for each stage of a call."""

    name: str
    platform: str
    address: int
    initialize: int
    execute: int


class Description(TypedDict):
    """The library's description of itself, as far as it is read here; docs/calls.md has more."""

    version: str
    target_version: int
    calls: list[DescribedCall]
    handlers: list[Handler]
    retired: list[Handler]


class Device(TypedDict):
    """An NVIDIA GPU, and what keeps it from being used."""

    name: str
    capability: str
    error: str | None


class DescribedPlan(TypedDict):
    """The plan of a call on an NVIDIA GPU: its schedule, and symbols of kernels in their order."""

    schedule: str
    kernels: list[str]


class CudaStatus(TypedDict):
    """Report of the library on NVIDIA GPUs; see `cuda_status`."""

    architectures: list[str]
    compiler: str | None
    driver: str | None
    devices: list[Device]
    error: str | None


_lock = threading.RLock()
# The library's description, or the reason why there is none; None before it is registered.
_outcome: Description | str | None = None
# The reason why no kernels run on NVIDIA GPUs, "" where they do; None before one is asked for.
_cuda_outcome: str | None = None


def description() -> Description:
    """The library's description of itself: its calls, their limits, the handlers.

    Raises:
        RuntimeError: the library cannot be used.
    """
    outcome = _load_once()
    if isinstance(outcome, str):
        raise RuntimeError(f"jax_mhc: no fused kernels: {outcome}")
    return outcome


def target_name(call: str) -> str:
    """The name under which XLA knows a call such as `pre_fwd`.

    It ends in the version of the table of calls, since compiled programs outlive the library.
    """
    return f"jax_mhc_{call}_v{description()['target_version']}"


def register() -> None:
    """Registers the handlers of all platforms with XLA, once in a process; never raises an error.

    What keeps the library from being used comes to light where an op is traced.
    """
    _load_once()


def ensure_registered(platform: str) -> None:
    """Sees to it that the kernels can run on a platform.

    Args:
        platform: `cpu` or `cuda`.

    Raises:
        RuntimeError: there are no fused kernels here, and why. The same error comes at every call;
            JAX itself stays usable.
    """
    if reason := missing(platform):
        raise RuntimeError(
            f"jax_mhc: no fused kernels: {reason}. implementation='reference' works without them, "
            "and python -m jax_mhc.info shows what is installed."
        )


def missing(platform: str) -> str | None:
    """Reason why there are no fused kernels for `platform`; None where they can run."""
    outcome = _load_once()
    if isinstance(outcome, str):
        return outcome
    if platform == "cuda":
        return _cuda_once() or None
    if not _handlers(outcome, platform):
        return f"this build of jax-mhc has none for platform {platform!r}"
    return None


def broken() -> str | None:
    """Reason why the shared library cannot be used at all; None where it can."""
    outcome = _load_once()
    return outcome if isinstance(outcome, str) else None


@functools.cache
def is_left_out() -> bool:
    """True if what is installed is the wheel of Python alone, which has no library by design."""
    try:
        wheel = metadata.distribution("jax-mhc").read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return False
    return "Root-Is-Purelib: true" in wheel and not _PATH.exists()


def status() -> dict[str, Any]:
    """Report of the library on itself, or the error that keeps it from being used.

    Loads it, and never raises.
    """
    outcome = _load_once()
    fields = ("version", "commit", "ffi_api_version", "architecture", "instruction_set", "log")
    found: dict[str, Any] = {"path": str(_PATH)}
    if isinstance(outcome, str):
        return found | dict.fromkeys(fields) | {"handlers": {}, "error": outcome}
    handlers = {
        platform: [handler["name"] for handler in _handlers(outcome, platform)]
        for platform in sorted(set(map(_platform, outcome["handlers"])))
    }
    return (
        found
        | {field: outcome.get(field) for field in fields}
        | {"handlers": handlers, "error": None}
    )


def cuda_status() -> CudaStatus:
    """Report of the library on NVIDIA GPUs: asks the driver, and never raises.

    Returns:
        `architectures` that it holds kernels for and the `compiler` that made them; the `driver`'s
        version of CUDA; `devices`, each with name, compute capability and the `error` that keeps it
        from being used; the `error` that keeps all of them from it.
    """
    reason = broken()
    if reason is None:
        get_status = ctypes.CDLL(str(_PATH)).jax_mhc_cuda_status
        get_status.restype = ctypes.c_char_p
        if status := get_status():
            return json.loads(status)
        reason = "the shared library cannot tell what there is of CUDA"
    return {"architectures": [], "compiler": None, "driver": None, "devices": [], "error": reason}


@functools.cache
def workspace(
    call: str,
    element_bytes: int,
    streams: int,
    hidden: int,
    columns: int,
    sinkhorn_iters: int,
    norm_width: int,
    given: int,
) -> tuple[int, int]:
    """Scratch memory of a call on an NVIDIA GPU: float32 numbers for each token, and beside them.

    Needs no GPU.

    Args:
        call: a call such as `pre_fwd`.
        element_bytes: of the streams' dtype.
        streams: n.
        hidden: C; n for a call that takes logits alone.
        columns: of phi; 0 where there is none.
        sinkhorn_iters: of the config; 0 where there is none.
        norm_width: values of norm_scale; 0 where there are none.
        given: 1 where the weights of the streams in u are given, or 0.

    Raises:
        RuntimeError: the library knows no such call.
    """
    get_workspace = ctypes.CDLL(str(_PATH)).jax_mhc_workspace
    get_workspace.restype = ctypes.c_bool
    numbers = (element_bytes, streams, hidden, columns, sinkhorn_iters, norm_width, given)
    out = (ctypes.c_int64 * 2)()
    if not get_workspace(call.encode(), *map(ctypes.c_int64, numbers), out):
        raise RuntimeError(f"jax_mhc: {call}{numbers}: the shared library knows no such CUDA call")
    return out[0], out[1]


def plan(
    call: str,
    dtype: str,
    tokens: int,
    streams: int,
    hidden: int,
    *,
    constraint: str,
    sinkhorn_iters: int,
    dynamic: bool,
    norm: bool,
    given: bool,
    capability: tuple[int, int],
) -> DescribedPlan:
    """The plan of a call with aligned operands on a GPU of a compute capability; needs no GPU.

    Args:
        call: a call such as `pre_fwd`.
        dtype: of the streams.
        tokens: their number.
        streams: n.
        hidden: C.
        constraint: of the config, as its `sinkhorn_iters`.
        sinkhorn_iters: the iterations.
        dynamic: whether coefficients are those of each token.
        norm: whether the layer's input is normalised.
        given: whether the weights of the streams in u are given.
        capability: of the GPU.

    Raises:
        RuntimeError: the library cannot be used.
        ValueError: there are no kernels for such GPUs in this build, or no call of such sizes.
    """
    description()
    asked = json.dumps(dict(locals()))
    tell = ctypes.CDLL(str(_PATH)).jax_mhc_plan
    tell.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(1 << 14)
    length = tell(asked.encode(), out, ctypes.c_size_t(len(out)))
    if not 0 < length <= len(out):
        raise RuntimeError(f"jax_mhc: the shared library cannot tell the plan of {asked}")
    told: Any = json.loads(out.value)
    if "error" in told:
        raise ValueError(told["error"])
    found: DescribedPlan = told
    return found


def _platform(handler: Handler) -> str:
    """XLA writes `CUDA`; everybody else, `cuda`."""
    return handler["platform"].lower()


def _handlers(library: Description, platform: str) -> list[Handler]:
    return [handler for handler in library["handlers"] if _platform(handler) == platform]


def _load_once() -> Description | str:
    global _outcome, _cuda_outcome
    with _lock:
        if _outcome is None:
            try:
                library = _load()
                _register(library, "cpu")
                try:
                    _register(library, "cuda")
                except _Unusable as error:
                    _cuda_outcome = str(error)
            except _Unusable as error:
                _outcome = str(error)
            else:
                # Only now: what Ctrl-C interrupts starts over.
                _outcome = library
        return _outcome


def _cuda_once() -> str:
    global _cuda_outcome
    with _lock:
        if _cuda_outcome is None:
            try:
                _check_devices(cuda_status())
                _cuda_outcome = ""
            except _Unusable as error:
                _cuda_outcome = str(error)
        return _cuda_outcome


class _Unusable(Exception):
    """The reason why the library is not to be used."""


def _load() -> Description:
    """The library's description of itself."""
    oldest = ".".join(map(str, OLDEST_JAXLIB))
    found = re.match(r"(\d+)\.(\d+)", jaxlib.version.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_JAXLIB:
        raise _Unusable(
            f"expected jaxlib {oldest} or newer, got {jaxlib.version.__version__}; "
            f"run pip install --upgrade 'jax>={oldest}'"
        )
    if is_left_out():
        raise _Unusable(
            "this is the wheel of jax-mhc without kernels; on Linux and macOS they come with pip "
            "install --force-reinstall --no-deps --no-binary jax-mhc jax-mhc, which needs Rust and "
            "a C++ compiler"
        )
    reinstall = "reinstall jax-mhc (in a checkout: pip install .)"
    if not _PATH.exists():
        raise _Unusable(f"{_PATH} is missing; {reinstall}")
    if not _is_whole(_PATH):
        raise _Unusable(f"{_PATH} is cut off; {reinstall}")
    built_for = _machine(_PATH)
    if built_for not in (None, machine()):
        raise _Unusable(f"{_PATH} is for {built_for}, and this machine is {machine()}; {reinstall}")
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        raise _Unusable(
            f"{_PATH} cannot be loaded on this machine ({error}); {reinstall}"
        ) from error
    try:
        describe = library.jax_mhc_describe
        describe.restype = ctypes.c_char_p
        description = json.loads(describe() or b"null")
        version, _, _ = (description[key] for key in ("version", "target_version", "limits"))
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise _Unusable(f"{_PATH} is not the library of jax-mhc; {reinstall}") from error
    expected = metadata.version("jax-mhc")
    if version != expected:
        raise _Unusable(
            f"expected version {expected}, got version {version} in {_PATH}; {reinstall}"
        )
    return description


def _machine(path: Path) -> str | None:
    """The machine that an ELF library is for; None where it is another format or another machine.

    Loaders say of one for another machine that there is no such file.
    """
    with path.open("rb") as file:
        header = file.read(20)
    if header[:6] != b"\x7fELF\x02\x01":
        return None
    (number,) = struct.unpack_from("<H", header, 18)
    return {62: "x86_64", 183: "aarch64"}.get(number)


def _is_whole(path: Path) -> bool:
    """True if a file has all bytes that an ELF library says it has.

    To touch those that a truncated one lacks would end the process (SIGBUS). Other formats are left
    to their loaders, which check it themselves.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":  # of 64 bits, little-endian
            return not b"\x7fELF\x02\x01".startswith(header[:6])
        if len(header) < 64:
            return False
        start, sections, size, num, *of_sections = struct.unpack_from("<32xQQ6xHHHH", header)
        file.seek(start)
        table = file.read(size * num)
        length = file.seek(0, 2)
    if len(table) < size * num or length < sections + math.prod(of_sections):
        return False
    # Of each segment its offset in the file and its size there.
    segments = (struct.unpack_from("<8xQ16xQ", table, at * size) for at in range(num))
    return all(offset + bytes_there <= length for offset, bytes_there in segments)


def _check_devices(status: CudaStatus) -> None:
    """Every GPU must do: which of them a program runs on is not known when it is traced."""
    if status["error"]:
        raise _Unusable(status["error"])
    for index, device in enumerate(status["devices"]):
        if device["error"]:
            raise _Unusable(
                f"GPU {index}, {device['name']} of compute capability {device['capability']}: "
                f"{device['error']}; where there are others, hide it with CUDA_VISIBLE_DEVICES"
            )


def _register(library: Description, platform: str) -> None:
    retired = [h for h in library.get("retired", ()) if _platform(h) == platform]
    for handler in [*_handlers(library, platform), *retired]:
        # A handler is one function, or one for each stage of a call.
        stages = {
            stage: jax.ffi.pycapsule(handler[stage])
            for stage in ("initialize", "execute")
            if stage in handler
        }
        try:
            jax.ffi.register_ffi_target(
                handler["name"],
                stages or jax.ffi.pycapsule(handler["address"]),
                platform=handler["platform"],
            )
        except Exception as error:  # JAX raises errors of several types here
            raise _Unusable(f"XLA refused {handler['name']} ({error})") from error
