"""Arguments that are unusual, and meant: data for test_arguments.py.

`GOOD` are calls that must not be refused, so that the checks do not grow too strict.
"""

import enum
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from bad_arguments import (
    CONFIGS,
    GAIN,
    HEAD,
    KEY,
    PARAMS,
    STATIC,
    C,
    K,
    N,
    X,
    Z,
    deepseek,
    deepseek_head,
    hy4,
    megatron,
    nnx_head,
    nnx_module,
    nnx_stack,
    params_of,
    sampled,
    scan,
    stack,
    sublayer,
    zeros,
)
from flax import nnx

import jax_mhc as mhc
from jax_mhc import MHCConfig, convert, diagnostics


class Mode(enum.StrEnum):
    MEAN = "mean"


@functools.wraps(jnp.tanh)
def wrapped(*args):
    return jnp.tanh(args[0])


class Variable:
    """An array to JAX, as those of Flax are."""

    def __jax_array__(self):
        return jnp.asarray(X)


def masked(u, mask):
    return u * jnp.broadcast_to(mask, u.shape)


WIDE = MHCConfig(post_scale=1e300, norm_eps=1e-60)
POLICIES = [
    jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable,
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("mhc_layer_output"),
    jax.checkpoint_policies.save_anything_except_these_names("mhc_streams"),
    jax.checkpoint_policies.save_any_names_but_these("mhc_streams"),
    jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    lambda *_, **settings: True, lambda primitive, *avals, name=None, **settings: False,
]  # fmt: skip
ALL_MHC_PARAMS = functools.partial(mhc.init_params, streams=N, hidden=C)

