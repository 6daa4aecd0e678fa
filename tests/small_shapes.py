"""Every small shape through the handlers, against NumPy.

n from 1 to 16, C from 1 to 70, 0 to 17 tokens: all rests that vectors, chunks and tiles leave. The
settings of each are drawn. float64 is compared with the oracle, its gradients with derivatives by
complex steps along one direction of all operands at once. The other dtypes are compared with
float64, on operands that all dtypes can hold.

    python tests/small_shapes.py --record shapes.json
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
from handlers import BFLOAT16, Handlers

STREAMS, HIDDEN, TOKENS = range(1, 17), range(1, 71), range(18)

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}

# The largest error, beside the largest value of the result: what rounding the result to its own
# dtype makes, and so many roundings of a sum's terms, which add up like the root of their number.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
NUM_ROUNDINGS = 16
# Along a direction of all operands: the sum of all products, beside the sum of their magnitudes.
DERIVATIVE_ERROR = 1e-13


# Gradients of parameters: sums over tokens.
SUMS = ("phi", "alpha", "bias", "norm_scale")


class Params(NamedTuple):
    """Parameters as the oracle takes them: phi as [n C, K], None for static coefficients."""

    phi: Any
    alpha: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes of the calls."""

    constraint: str = "birkhoff"
    sinkhorn_iters: int = 20
    sinkhorn_eps: float = 0.0
    sinkhorn_eps_mode: str = "add"
    order: str = "column_row"
    norm_eps: float = 1e-6
    norm_eps_mode: str = "inside"
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    norm_scale_eps: float = 1e-5
    deferred: int = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape with its settings."""

    tokens: tuple[int, ...]
    n: int
    hidden: int
    settings: Settings
    static: bool
    norm: bool
    given: bool
    seed: int

    @property
    def num_coefficients(self) -> int:
        return 2 * self.n + oracle.NUM_RES[self.settings.constraint](self.n)

    @property
    def num_gates(self) -> int:
        return 2 if self.settings.constraint == "identity" else 3

    @property
    def sizes(self) -> dict[str, Any]:
        """The letters of the table of calls, for the calls that are no head's."""
        num = self.num_coefficients
        return {"tokens": self.tokens, "n": self.n, "C": self.hidden, "K": num, "A": self.num_gates}

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of all calls."""
        has = {"dynamic": not self.static, "norm": self.norm, "given": self.given}
        groups = {group: int(is_there) for group, is_there in has.items()}
        return {**dataclasses.asdict(self.settings), **groups}

    @property
    def parameters(self) -> list[str]:
        """The parameters that the calls of pre have."""
        dynamic = [] if self.static else ["phi", "alpha"]
        return [*dynamic, "bias", *(["norm_scale"] if self.norm else [])]

    def weights(self, call: str) -> list[str]:
        """The weights of the streams in u that a call has beside those of its own sublayer."""
        return ["h_given"] if self.given and call.startswith("post_pre") else []


def draw_shapes(num: int | None = None) -> list[Shape]:
    """So many of all of them, always the same, with settings that are drawn."""
    rng = random.Random(0)
    sizes = list(itertools.product(STREAMS, HIDDEN, TOKENS))
    rng.shuffle(sizes)
    return [_with_settings(*size, rng) for size in sizes[:num]]


def _with_settings(n: int, hidden: int, num_tokens: int, rng: random.Random) -> Shape:
    def pick(*values):
        return rng.choice(values)

    # Half of all: the others have no settings of their own.
    constraint = pick("birkhoff", "birkhoff", *oracle.NUM_RES)
    if constraint == "permutations" and n > 4:
        constraint = "birkhoff"
    settings = Settings(
        constraint=constraint,
        sinkhorn_iters=pick(0, 1, 2, 3, 5, 7, 20),
        sinkhorn_eps=pick(0.0, 0.0, 1e-6, 1e-2),
        sinkhorn_eps_mode=pick("add", "clamp"),
        order=pick("column_row", "row_column"),
        norm_eps=pick(1e-6, 1e-2),
        norm_eps_mode=pick("inside", "outside"),
        pre_eps=pick(0.0, 1e-6, 0.1),
        post_scale=pick(2.0, 1.0, 0.5),
        post_eps=pick(0.0, 1e-6, 0.1),
        deferred=pick(0, 1),
    )
    tokens = pick((num_tokens,), (num_tokens, 1), (1, num_tokens))
    if num_tokens == 1:
        tokens = pick(tokens, ())
    static, part = rng.random() < 0.2, rng.random()
    norm, given = part < 0.4, part > 0.6
    return Shape(tokens, n, hidden, settings, static, norm, given, rng.getrandbits(32))


# ---- the calls ----------------------------------------------------------------------------------


def operands(shape: Shape) -> dict[str, np.ndarray]:
    """Operands in float64, each of which every dtype can hold."""
    rng = np.random.default_rng(shape.seed)
    n, hidden, num = shape.n, shape.hidden, shape.num_coefficients

    def draw(*dims, scale=1.0):
        values = np.clip(scale * rng.standard_normal(dims, np.float32), -8, 8)
        return values.astype(BFLOAT16).astype(np.float64)

    tokens = shape.tokens
    scale = 1 / math.sqrt(n * hidden)
    return {
        "x": draw(*tokens, n, hidden),
        "y": draw(*tokens, hidden),
        "h_post": draw(*tokens, n),
        "h_res": draw(*tokens, n, n),
        "phi": draw(n, hidden, num, scale=scale),
        "alpha": draw(shape.num_gates, scale=0.5),
        "bias": draw(num),
        "norm_scale": 1 + draw(hidden, scale=0.125),
        "head.phi": draw(n, hidden, n, scale=scale),
        "head.alpha": draw(1),
        "head.bias": draw(n),
        "h_given": draw(*tokens, n),
        "d_u": draw(*tokens, hidden),
        "d_h_pre": draw(*tokens, n),
        "d_h_post": draw(*tokens, n),
        "d_h_res": draw(*tokens, n, n),
        "d_x_new": draw(*tokens, n, hidden),
    }


def run_calls(handlers: Handlers, shape: Shape, dtype: np.dtype, given) -> dict[str, np.ndarray]:
    """All calls of a dtype; results in float64 as `call.result`."""
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    of_streams = {"x", "y", "d_u", "d_x_new"}
    given = {
        name: value.astype(dtype if name in of_streams else wide) for name, value in given.items()
    }
    given["d_x_in"] = given["d_x_new_in"] = given["d_x_new"]
    settings, sizes = shape.attributes, shape.sizes
    out = {}

    def call(name, more, sizes=sizes, **changed):
        results = handlers.call(name, {**given, **more}, sizes, {**settings, **changed})
        out.update({f"{name}.{key}": value for key, value in results.items()})
        return results

    pre = call("pre_fwd", {})
    call("pre_bwd", {**saved(pre), "h_res": pre["h_res"]})
    call("post_fwd", {})
    call("post_bwd", {})
    post_pre = call("post_pre_fwd", {})
    more = {"u_norm": post_pre["u"], "h_res_new": post_pre["h_res"]}
    call("post_pre_bwd", {**saved(post_pre), **more})

    head = {name: given[f"head.{name}"] for name in ("phi", "alpha", "bias")}
    head_sizes = {**sizes, "K": shape.n, "A": 1}
    forward = call("head_fwd", head, head_sizes)
    call("head_bwd", {**head, "m": forward["m"], "r": forward["r"]}, head_sizes)
    call("collapse_fwd", {"h_pre": given["h_post"]})
    call("collapse_bwd", {})
    if dtype == wide:
        logits = {"z": given["d_h_res"], "d_h_res": given["h_res"]}
        call("sinkhorn_fwd", logits, constraint="birkhoff")
        call("sinkhorn_bwd", logits, constraint="birkhoff")
    return {name: np.asarray(value, np.float64) for name, value in out.items()}


def saved(forward: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Results of a forward call of pre that the backward call reads, as many as there are."""
    return {name: forward[name] for name in ("m", "r", "rho") if name in forward}


