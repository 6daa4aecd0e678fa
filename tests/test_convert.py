"""Converters of other implementations against their own formulas, and bit for bit both ways."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLOAT64, relative_error
from formats import FORMATS, tensors_of
from programs import ROOT

import jax_mhc
from jax_mhc import HeadParams, convert, presets

# Largest errors over the largest value: of outputs and of gradients.
LARGEST = {"float32": (1e-6, 1e-5), "float64": (FLOAT64, FLOAT64)}


def ours(form, x, tensors, implementation):
    params, options = form.ours(tensors), {"implementation": implementation}
    if form.config.schedule == "delayed":
        streams = jax_mhc.as_streams(x, **options)
        for _ in range(2):
            streams = jax_mhc.mhc_residual(jnp.tanh, streams, params, config=form.config, **options)
        return jax_mhc.collapse(streams, **options)
    u, ctx = jax_mhc.pre(x, params, config=form.config, **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


@functools.cache
def errors(name):
    """The largest error of outputs and that of gradients, by dtype, against float64."""
    form, n, hidden = FORMATS[name], 4, 9
    rng = np.random.default_rng(1)
    x, cotangent = (rng.normal(size=(3, 5, n, hidden)).astype(np.float32) for _ in range(2))
    if form.config.schedule == "delayed":
        cotangent = cotangent[..., 0, :]
    arguments = x, tensors_of(name, n, hidden), cotangent

    def theirs(x, tensors):
        with jax.numpy_rank_promotion("allow"):
            return form.theirs(x, **tensors)

    def run(compute, dtype):
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), arguments)

        @jax.jit
        def results(x, tensors, cotangent):
            out, vjp = jax.vjp(compute, x, tensors)
            return out, vjp(cotangent)

        return results(*given)

    expected, found = run(theirs, np.float64), {}
    for dtype, implementation in (("float32", "fused"), ("float64", "reference")):
        got = run(functools.partial(ours, form, implementation=implementation), dtype)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
        found[dtype] = [
            np.max(jax.tree.leaves(jax.tree.map(relative_error, part, wanted)))
            for part, wanted in zip(got, expected, strict=True)
        ]
    return found


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_all_gradients_are_those_of_the_public_code(name, dtype):
    for part, error, largest in zip(
        ("outputs", "gradients"), errors(name)[dtype], LARGEST[dtype], strict=True
    ):
        assert error <= largest, f"{part}: relative error {error:.2e}"


@pytest.mark.cpu("the table is that of a CPU")
def test_the_table_of_errors_is_measured():
    """Figures of docs/models.md; roundings differ with the vectors of the CPU, within a factor."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+e-\d+) \| (\S+e-\d+) \|$", page, re.MULTILINE)
    table = {name.lower(): [float(value) for value in values] for name, *values in rows}
    assert table.keys() == FORMATS.keys()
    for name, told in table.items():
        for error, value in zip(errors(name)["float32"], told, strict=True):
            assert value / 4 <= error <= 4 * value, f"{name}: {error:.1e}, in the table {value:.1e}"


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_come_back_bit_for_bit(name, n):
    """Of one connection, and of several stacked, which are those of each."""
    form = FORMATS[name]
    tensors = tensors_of(name, n, 6)
    stacked = {tensor: np.stack([value, 3 * value]) for tensor, value in tensors.items()}
    for given in (tensors, stacked):
        if "norm_weight" in given:  # which is folded for good
            given["norm_weight"] = np.ones_like(given["norm_weight"])
    for given in (tensors, stacked):
        back = form.back(form.ours(given), given, n)
        assert back.keys() == given.keys()
        for tensor, value in given.items():
            assert back[tensor].dtype == np.float32
            np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)
    one, both = form.ours(tensors), form.ours(stacked)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), one, both)


def test_maxtext_unfolds_what_training_changed():
    """Entries of phi that changed are divided by the weight of the norm, all others keep theirs."""
    tensors = tensors_of("maxtext", 4, 6)
    tensors["mhc_norm.scale"][:2] = 0
    params = convert.from_maxtext(tensors)
    phi = params.phi.at[:, ::5].multiply(1.25).at[0, 3].set(7)
    trained = jax_mhc.MHCParams(phi, params.alpha, params.bias)
    back = convert.to_maxtext(trained, like=tensors, streams=4)
    again = convert.from_maxtext(back)
    np.testing.assert_allclose(again.phi, phi, rtol=2e-7)
    np.testing.assert_array_equal(again.phi[:, 1], phi[:, 1])
    # The weight of the first row was 0, with which its phi would be 0.
    np.testing.assert_array_equal(back["mhc_norm.scale"][0], 1)
    np.testing.assert_array_equal(back["mhc_norm.scale"][1:], tensors["mhc_norm.scale"][1:])
    np.testing.assert_array_equal(back["pre_alpha"][1:, 1:], tensors["pre_alpha"][1:, 1:])


