"""Arguments that the library refuses: data for test_arguments.py.

`BAD` has a row for each argument of each public function: the op and the argument that the error
names, values of its kind that cannot be meant, and a call that takes one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc import Context, HeadParams, MHCConfig, MHCParams, convert, diagnostics
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx
from jax_mhc.presets import PAPER

KEY = jax.random.key(0)
N, C, K = 4, 8, 24
CONFIGS = {c: MHCConfig(constraint=c) for c in ("none", "identity", "permutations")}


def zeros(*shape, dtype=jnp.float32):
    """NumPy's, of which JAX compiles nothing."""
    return np.zeros(shape, dtype)


def params_of(n=N, c=C, *, static=False, config=PAPER):
    """Of the shapes that `init_params` gives them."""
    num = config.num_coefficients(n)
    dynamic = (zeros(n * c, num), zeros(config.num_gates()))
    return MHCParams(*(None, None) if static else dynamic, zeros(num))


def with_(record, **fields):
    """A copy with other fields."""
    return dataclasses.replace(record, **fields)


def stacked(tree, num=3):
    return jax.tree.map(lambda leaf: np.stack(num * [leaf]), tree)


def deleted(*shape):
    array = jnp.asarray(zeros(*shape))
    array.delete()
    return array


X, Y, Z, H = zeros(5, N, C), zeros(5, C), zeros(5, N, N), zeros(5, N)
PARAMS, STATIC = params_of(), params_of(static=True)
UNMIXED = params_of(config=CONFIGS["identity"])
HEAD = HeadParams(zeros(N * C, N), zeros(1), zeros(N))
CTX = Context(X, H, H, Z)
STREAMED = mhc.as_streams(jnp.asarray(X))
GAIN = diagnostics.Gain(1 + H, 1 + H)
ONE = np.ones((), np.float32)
MAXTEXT = {name: np.asarray(value) for name, value in convert.to_maxtext(PARAMS).items()}


