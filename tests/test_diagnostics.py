"""Diagnostics against NumPy in float64, and against what the mathematics says."""

import functools
import math
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jax_mhc as mhc
from jax_mhc import diagnostics
from jax_mhc.diagnostics import Gain, GainWarning


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def projected(*shape, iters=20, scale=1.0):
    return mhc.sinkhorn(
        jnp.asarray(normal(*shape, scale=scale), jnp.float32),
        config=mhc.MHCConfig(sinkhorn_iters=iters),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_gain_and_mixing_are_those_of_numpy(n):
    h = normal(5, 3, n, n)
    gain, mixing = jax.jit(lambda h: (diagnostics.amax_gain(h), diagnostics.mixing(h)))(
        h.astype(np.float32)
    )
    rows, columns = h.sum(-1), h.sum(-2)
    shares = abs(h) / abs(h).sum(-1, keepdims=True)
    wanted = {
        "forward": abs(rows).max(-1),
        "backward": abs(columns).max(-1),
        "row_error": abs(rows - 1).max(-1),
        "column_error": abs(columns - 1).max(-1),
        "identity_distance": np.linalg.norm(h - np.eye(n), axis=(-2, -1)),
        "entropy": -(shares * np.log(shares)).sum(-1).mean(-1),
    }
    found = {**gain._asdict(), **mixing._asdict()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == (5, 3) and found[name].dtype == jnp.float32, name
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_is_known_of_special_matrices():
    identity, mean = jnp.eye(4), jnp.full((4, 4), 0.25)
    of_identity, of_mean = diagnostics.mixing(identity), diagnostics.mixing(mean)
    assert all(value == 0 for value in of_identity)
    assert of_mean.row_error == of_mean.column_error == 0
    np.testing.assert_allclose(of_mean.entropy, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(of_mean.identity_distance, np.sqrt(3), rtol=1e-6)
    assert diagnostics.amax_gain(identity) == diagnostics.amax_gain(mean) == (1, 1)
    # Forward and backward are not to be taken for each other: all of stream 1 into stream 0.
    assert diagnostics.amax_gain(jnp.array([[1.0, 1.0], [0.0, 0.0]])) == (2, 1)
    nothing = diagnostics.mixing(jnp.zeros((2, 2)))
    assert nothing.entropy == 0 and nothing.row_error == 1


@pytest.mark.parametrize("n, order", [(2, "column_row"), (4, "column_row"), (4, "row_column")])
def test_the_range_of_logits_is_known_without_them(n, order):
    """Offsets of rows and columns, which Sinkhorn takes out, are none."""
    z = normal(7, n, n, scale=3.0)
    centred = z - z.mean(-1, keepdims=True)
    centred -= centred.mean(-2, keepdims=True)
    wanted = centred.max((-2, -1)) - centred.min((-2, -1))
    config = mhc.MHCConfig(order=order)
    h = mhc.sinkhorn(jnp.asarray(z + normal(7, n, 1, seed=1), jnp.float32), config=config)
    np.testing.assert_allclose(diagnostics.logit_range(h), wanted, rtol=1e-4)
    assert diagnostics.logit_range(jnp.full((n, n), 1 / n)) < 1e-6
    assert np.isfinite(diagnostics.logit_range(jnp.eye(n)))


def test_the_range_of_logits_at_the_start():
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=8)
    _, ctx = mhc.pre(jnp.ones((3, 4, 8), jnp.float32), params)
    # 0.9 on the diagonal and 0.1 / 3 beside it.
    np.testing.assert_allclose(diagnostics.logit_range(ctx.h_res), np.log(27), rtol=1e-4)


def test_the_summary_has_the_figures():
    h = projected(6, 5, 4, 4, iters=3)
    found = jax.jit(diagnostics.summary)(h)
    gain = diagnostics.amax_gain(diagnostics.composite(h)[-1])
    mixing = diagnostics.mixing(h)
    wanted = {
        "composite_gain_forward": gain.forward.max(),
        "composite_gain_forward_mean": gain.forward.mean(),
        "composite_gain_backward": gain.backward.max(),
        "composite_gain_backward_mean": gain.backward.mean(),
        "row_error": mixing.row_error.max(),
        "column_error": mixing.column_error.max(),
        "logit_range": diagnostics.logit_range(h).max(),
        "identity_distance": mixing.identity_distance.mean(),
        "entropy": mixing.entropy.mean(),
    }
    assert found.keys() == {f"mhc/{name}" for name in wanted}
    for name, value in wanted.items():
        assert found[f"mhc/{name}"].shape == ()
        np.testing.assert_allclose(found[f"mhc/{name}"], value, rtol=1e-5, atol=1e-6)
    assert all(name.startswith("a.") for name in diagnostics.summary(h, prefix="a."))


def test_composite_multiplies_later_sublayers_from_the_left():
    h = normal(6, 2, 4, 4).astype(np.float32)
    products = diagnostics.composite(h)
    wanted = np.broadcast_to(np.eye(4), (2, 4, 4))
    for at in range(6):
        wanted = h[at].astype(np.float64) @ wanted
        np.testing.assert_allclose(products[at], wanted, rtol=1e-4, atol=1e-4)
    assert diagnostics.composite(h[:1]).shape == (1, 2, 4, 4)
    assert diagnostics.composite(h[:0]).shape == (0, 2, 4, 4)
    assert diagnostics.composite(h[:, :0]).shape == (6, 0, 4, 4)


def test_gain_grows_without_the_manifold_and_not_on_it():
    """The figure of the paper's section on stability, at 64 sublayers."""
    deep = (64, 100, 4, 4)
    free = diagnostics.amax_gain(diagnostics.composite(normal(*deep).astype(np.float32))[-1])
    assert 1e14 < float(jnp.median(free.forward)) < 1e18
    for iters, limit in ((1, 4.0), (20, 1.01)):
        products = diagnostics.composite(projected(*deep, iters=iters))
        gain = diagnostics.amax_gain(products[-1])
        np.testing.assert_allclose(gain.forward, 1, rtol=1e-5)  # rows come last
        assert float(jnp.max(gain.backward)) < limit


def test_values_of_a_layer_are_accepted_as_they_are():
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=32)
    x = mhc.expand(jnp.asarray(normal(7, 32), jnp.bfloat16), streams=4)

    @jax.jit
    def figures(x):
        ctx = mhc.pre(x, params)[1]
        return diagnostics.amax_gain(ctx.h_res), diagnostics.stream_similarity(x)

    gain, similarity = figures(x)
    np.testing.assert_allclose(gain.forward, 1, rtol=1e-5)
    np.testing.assert_allclose(similarity, 1, rtol=1e-5)


def test_stream_similarity():
    x = normal(5, 3, 8).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    pairs = np.einsum("tic,tjc->tij", unit, unit)
    wanted = (pairs.sum((-2, -1)) - 3) / 6
    np.testing.assert_allclose(diagnostics.stream_similarity(x), wanted, rtol=1e-5, atol=1e-6)
    orthogonal = jnp.eye(4)
    assert diagnostics.stream_similarity(orthogonal) == 0
    opposite = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    np.testing.assert_allclose(diagnostics.stream_similarity(opposite), -1, rtol=1e-6)
    assert diagnostics.stream_similarity(orthogonal.at[0].set(0)) == 0


@pytest.mark.parametrize(
    "count, wanted", [(1, [0]), (2, [0, 29]), (7, [0, 4, 9, 14, 19, 24, 29]), (99, range(30))]
)
def test_sampled_tokens_are_evenly_spaced(count, wanted):
    h = jnp.arange(30 * 4, dtype=jnp.float32).reshape(2, 3, 5, 2, 2)
    sample = jax.jit(lambda h: diagnostics.sample_tokens(h, count))
    np.testing.assert_array_equal(sample(h), h.reshape(30, 2, 2)[np.array(wanted)])
    np.testing.assert_array_equal(jax.vmap(sample)(h)[1], sample(h[1]))
    np.testing.assert_array_equal(jax.grad(lambda h: jnp.sum(sample(h)))(h), 0)
    assert sample(h[:, :0]).shape == (0, 2, 2)
    np.testing.assert_array_equal(sample(h[0, 0, 0]), h[:1, 0, 0])


def test_a_sample_reads_no_more_than_its_tokens():
    h = jax.ShapeDtypeStruct((8, 128, 4, 4), jnp.float32)
    compiled = jax.jit(lambda h: diagnostics.sample_tokens(h, 5)).lower(h).compile()
    of_all = [
        kind
        for shape, kind in re.findall(r"= f32\[([\d,]+)\]\S* (\w+)\(", compiled.as_text())
        if math.prod(map(int, shape.split(","))) == h.size
    ]
    assert of_all and set(of_all) == {"parameter"}
    assert compiled.memory_analysis().temp_size_in_bytes < h.size


def test_a_token_with_nan_keeps_to_itself():
    h = jnp.asarray(normal(3, 5, 4, 4), jnp.float32)
    before = diagnostics.amax_gain(diagnostics.composite(h))
    after = diagnostics.amax_gain(diagnostics.composite(h.at[1, 2, 0, 0].set(jnp.nan)))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.delete(one, 2, 1), np.delete(other, 2, 1))
        assert np.all(np.isnan(other[1:, 2]))
    x = jnp.asarray(normal(5, 3, 8), jnp.float32)
    similarity = diagnostics.stream_similarity(x.at[2, 1, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(similarity), np.arange(5) == 2)


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_they_stay_where_the_tokens_are(kind):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,), devices=jax.devices()[:2])
    h, x = normal(3, 8, 4, 4).astype(np.float32), normal(8, 4, 16).astype(np.float32)

    def figures(h, x):
        products = diagnostics.composite(h)
        of_products = diagnostics.amax_gain(products), diagnostics.mixing(products)
        return of_products, diagnostics.stream_similarity(x)

    wanted = figures(h, x)
    with jax.set_mesh(mesh):
        split = jax.device_put(h, P(None, "a")), jax.device_put(x, P("a"))
        compiled = jax.jit(figures).lower(*split).compile()
        found = compiled(*split)
    assert not collectives(compiled.as_text())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.mesh