# ---- what is expected ---------------------------------------------------------------------------


def flat(phi: np.ndarray) -> np.ndarray:
    """phi [n, C, K] as the oracle takes it, [n C, K]."""
    return phi.reshape(-1, phi.shape[-1])


def outputs(x, values, shape: Shape, call: str) -> dict[str, np.ndarray]:
    """The results of pre that a call has, by the oracle, with parameters of `values`."""
    settings = shape.settings
    phi = None if shape.static else flat(values["phi"])
    params = Params(phi, values["alpha"], values["bias"])
    scale = values["norm_scale"] if shape.norm else None
    u, h_pre, h_post, h_res = oracle.pre(x, params, settings, scale, settings.norm_scale_eps)
    for name in shape.weights(call):
        u = oracle.collapse(x, values[name])
    r = oracle.inverse_rms(x, settings)
    # r is not read where there is no m.
    r = np.zeros_like(r) if shape.static else r
    out = dict(u=u, h_pre=h_pre, h_post=h_post, h_res=h_res, r=r)
    if not shape.static:
        out["m"] = oracle.project(x, phi, settings)
    if shape.norm:
        total = np.einsum("...i,...ic->...c", h_pre, x)
        mean = np.mean(total**2, axis=-1, keepdims=True)
        out["rho"] = 1 / np.sqrt(mean + settings.norm_scale_eps)
    return out


