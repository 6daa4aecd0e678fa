"""A stack of sublayers: what it computes, what is compiled, and what its backward pass keeps."""

import collections
import dataclasses
import functools
import math
import operator
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    AS_WRITTEN,
    FAST_COMPILATION,
    PLATFORM,
    WIDEST,
    Case,
    assert_trees_close,
    implemented,
    in_float64,
    relative_error,
    variant,
)
from hlo import compiled_text, custom_calls, residuals
from jax import checkpoint_policies

from jax_mhc import (
    Recompute,
    mhc_residual,
    post,
    pre,
    presets,
    stack,
    stack_with_samples,
)

CASE = Case((3, 5), 4, 16)


# ---- one model in three forms -------------------------------------------------------------------


def operands(num_blocks, num_sublayers, dtype=WIDEST, case=CASE):
    """Streams, weights [num_blocks, num_sublayers, C, C], and stacked params of each sublayer."""
    rng = np.random.default_rng(0)
    draw = functools.partial(cases.params, case, rng, dtype)
    params = [[draw() for _ in range(num_blocks)] for _ in range(num_sublayers)]
    scales = [[cases.norm_scale(case, rng, dtype) for _ in row] for row in params]
    weights = rng.normal(size=(num_blocks, num_sublayers, case.hidden, case.hidden))
    return {
        "x": jnp.asarray(cases.streams(case, rng, dtype)),
        "weights": jnp.asarray((weights / math.sqrt(case.hidden)).astype(dtype)),
        "params": tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *p) for p in params),
        "norm_scale": tuple(jnp.stack(s) if case.norm else None for s in scales),
    }


def layers(num_sublayers):
    def layer(u, weights, i):
        return jnp.sin(jnp.matmul(u, weights[i], precision="highest"))

    return [functools.partial(layer, i=i) for i in range(num_sublayers)]


def by_sublayers(o, **options):
    """The loop that the docstring of `stack` shows."""

    def block(x, slices):
        params, scales, weights = slices
        for layer, p, scale in zip(layers(len(params)), params, scales, strict=True):
            sublayer = functools.partial(layer, weights=weights)
            x = mhc_residual(sublayer, x, p, norm_scale=scale, **options)
        return x, None

    return jax.lax.scan(block, o["x"], (o["params"], o["norm_scale"], o["weights"]))[0]


def scanned(o, run=stack, **options):
    options |= {"xs": o["weights"], "norm_scale": o["norm_scale"]}
    return run(layers(len(o["params"])), o["x"], o["params"], **options)


def in_a_row(o, run=stack, **options):
    functions, params, scales = [], [], []
    for b, weights in enumerate(o["weights"]):
        functions += [functools.partial(f, weights=weights) for f in layers(len(o["params"]))]
        params += [jax.tree.map(operator.itemgetter(b), p) for p in o["params"]]
        scales += [scale if scale is None else scale[b] for scale in o["norm_scale"]]
    return run(functions, o["x"], params, norm_scale=scales, **options)


def value_and_gradients(form, o, **options):
    x_new, vjp = jax.vjp(functools.partial(form, **options), o)
    return x_new, vjp(jnp.sin(jnp.arange(x_new.size)).reshape(x_new.shape).astype(x_new.dtype))[0]


def compiled(form, compiler_options, **options):
    function = functools.partial(value_and_gradients, form, **options)
    return jax.jit(function, compiler_options=compiler_options)


@functools.cache
def exact(*size, dtype=WIDEST, case=CASE, norm_scale_eps=1e-6):
    """Sublayer by sublayer, in float64 on the CPU."""
    program = exact_program(config=case.config, norm_scale_eps=norm_scale_eps)
    return in_float64(program, operands(*size, dtype, case))


@functools.cache
def exact_program(**options):
    """One for operands of all dtypes, which are widened."""
    return compiled(by_sublayers, FAST_COMPILATION, implementation="reference", **options)


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype, implementation", implemented("float32", "bfloat16"))
@pytest.mark.parametrize(
    "size, forms",
    [
        ((1, 1), (in_a_row,)),
        ((1, 3), (in_a_row, scanned)),
        ((2, 1), (in_a_row, scanned)),
        ((5, 3), (scanned,)),
    ],
)
def test_is_the_sublayers_one_after_the_other(size, forms, dtype, implementation):
    """Rounding errors are those of `mhc_residual`, in all values and gradients."""
    dtype = jnp.dtype(dtype)
    o, wanted = operands(*size, dtype), exact(*size, dtype=dtype)

    def errors(form):
        actual = compiled(form, AS_WRITTEN, implementation=implementation)(o)
        assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, (o["x"], o))
        return jax.tree.leaves(jax.tree.map(relative_error, actual, wanted))

    plain = errors(by_sublayers)
    for form in forms:
        for error, other in zip(errors(form), plain, strict=True):
            assert error <= 3 * other + 4 * float(jnp.finfo(dtype).eps)