@pytest.mark.parametrize("spec, axes", [(P("a"), "a"), (P("a", "b"), "ab"), (P(("a", "b")), "ab")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sample_is_on_every_device(kind, spec, axes):
    num = jax.device_count() // 2
    rows, columns = (2 * num, 1) if len(spec) == 1 and len(axes) == 2 else (num, len(axes))
    mesh = jax.make_mesh((num, 2), ("a", "b"), axis_types=2 * (kind,))
    h = normal(2 * num, 6, 4, 4).astype(np.float32)
    with jax.set_mesh(mesh):
        split = jax.device_put(h, spec)
        compiled = jax.jit(lambda h: diagnostics.sample_tokens(h, 10)).lower(split).compile()
        sample = compiled(split)
        own = jax.shard_map(
            lambda h: diagnostics.sample_tokens(h, 2), in_specs=spec, out_specs=P(tuple(axes))
        )(split)
    np.testing.assert_array_equal(sample, diagnostics.sample_tokens(jnp.asarray(h), 10))
    assert sample.sharding.is_fully_replicated
    # Of each device's tokens those are the first and the last.
    parts = [part for rows in np.split(h, rows) for part in np.split(rows, columns, 1)]
    ends = [part.reshape(-1, 4, 4)[[0, -1]] for part in parts]
    np.testing.assert_array_equal(own, np.concatenate(ends))
    found = collectives(compiled.as_text())
    assert found.keys() <= {"all-reduce"} and sum(n for _, n in found.values()) <= 2 * 10 * 16


# ---- the watch ----------------------------------------------------------------------------------

WAYS = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.jit(jax.vmap(f)),
    "scan": lambda f: jax.jit(lambda v: jax.lax.scan(lambda _, x: (None, f(x)), None, v)[1]),
    "grad": lambda f: jax.jit(jax.grad(lambda v: jnp.sum(f(v)))),
}


def watching(**options):
    """A function that watches its operand, and the warnings that it gives."""
    found = []

    def double(v):
        diagnostics.watch_gain(Gain(v, 1 / v), callback=found.append, **options)
        return 2 * v

    return double, found


@pytest.mark.parametrize("way", WAYS)
def test_the_watch_tells_of_what_is_outside(way):
    double, found = watching(step=3, name="gain of all")
    run = WAYS[way](double)
    inside = jnp.array([[1.0, 0.25], [4.0, 1.0], [1.0, 1.0]], jnp.float32)
    for v in (inside, inside.at[1, 0].set(8.0)):
        assert not found
        results = run(v)
        np.testing.assert_array_equal(results, jnp.full_like(v, 2) if way == "grad" else 2 * v)
        jax.effects_barrier()
    (warning,) = found
    assert (warning.name, warning.step, warning.band) == ("gain of all", 3, (0.25, 4.0))
    least = 1.0 if way == "scan" else 0.25  # of the step that is outside, or of all
    assert warning.forward == (least, 8.0) and warning.backward == (0.125, 1 / least)
    assert str(warning).startswith(
        f"gain of all at step 3: expected from 0.25 to 4, got forward {least:g} to 8, "
        f"backward 0.125 to {1 / least:g}. "
    )
    assert vars(pickle.loads(pickle.dumps(warning))) == vars(warning)


def test_the_watch_knows_its_band_and_step():
    double, found = watching(band=(0.1, 10.0))
    jax.jit(double)(jnp.array([0.2, 8.0]))
    jax.jit(double)(jnp.zeros(0))
    jax.effects_barrier()
    assert not found

    @jax.jit
    def step(at):
        gain = Gain(jnp.array(1.0), jnp.array(0.2))
        diagnostics.watch_gain(gain, step=at, callback=found.append)

    step(7)
    jax.effects_barrier()
    assert (found[0].step, found[0].forward, found[0].backward) == (7, (1, 1), (0.2, 0.2))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("way", ["as it is", "jit"])
def test_the_watch_sees_what_is_not_finite(way, bad):
    double, found = watching(band=(1e-30, 1e30))
    WAYS[way](double)(jnp.ones(9).at[4].set(bad))
    jax.effects_barrier()
    (warning,) = found
    np.testing.assert_equal(warning.forward[1], bad)


def test_the_watch_warns():
    watch = jax.jit(lambda v: diagnostics.watch_gain(Gain(v, v), step=5))
    with pytest.warns(GainWarning, match="^composite gain at step 5: .* backward 6 to 8. .*sinkh"):
        watch(jnp.array([6.0, 8.0]))
        jax.effects_barrier()
    # Warnings are errors in these tests.
    with pytest.raises(GainWarning, match="forward 6 to 6"):
        diagnostics.watch_gain(Gain(jnp.array(6.0), jnp.array(1.0)))
    for bad in (np.float32(6), 0.2, np.array([1, np.nan]), np.inf):
        with pytest.raises(GainWarning, match="at step 7"), jax.transfer_guard("disallow"):
            diagnostics.watch_gain(Gain(bad, 1.0), step=7)
    diagnostics.watch_gain(Gain(np.array([0.25, 4]), np.zeros(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="GainWarning: composite gain at step 5"):
        jax.block_until_ready(watch(jnp.array([6.0])))
        jax.effects_barrier()


def test_nothing_is_handed_over_within_the_band():
    """The call of the host is in a branch, not in the program's main part."""
    double, _ = watching()
    text = jax.jit(double).lower(jnp.ones(3)).compile().as_text()
    before, main = text.split("\nENTRY ")
    assert "callback" in before and "conditional(" in main
    assert "callback" not in re.sub("metadata={[^}]*}", "", main)


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_watch_on_meshes(kind):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,), devices=jax.devices()[:2])
    v = jnp.ones((4, 2), jnp.float32).at[3, 0].set(8)
    with jax.set_mesh(mesh):
        v = jax.device_put(v, P("a"))
        by_hand = functools.partial(jax.shard_map, in_specs=P("a"), out_specs=P("a"))
        for way in (jax.jit, WAYS["vmap"], lambda f: jax.jit(by_hand(f))):
            double, found = watching()
            np.testing.assert_array_equal(way(double)(v), 2 * v)
            jax.effects_barrier()
            (warning,) = found
            assert warning.forward == (1, 8) and warning.backward == (0.125, 1)


@pytest.mark.parametrize("watched", [False, True])
def test_a_step_with_diagnostics_costs_little_more(watched):
    """Operations, bytes and memory as XLA counts them; times are in docs/diagnostics.md."""
    num, hidden = 6, 256

    def step(count, params, w, u):
        def loss(params, w, u):
            x = mhc.expand(u, streams=4)
            layers, h_res = [lambda v, w: jnp.tanh(v @ w)], None
            if count:
                x, h_res = mhc.stack_with_samples(layers, x, [params], xs=w, sample_tokens=count)
            else:
                x = mhc.stack(layers, x, [params], xs=w)
            return jnp.sum(mhc.reduce(x)), h_res

        (value, h_res), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, w, u)
        if not count:
            return value, grads
        gain = diagnostics.amax_gain(diagnostics.composite(h_res)[-1])
        if watched:
            diagnostics.watch_gain(gain)
        return value, grads, jax.tree.map(jnp.max, (gain, diagnostics.mixing(h_res)))

    def costs(count):
        init = functools.partial(mhc.init_params, streams=4, hidden=hidden)
        params = jax.eval_shape(lambda: jax.vmap(init)(jax.random.split(jax.random.key(0), num)))
        w = jax.ShapeDtypeStruct((num, hidden, hidden), jnp.float32)
        u = jax.ShapeDtypeStruct((4096, hidden), jnp.float32)
        run = jax.jit(functools.partial(step, count)).lower(params, w, u).compile()
        counted = run.cost_analysis()
        memory = run.memory_analysis().temp_size_in_bytes
        return np.array([counted["flops"], counted["bytes accessed"], memory])

    more = costs(64) / costs(0) - 1
    assert np.all(more < 0.005), more
    assert more[0] > 0, "nothing was counted"