def expected_forward(shape: Shape, given) -> dict[str, np.ndarray]:
    """Results of all forward calls by the oracle, and those gradients that are plain sums."""
    settings = shape.settings
    x, y, h_post, h_res = (given[name] for name in ("x", "y", "h_post", "h_res"))
    x_new = oracle.post(y, x, h_post, h_res)
    pre = outputs(x, given, shape, "pre_fwd")
    post_pre = {"x_new": x_new, **outputs(x_new, given, shape, "post_pre_fwd")}
    head = Params(flat(given["head.phi"]), given["head.alpha"], given["head.bias"])
    d_x_new, d_u = given["d_x_new"], given["d_u"]
    logits = dataclasses.replace(settings, constraint="birkhoff")
    return {
        **{f"pre_fwd.{name}": value for name, value in pre.items()},
        **{f"post_pre_fwd.{name}": value for name, value in post_pre.items()},
        "post_fwd.x_new": x_new,
        **{f"post_bwd.{name}": value for name, value in post_gradients(given, d_x_new).items()},
        "sinkhorn_fwd.h_res": oracle.sinkhorn(given["d_h_res"], logits),
        "head_fwd.u": oracle.head(x, head, settings),
        "head_fwd.m": oracle.project(x, head.phi, settings),
        "head_fwd.r": oracle.inverse_rms(x, settings),
        "collapse_fwd.u": np.einsum("...i,...ic->...c", h_post, x),
        "collapse_bwd.d_h_pre": np.einsum("...ic,...c->...i", x, d_u),
    }


def post_gradients(given, d_x_new) -> dict[str, np.ndarray]:
    """The gradients of post's other operands, given that of its result."""
    return {
        "d_y": np.einsum("...i,...ic->...c", given["h_post"], d_x_new),
        "d_h_post": np.einsum("...ic,...c->...i", d_x_new, given["y"]),
        "d_h_res": np.einsum("...ic,...jc->...ij", d_x_new, given["x"]),
    }


def derivatives(shape: Shape, given, got) -> dict[str, tuple[float, float]]:
    """Errors of gradients in float64 along one direction of all operands, and what may be.

    The derivative along a direction d is Im f(x + ihd) / h; with h = 1e-30 it has no error but
    rounding. `got` has what the calls returned.
    """
    rng = np.random.default_rng(shape.seed + 1)
    settings = shape.settings
    step = 1e-30
    cotangents = [given[name] for name in ("d_u", "d_h_pre", "d_h_post", "d_h_res")]

    def moved(names):
        """Directions by name, and the operands a step along them."""
        directions = {name: rng.standard_normal(given[name].shape) for name in names}
        return directions, {name: given[name] + 1j * step * directions[name] for name in names}

    def error(call, directions, value, of=lambda name: f"d_{name.removeprefix('head.')}"):
        products = [got[f"{call}.{of(name)}"] * d for name, d in directions.items()]
        scale = sum(np.abs(product).sum() for product in products) + 1e-3
        total = sum(product.sum() for product in products)
        return abs(np.imag(value) / step - total) / scale

    def pre_value(x, at, mixing, call):
        h = outputs(x, {**given, **at}, shape, call)
        results = (h[name] for name in ("u", "h_pre", "h_post", "h_res"))
        value = sum((c * h).sum() for c, h in zip(cotangents, results, strict=True))
        # A deferred cotangent is that of what post makes of x with the new h_res, held fixed.
        return value + (given["d_x_new"] * (mixing @ x)).sum()

    errors = {}
    eye = np.eye(shape.n)
    for call, h_res in (("pre_bwd", "pre_fwd.h_res"), ("post_pre_bwd", "post_pre_fwd.h_res")):
        names = [*shape.parameters, *shape.weights(call)]
        directions, at = moved(names)
        x = given["x"] if call == "pre_bwd" else got["post_pre_fwd.x_new"]
        direction = rng.standard_normal(x.shape)
        of_x = "d_x" if call == "pre_bwd" else "d_x_new"
        mixing = got[h_res] if settings.deferred else eye
        value = pre_value(x + 1j * step * direction, at, mixing, call)
        results = {**{name: f"d_{name}" for name in names}, of_x: of_x}
        directions = {**directions, of_x: direction}
        errors[call] = error(call, directions, value, results.__getitem__)

    directions, at = moved(("x", "head.phi", "head.alpha", "head.bias"))
    head = Params(flat(at["head.phi"]), at["head.alpha"], at["head.bias"])
    value = (given["d_u"] * oracle.head(at["x"], head, settings)).sum()
    errors["head_bwd"] = error("head_bwd", directions, value)

    direction = rng.standard_normal(given["d_h_res"].shape)
    h_res = oracle.sinkhorn(given["d_h_res"] + 1j * step * direction, settings)
    value = (given["h_res"] * h_res).sum()
    errors["sinkhorn_bwd"] = error("sinkhorn_bwd", {"z": direction}, value)
    return {f"{call}.derivative": (error, DERIVATIVE_ERROR) for call, error in errors.items()}


