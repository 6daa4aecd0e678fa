"""A stack of sublayers, joined by seams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, _errors, diagnostics
from jax_mhc._axes import varying_like
from jax_mhc._call import Implementation, Settings, Values, use_fused
from jax_mhc._mesh.types import sharded_like
from jax_mhc._ops.deferred import streams
from jax_mhc._ops.fused_op import present
from jax_mhc._ops.post import post
from jax_mhc._ops.post_pre import post_pre
from jax_mhc._ops.pre import pre
from jax_mhc._stack.own_scan import Stretches, no_sublayer, scan_of_seams
from jax_mhc._stack.remat import Recompute, best_length, check_policy, policy_of
from jax_mhc._types import Context, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

_OP = "stack"


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
    layers = _elements("layers", layers, "functions, one for each sublayer")
    params = _elements("params", params, "jax_mhc.MHCParams, one for each of layers")
    scales: tuple[Any, ...] = (None,) * len(layers)
    if norm_scale is not None:
        scales = _elements("norm_scale", norm_scale, "arrays, one for each of layers")
    _check_layers(layers, params, scales)
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
    options: dict[str, Any] = {
        "config": config, "implementation": implementation, "norm_scale_eps": eps,
        "hidden_axis_name": axes,
    }  # fmt: skip
    of_slices = "" if xs is None else "a slice of "

    def advance(before: Any, sublayers: list[_Sublayer]) -> Any:
        samples = []
        for i, layer, p, scale in sublayers:
            _check.params(_OP, p, x, config, f"{of_slices}params[{i}]", axes)
            _check.norm_scale(_OP, scale, eps, x, f"{of_slices}norm_scale[{i}]", axes)
            if isinstance(before, _Pending):
                u, ctx = post_pre(*before.operands(), p, norm_scale=scale, **options)
            else:
                u, ctx = pre(before, p, norm_scale=scale, **options)
            # Loops want the type of y to be that of u.
            y = sharded_like(_layer_output(i, layer(u), x), u)
            y = checkpoint_name(y, "mhc_layer_output")
            before = _Pending(streams(ctx)[1], y, ctx.h_post, ctx.h_res)
            if num_samples:
                samples.append(diagnostics.sample_tokens(ctx.h_res, num_samples))
        return before, samples

    def run(before: Any, sublayers: list[_Sublayer], every: int, prevent_cse: bool = True) -> Any:
        if every == 1 and policy == "streams":
            return advance(before, sublayers)
        what = policy if callable(policy) else policy_of(x.shape, policy)
        samples: list[Any] = []
        for start in range(0, len(sublayers), every):
            stretch = partial(advance, sublayers=sublayers[start : start + every])
            run_stretch = jax.checkpoint(stretch, policy=what, prevent_cse=prevent_cse)
            before, of_stretch = run_stretch(before)
            samples += of_stretch
        return before, samples

    n = x.shape[-2]
    if xs is None:
        every = keep_streams_every
        if every == "auto":
            every = best_length(n, len(layers), list(range(1, len(layers) + 1)) or [1])
        each = zip(layers, params, scales, strict=True)
        sublayers = [_Sublayer(i, *of_one) for i, of_one in enumerate(each)]
        before, samples = run(x, sublayers, every)
        h_res = jnp.stack(samples) if samples else None
    else:
        num_blocks = _num_blocks(params, scales, xs)
        every, num_together = _stretch(keep_streams_every, n, len(layers), num_blocks)
        steps = _Steps(num_blocks, num_together, unroll)
        if not callable(policy) and _seams_alone(layers, x, params, steps, every, implementation):
            stretches = Stretches(every, num_together, policy == "streams")
            x_new, h_res = _scan_of_seams(
                layers, x, params, scales, xs,
                Settings(config, eps, axes, implementation == "fused"),
                stretches, num_samples,
            )  # fmt: skip
            return (x_new, h_res) if num_samples else x_new
        stacked = params, scales, xs
        before, h_res = _scan(partial(run, every=every), layers, x, stacked, steps, axes)
    # Without a sublayer there is no post.
    x_new = before
    if isinstance(before, _Pending):
        x_new = post(*before.operands(), implementation=implementation)
    if not num_samples:
        return x_new
    if h_res is None:
        h_res = jnp.zeros((0, num_samples, n, n), _check.accumulation_dtype(x.dtype))
    return x_new, h_res


class _Pending(NamedTuple):
    """What the post of a sublayer needs; its context has more, which a loop should not carry.

    The cotangent of x is deferred where the ops are fused (_ops/deferred.py).
    """

    x: jax.Array
    y: jax.Array
    h_post: jax.Array
    h_res: jax.Array

    def operands(self) -> tuple[jax.Array, Context]:
        """The first operands of post and of post_pre, which do not read h_pre."""
        h_pre = self.h_post
        return self.y, Context._of(self.x, self.x, h_pre, self.h_post, self.h_res)


class _Sublayer(NamedTuple):
    """A sublayer and its place in `layers`."""

    place: int
    layer: Callable[[jax.Array], Any]
    params: MHCParams
    norm_scale: jax.Array | None


class _Steps(NamedTuple):
    """The steps of a scan over blocks."""

    num_blocks: int
    num_together: int
    unroll: int | bool

    @property
    def num(self) -> int:
        return self.num_blocks // self.num_together


def _scan(
    run: Callable[..., Any],
    layers: tuple[Callable[..., Any], ...],
    x: jax.Array,
    stacked: tuple[tuple[MHCParams, ...], tuple[Any, ...], Any],
    steps: _Steps,
    hidden_axes: tuple[str, ...],
) -> tuple[_Pending, Any]:
    """Runs all blocks; returns the pending post of the last sublayer, and samples of h_res."""
    num_together, unroll = steps.num_together, steps.unroll

    def step(before: _Pending, slices: Any) -> tuple[_Pending, Any]:
        blocks = [slices]
        if num_together > 1:
            blocks = [jax.tree.map(itemgetter(b), slices) for b in range(num_together)]
        sublayers = [
            _Sublayer(i, partial(_with_slice, layer, s), p, scale)
            for block_params, scales, s in blocks
            for i, (layer, p, scale) in enumerate(zip(layers, block_params, scales, strict=True))
        ]
        # XLA could merge the two passes again only where no loop is left of them.
        before, samples = run(before, sublayers, prevent_cse=unroll is True or unroll >= steps.num)
        return before, jnp.stack(samples) if samples else None

    if num_together > 1:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(steps.num, num_together, *leaf.shape[1:]), stacked
        )
    x = varying_like(x, x, *jax.tree.leaves(stacked[:2]))
    first = _Pending(x, *no_sublayer(x, hidden_axes))
    before, h_res = jax.lax.scan(step, first, stacked, unroll=unroll)
    return before, jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:]), h_res)


def _seams_alone(
    layers: tuple[Callable[..., Any], ...],
    x: jax.Array,
    params: tuple[MHCParams, ...],
    steps: _Steps,
    every: int,
    implementation: Implementation,
) -> bool:
    """Whether `scan_of_seams` takes these sublayers.

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


