"""The experts of examples/moe.py, on all devices, against one device."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import pytest
from collectives import collectives
from hlo import custom_calls
from programs import ROOT

sys.path.append(str(ROOT / "examples"))

import moe  # noqa: E402 - in the folder that the line above adds

pytestmark = pytest.mark.mesh

# Capacity so large that no token is dropped: which ones are depends on the number of devices.
SETTINGS = moe.Settings(
    devices=1, experts=16, capacity=8.0, hidden=32, heads=2, mlp=48, batch=8, length=8,
    balance=0.5, dtype="float32", steps=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def as_a_user_finds_jax(default_dtypes):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        # Products in float32 round their factors on a GPU by default.
        with jax.default_matmul_precision("highest"):
            yield


def run(s):
    """A compiled loss with its gradients, what these are, and the parameters."""
    params = jax.device_get(jax.jit(functools.partial(moe.init, s=SETTINGS))(jax.random.key(0)))
    # Connections away from their initial values, so that all of them have gradients.
    rng = np.random.default_rng(0)
    params["connections"] = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype),
        params["connections"],
    )
    mesh = moe.make_mesh(s)
    placed = moe.place(mesh, moe.specs(params)), moe.place(mesh, jax.P(moe.AXIS))
    operands = jax.device_put((params, moe.load_batches(SETTINGS)[0]), placed)
    both = jax.value_and_grad(functools.partial(moe.loss, s=s, mesh=mesh), has_aux=True)
    told = moe.place(mesh, (jax.P(), dict.fromkeys(("loss", "balance", "dropped"), jax.P())))
    compiled = jax.jit(both, out_shardings=(told, placed[0])).lower(*operands).compile()
    return compiled.as_text(), jax.device_get(compiled(*operands)), params


def test_experts_on_all_devices_compute_what_one_device_does():
    settings = dataclasses.replace(SETTINGS, devices=jax.device_count())
    _, ((_, told), gradients), params = run(SETTINGS)
    text, ((_, found), found_gradients), _ = run(settings)
    assert told["dropped"] == found["dropped"] == 0
    for name, one in told.items():
        np.testing.assert_allclose(found[name], one, rtol=1e-5, err_msg=name)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found_gradients), jax.tree.leaves(gradients), strict=True
    ):
        limit = 1e-4 * np.abs(other).max()
        assert limit > 0
        np.testing.assert_allclose(one, other, atol=limit, err_msg=jax.tree_util.keystr(path))

    calls = custom_calls(text)
    assert calls["post_pre_fwd"] and calls["post_pre_bwd"]
    sent = collectives(text)
    # All-to-alls in the loops over the blocks: to the experts and back, forward and backward.
    num, size = sent.pop("all-to-all")
    assert num == 4 and size == num * settings.experts * settings.slots * settings.hidden
    # Sums of gradients of parameters that every device has, and of what tells the balance.
    everywhere = sum(
        leaf.size
        for leaf, spec in zip(
            jax.tree.leaves(params), jax.tree.leaves(moe.specs(params)), strict=True
        )
        if spec == jax.P()
    )
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"][1] <= everywhere + 2 * settings.experts + 3, (sent, everywhere)


def test_tokens_go_to_the_experts_that_they_choose():
    """Layers give the sum of the chosen experts, by the gates, unless these have no slot left."""
    s = dataclasses.replace(SETTINGS, devices=2)
    weights = jax.tree.map(lambda leaf: leaf[0], moe.init(jax.random.key(1), s)["experts"])
    u = jax.random.normal(jax.random.key(2), (s.batch, s.length, s.hidden))

    def layer(s):
        specs = {"router": jax.P(), "up": jax.P(moe.AXIS), "down": jax.P(moe.AXIS)}
        return jax.jit(
            jax.shard_map(
                functools.partial(moe.experts, s=s), mesh=moe.make_mesh(s),
                in_specs=(jax.P(moe.AXIS), specs), out_specs=(jax.P(moe.AXIS), jax.P()),
            )
        )(u, weights)  # fmt: skip

    normed = moe.rms_norm(u)
    probabilities = jax.nn.softmax(normed @ weights["router"])
    least = jax.lax.top_k(probabilities, s.top_k)[0][..., -1:]
    gates = np.where(probabilities >= least, probabilities, 0)
    inner = jax.nn.silu(np.einsum("blc,ecm->blem", normed, weights["up"]))
    expected = np.einsum("ble,blem,emc->blc", gates, inner, weights["down"])
    y, told = layer(s)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    chosen = (gates > 0).mean((0, 1))
    balance = s.experts * np.sum(chosen / s.top_k * probabilities.mean((0, 1)))
    np.testing.assert_allclose(told["balance"], balance, rtol=1e-5)

    few = layer(dataclasses.replace(s, capacity=0.5))
    assert 0.3 < few[1]["dropped"] < 0.8
    np.testing.assert_allclose(few[1]["balance"], balance, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": 6, "devices": 4}, "experts: expected a multiple of devices, 4, got 6"),
        ({"batch": 6, "devices": 4}, "batch: expected a multiple of devices, 4, got 6"),
        ({"hidden": 30}, "hidden: expected a multiple of heads, 4, got 30"),
        ({"top_k": 9}, "top_k: expected 1 to 8, got 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(SystemExit) as error:
        moe.Settings(**options)
    assert str(error.value) == f"moe.py: {message}"