def check(form, size, implementation, case=CASE, **options):
    """Compares with what is exact in the widest dtype, where all roundings are small."""
    options |= {"config": case.config, "implementation": implementation}
    quick = FAST_COMPILATION if PLATFORM == "cpu" else AS_WRITTEN
    actual = compiled(form, quick, **options)(operands(*size, case=case))
    eps = options.get("norm_scale_eps", 1e-6)
    wanted = exact(*size, case=case, norm_scale_eps=eps)
    assert_trees_close(actual, wanted, 1e3 * float(jnp.finfo(WIDEST).eps))


@pytest.mark.parametrize(
    "form, size, options",
    [
        (in_a_row, (2, 2), {"recompute": Recompute(every=3)}),  # the last stretch is shorter
        (scanned, (4, 2), {"recompute": Recompute(every=2)}),
        (scanned, (2, 4), {"recompute": Recompute(every=2)}),
        (scanned, (4, 2), {"recompute": Recompute(every=4)}),
        (scanned, (4, 2), {"recompute": Recompute(every=8)}),
        (scanned, (4, 2), {"unroll": 2}),
        (scanned, (4, 2), {"unroll": True, "recompute": Recompute(every=2)}),
        (scanned, (4, 2), {"recompute": Recompute(policy=checkpoint_policies.nothing_saveable)}),
        (in_a_row, (2, 2), {"recompute": Recompute(policy=checkpoint_policies.nothing_saveable)}),
        (scanned, (2, 2), {"recompute": Recompute(policy="mhc")}),
        (scanned, (2, 4), {"recompute": Recompute(every=2, policy="mhc")}),
        (scanned, (4, 2), {"recompute": Recompute(every="auto", policy="mhc")}),
        (in_a_row, (2, 2), {"recompute": Recompute(every="auto", policy="mhc")}),
    ],
)
def test_what_is_kept_does_not_change_the_result(form, size, options):
    check(form, size, "fused", **options)


@pytest.mark.parametrize("form, size", [(in_a_row, (2, 2)), (scanned, (4, 2))])
def test_the_reference_computes_again_what_it_has_not_kept(form, size):
    check(form, size, "reference", recompute=Recompute(every=2))


@pytest.mark.parametrize(
    "case",
    [
        Case((5,), 3, 7, config=presets.DEEPSEEK_V4),
        Case(
            (5,), 4, 16, config=variant(norm_eps=0.5, pre_eps=0.25, post_scale=0.7, post_eps=0.125)
        ),
        Case((3,), 1, 5, config=variant(constraint="identity")),
        Case((2, 0, 3), 4, 16),
        Case((), 2, 5),
        Case((3,), 4, 16, static=True),
        Case((5,), 4, 16, 3.0, cases.PERMUTED),
    ],
)
def test_settings_and_shapes(case, implementation):
    check(scanned, (2, 2), implementation, case)


@pytest.mark.parametrize("form", [in_a_row, scanned])
def test_norms(form, implementation):
    case = Case((5,), 4, 16, norm=True)
    check(form, (2, 2), implementation, case, norm_scale_eps=0.25)


@pytest.mark.parametrize("policy", ["streams", "mhc"])
def test_norms_where_streams_are_computed_again(policy):
    case = Case((5,), 4, 16, norm=True)
    check(scanned, (2, 2), "fused", case, recompute=Recompute(every=2, policy=policy))


def test_settings_of_a_row():
    check(in_a_row, (2, 1), "fused", Case((5,), 3, 7, config=presets.DEEPSEEK_V4))


def test_no_sublayers(implementation):
    o = operands(2, 1)
    for xs in (None, o["weights"]):
        out = stack([], o["x"], [], xs=xs, implementation=implementation)
        np.testing.assert_array_equal(out, o["x"])


def vmapped(o, **options):
    axes = (dict.fromkeys(o) | {"x": 0},)
    return jax.vmap(functools.partial(scanned, **options), in_axes=axes)(o)