def _scan_of_seams(
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
        return sharded_like(_layer_output(i, layers[i](u, s), x), u)

    with jax.named_scope("mhc_stack"):
        return scan_of_seams(
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


def _with_slice(layer: Callable[..., Any], s: Any, u: jax.Array) -> Any:
    return layer(u, s)


# ---- checks -------------------------------------------------------------------------------------


def _elements(argument: str, value: Any, expected: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        _errors.fail(
            TypeError, _OP, argument, f"a sequence of {expected}", type(value).__name__,
            f"Put it into a list; {argument} stacked over blocks are given as one for each sublayer"
            " of a block, with xs.",
        )  # fmt: skip


def _check_layers(
    layers: tuple[Any, ...], params: tuple[Any, ...], scales: tuple[Any, ...]
) -> None:
    for i, layer in enumerate(layers):
        _errors.function(
            _OP, f"layers[{i}]", layer, "a function",
            "Pass the sublayers themselves: stack([attention, mlp], x, params).",
        )  # fmt: skip
    if len(params) != len(layers):
        _errors.fail(
            ValueError, _OP, "params", f"{len(layers)} MHCParams, one for each of layers",
            len(params), "Every sublayer has its own; attention and MLP are two.",
        )  # fmt: skip
    if len(scales) != len(layers):
        _errors.fail(
            ValueError, _OP, "norm_scale", f"{len(layers)} arrays or None, one for each of layers",
            len(scales), "Give None for a layer whose input is not to be normalised.",
        )  # fmt: skip


def _layer_output(i: int, y: Any, x: jax.Array) -> jax.Array:
    argument = f"the result of layers[{i}]"
    if isinstance(y, tuple | list):
        _errors.fail(
            TypeError, _OP, argument, "one array", f"a {type(y).__name__} of {len(y)}",
            "For layers that return more, call jax_mhc.pre, post_pre and post in a loop.",
        )  # fmt: skip
    return _check.layer_output(_OP, argument, y, x)


def _num_blocks(params: tuple[MHCParams, ...], scales: tuple[Any, ...], xs: Any) -> int:
    """The common length of the leading axes."""
    num_blocks, first = None, ""
    for argument, tree in (("xs", xs), ("params", params), ("norm_scale", scales)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = argument + jax.tree_util.keystr(path)
            shape = _check.shape(_OP, name, leaf)
            if num_blocks is None and shape:
                num_blocks, first = shape[0], name
            elif shape[:1] != (num_blocks,):
                expected = "a leading axis of blocks"
                if first:
                    expected += f" of length {num_blocks}, as {first} has"
                _errors.fail(
                    ValueError, _OP, name, expected, f"shape {list(shape)}",
                    "With xs, all leaves of params and xs are stacked over the blocks, for "
                    "example by jax.vmap(init)(keys).",
                )  # fmt: skip
    if num_blocks is None:
        _errors.fail(
            ValueError, _OP, "xs", "an array with a leading axis of blocks", "none, nor any params",
            "Leave xs out where there is nothing to loop over.",
        )  # fmt: skip
    return num_blocks


def _stretch(every: Any, streams: int, num_layers: int, num_blocks: int) -> tuple[int, int]:
    """The sublayers of a stretch, and the blocks in a step of the scan, which is all of it."""
    if not num_layers:
        return 1, 1
    within = [length for length in range(1, num_layers + 1) if num_layers % length == 0]
    across = [b * num_layers for b in range(2, num_blocks + 1) if num_blocks % b == 0]
    if every == "auto":
        every = best_length(streams, num_layers * num_blocks, within + across)
    if every in within:
        return every, 1
    if every in across:
        return every, every // num_layers
    _errors.fail(
        ValueError, _OP, "keep_streams_every",
        f"a divisor of {num_layers}, the sublayers of a block, or {num_layers} times a divisor of "
        f"{num_blocks}, the blocks", every,
        "All stretches of a scan are of the same length; 'auto' chooses one.",
    )  # fmt: skip