# ---- plots --------------------------------------------------------------------------------------


def drawn(axes):
    """The lines that show data, as (label, style, values of x, values of y)."""
    return [
        (line.get_label(), line.get_linestyle(), *map(np.asarray, line.get_data()))
        for line in axes.get_lines()
        if len(line.get_xdata()) > 0
    ]


def test_gain_is_drawn():
    gains = {
        label: Gain(np.exp(normal(6, 5, seed=seed)), np.exp(normal(6, 5, seed=seed + 1)))
        for label, seed in (("mHC", 0), ("HC", 2))
    }
    figure = diagnostics.plot_gain(gains)
    (axes,) = figure.axes
    residual, *curves = drawn(axes)
    assert residual[0] == "residual connection" and set(residual[3]) == {1}
    expected = [
        (style, reduce(values, axis=1))
        for gain in gains.values()
        for style, values in (("-", gain.forward), ("--", gain.backward))
        for reduce in (np.median, np.max)
    ]
    for (_, style, x, y), (wanted_style, wanted) in zip(curves, expected, strict=True):
        assert style == wanted_style
        np.testing.assert_array_equal(x, range(1, 7))
        np.testing.assert_allclose(y, wanted)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "0.25 to 4", "residual connection", "mHC", "HC", "forward", "backward", "largest token"
    ]  # fmt: skip
    assert len({line.get_color() for line in axes.get_lines()}) == 3
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "sublayers"
    figure.canvas.draw()