GOOD = {
    "MHCConfig": [
        lambda: MHCConfig(sinkhorn_iters=np.int64(3), norm_eps=0, pre_eps=np.float16(0.5)),
        lambda: MHCConfig(constraint=np.str_("none"), sinkhorn_eps=10**30, post_scale=np.int8(1)),
        lambda: MHCConfig().num_coefficients(np.int32(16)),
    ],
    "keys": [
        *(lambda key=key: ALL_MHC_PARAMS(key) for key in (KEY, jax.random.PRNGKey(0))),
        lambda: ALL_MHC_PARAMS(np.zeros(2, np.uint32)),
        lambda: ALL_MHC_PARAMS(jax.random.key(0, impl="rbg")),
        lambda: jax.vmap(ALL_MHC_PARAMS)(jax.random.split(KEY, 3)),
        lambda: jax.vmap(ALL_MHC_PARAMS)(jax.random.split(jax.random.PRNGKey(0), 3)),
        lambda: nnx_module(rngs=nnx.Rngs(params=0)), lambda: nnx_head(rngs=nnx.Rngs(mhc=1)),
    ],
    "init_params": [
        *(
            lambda dtype=dtype: ALL_MHC_PARAMS(KEY, dtype=dtype)
            for dtype in ("float32", "f4", jnp.float64, np.float32, np.dtype("float64"), float)
        ),
        lambda: mhc.init_params(KEY, streams=np.int8(1), hidden=np.uint64(1), static=np.True_),
        lambda: mhc.init_params(KEY, streams=16, hidden=10**6),
        lambda: ALL_MHC_PARAMS(KEY, config=WIDE, dtype="float64"),
    ],
    "streams": [
        *(
            lambda c=c, n=n, dtype=dtype: mhc.reduce(mhc.expand(zeros(c, dtype=dtype), streams=n))
            for c, n in ((1, 1), (3, 16))
            for dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)
        ),
        lambda: mhc.expand(zeros(0, C), streams=N),
        lambda: mhc.reduce(X, method=np.str_("sum")), lambda: mhc.reduce(X, method=Mode.MEAN),
        lambda: mhc.pre(Variable(), PARAMS), lambda: mhc.pre(X * np.nan, PARAMS),
        lambda: mhc.pre(X[:0], PARAMS), lambda: mhc.pre(X[0], STATIC),
        lambda: mhc.pre(X, PARAMS, config=MHCConfig(norm_eps=0.0, sinkhorn_iters=0)),
        lambda: mhc.pre(X, PARAMS, hidden_axis_name=[]),
        lambda: mhc.pre(X, PARAMS, config=CONFIGS["none"]),
        lambda: mhc.pre(X, PARAMS, norm_scale=zeros(C), norm_scale_eps=0),
        lambda: mhc.pre(X, PARAMS, norm_scale=zeros(C), norm_scale_eps=np.float32(1e-6)),
        lambda: mhc.pre(
            np.float64(X), jax.tree.map(np.float64, PARAMS), config=WIDE,
            norm_scale=np.ones(C), norm_scale_eps=1e-60,
        ),
        lambda: mhc.head(X, HEAD, implementation=np.str_("reference")),
        lambda: mhc.sinkhorn(np.float64(Z), config=MHCConfig(sinkhorn_eps=1e-60)),
    ],
    "layers": [
        *(
            lambda f=f: sublayer(f)
            for f in (wrapped, jax.jit(jnp.tanh), jnp.asarray, eqx.nn.Identity())
        ),
        lambda: sublayer(functools.partial(masked, mask=zeros(C))),
        lambda: sublayer(lambda u, *rest, scale=2.0: (u, None), has_aux=np.bool_(True)),
        lambda: stack((f for f in [wrapped]), X, (p for p in [PARAMS])),
        lambda: stack({"a": jnp.tanh}.values(), X, {"a": PARAMS}.values(), norm_scale=zeros(1, C)),
        lambda: stack([], X, []), lambda: stack(unroll=False),
        lambda: stack(recompute=mhc.Recompute(every="auto")),
        lambda: stack(recompute=mhc.Recompute(every=np.int32(100))),
        lambda: sampled(sample_tokens=np.int64(3)),
        lambda: scan([lambda u, s: u], xs=jax.random.split(KEY, 3)),
        lambda: scan(xs=np.float32([1, 2, 3])),
        lambda: scan([lambda u, s: u], xs={"a": zeros(3, dtype=int), "b": None}, unroll=True),
        lambda: scan(unroll=7),
        lambda: scan(recompute=mhc.Recompute(every=3), norm_scale=[zeros(3, C)]),
        lambda: nnx_stack(iter(["mlp"])), lambda: nnx_stack({"mlp": {}}.keys()),
        lambda: nnx_stack({"mlp": {}}, recompute=mhc.Recompute(every="auto")),
        lambda: nnx_module(lambda u, scale: u * scale)(X, scale=2.0),
    ],
    "policies": [
        *(
            lambda policy=policy: mhc.remat_policy("mhc", streams=N, hidden=C, layers=policy)
            for policy in POLICIES
        ),
        *(
            lambda policy=policy: stack(recompute=mhc.Recompute(policy=policy))
            for policy in POLICIES
        ),
        lambda: mhc.Recompute(policy=mhc.remat_policy(streams=np.int64(N), hidden=C)),
    ],
    "labels": [
        lambda params=params: mhc.param_labels(params)
        for params in ({}, (), [None, 1.0], PARAMS, np.float32(1), {("a", "b"): X}, {1: STATIC})
    ],
    "convert": [
        *(
            lambda dtype=dtype: convert.to_deepseek_v4(deepseek(zeros(K, N * C, dtype=dtype)))
            for dtype in (jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16)
        ),
        *(
            lambda n=n, c=c: convert.to_deepseek_v4(params_of(n, c), streams=np.int64(n))
            for n in range(1, 17) for c in (1, 12)
        ),
        *(lambda n=n: convert.to_deepseek_v4(params_of(n, 1)) for n in range(1, 17)),
        lambda: convert.to_deepseek_v4(params_of(4, 7168)), megatron, deepseek_head, hy4,
        lambda: convert.to_hy4(hy4()),
    ],
    "diagnostics": [
        lambda: diagnostics.sample_tokens(Z, np.int32(100)), lambda: diagnostics.composite(Z[:0]),
        *(
            lambda options=options: diagnostics.watch_gain(GAIN, **options)
            for options in (
                {"step": 3}, {"step": np.int64(3)}, {"step": np.array(3)}, {"step": jnp.int32(3)},
                {"name": np.str_("gain")}, {"band": np.array([0.5, 2.0])}, {"callback": print},
            )
        ),
        lambda: diagnostics.watch_gain(diagnostics.Gain(1, 1.0)),
        lambda: diagnostics.watch_gain(diagnostics.Gain(jnp.ones(3, jnp.bfloat16), np.float16(1))),
        lambda: jax.jit(diagnostics.watch_gain)(GAIN),
        lambda: diagnostics.plot_gain(GAIN, x=np.arange(5), band=None, xlabel="step"),
        lambda: diagnostics.plot_gain(GAIN, x=np.arange("2026-01", "2026-06", dtype="M8[M]")),
        lambda: diagnostics.plot_mixing(Z, sublayers=np.arange(2)),
        lambda: diagnostics.plot_mixing(diagnostics.mixing(Z), sublayers=()),
    ],
}  # fmt: skip
