"""A stack of sublayers, which post_pre joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jax_mhc import _check, _errors
from jax_mhc._call import Implementation, use_fused
from jax_mhc._ops.streams import Streams, as_streams
from jax_mhc._ops.sublayer import Options
from jax_mhc._stack import checks
from jax_mhc._stack.remat import NOTHING, Recompute, best_length
from jax_mhc._stack.runner import Before, Runner, Steps, Told, run_blocks, stacked_up
from jax_mhc._types import Layer, MHCConfig, MHCParams, Tree
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

_OP = checks.OP


def stack(
    layers: Sequence[Layer],
    x: Float[jax.Array, "*tokens n C"] | Streams,
    params: Sequence[MHCParams],
    *,
    xs: Tree = None,
    config: MHCConfig = PAPER,
    norm_scale: Sequence[Float[jax.Array, "*blocks C"] | None] | None = None,
    norm_scale_eps: float = 1e-6,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
    recompute: Recompute = NOTHING,
    unroll: int | bool = 1,
    has_aux: bool | Literal["sum"] = False,
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
    block's last sublayer needs: x, y, h_post and h_res, and its h_pre for the delayed schedule.
    Before the first block these are x, 0, 0 and I, and 1 for stream 0. Source: arXiv 2512.24880.

    See `pre` for dtypes, derivatives and batching. Beside what the layers keep, the backward pass
    keeps of each sublayer the streams before it, y, with norm_scale u too, and about 2 (n² + 2n)
    numbers a token; with `recompute` it keeps less, and computes it again without running a layer.
    With xs the loop has a derivative of its own: the policy of a `jax.checkpoint` around it sees no
    names inside. With a function as `recompute.policy`, and without xs, each stretch is one
    `jax.checkpoint`. JAX applies its policy to the insides of layers that are wrapped in
    `jax.checkpoint` themselves, too. Names for policies: those of `post_pre`, and
    "mhc_layer_output" (y).

    Args:
        layers: the sublayers, functions `[..., C] -> [..., C]` that keep the dtype; with xs those
            of one block, `(u, s) -> y`, where s is the block's slice of xs.
        x: the streams `[..., n, C]`, or `Streams`; with schedule "delayed" these alone, which carry
            the h_pre of the sublayer before.
        params: one for each of `layers`, from `init_params`; with xs stacked over the blocks.
        xs: the layers' parameters, a pytree of arrays `[num_blocks, ...]`.
        config: settings of all sublayers.
        norm_scale: one for each of `layers`, of the norm that the layer begins with `[C]`, or None;
            with xs stacked over the blocks. None for no norms; see `pre`.
        norm_scale_eps: the eps of all of them.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.
        recompute: what the backward pass computes again; see `Recompute`.
        unroll: as for `jax.lax.scan`, whose steps are blocks, or stretches of several blocks.
        has_aux: layers return `(y, aux)`, such as the loss of experts; aux is any pytree of arrays.
            True: stacked over the blocks. "sum": the sum over all sublayers but those whose aux is
            None.

    Returns:
        The new streams `[..., n, C]`, or `Streams` where x is. With has_aux `(streams, aux)`: one
        aux for each of `layers`, with xs each `[num_blocks, ...]`; or the one sum.

    Raises:
        ValueError, TypeError: what `pre` raises; numbers of layers, parameters or blocks that
            differ; a stretch that does not fit; a layer that is no function of u (and of a slice of
            xs), or returns another shape or dtype.
    """
    x_new, aux, _ = _run(
        layers,
        x,
        params,
        0,
        xs=xs,
        config=config,
        norm_scale=norm_scale,
        norm_scale_eps=norm_scale_eps,
        hidden_axis_name=hidden_axis_name,
        implementation=implementation,
        recompute=recompute,
        unroll=unroll,
        has_aux=has_aux,
    )
    return (x_new, aux) if has_aux else x_new


