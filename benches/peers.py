"""Prints what the mHC kernels of other libraries take here, as JSON lines; benches/gpu.py runs it.

Median times of CUDA graph replays, one graph for each of several sets of inputs, of what the ops
of the same name in gpu.py do. Results are checked against float64. Of a library that is not
installed it prints the error:

- Liger (liger-kernel): phi in bfloat16, which it recommends for speed; its gradients of phi use
  atomics.

DeepSeek's TileKernels need PyTorch 2.13 and a compiler (tilelang) and are not timed here.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

STREAMS = 4
ROTATED_BYTES = 240e6


def liger_ops() -> dict[str, Callable[..., Any]]:
    import torch
    from liger_kernel.ops.mhc import (
        LigerMHCCoeffsFunction,
        LigerMHCPostResFunction,
        LigerMHCPreFunction,
    )

    def pre(o: dict[str, Any]) -> Any:
        # The settings: no float32, 20 iterations, eps of the norm, of h_pre and of Sinkhorn, scale.
        h_pre, h_post, h_res = LigerMHCCoeffsFunction.apply(
            o["x"], o["phi"], o["bias"], *o["alpha"], False, 20, 1e-6, 0.0, 1e-6, 2.0
        )
        return LigerMHCPreFunction.apply(o["x"], h_pre), h_post, h_res

    def post(o: dict[str, Any]) -> Any:
        return LigerMHCPostResFunction.apply(o["x"], o["y"], o["h_post"], o["h_res"])

    def fb(o: dict[str, Any]) -> Any:
        # Leaves of their own: Liger keeps every Sinkhorn iterate of what may need a gradient.
        x, y, phi, bias = (o[name].detach().requires_grad_() for name in ("x", "y", "phi", "bias"))
        alpha = [gate.detach().requires_grad_() for gate in o["alpha"]]
        u, h_post, h_res = pre({"x": x, "phi": phi, "bias": bias, "alpha": alpha})
        x_new = post({"x": x, "y": y, "h_post": h_post, "h_res": h_res})
        leaves, cotangents = [x, y, phi, bias, *alpha], [o["d_u"], o["d_x_new"]]
        return u, x_new, torch.autograd.grad([u, x_new], leaves, cotangents)

    return {"pre": pre, "post": post, "fb": fb}


def make_inputs(tokens: int, hidden: int, seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: Any = torch.bfloat16, scale: float = 1.0) -> Any:
        return (scale * torch.randn(shape, generator=generator, device="cuda")).to(dtype)

    num = STREAMS**2 + 2 * STREAMS
    width = STREAMS * hidden
    return {
        "x": normal(tokens, STREAMS, hidden),
        "y": normal(tokens, hidden),
        "phi": normal(width, num, scale=width**-0.5),
        "bias": normal(num, dtype=torch.float32, scale=0.5),
        "alpha": [torch.tensor(gate, device="cuda") for gate in (1.0, 0.8, 1.2)],
        "h_post": torch.rand((tokens, STREAMS), generator=generator, device="cuda"),
        "h_res": torch.softmax(normal(tokens, STREAMS, STREAMS, dtype=torch.float32), -1),
        "d_u": normal(tokens, hidden),
        "d_x_new": normal(tokens, STREAMS, hidden),
    }


def replay_us(run: Callable[[Any], Any], sets: list[Any], repeats: int = 11) -> float:
    import torch

    graphs = []
    for made in sets:
        aside = torch.cuda.Stream()  # where a graph's operations must have run before
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run(made)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(made)
        graphs.append(graph)
    for graph in graphs:
        graph.replay()
    rotation, calls, times = itertools.cycle(graphs), 10, []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            next(rotation).replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def liger_errors(run: dict[str, Callable[..., Any]], made: dict[str, Any]) -> dict[str, float]:
    """Relative L2 errors of u and x_new on some tokens, against float64 with Liger's settings."""
    import common
    import jax
    import numpy as np

    import jax_mhc as mhc

    jax.config.update("jax_enable_x64", True)
    some = {k: v[:64] if k in ("x", "y", "h_post", "h_res") else v for k, v in made.items()}
    wide = {
        name: np.stack([gate.item() for gate in value])
        if name == "alpha"
        else value.double().cpu().numpy()
        for name, value in some.items()
    }
    config = mhc.MHCConfig(sinkhorn_eps=1e-6, order="row_column")
    params = mhc.MHCParams(*(jax.numpy.asarray(wide[name]) for name in ("phi", "alpha", "bias")))
    x, y = jax.numpy.asarray(wide["x"]), jax.numpy.asarray(wide["y"])
    u, ctx = mhc.reference.pre(x, params, config=config)
    got_u, h_post, h_res = run["pre"](some)
    got = run["post"]({**some, "h_post": h_post, "h_res": h_res})
    exact = {"u": u, "x_new": mhc.reference.post(y, ctx)}
    results = {"u": got_u, "x_new": got}
    return {
        name: common.relative_error(result.double().cpu().numpy(), exact[name])
        for name, result in results.items()
    }


def main(shapes: list[tuple[int, int]]) -> None:
    try:
        run = liger_ops()
    except ImportError as error:
        print(json.dumps({"library": "liger", "error": str(error)}))
        return
    import torch

    for tokens, hidden in shapes:
        num = max(2, -int(-ROTATED_BYTES // (tokens * STREAMS * hidden * 2)))
        sets = [make_inputs(tokens, hidden, seed) for seed in range(num)]
        errors = liger_errors(run, sets[0])
        if not max(errors.values()) < 5e-3:
            raise SystemExit(f"liger, {tokens} x {hidden}: errors {errors}")
        times = {}
        for op, function in run.items():
            times[op] = replay_us(function, sets)
            torch.cuda.empty_cache()
        found = {"library": "liger", "version": metadata.version("liger-kernel")}
        found |= {"tokens": tokens, "hidden": hidden, "errors": errors, "us": times}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