def looped_over(o, **options):
    return jax.lax.map(lambda x: scanned(o | {"x": x}, **options), o["x"])


def checkpointed(o, **options):
    policy = checkpoint_policies.save_only_these_names("mhc_layer_output", "mhc_coefficients")
    return jax.checkpoint(functools.partial(scanned, **options), policy=policy)(o)


@pytest.mark.parametrize("form", [vmapped, looped_over, checkpointed])
def test_transformations(form):
    for recompute in (Recompute(), Recompute(every=2), Recompute(every=4, policy="mhc")):
        check(form, (4, 2), "fused", recompute=recompute)


# ---- the scan with a backward pass of its own ---------------------------------------------------


def with_all_kinds_of_values(o, scale, table, **options):
    """Layers with slices that have no gradient, and with arrays from outside."""
    numbers = jnp.arange(table.size)[::-1]
    num_blocks = len(o["weights"])
    xs = {
        "weights": o["weights"],
        "shift": np.arange(num_blocks),
        "key": jax.random.split(jax.random.key(0), num_blocks),
    }

    def first(u, s):
        mixed = jnp.tanh(jnp.matmul(u, s["weights"][0], precision="highest"))
        dropped = jax.random.bernoulli(s["key"], 0.5, u.shape)
        return jnp.where(dropped, 0, mixed[..., numbers] * scale * jnp.broadcast_to(table, u.shape))

    @jax.checkpoint
    def second(u, s):
        return jnp.sin(jnp.roll(u, s["shift"], -1) * scale) + u

    return stack([first, second], o["x"], o["params"], xs=xs, implementation="fused", **options)


@pytest.mark.parametrize(
    "transform, options",
    [
        (jax.jit, {}),
        (jax.checkpoint, {}),
        (lambda f: f, {}),
        (jax.jit, {"recompute": Recompute(every=2)}),
        (jax.jit, {"recompute": Recompute(every=4, policy="mhc")}),
    ],
)
def test_has_the_gradients_of_a_scan(transform, options):
    """To the bit, but for sums over the blocks of the gradient of what a layer closes over."""
    o = operands(4, 2, np.dtype("float32"))
    scale, table = jnp.float32(1.3), jnp.linspace(0, 1, CASE.hidden, dtype="float32")

    def run(**options):
        function = transform(functools.partial(with_all_kinds_of_values, **options))
        x_new, vjp = jax.vjp(function, o, scale, table)
        return x_new, vjp(jnp.sin(x_new))

    x_new, (d_o, *d_others) = run(**options)
    # A policy is for jax.checkpoint, in JAX's own scan.
    expected, (d_o_expected, *d_others_expected) = run(
        recompute=Recompute(policy=checkpoint_policies.everything_saveable)
    )
    jax.tree.map(np.testing.assert_array_equal, (x_new, d_o), (expected, d_o_expected))
    assert_trees_close(d_others, d_others_expected, 1e-5, jnp.float32)


def test_two_gradients_of_one_program():
    """The forward pass is traced for each."""
    o = operands(2, 2)
    scale, table = jnp.ones((), WIDEST), jnp.ones(CASE.hidden, WIDEST)
    function = jax.jit(lambda *args: with_all_kinds_of_values(*args).sum())
    _, of_scale = jax.vjp(lambda scale: function(o, scale, table), scale)
    _, of_table = jax.vjp(lambda table: function(o, scale, table), table)
    both = jax.grad(function, argnums=(1, 2))(o, scale, table)
    one = jnp.ones((), WIDEST)
    np.testing.assert_array_equal(of_scale(one)[0], both[0])
    np.testing.assert_array_equal(of_table(one)[0], both[1])


def test_what_layers_get_is_not_kept():
    """Neither the weights nor what layers close over, or compute from that alone."""
    mask = jnp.ones((19, 23), WIDEST)

    def layer(u, weights):
        return u * jnp.tril(mask).sum() * jnp.cos(mask)[:1, :1].sum() + u @ weights

    def form(o, mask_scale):
        own = mask * mask_scale

        def other(u, weights):
            return jnp.where(own.sum() > 0, u, 0) * jnp.exp(own)[0, 0]

        weights = o["weights"][:, 0]
        return stack([layer, other], o["x"], o["params"], xs=weights, implementation="fused")

    o = operands(5, 2, case=KEPT)
    sizes = residuals(form, o, jnp.ones((), WIDEST))
    assert 5 * mask.size not in sizes
    # The weights themselves, which were cut out of an argument.
    assert sizes.count(5 * KEPT.hidden**2) == 1