# ---- comparison ---------------------------------------------------------------------------------


def num_terms(shape: Shape) -> int:
    """Terms of the longest sum that a result depends on."""
    iters = shape.settings.sinkhorn_iters * shape.n
    return max(shape.n * shape.hidden, shape.num_coefficients, math.prod(shape.tokens), iters)


def conditions(call: str, x, results) -> dict[str, np.ndarray]:
    """How often the relative error of the terms of u, which may cancel, is in that of rho."""
    h_pre, rho = results[f"{call}.h_pre"], results.get(f"{call}.rho")
    if rho is None:
        return {}
    terms = np.einsum("...i,...ic->...c", h_pre, np.abs(x))
    return {f"{call}.rho": 1 + rho * np.sqrt(np.mean(terms**2, axis=-1, keepdims=True))}


def compare(shape: Shape, dtype: str, got, want, condition) -> dict[str, tuple[float, float]]:
    """Errors of the expected results, and what they may be.

    A result that was expected under a name that no call has raises `KeyError`.
    """
    errors = {}
    accumulation = ROUNDING["float64" if dtype == "float64" else "float32"]
    terms = NUM_ROUNDINGS * accumulation * math.sqrt(num_terms(shape))
    for name, expected in want.items():
        # Logits are not of half precision, so that there are no calls of Sinkhorn in it.
        if expected.size == 0 or (name not in got and name.startswith("sinkhorn")):
            continue
        result = name.partition(".")[2].removeprefix("d_")
        is_streams = result in ("x", "x_new", "y", "u")
        allowed = terms + (ROUNDING[dtype] if is_streams else 0)
        scale = np.abs(expected).max() + 1e-3
        if result in SUMS:
            # The terms of a sum over tokens may cancel, and are about as large as a root of C.
            scale += math.sqrt(shape.hidden * math.prod(shape.tokens))
        error = np.max(np.abs(got[name] - expected) / condition.get(name, 1)) / scale
        # NaN, where nothing was written, is an error of any size.
        errors[name] = (float(error) if error == error else math.inf, allowed)
    return errors


def check(handlers: Handlers, shape: Shape) -> dict[tuple[str, str], tuple[float, float]]:
    """All errors of a shape, and what they may be, by dtype and `call.result`."""
    given = operands(shape)
    exact = run_calls(handlers, shape, DTYPES["float64"], given)
    condition = conditions("pre_fwd", given["x"], exact)
    condition |= conditions("post_pre_fwd", exact["post_pre_fwd.x_new"], exact)
    found = compare(shape, "float64", exact, expected_forward(shape, given), condition)
    gradients = post_gradients(given, exact["post_pre_bwd.d_x_new"])
    want = {f"post_pre_bwd.{name}": value for name, value in gradients.items()}
    found |= compare(shape, "float64", exact, want, {})
    found |= derivatives(shape, given, exact)
    errors = {("float64", name): error for name, error in found.items()}
    for dtype in ("float32", "bfloat16", "float16"):
        got = run_calls(handlers, shape, DTYPES[dtype], given)
        want = dict(exact)
        # post_pre computes the results of pre from streams that were rounded.
        rounded = {**given, "x": got["post_pre_fwd.x_new"]}
        want |= run_pre(handlers, shape, rounded)
        gradients = post_gradients(given, got["post_pre_bwd.d_x_new"])
        want |= {f"post_pre_bwd.{name}": value for name, value in gradients.items()}
        condition |= conditions("post_pre_fwd", got["post_pre_fwd.x_new"], want)
        found = compare(shape, dtype, got, want, condition)
        errors |= {(dtype, name): error for name, error in found.items()}
    return errors


