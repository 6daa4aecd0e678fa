"""A sample of all small shapes through the handlers; `make shapes` runs all of them."""

from pathlib import Path

import jax.ffi
import pytest
import small_shapes
from handlers import Handlers

from jax_mhc._call import library

pytestmark = pytest.mark.cpu("handlers for CPUs")


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    build = tmp_path_factory.mktemp("frame")
    return Handlers(library._PATH, Path(jax.ffi.include_dir()), build)


def test_sample(handlers):
    record = small_shapes.run(handlers, small_shapes.draw_shapes(120))
    assert record["shapes"] == 120
    assert not record["findings"]


def test_errors_show(handlers):
    """Another rule for one call, here another width of h_post, is found in every dtype."""
    shape = next(s for s in small_shapes.draw_shapes(50) if min(s.tokens, default=0) > 1)
    given = small_shapes.operands(shape)
    want = small_shapes.expected_forward(shape, {**given, "h_post": given["h_post"] * 1.02})
    for name, dtype in small_shapes.DTYPES.items():
        got = small_shapes.run_calls(handlers, shape, dtype, given)
        errors = small_shapes.compare(shape, name, got, want, {})
        error, allowed = errors["post_fwd.x_new"]
        assert error > allowed
        error, allowed = errors["pre_fwd.h_pre"]
        assert error <= allowed