@pytest.mark.parametrize(
    "derivative, message",
    [
        (lambda f: lambda x: jax.jvp(f, (x,), (x,)), "stack: derivative: expected reverse mode"),
        (lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()), "derivative of the derivative"),
    ],
)
def test_has_a_reverse_mode_of_first_order(derivative, message):
    o = operands(2, 2)
    with pytest.raises(TypeError, match=message):
        derivative(lambda x: scanned(o | {"x": x}, implementation="fused").sum())(o["x"])


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("has_aux", [False, True, "sum"])
def test_no_blocks(implementation, has_aux):
    o = operands(1, 2)
    none = jax.tree.map(lambda leaf: leaf[:0], (o["params"], o["weights"]))

    def run(x):
        told = [lambda u, w: (u, w[0])] * 2 if has_aux else [lambda u, w: u] * 2
        return stack(told, x, none[0], xs=none[1], implementation=implementation, has_aux=has_aux)

    after, backward, *_ = jax.vjp(lambda x: jax.tree.leaves(run(x))[0], o["x"])
    np.testing.assert_array_equal(after, o["x"])
    np.testing.assert_array_equal(backward(after)[0], o["x"])


# ---- what layers return beside y ----------------------------------------------------------------


def with_losses(form, recompute, has_aux, o):
    """A total of the streams and of losses that a layer of two returns, and the losses."""
    functions, params = layers(2), o["params"]

    def run(f, is_told, u, *weights):
        y = f(u, *weights) if weights else f(u)
        return y, jnp.mean(u * y, axis=-1) if is_told else None

    if form is scanned:
        told = [functools.partial(run, f, i == 1) for i, f in enumerate(functions)]
        options = {"xs": o["weights"]}
    else:
        told, params = [], []
        for b, weights in enumerate(o["weights"]):
            of_block = (functools.partial(f, weights=weights) for f in functions)
            told += [functools.partial(run, f, i == 1) for i, f in enumerate(of_block)]
            params += [jax.tree.map(operator.itemgetter(b), p) for p in o["params"]]
        options = {}
    x, aux = stack(told, o["x"], params, recompute=recompute, has_aux=has_aux, **options)
    total = jnp.sum(jnp.sin(x)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(aux))
    return total, aux


@pytest.mark.parametrize("recompute", [Recompute(), Recompute(every=2), Recompute(every=4)])
def test_losses_of_layers(recompute):
    o, limit = operands(4, 2), 1e-9 if PLATFORM == "cpu" else 1e-4
    program = jax.value_and_grad(with_losses, argnums=3, has_aux=True)
    run = jax.jit(program, static_argnums=(0, 1, 2))
    (expected, each), gradient = run(in_a_row, Recompute(), True, o)
    assert each[::2] == (None,) * 4
    for form in scanned, in_a_row:
        (total, summed), got = run(form, recompute, "sum", o)
        np.testing.assert_allclose(total, expected, rtol=limit)
        np.testing.assert_allclose(summed, sum(each[1::2]), rtol=limit)
        assert_trees_close(got, gradient, limit)
    (_, (none, stacked)), _ = run(scanned, recompute, True, o)
    assert none is None
    np.testing.assert_allclose(stacked, jnp.stack(each[1::2]), rtol=limit)


# ---- what is compiled ---------------------------------------------------------------------------


def calls(form, size, **options):
    """The custom calls of a model's forward pass, and those that its gradient adds."""
    o = operands(*size)
    options["implementation"] = "fused"
    forward = custom_calls(compiled_text(functools.partial(form, **options), o))
    # As handed to XLA, which may merge what is computed twice.
    program = jax.jit(functools.partial(value_and_gradients, form, **options)).lower(o).as_text()
    both = collections.Counter(re.findall(r"custom_call @jax_mhc_(\w+)_v\d+", program))
    return forward, both - forward


def test_a_row_is_joined_by_seams():
    forward, backward = calls(in_a_row, (2, 3))
    assert forward == {"pre_fwd": 1, "post_pre_fwd": 5, "post_fwd": 1}
    assert backward == {"pre_bwd": 1, "post_pre_bwd": 5, "post_bwd": 1}


def test_a_block_begins_with_a_seam():
    """There is no pre, and one post after the loop."""
    forward, backward = calls(scanned, (4, 3))
    assert forward == {"post_pre_fwd": 3, "post_fwd": 1}
    assert backward == {"post_pre_bwd": 3, "post_bwd": 1}


