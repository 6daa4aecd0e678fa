"""A stack of sublayers, which post_pre joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_mhc import _check, _errors
from jax_mhc._call import Implementation, Settings, Values, use_fused
from jax_mhc._mesh.types import sharded_like
from jax_mhc._ops.fused_op import present
from jax_mhc._ops.post import post
from jax_mhc._stack import checks
from jax_mhc._stack.own_scan import Stretches, own_scan
from jax_mhc._stack.plain_scan import Pending, Runner, Steps, Sublayer, scan
from jax_mhc._stack.remat import Recompute, best_length, check_policy
from jax_mhc._types import MHCConfig, MHCParams
from jax_mhc.presets import PAPER

_OP = checks.OP


def stack(
    layers: Sequence[Callable[..., Any]],
    x: jax.Array,
    params: Sequence[MHCParams],
    *,
    xs: Any = None,
    config: MHCConfig = PAPER,
    norm_scale: Sequence[jax.Array | None] | None = None,
    norm_scale_eps: float = 1e-6,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
    keep_streams_every: int | Literal["auto"] = 1,
    policy: Recompute | Callable[..., Any] = "streams",
    unroll: int | bool = 1,
    sample_tokens: int = 0,
) -> Any:
    """Sublayers one after the other, each with its hyper-connection (equation 3).

    Without xs this is, to rounding,

        for layer, p in zip(layers, params, strict=True):
            x = mhc_residual(layer, x, p, config=config)

    and with xs, for the sublayers of one block and parameters stacked over the blocks,

        def block(x, slices):
            block_params, s = slices
            for layer, p in zip(layers, block_params, strict=True):
                x = mhc_residual(lambda u: layer(u, s), x, p, config=config)
            return x, None

        x, _ = jax.lax.scan(block, x, (params, xs))

    but from one sublayer to the next, from block to block too, the streams are read and written
    once, by `post_pre`, and not twice, by `post` and `pre`. The scan carries what the post of a
    block's last sublayer needs: x, y, h_post and h_res. Before the first block these are x, 0, 0
    and I. Source: arXiv 2512.24880.

    See `pre` for dtypes, derivatives and batching. Beside what the layers keep, the backward pass
    keeps of each sublayer the streams before it, y, with norm_scale u too, and about 2 (n² + 2n)
    numbers a token. With `keep_streams_every` above 1 the sublayers are run in stretches of that
    many: only the streams before a stretch are kept, and the backward pass computes the others
    again, a stretch at a time, without running a layer (section 4.3.2). With xs the loop has a
    derivative of its own: the policy of a `jax.checkpoint` around it sees no names inside. With a
    function as `policy`, and without xs, each stretch is one `jax.checkpoint`. JAX applies
    its policy to the insides of layers that are wrapped in `jax.checkpoint` themselves, too. Names
    for policies: those of `post_pre`, and "mhc_layer_output" (y).

    Args:
        layers: the sublayers, functions `[..., C] -> [..., C]` that keep the dtype; with xs those
            of one block, `(u, s) -> y`, where s is the block's slice of xs.
        x: the streams `[..., n, C]`.
        params: one for each of `layers`, from `init_params`; with xs stacked over the blocks.
        xs: the layers' parameters, a pytree of arrays `[num_blocks, ...]`.
        config: settings of all sublayers.
        norm_scale: one for each of `layers`, of the norm that the layer begins with `[C]`, or None;
            with xs stacked over the blocks. None for no norms; see `pre`.
        norm_scale_eps: the eps of all of them.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.
        keep_streams_every: the sublayers of a stretch. With xs a divisor of those of a block, or
            those of several blocks that divide num_blocks. "auto": the possible number nearest to
            sqrt(n L / (n + 2)) of all L sublayers, which needs the least memory.
        policy: what a stretch computes again beside the streams within it: "streams": nothing;
            "mhc": the layers' inputs and the coefficients, as in the paper (see `remat_policy`); or
            what of it is kept, a policy of `jax.checkpoint`.
        unroll: as for `jax.lax.scan`, whose steps are blocks, or stretches of several blocks.
        sample_tokens: the number of tokens S whose h_res to return, for `diagnostics`.

    Returns:
        The new streams `[..., n, C]`; with sample_tokens a pair of these and h_res
        `[L, S, n, n]` of all L sublayers and of S tokens, or all if there are fewer, as
        `diagnostics.sample_tokens` chooses them. It has no gradient.

    Raises:
        ValueError, TypeError: what `pre` raises; numbers of layers, parameters or blocks that
            differ; a stretch that does not fit; a layer that is no function of u (and of a slice of
            xs), or returns another shape or dtype; a policy that is none.
    """
    x = _check.streams(_OP, "x", x)
    config = _check.config(_OP, config, x.dtype)
    layers = checks.elements("layers", layers, "functions, one for each sublayer")
    params = checks.elements("params", params, "jax_mhc.MHCParams, one for each of layers")
    scales: tuple[Any, ...] = (None,) * len(layers)
    if norm_scale is not None:
        scales = checks.elements("norm_scale", norm_scale, "arrays, one for each of layers")
    checks.sequences(layers, params, scales)
    of_what = "u" if xs is None else "u and a slice of xs"
    layers = tuple(
        partial(_check.call, _OP, f"layers[{i}]", of_what, layer) for i, layer in enumerate(layers)
    )
    if not (isinstance(keep_streams_every, str) and keep_streams_every == "auto"):
        keep_streams_every = _errors.integer(
            _OP, "keep_streams_every", keep_streams_every, 1, None,
            "Give 1 to keep the streams before every sublayer, or 'auto'.",
        )  # fmt: skip
    if callable(policy):
        check_policy(_OP, "policy", policy)
    else:
        policy = _errors.choice(_OP, "policy", policy, ("streams", "mhc"), "a function")
    num_samples = _errors.integer(
        _OP, "sample_tokens", sample_tokens, 0, None, "Give 0 for no samples of h_res."
    )
    if not isinstance(unroll, bool):
        unroll = _errors.integer(_OP, "unroll", unroll, 1, None, "Give 1 to unroll nothing.")
    if xs is None and unroll not in (False, 1):
        _errors.fail(
            ValueError, _OP, "unroll", "1 where there is no xs", unroll,
            "Without xs there is no loop; leave unroll out.",
        )  # fmt: skip
    axes = _check.hidden_axes(_OP, hidden_axis_name, x)
    eps = _check.norm_scale_eps(_OP, norm_scale_eps, _check.accumulation_dtype(x.dtype))
    # The ops check it, too, but there may be none.
    _check.implementation(_OP, implementation)
    of_slices = "" if xs is None else "a slice of "
    runner = Runner(x, config, eps, axes, implementation, policy, num_samples, of_slices)

    n = x.shape[-2]
    if xs is None:
        every = keep_streams_every
        if every == "auto":
            every = best_length(n, len(layers), list(range(1, len(layers) + 1)) or [1])
        each = zip(layers, params, scales, strict=True)
        sublayers = [Sublayer(i, *of_one) for i, of_one in enumerate(each)]
        before, samples = runner.run(x, sublayers, every)
        h_res = jnp.stack(samples) if samples else None
    else:
        num_blocks = checks.num_blocks(params, scales, xs)
        every, num_together = checks.stretch(keep_streams_every, n, len(layers), num_blocks)
        steps = Steps(num_blocks, num_together, unroll)
        takes_own_scan = _takes_own_scan(layers, x, params, steps, every, implementation)
        if not callable(policy) and takes_own_scan:
            stretches = Stretches(every, num_together, policy == "streams")
            x_new, h_res = _own_scan(
                layers, x, params, scales, xs,
                Settings(config, eps, axes, implementation == "fused"),
                stretches, num_samples,
            )  # fmt: skip
            return (x_new, h_res) if num_samples else x_new
        stacked = params, scales, xs
        before, h_res = scan(partial(runner.run, every=every), layers, x, stacked, steps, axes)
    # Without a sublayer there is no post.
    x_new = before
    if isinstance(before, Pending):
        x_new = post(*before.operands(), implementation=implementation)
    if not num_samples:
        return x_new
    if h_res is None:
        h_res = jnp.zeros((0, num_samples, n, n), _check.accumulation_dtype(x.dtype))
    return x_new, h_res


def _takes_own_scan(
    layers: tuple[Callable[..., Any], ...],
    x: jax.Array,
    params: tuple[MHCParams, ...],
    steps: Steps,
    every: int,
    implementation: Implementation,
) -> bool:
    """Whether `own_scan` takes these sublayers.

    Of a loop of one step nothing is left, and XLA could merge what is computed again with the
    forward pass.
    """
    return (
        len(layers) * steps.num_together > 1
        and steps.num > (0 if every == 1 else 1)
        and steps.unroll in (False, 1)
        and steps.unroll is not True
        and all(isinstance(p, MHCParams) for p in params)
        and use_fused(_OP, implementation, x.dtype)
    )


def _own_scan(
    layers: tuple[Callable[..., Any], ...],
    x: jax.Array,
    params: tuple[MHCParams, ...],
    scales: tuple[Any, ...],
    xs: Any,
    settings: Settings,
    stretches: Stretches,
    num_samples: int,
) -> tuple[jax.Array, Any]:
    config, eps, axes = settings.config, settings.norm_scale_eps, settings.hidden_axes
    assert config is not None

    def of_block(i: int, p: MHCParams, scale: Any) -> Values:
        phi, alpha, bias = _check.params(_OP, p, x, config, f"a slice of params[{i}]", axes)
        of_slice = f"a slice of norm_scale[{i}]"
        scale, _ = _check.norm_scale(_OP, scale, eps, x, of_slice, axes)
        return present(phi=phi, alpha=alpha, bias=bias, norm_scale=scale)

    def checked(i: int, u: jax.Array, s: Any) -> jax.Array:
        return sharded_like(checks.layer_output(i, layers[i](u, s), x), u)

    with jax.named_scope("mhc_stack"):
        return own_scan(
            [partial(checked, i) for i in range(len(layers))],
            x,
            [
                jax.vmap(partial(of_block, i))(*of_all)
                for i, of_all in enumerate(zip(params, scales, strict=True))
            ],
            xs,
            settings=settings,
            stretches=stretches,
            num_samples=num_samples,
        )
