"""The pipeline of examples/pipeline.py against the same model on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from collectives import collectives
from pipeline_step import in_flight, pipeline

pytestmark = pytest.mark.mesh

SETTINGS = pipeline.Settings(
    layers=8, micro_batches=4, micro_batch=4, hidden=32, mlp=64, length=8, dtype="float32", steps=1
)


def run(function, params, tokens):
    """Compiled, with loss and gradients."""
    # Products in float32 round their factors on a GPU by default.
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(function).lower(params, tokens).compile()
    return compiled.as_text(), *compiled(params, tokens)


@functools.cache
def plain(connection):
    settings = dataclasses.replace(SETTINGS, connection=connection)
    params = jax.jit(functools.partial(pipeline.init, s=settings))(jax.random.key(0))
    # Connections away from their initial values, so that all of them have gradients.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(np.asarray(leaf) + 0.02 * rng.normal(size=leaf.shape), np.float32),
        params,
    )
    tokens = pipeline.load_batches(settings)[0]
    both = jax.value_and_grad(functools.partial(pipeline.plain_loss, s=settings))
    return params, tokens, run(both, params, tokens)


def in_chunks(chunks, leaf):
    """Blocks in so many parts."""
    return leaf.reshape(chunks, -1, *leaf.shape[2:])


@pytest.mark.parametrize(
    "overlap, stages, chunks, data, connection",
    [
        (True, 4, 1, 1, "mhc"),
        (False, 2, 1, 2, "mhc"),
        (True, 2, 2, 2, "mhc"),
        (False, 4, 2, 1, "mhc"),
        (True, 2, 4, 1, "residual"),
    ],
)
def test_it_computes_what_one_device_does(overlap, stages, chunks, data, connection):
    if jax.device_count() < stages * data:
        pytest.skip(f"needs {stages * data} devices")
    params, tokens, (_, loss, gradients) = plain(connection)
    settings = dataclasses.replace(
        SETTINGS, stages=stages, chunks=chunks, data=data, overlap=overlap, connection=connection
    )
    params, gradients = (
        tree | {"blocks": jax.tree.map(functools.partial(in_chunks, chunks), tree["blocks"])}
        for tree in (params, gradients)
    )
    mesh = pipeline.make_mesh(settings)
    text, found, found_gradients = run(
        pipeline.value_and_gradients(settings, mesh, params), params, tokens
    )
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found_gradients), jax.tree.leaves(gradients), strict=True
    ):
        limit = 2e-4 * np.abs(other).max() + 1e-9
        np.testing.assert_allclose(one, other, atol=limit, err_msg=jax.tree_util.keystr(path))
    assert ("jax_mhc_post_pre_bwd" in text) == (connection == "mhc")
    # Streams, once forward and once backward, are all that is sent to other stages.
    num, size = collectives(text)["collective-permute"]
    rounds = chunks * settings.micro_batches
    tick_bytes = settings.boundary_bytes // rounds // data
    assert 2 * rounds <= num <= 2 * settings.ticks
    assert size == num * tick_bytes // 4


def test_transfers_do_not_wait_for_the_computation_beside_them():
    """A tick sends what is from before, and receives what is for later."""
    params, tokens, _ = plain("mhc")
    mesh = pipeline.make_mesh(SETTINGS)
    function = pipeline.value_and_gradients(SETTINGS, mesh, params)
    jaxpr = jax.make_jaxpr(function)(params, tokens)
    (inner,) = (e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "shard_map")
    # The first scan with transfers is the forward one.
    tick = next(
        e.params["jaxpr"].jaxpr
        for e in inner.eqns
        if e.primitive.name == "scan" and "ppermute" in str(e)
    )
    (send,) = (eqn for eqn in tick.eqns if eqn.primitive.name == "ppermute")
    assert send.invars[0] in tick.invars
    (sent,) = send.outvars
    (barrier,) = (eqn for eqn in tick.eqns if sent in eqn.invars)
    assert barrier.primitive.name == "optimization_barrier"
    assert not any(out in eqn.invars for out in barrier.outvars for eqn in tick.eqns)


@pytest.mark.gpu
def test_transfers_overlap():
    """XLA puts computation between start and done of a transfer."""
    settings = dataclasses.replace(SETTINGS, hidden=256, mlp=512, length=256, dtype="bfloat16")
    params = jax.jit(functools.partial(pipeline.init, s=settings))(jax.random.key(0))
    mesh = pipeline.make_mesh(settings)
    tokens = pipeline.load_batches(settings)[0]
    params = jax.device_get(params)
    text, *_ = run(pipeline.value_and_gradients(settings, mesh, params), params, tokens)
    num, num_overlapped = in_flight(text)
    # At the ends of the pipeline there may be nothing beside a transfer.
    assert num >= 2 * settings.micro_batches
    assert num_overlapped >= num - 2


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"layers": 6, "chunks": 2},
            "layers: expected a multiple of stages times chunks, 4, got 6",
        ),
        ({"data": 3}, "micro_batch: expected a multiple of data, 3, got 4"),
        (
            {"chunks": 2, "micro_batches": 6},
            "micro_batches: expected a multiple of a group that goes round, 4, got 6",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(SystemExit) as error:
        pipeline.Settings(**options)
    assert str(error.value) == f"pipeline.py: {message}"