def test_streams_are_computed_again_by_post_alone():
    """Streams between the first and the last of a stretch, whose layers do not run again."""
    forward, backward = calls(scanned, (4, 3), recompute=Recompute(every=3))
    assert forward == {"post_pre_fwd": 3, "post_fwd": 1}
    assert backward == {"post_fwd": 2, "post_pre_bwd": 3, "post_bwd": 1}
    _, backward = calls(scanned, (4, 1), recompute=Recompute(every=2))
    assert backward == {"post_fwd": 1, "post_pre_bwd": 2, "post_bwd": 1}


def test_the_layers_inputs_are_computed_again_by_seams():
    _, backward = calls(scanned, (4, 3), recompute=Recompute(every=3, policy="mhc"))
    assert backward == {"post_pre_fwd": 3, "post_pre_bwd": 3, "post_bwd": 1}


@pytest.mark.parametrize("form", [scanned, in_a_row])
@pytest.mark.parametrize("policy", ["streams", "mhc"])
def test_no_layer_runs_again(form, policy):
    def num_products(**options):
        run = functools.partial(value_and_gradients, form, implementation="fused", **options)
        return compiled_text(run, operands(4, 2)).count(" dot(")

    # Of a layer its own, and those for the gradients of u and of its weights.
    assert num_products(recompute=Recompute(every=2, policy=policy)) == num_products()


def test_unroll():
    forward, _ = calls(scanned, (4, 1), unroll=2)
    assert forward == {"post_pre_fwd": 2, "post_fwd": 1}


def test_reference_has_no_custom_call():
    text = compiled_text(functools.partial(scanned, implementation="reference"), operands(2, 1))
    assert not custom_calls(text)


@pytest.mark.parametrize("every", [1, 2])
def test_the_loop_carries_the_streams_once(every, implementation):
    """Beside them y, h_post and h_res; the rest is what it loops over."""
    o = operands(3, 2)
    form = functools.partial(
        scanned, implementation=implementation, recompute=Recompute(every=every)
    )
    program = jax.jit(form).lower(o).as_text()
    loop = re.search(r"stablehlo.while\(.*?\) : (.*)", program).group(1)
    carried = re.findall(rf"tensor<([\dx]+)xf{8 * WIDEST.itemsize}>", loop)
    looped_over = [
        "x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves((o["params"], o["weights"]))
    ]
    # A norm_scale that is not there has no values.
    carried = sorted(shape for shape in carried if not shape.endswith("x0"))
    assert carried == sorted([*looped_over, "3x5x4x16", "3x5x16", "3x5x4", "3x5x4x4"])


# ---- what the backward pass keeps ---------------------------------------------------------------

# Arrays of T · C and of T · n · C numbers are as large as no other.
KEPT = Case((3, 7), 3, 16)
T = math.prod(KEPT.tokens)


def num_kept(form, size, num_steps, case=KEPT, **options):
    """Number of streams and hidden states that each step of the model keeps beside its operands."""
    o = operands(*size, case=case)
    kept = collections.Counter(
        residuals(functools.partial(form, implementation="fused", **options), o)
    )
    hidden = num_steps * T * KEPT.hidden
    # The streams after all blocks lie behind those before each.
    streams = kept[hidden * KEPT.streams] + kept[(hidden + T * KEPT.hidden) * KEPT.streams]
    return streams, kept[hidden]


# Of each sublayer the layer keeps u and a cosine, the seam y and the streams.
@pytest.mark.parametrize(
    "size, num_steps, options, streams, states",
    [
        ((5, 2), 5, {}, 2, 6),
        ((5, 2), 5, {"recompute": Recompute(every=2)}, 1, 6),
        ((5, 4), 5, {"recompute": Recompute(every=2)}, 2, 12),
        ((4, 2), 2, {"recompute": Recompute(every=4)}, 1, 12),
        ((5, 2), 5, {"recompute": Recompute(every=2, policy="mhc")}, 1, 4),
        ((4, 2), 2, {"recompute": Recompute(every=4, policy="mhc")}, 1, 8),
        # The streams and the y before each sublayer or block: all that enters it.
        ((5, 2), 5, {"recompute": Recompute(policy=checkpoint_policies.nothing_saveable)}, 2, 2),
        (
            (5, 2), 5,
            {"recompute": Recompute(every=2, policy=checkpoint_policies.nothing_saveable)}, 1, 1,
        ),
        (
            (5, 2), 5,
            {
                "recompute": Recompute(
                    every=2, policy=checkpoint_policies.save_only_these_names("mhc_layer_output")
                ),
            },
            1, 2,
        ),
    ],
)  # fmt: skip
def test_a_block_keeps(size, num_steps, options, streams, states):
    assert num_kept(scanned, size, num_steps, **options) == (streams, states)