def stack_with_samples(
    layers: Sequence[Layer],
    x: Float[jax.Array, "*tokens n C"] | Streams,
    params: Sequence[MHCParams],
    *,
    sample_tokens: int,
    xs: Tree = None,
    config: MHCConfig = PAPER,
    norm_scale: Sequence[Float[jax.Array, "*blocks C"] | None] | None = None,
    norm_scale_eps: float = 1e-6,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
    recompute: Recompute = NOTHING,
    unroll: int | bool = 1,
    has_aux: bool | Literal["sum"] = False,
) -> tuple[Any, ...]:
    """Runs `stack`, and returns h_res of some tokens of all sublayers, for `diagnostics`.

    Args:
        layers: see `stack`, as for all arguments but sample_tokens.
        x: the streams `[..., n, C]`, or `Streams`.
        params: one for each of `layers`.
        sample_tokens: the number of tokens S, at least 1.
        xs: the layers' parameters, stacked over the blocks.
        config: settings of all sublayers.
        norm_scale: of the norms that the layers begin with, or None.
        norm_scale_eps: the eps of all of them.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`.
        implementation: None, "fused" or "reference".
        recompute: what the backward pass computes again.
        unroll: as for `jax.lax.scan`.
        has_aux: layers return `(y, aux)`.

    Returns:
        What `stack` returns, `(streams, h_res)` or `(streams, aux, h_res)`, with h_res
        `[L, S, n, n]` of all L sublayers in their order, of S tokens, or all if there are fewer,
        as `diagnostics.sample_tokens` chooses them.
        `h_res[..., i, j]` is the weight of stream j in new stream i. It has no gradient.

    Raises:
        ValueError, TypeError: sample_tokens that is no positive int; what `stack` raises, by its
            name.
    """
    op, remedy = "stack_with_samples", "Some 64 tokens tell enough of a batch."
    num_samples = _errors.integer(op, "sample_tokens", sample_tokens, 1, None, remedy)
    x_new, aux, h_res = _run(
        layers,
        x,
        params,
        num_samples,
        xs=xs,
        config=config,
        norm_scale=norm_scale,
        norm_scale_eps=norm_scale_eps,
        hidden_axis_name=hidden_axis_name,
        implementation=implementation,
        recompute=recompute,
        unroll=unroll,
        has_aux=has_aux,
    )
    return (x_new, aux, h_res) if has_aux else (x_new, h_res)


def _run(
    layers: Sequence[Layer],
    x: Before,
    params: Sequence[MHCParams],
    num_samples: int,
    *,
    xs: Tree,
    config: MHCConfig,
    norm_scale: Sequence[jax.Array | None] | None,
    norm_scale_eps: float,
    hidden_axis_name: str | Sequence[str] | None,
    implementation: Implementation,
    recompute: Recompute,
    unroll: int | bool,
    has_aux: bool | Literal["sum"],
) -> tuple[Before, Any, Any]:
    """The new streams, aux, and h_res of `num_samples` tokens, or None."""
    if isinstance(x, Streams):
        x.check_parts()
    else:
        x = _check.streams(_OP, "x", x)
    config = _check.config(_OP, config, x.dtype)
    if config.schedule == "delayed":
        _check.given_weights(_OP, x.h_pre if isinstance(x, Streams) else None, x)
    layers, params, scales = checks.sublayers(
        layers,
        params,
        norm_scale,
        x,
        has_slices=xs is not None,
        has_aux=checks.has_aux(_OP, has_aux) is not False,
    )
    checks.recompute(recompute)
    unroll = checks.unroll(_OP, unroll, has_loop=xs is not None)
    axes = _check.hidden_axes(_OP, hidden_axis_name, jax.tree.leaves(x)[0])
    eps = _check.norm_scale_eps(_OP, norm_scale_eps, _check.accumulation_dtype(x.dtype))
    # The ops check it, too, but there may be none.
    _check.implementation(_OP, implementation)
    options: Options = {
        "config": config,
        "norm_scale_eps": eps,
        "hidden_axis_name": axes,
        "implementation": implementation,
    }
    of_slices = "" if xs is None else "a slice of "
    defers = use_fused(_OP, implementation, x.dtype, axes)
    runner = Runner(x, options, axes, recompute.policy, defers, num_samples, of_slices)

    if xs is None:
        after, told = _in_a_row(runner, x, layers, params, scales, recompute)
    else:
        num_blocks = checks.num_blocks(params, scales, xs)
        every, num_together = checks.stretch(recompute.every, x.shape[-2], len(layers), num_blocks)
        before = as_streams(x, hidden_axis_name=axes, implementation=implementation)
        steps = Steps(num_blocks, num_together, unroll)
        with jax.named_scope("mhc_stack"):
            after, told = run_blocks(runner, before, layers, (params, scales, xs), steps, every)
    # Without a sublayer there is no post.
    if isinstance(after, Streams) and not isinstance(x, Streams):
        after = after.array(implementation=implementation)
    aux, samples = told
    if num_samples and samples is None:
        n = x.shape[-2]
        samples = jnp.zeros((0, num_samples, n, n), _check.accumulation_dtype(x.dtype))
    if has_aux == "sum":
        aux = checks.total(_OP, aux, of_blocks=xs is not None)
    return after, aux if has_aux == "sum" else tuple(aux), samples


def _in_a_row(
    runner: Runner,
    x: Before,
    layers: tuple[checks.CheckedLayer, ...],
    params: tuple[MHCParams, ...],
    scales: tuple[jax.Array | None, ...],
    recompute: Recompute,
) -> tuple[Before, Told]:
    """The streams after the last sublayer, and what the sublayers told."""
    every = recompute.every
    if every == "auto":
        lengths = list(range(1, len(layers) + 1)) or [1]
        every = best_length(runner.x.shape[-2], len(layers), lengths)
    each = zip(layers, params, scales, strict=True)
    sublayers = [runner.sublayer(i, *of_one) for i, of_one in enumerate(each)]
    after, (aux, samples) = runner.run(x, sublayers, every)
    return after, Told(aux, stacked_up(samples))
