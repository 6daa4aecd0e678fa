"""Programs that have to work with one pair of Python and jaxlib; `pairs.py` runs them for each.

    pair.py write FOLDER           runs every check, and leaves an exported program in the folder
    pair.py load FOLDER FOLDER ..  runs the programs in the folders, as a serving process does

Either prints a line of JSON: the versions, and of each check the error or null.
"""

import functools
import json
import platform
import sys
import warnings
from pathlib import Path

# No release of JAX may have deprecated what we call.
warnings.simplefilter("error")

import jax  # noqa: E402 - the filter above is for imports, too
import jax.numpy as jnp  # noqa: E402 - see above
import numpy as np  # noqa: E402 - see above
from jax import export  # noqa: E402 - see above

import jax_mhc as mhc  # noqa: E402 - see above
from jax_mhc._call import library  # noqa: E402 - see above

# XLA's own optimisations are of no interest here.
jax.config.update("jax_disable_most_optimizations", True)

KEY = jax.random.key(0)
STREAMS, HIDDEN, TOKENS = 4, 32, 8


def away_from_initial(params):
    """Every gradient of the initial parameters that could be 0 is not."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    noise = [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [a + 0.05 * b for a, b in zip(leaves, noise, strict=True)])


def inputs():
    params = away_from_initial(mhc.init_params(KEY, streams=STREAMS, hidden=HIDDEN))
    head = away_from_initial(mhc.init_head(KEY, streams=STREAMS, hidden=HIDDEN))
    return jax.random.normal(KEY, (TOKENS, STREAMS, HIDDEN)), params, head


def loss(x, params, head, implementation="fused"):
    """A sublayer, a stack of two (so that there are seams), and a head."""
    options = {"implementation": implementation}
    x = mhc.mhc_residual(jnp.tanh, x, params, **options)
    x = mhc.stack((jnp.tanh, jnp.sin), x, (params, params), **options)
    return jnp.sum(mhc.head(x, head, **options) ** 2)


def loss_of_scan(x, params, implementation="fused"):
    params = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a, 1.1 * a]), params)
    return jnp.sum(
        mhc.stack(
            (lambda u, scale: jnp.tanh(u) * scale,), x, [params], xs=jnp.arange(1.0, 4.0),
            implementation=implementation, recompute=mhc.Recompute(every=3),
        ) ** 2
    )  # fmt: skip


gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def assert_close(got, expected):
    """Within rounding in float32 of the largest value of each array."""
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        scale = max(1e-3, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)


# ---- checks -------------------------------------------------------------------------------------


def check_gradient():
    reference = functools.partial(loss, implementation="reference")
    expected = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2)))(*inputs())
    assert_close(gradient(*inputs()), expected)


def check_scan():
    x, params, _ = inputs()
    got, expected = (
        jax.jit(jax.value_and_grad(loss_of_scan), static_argnums=2)(x, params, name)
        for name in ("fused", "reference")
    )
    assert_close(got, expected)


def check_vmap():
    x, params, head = inputs()
    batch = jnp.stack([x, 2 * x])
    got = jax.vmap(gradient, (0, None, None))(batch, params, head)
    each = [gradient(one, params, head) for one in batch]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def check_sharding():
    x, params, _ = inputs()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(lambda x: mhc.pre(x, params, implementation="fused")[0])
    assert_close(run(spread), run(x))


# How often the seam's forward call is in a program whose policy has the streams computed again:
# twice, or once where JAX ignores the policy, as 0.12 does with the first of these settings alone.
SEAMS = {(): 2, ("jax_remat3",): 1, ("jax_remat3", "jax_custom_vjp3"): 2}


def check_remat3():
    """Claims of docs/deployment.md on JAX's new rematerialisation, where there is one."""
    if jax.__version_info__ < (0, 12):
        return
    x, params, _ = inputs()
    policy = mhc.remat_policy(streams=STREAMS, hidden=HIDDEN)

    def two_sublayers(x):
        u, ctx = mhc.pre(x, params, implementation="fused")
        u, ctx = mhc.post_pre(jnp.tanh(u), ctx, params, implementation="fused")
        return jnp.sum(mhc.post(jnp.tanh(u), ctx, implementation="fused"))

    for settings, expected in SEAMS.items():
        for name in settings:
            jax.config.update(name, True)
        try:
            run = jax.grad(jax.checkpoint(two_sublayers, policy=policy))
            program = jax.jit(run).lower(x).as_text()
        finally:
            for name in settings:
                jax.config.update(name, False)
        found = program.count("custom_call @jax_mhc_post_pre_fwd")
        assert found == expected, f"{settings or 'no setting'}: {found} seams, not {expected}"


def check_info():
    from jax_mhc import info

    assert info.collect()["fused"]["cpu"] == "registered", info.collect()["fused"]


def checks_of_export(folder):
    """The program for any number of tokens, with what it makes of the inputs here."""

    def check_export():
        (tokens,) = export.symbolic_shape("tokens")
        x, *others = inputs()
        shapes = [jax.ShapeDtypeStruct((tokens, *x.shape[1:]), x.dtype)]
        shapes += jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), others)
        # Leaves: a process that loads it need not know the pytrees' classes.
        shapes, treedef = jax.tree.flatten(shapes)
        calls = (
            "pre_fwd pre_bwd post_fwd post_bwd post_pre_fwd post_pre_bwd head_fwd head_bwd".split()
        )
        targets = [library.target_name(name) for name in calls]
        checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]

        @jax.jit
        def flat(*leaves):
            return jax.tree.leaves(gradient(*jax.tree.unflatten(treedef, leaves)))

        exported = export.export(flat, disabled_checks=checks)(*shapes)
        assert library.target_name("post_pre_bwd") in exported.mlir_module()
        given = jax.tree.leaves(inputs())
        results = exported.call(*given)
        assert_close(results, jax.tree.leaves(gradient(*inputs())))
        arrays = {f"given{i:02}": a for i, a in enumerate(given)}
        arrays |= {f"result{i:02}": a for i, a in enumerate(results)}
        np.savez(folder / "values.npz", **arrays)
        (folder / "program").write_bytes(exported.serialize())

    return check_export


def check_load(folder):
    """The program that another pair exported gives that pair's results."""

    def check():
        exported = export.deserialize((folder / "program").read_bytes())
        with np.load(folder / "values.npz") as values:
            arrays = {name: values[name] for name in sorted(values.files)}
        given = [a for name, a in arrays.items() if name.startswith("given")]
        expected = [a for name, a in arrays.items() if name.startswith("result")]
        assert_close(exported.call(*given), expected)

    return check


def main(what, *folders):
    folders = [Path(folder) for folder in folders]
    if what == "write":
        named = [
            check_gradient, check_scan, check_vmap, check_sharding, check_remat3, check_info
        ]  # fmt: skip
        checks = {function.__name__.removeprefix("check_"): function for function in named}
        checks["export"] = checks_of_export(folders[0])
    else:
        checks = {folder.name: check_load(folder) for folder in folders}
    errors = {}
    for name, check in checks.items():
        try:
            errors[name] = check()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    print(json.dumps(versions | {"errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