def test_a_norm_keeps_no_second_input():
    """The backward pass takes u from where the layer keeps it."""
    assert num_kept(scanned, (5, 2), 5, dataclasses.replace(KEPT, norm=True)) == (2, 6)


@pytest.mark.parametrize("every, streams", [(1, 5), (2, 3), (3, 2), (6, 1)])
def test_a_row_keeps(every, streams):
    """The streams before each stretch, the first of which are an operand, and before the end."""
    kept, states = num_kept(in_a_row, (2, 3), 1, recompute=Recompute(every=every))
    assert (kept, states) == (streams, 18)


def test_all_of_mhc_is_computed_again():
    """Of the coefficients those that each stretch begins with are kept, h_post and h_res."""
    o, n = operands(8, 2, case=KEPT), KEPT.streams
    for every in (2, 4):
        again = Recompute(every=every, policy="mhc")
        run = functools.partial(scanned, implementation="fused", recompute=again)
        kept = collections.Counter(residuals(run, o))
        of_h_res = sum(
            size // (T * n * n) * num
            for size, num in kept.items()
            if size in (T * n * n, 16 // every * T * n * n)
        )
        assert of_h_res == 16 // every + 1  # and those of the last sublayer


def test_the_reference_computes_streams_again():
    o = operands(5, 2, case=KEPT)

    def num_streams(every):
        form = functools.partial(
            scanned, implementation="reference", recompute=Recompute(every=every)
        )
        return collections.Counter(residuals(form, o))[5 * T * KEPT.streams * KEPT.hidden]

    assert num_streams(2) == 1 < num_streams(1)


def test_wider_copies_are_not_kept_beside_what_they_copy():
    """Such as the float32 that a norm makes of half precision."""

    def layer(u, weights):
        wide = u.astype(jnp.float32)
        return u * (wide * wide).astype(u.dtype)

    def form(o, **options):
        return stack(2 * [layer], o["x"], o["params"], xs=o["weights"], **options)

    o = operands(5, 2, jnp.bfloat16, KEPT)

    def num_states(every):
        run = functools.partial(form, implementation="fused", recompute=Recompute(every=every))
        return collections.Counter(residuals(run, o))[5 * T * KEPT.hidden]

    # y, u and its square, but not the wide u.
    assert num_states(1) == num_states(2) == 2 * 3


# ---- samples of h_res ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, size, options",
    [
        (scanned, (2, 2), {}),
        (in_a_row, (2, 2), {}),
        (scanned, (2, 2), {"recompute": Recompute(every=4)}),
        (scanned, (4, 2), {"recompute": Recompute(every=4)}),
        (scanned, (2, 2), {"recompute": Recompute(every=2), "unroll": True}),
    ],
)
def test_samples_are_the_h_res_of_all_sublayers(form, size, options, implementation):
    o = operands(*size)
    x, expected = o["x"], []
    for b, weights in enumerate(o["weights"]):
        for layer, params in zip(layers(2), o["params"], strict=True):
            u, ctx = pre(x, jax.tree.map(operator.itemgetter(b), params))
            expected.append(ctx.h_res.reshape(-1, 4, 4)[np.array([0, 7, 14])])
            x = post(layer(u, weights), ctx)
    options |= {"implementation": implementation}

    def run(o, num):
        if num:
            x_new, h_res = form(o, stack_with_samples, sample_tokens=num, **options)
        else:
            x_new, h_res = form(o, **options), None
        return jnp.sum(jnp.sin(x_new)), h_res

    run = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    (value, h_res), gradients = run(o, 3)
    tolerance = 1e3 * float(jnp.finfo(WIDEST).eps)
    assert_trees_close(h_res, jnp.stack(expected), tolerance)
    # And nothing else changes.
    (without, _), gradients_without = run(o, 0)
    assert_trees_close((value, gradients), (without, gradients_without), tolerance)


def test_samples_without_sublayers():
    _, h_res = stack_with_samples([], operands(1, 1)["x"], [], sample_tokens=3)
    assert h_res.shape == (0, 3, 4, 4)