def test_gain_is_drawn_against_steps_into_axes_of_the_user():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    values = np.array([1.0, 2.0, np.inf, np.nan, 4.0])
    gain = diagnostics.amax_gain(jnp.asarray(values)[:, None, None])
    assert diagnostics.plot_gain(gain, x=range(0, 50, 10), band=None, axes=right) is figure
    assert not left.get_lines() and right.get_xlabel() == "training step"
    _, forward, backward = drawn(right)
    for _, _, x, y in (forward, backward):
        np.testing.assert_array_equal(x, range(0, 50, 10))
        np.testing.assert_array_equal(y, [1, 2, np.nan, np.nan, 4])
    assert not right.patches


@pytest.mark.parametrize("n", [3, 8])
def test_mixing_is_drawn(n):
    h = projected(7, 5, n, n, iters=1)
    figure = diagnostics.plot_mixing(h, sublayers=[0, 6])
    *maps, errors, distance, entropy = figure.axes[:5]
    mixing = diagnostics.mixing(h)
    least = np.finfo(np.float32).eps
    wanted = {
        errors: [np.maximum(values, least) for values in mixing[:2]],
        distance: [mixing.identity_distance],
        entropy: [mixing.entropy],
    }
    for axes, values in wanted.items():
        curves = drawn(axes)
        if axes is entropy:
            label, _, _, y = curves.pop()
            assert label == f"mean of all streams: log {n}" and np.allclose(y, np.log(n))
        expected = [reduce(v, axis=1) for v in values for reduce in (np.median, np.max)]
        for (_, _, x, y), each in zip(curves, expected, strict=True):
            np.testing.assert_array_equal(x, range(7))
            np.testing.assert_allclose(y, each)
    assert errors.get_yscale() == "log"
    for axes, at in zip(maps, (0, 6), strict=True):
        mean = np.mean(h[at], 0)
        np.testing.assert_allclose(axes.images[0].get_array(), mean, rtol=1e-6)
        assert axes.get_title() == f"mean h_res, sublayer {at}"
        numbers = {text.get_position(): text.get_text() for text in axes.texts}
        of_cells = {(j, i): f"{mean[i, j]:.2f}" for i, j in np.ndindex(n, n)}
        assert numbers == (of_cells if n <= 4 else {})
    assert len(figure.axes) == (5 if n <= 4 else 6)  # with a bar of colours
    figure.canvas.draw()


def test_mixing_is_drawn_of_its_figures_alone():
    figure = diagnostics.plot_mixing(diagnostics.mixing(projected(7, 4, 4)))
    assert [len(drawn(axes)) for axes in figure.axes] == [2, 1, 1]
    own = Figure()
    axes = own.subplots(2, 3).ravel()
    assert diagnostics.plot_mixing(jnp.zeros((9, 2, 4, 4)), axes=axes) is own
    assert [panel.get_title()[-1] for panel in axes[3:]] == ["0", "4", "8"]


@pytest.mark.parametrize("plot", ["plot_gain", "plot_mixing"])
def test_plots_need_matplotlib(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    h = jnp.zeros((3, 4, 4))
    values = diagnostics.amax_gain(h) if plot == "plot_gain" else h
    with pytest.raises(ImportError, match=rf"^jax_mhc.diagnostics.{plot}: .*'jax-mhc\[plots\]'"):
        getattr(diagnostics, plot)(values)