class Traced:
    """A value that is not known while a program is made, such as `x` in `jax.jit(f)(x)`."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"a traced {self.value!r}"


# ---- values of every kind of argument that cannot be meant ---------------------------------------

ARRAY = [None, 3.0, "x", [1.0], {}, object(), np.array([None]), np.array(["a"]), MHCConfig]
DTYPES = [jnp.int32, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn]
INT = [None, "4", 4.0, True, [4], np.float32(4), jnp.int32(4), Traced(4), -1, 0]
STREAMS = [*INT, 17, 10**30]
WIDTH = [*INT, 2**62, 10**5000]
NUMBER = [None, "0", [0.0], True, 1j, np.complex64(1), jnp.float32(1), Traced(1.0)]
NUMBER += [-1, np.nan, np.inf, 10**400]
# Numbers that float32 does not hold.
EPS = [*NUMBER, 1e300, 1e-60, 1e-40]
CHOICE = [0, True, 1.5, "other", "", b"mean", [None], ["mean"], np.array(["mean"]), jnp.ones(3)]
CHOICE += [Traced(1)]
FLAG = [None, "yes", 1, 0, [], np.array([True]), jnp.bool_(True), Traced(True)]
FUNCTION = [None, 3, "tanh", X, PARAMS]
CONFIG = [None, {}, "paper", MHCConfig, 3, PARAMS]
TOO_LARGE = [
    MHCConfig(**{field: value})
    for field in ("sinkhorn_eps", "norm_eps", "pre_eps", "post_scale", "post_eps")
    for value in (1e300, 1e-60)
]
RANDOM_KEY = [None, 0, "key", [0, 0], jnp.ones(2), jax.random.split(KEY, 3), np.uint32(0)]
RANDOM_KEY += [jax.random.PRNGKey(0)[None], np.zeros(3, np.uint32), np.array([None]), Traced(0)]
RANDOM_KEY += [STREAMED]
PARAMETER_DTYPE = [None, "foo", "", "f4,(", 5, object(), int, complex, jnp.bfloat16, "float16", {}]
STORED = [None, "foo", "", "f4,(", 5, object(), int, complex, jnp.float8_e4m3fn, X, {}]
NAMES = [3, "phi", ["phi"], {"w": ("a",)}, {1: ("a",)}, {"phi": "ab"}, {"phi": ("a",)}]
NAMES += [{"bias": ("a", "b")}, {"alpha": (3,)}, {"alpha": None}, {"phi": {"a", "b"}}]
AXIS = [3, "a", "", ["a", "a"], ("a", 3), {"a"}, X, True]
POLICY = [3, jnp.tanh, lambda primitive: True, X, "dots", []]
LAYERS = [None, 3, jnp.tanh, [None], [jnp.tanh, "tanh"], "ab", {"a": jnp.tanh}, X[0, 0, 0]]
GAINS = [None, 3.0, H, (H, H), {}, {"a": H}]
BAND = [3, "ab", (2, 1), (0, 1), (1,), (1, 2, 3), (1, np.nan), (1, 10**400), ("a", "b")]

HIDDEN = [*ARRAY, *(zeros(5, C, dtype=d) for d in DTYPES), zeros(), zeros(5, 0), deleted(5, C)]
HIDDEN += [STREAMED]
X_BAD = [*ARRAY, *(zeros(5, N, C, dtype=d) for d in DTYPES), deleted(5, N, C)]
X_BAD += [zeros(C), zeros(5, 17, C), zeros(5, 0, C), zeros(5, N, 0), jax.random.split(KEY, (N, C))]
LAYER_OUTPUT = [*ARRAY, Y.astype(jnp.bfloat16), Y.astype(jnp.int32), Y[0], Y[:4], X, deleted(5, C)]
LAYER_OUTPUT += [STREAMED]
SCALE = [3.0, True, [1.0] * C, zeros(N), zeros(1, C), zeros(C, dtype=jnp.bfloat16), np.array(["a"])]
SCALE += [STREAMED]
GIVEN = [*ARRAY[1:], H.astype(jnp.bfloat16), H[0], H[:4], zeros(5, 3), Z, deleted(5, N), STREAMED]
MATRICES = [*ARRAY, *(zeros(5, N, N, dtype=d) for d in DTYPES), Z.astype(jnp.bfloat16)]
MATRICES += [zeros(N), zeros(N, 3), zeros(17, 17), zeros(0, 0), deleted(N, N), STREAMED]

MHC_PARAMS = [
    None, {}, (PARAMS.phi, PARAMS.alpha, PARAMS.bias), PARAMS.phi, HEAD, stacked(PARAMS), STREAMED,
    params_of(c=16), params_of(n=2, c=16), with_(STATIC, alpha=PARAMS.alpha),
    *(params_of(config=CONFIGS[name]) for name in ("identity", "permutations")),
    *(with_(PARAMS, phi=phi) for phi in (None, 3.0, PARAMS.phi.T, PARAMS.phi[None], zeros(32, 25))),
    *(with_(PARAMS, alpha=alpha) for alpha in (None, [1.0] * 3, zeros(), zeros(2), zeros(3, 1))),
    *(with_(PARAMS, bias=bias) for bias in (None, 3.0, zeros(K - 1), zeros(1, K), deleted(K))),
    *(jax.tree.map(lambda leaf, d=d: leaf.astype(d), PARAMS) for d in (jnp.bfloat16, jnp.int32)),
]  # fmt: skip
HEAD_PARAMS = [
    None, {}, PARAMS, HeadParams(zeros(32, 2), zeros(1), zeros(2)), with_(HEAD, phi=None),
    with_(HEAD, phi=HEAD.phi.T), with_(HEAD, alpha=None), with_(HEAD, alpha=zeros(3)),
    with_(HEAD, bias=zeros(N, dtype=jnp.float16)), with_(HEAD, bias=[0.0] * N),
]  # fmt: skip
CONTEXT = [
    None, {}, X, STREAMED, tuple(vars(CTX).values()), PARAMS,
    *(with_(CTX, x=x) for x in (None, X[:4], X.astype(jnp.int32), X.astype(jnp.float64))),
    *(with_(CTX, h_pre=h) for h in (None, H[0])),
    *(with_(CTX, h_post=h) for h in (None, H[..., None], H.astype(jnp.bfloat16), deleted(5, N))),
    *(with_(CTX, h_res=h) for h in (None, Z[0], Z[..., :3], Z.astype(jnp.float16))),
]  # fmt: skip

# ---- and calls that take them ------------------------------------------------------------------

STACKED = [stacked(PARAMS)]


def scaled(u, s):
    return s * u


def stack(layers=(jnp.tanh,), x=X, params=(PARAMS,), **options):
    return mhc.stack(layers, x, params, **options)


def sampled(**options):
    return mhc.stack_with_samples((jnp.tanh,), X, (PARAMS,), **options)


def scan(layers=(scaled,), x=X, params=STACKED, xs=H[:3, 0], **options):
    """Three blocks."""
    return mhc.stack(layers, x, params, xs=xs, **options)


def nnx_module(layer=jnp.tanh, hidden=C, **options):
    return mhc_nnx.MHC(layer, hidden, **{"rngs": nnx.Rngs(0), **options})


def nnx_head(hidden=C, **options):
    return mhc_nnx.Head(hidden, **{"rngs": nnx.Rngs(0), **options})


def nnx_stack(sublayers=("mlp",), blocks=None, x=X, **options):
    if blocks is None:
        module = nnx_module()
        blocks = nnx.merge(*(nnx.split(nnx.Dict(mlp=module))))
        nnx.update(blocks, jax.tree.map(lambda leaf: leaf[None], nnx.state(blocks)))
    return mhc_nnx.stack(blocks, x, sublayers, **options)


def eqx_stack(sublayers=None, blocks=None, x=X, **options):
    blocks = [eqx_module()] if blocks is None else blocks
    return mhc_eqx.stack(blocks, x, sublayers, **options)


def linen_stack(num_blocks=2, x=X, **options):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return mhc_linen.stack(mhc_linen.MHC(jnp.tanh, C), x, num_blocks, **options)

    return Model().init(KEY, x)


def linen_module(layer=jnp.tanh, hidden=C, x=X, **options):
    return mhc_linen.MHC(layer, hidden, **options).init(KEY, x)


def linen_head(hidden=C, x=X, **options):
    return mhc_linen.Head(hidden, **options).init(KEY, x)


def eqx_module(layer=jnp.tanh, hidden=C, **options):
    return mhc_eqx.MHC(layer, hidden, **{"key": KEY, **options})


def eqx_head(hidden=C, **options):
    return mhc_eqx.Head(hidden, **{"key": KEY, **options})


def sublayer(layer=jnp.tanh, x=X, params=PARAMS, **options):
    return mhc.mhc_residual(layer, x, params, **options)


def deepseek(fn=PARAMS.phi.T, base=PARAMS.bias, scale=PARAMS.alpha):
    return convert.from_deepseek_v4(fn, base, scale)


def hy4(fn=UNMIXED.phi.T, base=UNMIXED.bias, scale=UNMIXED.alpha):
    return convert.from_hy4(fn, base, scale)


def megatron(weight=PARAMS.phi.T, alpha=PARAMS.alpha, bias=PARAMS.bias):
    return convert.from_megatron(weight, alpha, bias)


def deepseek_head(fn=HEAD.phi.T, base=HEAD.bias, scale=HEAD.alpha):
    return convert.head_from_deepseek_v4(fn, base, scale)


def liger(phi=PARAMS.phi, b=PARAMS.bias, alpha_pre=ONE, alpha_post=ONE, alpha_res=ONE):
    return convert.from_liger(phi, b, alpha_pre, alpha_post, alpha_res)


def transformer_engine(
    phi=PARAMS.phi.T, alpha=PARAMS.alpha, beta=PARAMS.bias[None], norm_weight=None
):
    return convert.from_transformer_engine(phi, alpha, beta, norm_weight)


def maxtext_head(fn):
    return convert.head_from_maxtext(fn, HEAD.bias, HEAD.alpha)


def load(model):
    parts = zip(("fn", "base", "scale"), (PARAMS.phi.T, PARAMS.bias, PARAMS.alpha), strict=True)
    tensors = {
        f"layers.0.hc_{site}_{part}": array for part, array in parts for site in ("attn", "ffn")
    }
    return convert.load(tensors, model)


def of(call, argument):
    """The call as a function of one argument."""
    return lambda value: call(**{argument: value})


def rows(op, call, **kinds):
    """Rows of arguments that the error calls by their own names."""
    return [(op, argument, kind, of(call, argument)) for argument, kind in kinds.items()]


WEIGHT = [*ARRAY, *(zeros(K, N * C, dtype=d) for d in DTYPES), zeros(K), zeros(K, 0), zeros(K, 33)]
WEIGHT += [zeros(N * C, K), zeros(25, N * C), zeros(17 * 19, 17 * C)]
GATES = [None, [0.0] * 3, 3.0, zeros(), zeros(1), zeros(4), zeros(3, 1), zeros(3, dtype=jnp.int8)]
SCALAR = [None, 3.0, [0.0], zeros(1), zeros(3), zeros(dtype=jnp.int8)]
STATIC_PART = [None, [0.0] * K, zeros(), zeros(K - 1), zeros(K, 1), zeros(K, dtype=jnp.int8)]

BAD = [
    *rows(
        "MHCConfig", MHCConfig,
        constraint=[*CHOICE, None], order=[*CHOICE, None], norm_eps_mode=[*CHOICE, None],
        sinkhorn_eps_mode=[*CHOICE, None], schedule=[*CHOICE, None],
        sinkhorn_iters=[*INT[:-1], 10_001, 10**5000],
        sinkhorn_eps=NUMBER, norm_eps=NUMBER, pre_eps=NUMBER, post_scale=[*NUMBER, 0],
        post_eps=NUMBER, form=[*CHOICE, None],
    ),
    ("MHCConfig.num_coefficients", "streams", STREAMS, MHCConfig().num_coefficients),
    ("MHCConfig.num_coefficients", "config", [5], CONFIGS["permutations"].num_coefficients),
]  # fmt: skip
for op, init in (("init_params", mhc.init_params), ("init_head", mhc.init_head)):
    make = functools.partial(init, key=KEY, streams=N, hidden=C)
    too_large = [MHCConfig(pre_eps=0.25), *TOO_LARGE]
    BAD += rows(
        op, make, key=RANDOM_KEY, streams=STREAMS, hidden=WIDTH, config=[*CONFIG, *too_large],
        dtype=PARAMETER_DTYPE,
    )  # fmt: skip
BAD += [
    *rows(
        "init_params",
        functools.partial(mhc.init_params, KEY, streams=N, hidden=C),
        static=FLAG,
        config=[MHCConfig(post_scale=0.5), MHCConfig(post_eps=1.0)],
    ),
    *rows("expand", functools.partial(mhc.expand, streams=N), u=HIDDEN),
    *rows("expand", functools.partial(mhc.expand, Y), streams=STREAMS),
    *rows("reduce", mhc.reduce, x=X_BAD),
    *rows("reduce", functools.partial(mhc.reduce, X), method=[*CHOICE, None]),
]
for op, call in (
    ("pre", functools.partial(mhc.pre, x=X, params=PARAMS)),
    ("post_pre", functools.partial(mhc.post_pre, y=Y, ctx=CTX, params=PARAMS)),
):
    BAD += rows(
        op, call, params=MHC_PARAMS, config=[*CONFIG, *TOO_LARGE],
        norm_scale=SCALE, norm_scale_eps=EPS, hidden_axis_name=AXIS, implementation=CHOICE,
        h_pre=GIVEN,
    )  # fmt: skip
    others = [CONFIGS["identity"], CONFIGS["permutations"]]
    BAD.append((op, "params.bias", others, of(call, "config")))
BAD += [
    *rows("pre", functools.partial(mhc.pre, params=PARAMS), x=X_BAD),
    *rows("post", functools.partial(mhc.post, ctx=CTX), y=LAYER_OUTPUT),
    *rows("post", functools.partial(mhc.post, Y), ctx=CONTEXT),
    *rows("post", functools.partial(mhc.post, Y, CTX), implementation=CHOICE, bias=SCALE),
    *rows("post_pre", functools.partial(mhc.post_pre, ctx=CTX, params=PARAMS), y=LAYER_OUTPUT),
    *rows("post_pre", functools.partial(mhc.post_pre, y=Y, params=PARAMS), ctx=CONTEXT),
    *rows("collapse", functools.partial(mhc.collapse, h_pre=H), x=X_BAD),
    *rows("collapse", functools.partial(mhc.collapse, X), h_pre=GIVEN, implementation=CHOICE),
    *rows("as_streams", functools.partial(mhc.as_streams, X), h_pre=GIVEN),
    *rows("sinkhorn", mhc.sinkhorn, logits=MATRICES),
    *rows(
        "sinkhorn", functools.partial(mhc.sinkhorn, Z),
        config=[*CONFIG, *CONFIGS.values(), *TOO_LARGE], implementation=CHOICE,
    ),
    *rows("head", functools.partial(mhc.head, params=HEAD), x=X_BAD),
    *rows(
        "head", functools.partial(mhc.head, x=X, params=HEAD),
        params=HEAD_PARAMS, config=[*CONFIG, *TOO_LARGE], hidden_axis_name=AXIS,
        implementation=CHOICE,
    ),
    *rows("mhc_residual", sublayer, layer=[*FUNCTION, lambda u, s: u], has_aux=FLAG),
    (
        "mhc_residual", "layer's result", [*ARRAY, (), (Y, Y), Y[0], Y.astype(jnp.float16)],
        lambda y: sublayer(lambda u: y),
    ),
    (
        "mhc_residual", "layer's result", [*ARRAY, Y, (), (Y,), (Y, Y, Y), (None, Y)],
        lambda y: sublayer(lambda u: y, has_aux=True),
    ),
    *rows("pre", sublayer, x=X_BAD[:3], params=MHC_PARAMS[:3], norm_scale=SCALE[:3]),
    *rows(
        "stack", stack,
        layers=LAYERS, params=[None, 3, PARAMS, [], [PARAMS] * 2, "a", [None], [HEAD], STACKED],
        x=X_BAD, config=[*CONFIG, *TOO_LARGE], norm_scale=[3, "a", [], [SCALE[3]], [zeros(N)]],
        norm_scale_eps=EPS, hidden_axis_name=AXIS, implementation=CHOICE,
        recompute=[None, 2, "auto", "mhc", mhc.Recompute, Traced(1)],
        unroll=[None, "2", 1.5, 0, 2, Traced(1)], has_aux=[None, 1, "mean", Traced(True)],
    ),
    (
        "scan", "init", ["a", object(), [mhc.as_streams(X), None, "a"]],
        lambda init: mhc.scan(lambda x, s: (x, s), init, zeros(2)),
    ),
    *rows(
        "scan", functools.partial(mhc.scan, lambda x, s: (x, s), mhc.as_streams(X)),
        xs=["a", [object()], 3, [zeros(3), zeros(2)]], unroll=[None, "2", 1.5, 0, Traced(1)],
        length=["2", 1.5, -1, Traced(1)],
    ),
    *rows("stack_with_samples", sampled, sample_tokens=INT),
    *rows(
        "Recompute", mhc.Recompute,
        every=[*INT, "some", np.array(["auto", "auto"])], policy=[*POLICY, None, "a function"],
    ),
    ("stack", "layers[0]", [lambda: 0, lambda u, s: u], lambda f: stack([f])),
    ("stack", "layers[0]", [jnp.tanh, lambda: 0], lambda f: scan([f])),
    (
        "stack", "the result of layers[0]", [*ARRAY, (Y, Y), [Y], Y[0]],
        lambda y: stack([lambda u: y]),
    ),
    *rows(
        "stack", scan,
        xs=["a", [1.0], np.array([None] * 3), [zeros(3), zeros(2)], 3, jnp.float32(1), object()],
        params=[[PARAMS], [with_(PARAMS, phi=object())], [stacked(PARAMS, 2)], [HEAD]],
        norm_scale_eps=EPS, unroll=[None, "2", 1.5, 0, -1, Traced(1)],
        recompute=[mhc.Recompute(every=every) for every in (2, 4)],
        norm_scale=[[zeros(C)], [object()]],
    ),
    *rows(
        "remat_policy", functools.partial(mhc.remat_policy, streams=N, hidden=C),
        recompute=[*CHOICE, None], streams=STREAMS, hidden=WIDTH, layers=POLICY,
    ),
    *rows("param_labels", mhc.param_labels, params=[None, "a", MHCConfig, jnp.tanh, {"a": "b"}]),
    # Conversion.
    *rows("convert.from_deepseek_v4", deepseek, fn=WEIGHT, base=STATIC_PART, scale=GATES),
    *rows(
        "convert.from_hy4", hy4, fn=[*ARRAY, UNMIXED.phi, zeros(9, N * C), zeros(0, N * C)],
        base=STATIC_PART, scale=[zeros(3), *GATES],
    ),
    (
        "convert.to_hy4", "params",
        [
            None, {}, UNMIXED.phi, HEAD, STATIC, PARAMS, with_(UNMIXED, alpha=zeros(3)),
            with_(UNMIXED, bias=None), with_(UNMIXED, bias=zeros(9)),
        ],
        convert.to_hy4,
    ),
    *rows("convert.from_megatron", megatron, weight=WEIGHT, bias=STATIC_PART, alpha=GATES),
    (
        "convert.head_from_deepseek_v4", "hc_fn",
        [*ARRAY, zeros(N), zeros(N, 0), zeros(0, 0), HEAD.phi, zeros(17, 17 * C), zeros(N, 33)],
        of(deepseek_head, "fn"),
    ),
    ("convert.head_from_deepseek_v4", "hc_base", STATIC_PART, of(deepseek_head, "base")),
    (
        "convert.head_from_deepseek_v4", "hc_scale", [zeros(3), *GATES[:3]],
        of(deepseek_head, "scale"),
    ),
    (
        "convert.to_deepseek_v4", "params",
        [
            None, {}, PARAMS.phi, HEAD, STATIC, with_(PARAMS, phi=stacked(PARAMS).phi),
            *(params_of(n, config=CONFIGS["identity"]) for n in range(1, 17)),
            *(params_of(n, config=CONFIGS["permutations"]) for n in (2, 3, 4)),
            *(with_(PARAMS, phi=phi) for phi in (None, 3.0, PARAMS.phi.T, zeros(33, K))),
            with_(PARAMS, bias=None), with_(PARAMS, alpha=zeros(1)), with_(PARAMS, bias=zeros(8)),
        ],
        convert.to_deepseek_v4,
    ),
    (
        "convert.to_deepseek_v4", "streams", STREAMS[1:],
        lambda n: convert.to_deepseek_v4(PARAMS, streams=n),
    ),
    (
        "convert.to_deepseek_v4", "params.phi", [2, 3, 5, 12],
        lambda n: convert.to_deepseek_v4(PARAMS, streams=n),
    ),
    *(
        (
            "convert.to_deepseek_v4", "params.phi", nums,
            lambda n, config=CONFIGS[name]: convert.to_deepseek_v4(
                params_of(n, config=config), streams=n
            ),
        )
        for name, nums in (("identity", range(1, 17)), ("permutations", range(2, 5)))
    ),
    *rows(
        "convert.from_liger", liger,
        phi=[w.T if isinstance(w, np.ndarray) and w.ndim == 2 else w for w in WEIGHT],
        b=STATIC_PART, alpha_pre=SCALAR, alpha_post=SCALAR, alpha_res=SCALAR,
    ),
    *rows(
        "convert.from_transformer_engine", transformer_engine,
        phi=WEIGHT, alpha=GATES, beta=[*STATIC_PART, zeros(K)],
        norm_weight=[3.0, zeros(C), zeros(N * C, 1), zeros(N * C, dtype=jnp.int8)],
    ),
    *(
        (
            f"convert.{name}", "params",
            [None, {}, PARAMS.phi, HEAD, STATIC, params_of(5, config=CONFIGS["identity"])],
            getattr(convert, name),
        )
        for name in ("to_megatron", "to_liger", "to_transformer_engine", "to_maxtext")
    ),
    *(
        (f"convert.{name}", "params", HEAD_PARAMS[:3], getattr(convert, name))
        for name in ("head_to_deepseek_v4", "head_to_maxtext")
    ),
    ("convert.head_from_maxtext", "hc_fn", [*ARRAY, HEAD.phi.T], maxtext_head),
    (
        "convert.from_maxtext", "tensors",
        [
            None, 3, PARAMS, {}, {"pre_alpha": 1},
            *({name: value for name, value in MAXTEXT.items() if name != n} for n in MAXTEXT),
            *({**MAXTEXT, name: zeros(5)} for name in MAXTEXT),
            *({**MAXTEXT, name: zeros(*MAXTEXT[name].shape, dtype=jnp.int8)} for name in MAXTEXT),
        ],
        convert.from_maxtext,
    ),
    # Parameters whose phi has the shape of those of mHC-lite.
    (
        "convert.to_maxtext", "params.alpha",
        [params_of(n, config=CONFIGS["identity"]) for n in (3, 6, 16)], convert.to_maxtext,
    ),
    (
        "convert.to_maxtext", "like", [3, {}, convert.to_maxtext(params_of(2, 9), streams=2)],
        lambda like: convert.to_maxtext(PARAMS, like=like),
    ),
    ("convert.load", "path_or_mapping", [None, 3, [], {}, "/no/such", {"a": X}], convert.load),
    (
        "convert.load", "path_or_mapping", [f"layers.{10**12}.hc_attn_fn", "layers.1.hc_attn_fn"],
        lambda name: convert.load({name: PARAMS.phi.T}, "glm5"),
    ),
    ("convert.load", "model", [3, "", "deepseek", None, [], {}, {"model_type": "x"}], load),
    ("convert.save", "checkpoint", [None, {}, PARAMS, HEAD], lambda c: convert.save(c, {})),
    (
        "convert.save", "path_or_mapping", [None, 3, [], "/", b"a"],
        lambda path: convert.save(load("glm5"), path),
    ),
    # Diagnostics.
    *rows(
        "diagnostics.sample_tokens",
        functools.partial(diagnostics.sample_tokens, h_res=Z, count=3),
        h_res=MATRICES, count=INT,
    ),
    *rows("diagnostics.amax_gain", diagnostics.amax_gain, h_res=MATRICES),
    *rows("diagnostics.composite", diagnostics.composite, h_res=[*MATRICES, zeros(N, N)]),
    *rows("diagnostics.mixing", diagnostics.mixing, h_res=MATRICES),
    *rows("diagnostics.logit_range", diagnostics.logit_range, h_res=MATRICES),
    *rows(
        "diagnostics.summary", functools.partial(diagnostics.summary, h_res=Z[None]),
        h_res=[*MATRICES, zeros(N, N), zeros(0, 5, N, N), zeros(3, 0, N, N)], prefix=[None, 3, X],
    ),
    *rows(
        "estimate", functools.partial(mhc.estimate, hidden=C, layers=2, tokens=5),
        hidden=WIDTH, layers=INT, tokens=INT, streams=STREAMS, dtype=CHOICE, constraint=CHOICE,
        sublayers_per_layer=INT, gpu=CHOICE, bandwidth=[*NUMBER[1:], 0],
        recompute=[
            None, 2, "auto", mhc.Recompute(every=3), mhc.Recompute(policy=lambda *_, **__: True),
        ],
    ),
    *rows(
        "bench.measure", functools.partial(mhc.bench.measure, hidden=C, tokens=5),
        hidden=WIDTH, tokens=INT, streams=STREAMS, dtype=CHOICE, constraint=CHOICE, layers=INT,
    ),
    *rows("diagnostics.stream_similarity", diagnostics.stream_similarity, x=[*X_BAD, X[:, :1]]),
    *rows(
        "diagnostics.watch_gain", functools.partial(diagnostics.watch_gain, gain=GAIN),
        gain=[
            *GAINS, *(diagnostics.Gain(value, H) for value in (None, "a", [1.0], H > 0, 1j * H)),
            diagnostics.Gain(H, np.array([None])), diagnostics.Gain(H, True),
        ],
        band=BAND, step=[1.5, "1", True, [1], jnp.arange(2), H, Traced(1.0)], name=[None, 3, b"a"],
        callback=FUNCTION[1:],
    ),
    *rows(
        "diagnostics.plot_gain", functools.partial(diagnostics.plot_gain, gains=GAIN),
        gains=[
            *GAINS,
            *(diagnostics.Gain(value, value) for value in (None, "a", 1.0, H[:0])),
            *(diagnostics.Gain(H, value) for value in (None, H[:3])),
            {"a": diagnostics.Gain(H, None)},
        ],
        x=["abcde", 3, [1, 2], ["a"] * 5, [None] * 5, [[1], [1, 2]], {}],
        band=BAND, axes=[3, "a", [None]], xlabel=[3, b"a"],
    ),
    *rows(
        "diagnostics.plot_mixing", functools.partial(diagnostics.plot_mixing, h_res=Z),
        h_res=[
            *MATRICES, zeros(N, N), zeros(0, N, N), diagnostics.Mixing(None, None, None, None),
            diagnostics.Mixing(H, H, H, H[:3]), diagnostics.Mixing(*4 * [1.0]),
        ],
        sublayers=["ab", 3, [5], [-1], [1.5], [None]], axes=[3, "a", [None] * 6, []],
    ),
]  # fmt: skip
# Modules. What the initial values check is named as there.
for op, module, x_of in (
    ("flax.nnx", nnx_module, lambda x: nnx_module()(x)),
    ("flax.linen", linen_module, lambda x: linen_module(x=x)),
    ("equinox", eqx_module, lambda x: eqx_module()(x)),
):
    BAD += [
        *rows(
            f"{op}.MHC", module, layer=FUNCTION, static=FLAG, norm=FLAG, norm_scale_eps=EPS,
            implementation=CHOICE, param_dtype=STORED,
        ),
        (f"{op}.MHC", "x", [*X_BAD[:5], Y, X[..., :4], X[:, :3], X.astype(jnp.int32)], x_of),
    ]  # fmt: skip
for op, x_of in (
    ("flax.nnx", lambda x: nnx_head()(x)),
    ("flax.linen", lambda x: linen_head(x=x)),
    ("equinox", lambda x: eqx_head()(x)),
):
    BAD += [(f"{op}.Head", "x", [*X_BAD[:5], Y, X[..., :4], X.astype(jnp.int32)], x_of)]
for op, head in (("flax.nnx.Head", nnx_head), ("head", linen_head), ("equinox.Head", eqx_head)):
    BAD += rows(op, head, implementation=CHOICE)
for op, head in (
    ("flax.nnx.Head", nnx_head), ("flax.linen.Head", linen_head), ("equinox.Head", eqx_head),
):  # fmt: skip
    BAD += rows(op, head, param_dtype=STORED)
for op, kind in (("flax.nnx.MHC", nnx_module), ("flax.linen.MHC", linen_module)):
    BAD += rows(op, kind, axis_names=NAMES)
for op, kind in (("flax.nnx.Head", nnx_head), ("flax.linen.Head", linen_head)):
    BAD += rows(op, kind, axis_names=[*NAMES, {"norm_scale": ("a",)}])
for module, head in ((nnx_module, nnx_head), (eqx_module, eqx_head)):
    named = {"hidden": WIDTH, "streams": STREAMS, "config": [*CONFIG, *TOO_LARGE]}
    BAD += [*rows("init_params", module, **named), *rows("init_head", head, **named)]
# Streams of another n, width and dtype than the parameters.
OTHER_SHAPES = [mhc.as_streams(jnp.asarray(x)) for x in (X[:, :3], X[..., :4])]
OTHERS = [*OTHER_SHAPES, mhc.as_streams(jnp.asarray(X, jnp.float64))]
BAD += [
    ("pre", "params", OTHERS, functools.partial(mhc.pre, params=PARAMS)),
    ("pre", "params", OTHERS, lambda x: sublayer(x=x)),
    ("head", "params", OTHERS, functools.partial(mhc.head, params=HEAD)),
    ("stack", "params[0]", OTHERS, lambda x: stack(x=x)),
    ("stack", "a slice of params[0]", OTHERS, lambda x: scan(x=x)),
    ("flax.nnx.MHC", "x", OTHER_SHAPES, lambda x: nnx_module()(x)),
    ("flax.linen.MHC", "x", OTHER_SHAPES, lambda x: linen_module(x=x)),
    ("equinox.MHC", "x", OTHER_SHAPES, lambda x: eqx_module()(x)),
    ("flax.nnx.Head", "x", OTHER_SHAPES, lambda x: nnx_head()(x)),
]
RNGS = [None, 0, KEY, "a", nnx.Rngs(dropout=0), nnx.RngStream]
BAD += [
    *rows("flax.nnx.MHC", nnx_module, rngs=RNGS),
    *rows("flax.nnx.Head", nnx_head, rngs=RNGS),
    *rows(
        "flax.nnx.stack", nnx_stack,
        sublayers=[3, "mlp", [], [3], {"mlp": 3}, {3: {}}], x=X_BAD[:5],
        config=[MHCConfig()], norm_scale_eps=[1e-6], implementation=[None, "fused"],
        xs=[3, {"attention": {}}, {"mlp": 3}], arguments=[{}, 3],
    ),
    *rows("equinox.stack", eqx_stack, x=X_BAD[:5], arguments=[3, {3: X}], xs=[3, {3: X}]),
    ("equinox.stack", "blocks", [3, X, [3]], lambda b: eqx_stack(blocks=b)),
    *rows(
        "flax.linen.stack", linen_stack,
        num_blocks=[0, -1, 1.5, "a", None], x=X_BAD[:5], arguments=[3, {3: X}], xs=[3, {3: X}],
    ),
    ("flax.nnx.stack", "blocks", [3, X, nnx.Dict(mlp=nnx.Dict())], lambda b: nnx_stack(blocks=b)),
    *rows("flax.linen.MHC", linen_module, hidden=WIDTH, streams=STREAMS),
    *rows("flax.linen.Head", linen_head, hidden=WIDTH, streams=STREAMS),
    *rows("init_params", linen_module, config=[*CONFIG, *TOO_LARGE]),
    *rows("equinox.MHC", eqx_module, key=RANDOM_KEY),
    *rows("equinox.Head", eqx_head, key=RANDOM_KEY),
]  # fmt: skip