def test_maxtext_without_tensors_to_follow_has_a_norm_of_ones():
    tensors = tensors_of("maxtext_lite", 3, 5)
    params = convert.from_maxtext(tensors)
    back = convert.to_maxtext(params, streams=3)
    np.testing.assert_array_equal(back["mhc_norm.scale"], np.ones(15))
    jax.tree.map(np.testing.assert_array_equal, convert.from_maxtext(back), params)


def test_maxtext_takes_the_tensors_of_a_module():
    """Nested, as `nnx.to_pure_dict` has them."""
    tensors = tensors_of("maxtext", 2, 3)
    nested = {name: value for name, value in tensors.items() if "." not in name}
    nested["mhc_norm"] = {"scale": tensors["mhc_norm.scale"]}
    params = convert.from_maxtext(nested)
    jax.tree.map(np.testing.assert_array_equal, params, convert.from_maxtext(tensors))


def test_transformer_engine_reads_streams_channel_by_channel():
    """Column c·n + i of its phi is row i·C + c of ours."""
    n, hidden = 4, 3
    tensors = tensors_of("transformer_engine", n, hidden)
    phi = convert.from_transformer_engine(**tensors).phi
    weighted = tensors["phi"] * tensors["norm_weight"]
    for c in range(hidden):
        for i in range(n):
            np.testing.assert_array_equal(
                phi[i * hidden + c, : 2 * n], weighted[: 2 * n, c * n + i]
            )


@pytest.mark.parametrize("shape", [(), (3,)])
def test_heads_come_back_bit_for_bit(shape):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(*shape, *s)).astype(np.float32) for s in ((4, 20), (4,), (1,))]
    params = convert.head_from_deepseek_v4(*arrays)
    assert isinstance(params, HeadParams)
    for back, array in zip(convert.head_to_deepseek_v4(params), arrays, strict=True):
        np.testing.assert_array_equal(back, array)
    back = convert.head_from_maxtext(*convert.head_to_maxtext(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    np.testing.assert_array_equal(convert.head_to_maxtext(params)[0], params.phi)


class Tensor:
    """What the converters use of a `torch.Tensor`."""

    def __init__(self, array, dtype):
        self.array, self.dtype = array, f"torch.{dtype}"

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return Tensor(self.array.astype(np.float32), "float32")

    def numpy(self):
        assert self.dtype in ("torch.float16", "torch.float32"), "Got unsupported ScalarType"
        return self.array


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["deepseek_v4", "hy4"])
def test_tensors_of_torch_are_copied(name, dtype):
    arrays = {k: np.asarray(a, jnp.dtype(dtype)) for k, a in tensors_of(name, 2, 5).items()}
    params = FORMATS[name].ours({k: Tensor(array, dtype) for k, array in arrays.items()})
    expected = FORMATS[name].ours(arrays)
    for array in arrays.values():
        array[:] = 0
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_quantised_tensors_of_torch_are_refused():
    fn, base, scale = tensors_of("deepseek_v4", 2, 5).values()
    with pytest.raises(TypeError, match="fn: expected dtype float32.*, got float8_e4m3fn"):
        convert.from_deepseek_v4(Tensor(fn, "float8_e4m3fn"), base, scale)


def test_torch_itself():
    """Where it is installed: parameters, whose memory it goes on to use."""
    torch = pytest.importorskip("torch")
    arrays = tensors_of("deepseek_v4", 2, 5).values()
    tensors = [torch.nn.Parameter(torch.tensor(a).to(torch.bfloat16)) for a in arrays]
    params = convert.from_deepseek_v4(*tensors)
    base = tensors[1].detach().float().numpy().copy()
    with torch.no_grad():
        tensors[1].zero_()
    np.testing.assert_array_equal(params.bias[:4], base[:4])


def test_presets_of_models_that_differ_in_one_setting():
    """What tells them apart, and nothing else."""

    def changed(one, other):
        return {k for k, v in vars(one).items() if v != vars(other)[k]}

    assert changed(presets.DEEPSEEK_V41, presets.DEEPSEEK_V4) == {"schedule"}
    assert changed(presets.GLM5, presets.DEEPSEEK_V4) == {"norm_eps"}
    assert changed(presets.MAXTEXT, presets.DEEPSEEK_V4) == set()
    assert changed(presets.MEGATRON_DEV, presets.DEEPSEEK_V4) == {"norm_eps_mode"}
    assert changed(presets.LIGER, presets.DEEPSEEK_V4) == {"pre_eps", "order"}
    assert changed(presets.TRANSFORMER_ENGINE, presets.PAPER) == {"norm_eps"}
    assert changed(presets.MAXTEXT_LITE, presets.PAPER) == {"constraint", "pre_eps"}