def run_pre(handlers: Handlers, shape: Shape, given) -> dict[str, np.ndarray]:
    """Results of post_pre's calls in float64 that are pre's, of the same streams."""
    given = {**given, "d_x_in": given["d_x_new"]}
    forward = handlers.call("pre_fwd", given, shape.sizes, shape.attributes)
    d_x = {"d_x_new": given["d_x_new"]}
    if shape.given:
        # u, which has other weights, is beside all that pre computes.
        h, d_u = given["h_given"], given["d_u"]
        forward["u"] = oracle.collapse(given["x"], h)
        d_x["d_h_given"] = np.einsum("...ic,...c->...i", given["x"], d_u)
        given["d_u"] = np.zeros_like(d_u)
    more = {**saved(forward), "h_res": forward["h_res"]}
    backward = handlers.call("pre_bwd", {**given, **more}, shape.sizes, shape.attributes)
    d_x["d_x_new"] = backward.pop("d_x")
    if shape.given:
        d_x["d_x_new"] = d_x["d_x_new"] + h[..., None] * d_u[..., None, :]
    return {
        **{f"post_pre_fwd.{name}": value for name, value in forward.items()},
        **{f"post_pre_bwd.{name}": value for name, value in (backward | d_x).items()},
    }


# ---- the program --------------------------------------------------------------------------------


def run(handlers: Handlers, shapes, seconds: float = math.inf):
    """Checks shapes; returns the record of it."""
    start = time.perf_counter()
    worst: dict[str, dict[str, float]] = collections.defaultdict(dict)
    share: dict[str, float] = collections.defaultdict(float)
    findings = []
    num = 0
    for shape in shapes:
        if time.perf_counter() - start > seconds:
            break
        num += 1
        try:
            errors = check(handlers, shape)
        except ValueError as error:
            findings.append({"shape": dataclasses.asdict(shape), "error": str(error)})
            continue
        for (dtype, name), (error, allowed) in errors.items():
            call = name.partition(".")[0] + (".derivative" if name.endswith("derivative") else "")
            worst[call][dtype] = max(worst[call].get(dtype, 0.0), error)
            share[dtype] = max(share[dtype], error / allowed)
            if not error <= allowed:
                found = {"result": f"{dtype} {name}", "error": error, "allowed": allowed}
                findings.append({"shape": dataclasses.asdict(shape), **found})
        _tell(num, len(shapes), len(findings), time.perf_counter() - start)
    return {
        "commit": handlers.description["commit"],
        "instruction_set": handlers.description["instruction_set"],
        "shapes": num,
        "dtypes": list(DTYPES),
        "calls": handlers.num_calls,
        "seconds": round(time.perf_counter() - start, 1),
        "worst_errors": {call: worst[call] for call in sorted(worst)},
        "worst_share_of_what_is_allowed": dict(share),
        "num_findings": len(findings),
        "findings": findings[:20],
    }


def _tell(num: int, total: int, findings: int, seconds: float) -> None:
    """A line that stays where it is, on a terminal."""
    if sys.stderr.isatty():
        left = seconds / num * (total - num)
        end = "\n" if num == total else ""
        text = f"\r{num} of {total} shapes, {findings} findings, {left:.0f} s left "
        print(text, end=end, file=sys.stderr, flush=True)


def main() -> int:
    """Reads the command line and checks."""
    parser = argparse.ArgumentParser(description="All small shapes through the handlers.")
    parser.add_argument("--library", type=Path, help="the shared library; default: jax_mhc's")
    parser.add_argument("--headers", type=Path, help="XLA's FFI headers; default: jaxlib's")
    parser.add_argument("--shapes", type=int, help="how many of all 20160")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long")
    parser.add_argument("--record", type=Path, help="write what came out as JSON")
    options = parser.parse_args()
    library, headers = options.library, options.headers
    if library is None:
        from jax_mhc._call import library

        library = library._PATH
    if headers is None:
        import jax.ffi

        headers = Path(jax.ffi.include_dir())
    with tempfile.TemporaryDirectory() as build:
        handlers = Handlers(library, headers, Path(build))
        record = run(handlers, draw_shapes(options.shapes), options.seconds)
    text = json.dumps(record, indent=2)
    if options.record:
        options.record.write_text(text + "\n")
    print(text)
    return 1 if record["num_findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
