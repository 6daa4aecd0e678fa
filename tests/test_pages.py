"""Every code block of the pages runs, on its own, and says what is so.

A block runs with no names but its own. Where the text around it introduces others, such as a model,
a function of NAMES makes them, runs the block and looks at what came of it. Blocks of a page that
is one program run after those before them.
"""

import dataclasses
import functools
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import test_dtypes
from cases import assert_close
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from pages import ALL, README, ROOT, block
from test_scanned import TREES, tree

import jax_mhc as mhc
import jax_mhc.flax.linen
import jax_mhc.flax.nnx
from jax_mhc import convert, diagnostics

C = 16
KEY = jax.random.key(0)
# Roundings of a few sublayers in float32.
close = functools.partial(assert_close, limit=5e-6)

NAMES = {}
LANGUAGES = {"python", "diff", "bibtex"}


@pytest.fixture(autouse=True)
def as_a_user_finds_jax(default_dtypes):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        # By default a GPU rounds the factors of a product in float32 to 10 bits.
        with jax.default_matmul_precision("highest"):
            yield


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=str)
def test_a_block_runs(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = NAMES.get((block.page, block.section, block.number))
    run(block, monkeypatch) if run else block.run()


def test_every_block_is_known():
    """Code of another language would not be run, nor what stands for a block that is gone."""
    assert {block.language for block in ALL} <= LANGUAGES
    assert set(NAMES) <= {(block.page, block.section, block.number) for block in ALL}


def names(page, section, *numbers):
    """Registers a function that runs a block with the names that its page introduces."""

    def register(function):
        NAMES.update({(page, section, number): function for number in numbers or (0,)})
        return function

    return register


def params(num=None, hidden=C):
    """Parameters of a connection, or of several, stacked."""
    if num is None:
        return mhc.init_params(KEY, streams=4, hidden=hidden)
    init = functools.partial(mhc.init_params, streams=4, hidden=hidden)
    return jax.vmap(lambda key: init(key))(jax.random.split(KEY, num))


# ---- the README ---------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 650


def test_the_change_to_a_model():
    """Both sides of the diff run, and start with the same values."""
    code = block("README.md", "The change to your model").code
    layers = [(jnp.tanh, params()), (jnp.sin, params())]
    u = jax.random.normal(KEY, (8, C))
    for sign, other in ("-", "+"), ("+", "-"):
        lines = (line[1:] for line in code.splitlines() if not line.startswith(other))
        found = {"mhc": mhc, "x": u, "layers": layers}
        exec("\n".join(lines), found)
        if sign == "-":
            before = found["x"]
    close(found["x"], before)


@names("README.md", "The change to your model", 1)
def _(block, monkeypatch):
    found = block.run()
    u = jax.random.normal(KEY, (8, 64))
    close(found["model"](u), u + found["layer"].layer(u))


@names("README.md", "The change to your model", 2)
def _(block, monkeypatch):
    model = block.run()["Model"]()
    u = jax.random.normal(KEY, (8, 64))
    variables = model.init(KEY, u)
    dense = variables["params"]["Dense_0"]
    close(model.apply(variables, u), u + u @ dense["kernel"])


@names("README.md", "The change to your model", 3)
def _(block, monkeypatch):
    found = block.run()
    u = jax.random.normal(KEY, (8, 64))
    close(found["model"](u), u + found["layer"].layer(u))


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, hidden", [((8, 128, 4, 64), 32), ((4, 2, 16, 64), 64)])
def test_messages_are_those_of_the_page(shape, hidden):
    with pytest.raises(ValueError) as error:
        mhc.pre(jnp.ones(shape), params(hidden=hidden))
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    assert str(error.value) in " ".join(page.split())


# ---- pages of one program -----------------------------------------------------------------------


@functools.cache
def names_after(block):
    """Names of a page of which each block goes on from those before it."""
    blocks = [b for b in ALL if b.page == block.page and b.language == "python"]
    place = blocks.index(block)
    return block.run(**names_after(blocks[place - 1]) if place else {})


@names("docs/optimizers.md", "Weight decay")
def _(block, monkeypatch):
    names_after(block)


@names("docs/optimizers.md", "Muon", 0)
def _(block, monkeypatch):
    names_after(block)


@names("docs/optimizers.md", "Muon", 1)
def _(block, monkeypatch):
    found = names_after(block)
    params, decays, groups = (found[name] for name in ("params", "decays", "groups"))
    assert found["losses"][-1] < found["losses"][0] / 2
    named = mhc.MHCParams
    assert decays(params)["connections"] == [named(True, False, False)] * 2
    assert decays(params)["layers"] == [{"up": True, "down": True, "bias": False}] * 2
    assert groups(params) == {
        "embed": "adamw",
        "layers": [{"up": "muon", "down": "muon", "bias": "no decay"}] * 2,
        "connections": [named("adamw", "no decay", "no decay")] * 2,
    }


@names("docs/upcycling.md", "A trained model", 0, 1)
def _(block, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "modules")
    found = names_after(block)
    if "start" in found:
        close(*found["start"])
        assert np.mean(found["after"][-20:]) < np.mean(found["before"][-20:])


@names("docs/upcycling.md", "More streams, or fewer")
def _(block, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "modules")
    found = names_after(block)
    close(*found["widened"])
    assert np.mean(found["at_last"][-20:]) < np.mean(found["after"][-20:])
    # The copies of a stream have come apart.
    h_post = found["connections"](found["wide"])[0].bias[4:8].reshape(2, 2)
    assert np.abs(h_post[:, 0] - h_post[:, 1]).min() > 1e-4


# ---- training and recomputation -----------------------------------------------------------------


@names("docs/training.md", "One sublayer", 0)
def _(block, monkeypatch):
    found = block.run()
    assert np.isfinite(found["d_params"].phi).all() and np.any(found["d_w"])


@names("docs/training.md", "One sublayer", 1)
def _(block, monkeypatch):
    found = block.run()
    assert found["x"].shape == (8, 128, 4, 64) and found["aux"] > 0


@names("docs/training.md", "Save and restore")
def _(block, monkeypatch):
    found = block.run()
    jax.tree.map(np.testing.assert_array_equal, found["restored"], found["params"])


# ---- checkpoints --------------------------------------------------------------------------------

TINY = ROOT / "tests" / "vectors" / "deepseek_v4_tiny"


def tiny():
    return convert.load(TINY)


@names("docs/models.md", "A whole checkpoint", 0)
def _(block, monkeypatch):
    Path("DeepSeek-V4-Flash").symlink_to(TINY)
    assert isinstance(block.run()["attn"], mhc.MHCParams)


@names("docs/models.md", "A whole checkpoint", 1)
def _(block, monkeypatch):
    checkpoint = tiny()
    stacked = block.run(checkpoint=checkpoint)["stacked"]
    assert stacked["ffn"].phi.shape[0] == len(checkpoint.layers)


@names("docs/models.md", "A whole checkpoint", 2)
def _(block, monkeypatch):
    Path("model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    checkpoint = tiny()
    block.run(checkpoint=checkpoint, layers=checkpoint.layers, head=checkpoint.head)
    saved, tensors = map(safetensors.numpy.load_file, ("trained.safetensors", "model.safetensors"))
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor)


@names("docs/models.md", "Layouts", 0)
def _(block, monkeypatch):
    tensors, _ = tree(TREES["deepseek"])
    path, new_path = (Path(name).absolute() for name in ("items", "saved"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, unflatten_dict(tensors, sep="."))
    block.run(path=path, new_path=new_path)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = flatten_dict(checkpointer.restore(new_path), sep=".")
    jax.tree.map(np.testing.assert_array_equal, saved, tensors)


@names("docs/models.md", "Layouts", 1)
def _(block, monkeypatch):
    tensors, expected = tree(TREES["deepseek"])
    decoder = unflatten_dict(tensors, sep=".")["params"]["params"]["decoder"]
    stacked = block.run(decoder=decoder)["stacked"]
    np.testing.assert_array_equal(stacked.phi[0], expected[1, "attn"].phi)


# ---- dtypes -------------------------------------------------------------------------------------

CAST = "docs/dtypes.md", "A model that is cast whole"


@names(*CAST, 0)
def _(block_, monkeypatch):
    cast = block_.run()["cast"]
    assert cast("other", jnp.ones(3)).dtype == jnp.bfloat16
    assert cast("bias", jnp.ones(3)).dtype == jnp.float32


@names(*CAST, 1, 2, 3)
def _(block_, monkeypatch):
    cast = block(*CAST).run()["cast"]

    def run(**given):
        return types.SimpleNamespace(**block_.run(cast=cast, **given))

    of_library = test_dtypes.of_nnx, test_dtypes.of_linen, test_dtypes.of_equinox
    of_library[block_.number - 1](run)


# ---- many devices, and MaxText ------------------------------------------------------------------


@names("docs/sharding.md", "The modes")
def _(block, monkeypatch):
    sublayer = block.run(layer=jnp.tanh)["sublayer"]
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(KEY, (3, 4, C))
    specs = jax.P(None, None, "model")
    split = jax.shard_map(sublayer, mesh=mesh, in_specs=(specs, jax.P()), out_specs=specs)
    close(jax.jit(split)(x, params()), mhc.mhc_residual(jnp.tanh, x, params()))


@names("docs/sharding.md", "Experts")
def _(block, monkeypatch):
    def experts(u, weights):
        sent = jax.lax.all_to_all(u, "experts", 0, 1, tiled=True)
        y = jax.lax.all_to_all(jnp.tanh(sent @ weights[0]), "experts", 1, 0, tiled=True)
        return y, jax.lax.pmean(jnp.mean(u), "experts")

    sublayer = block.run(experts=experts)["sublayer"]
    x, weights = (jax.random.normal(KEY, shape) for shape in ((2, 3, 4, C), (1, C, C)))
    kinds = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1,), ("experts",), axis_types=kinds)):
        found, loss = jax.jit(sublayer)(x, params(), weights)
    close(found, mhc.mhc_residual(lambda u: jnp.tanh(u @ weights[0]), x, params()))
    close(loss, mhc.pre(x, params())[0].mean())


@names("docs/sharding.md", "Names for the dimensions of parameters")
def _(block, monkeypatch):
    rngs = nnx.Rngs(0)
    given = {"layer": nnx.Linear(C, C, rngs=rngs), "C": C, "rngs": rngs}
    with jax.set_mesh(jax.make_mesh((1, 1), ("embed", "norm"))):
        block.run(**given)


@names("docs/sharding.md", "Several hosts, and the compilation cache")
def _(block, monkeypatch):
    setting = "jax_remove_custom_partitioning_ptr_from_cache_key"
    before = getattr(jax.config, setting)
    try:
        block.run()
        assert getattr(jax.config, setting)
    finally:
        jax.config.update(setting, before)


@names("docs/maxtext.md", "MaxText")
def _(block, monkeypatch):
    """The classes of MaxText, which need not be here, are replaced by empty ones."""
    layers = types.ModuleType("maxtext.layers")
    layers.mhc = types.SimpleNamespace(
        ManifoldConstrainedHyperConnections=type("Connection", (), {}),
        DeepSeek4HyperHead=type("Head", (), {}),
    )
    monkeypatch.setitem(sys.modules, "maxtext", types.ModuleType("maxtext"))
    monkeypatch.setitem(sys.modules, "maxtext.layers", layers)
    monkeypatch.syspath_prepend(ROOT / "examples" / "maxtext")
    fused = block.run()["fused"]
    assert layers.mhc.ManifoldConstrainedHyperConnections.__call__ is fused.connection
    assert layers.mhc.DeepSeek4HyperHead.__call__ is fused.leave


@names("docs/maxtext.md", "Names of axes")
def _(block, monkeypatch):
    def constrained(x, names, mesh, mode, *, rules):
        assert len(names) == x.ndim
        return x

    given = {"maybe_shard_with_logical": constrained, "get_logical_axis_rules": list}
    block.run(x=jnp.ones((2, 3, 4, C)), mesh=None, shard_mode=None, **given)


# ---- deployment ---------------------------------------------------------------------------------


@names("docs/deployment.md", "What a serving process needs")
def _(block_, monkeypatch):
    exported = block("docs/deployment.md", "Exporting").run()
    Path("model.jax").write_bytes(exported["blob"])
    x = jax.random.normal(KEY, (8, 4, 64))
    close(block_.run(x=x)["y"], exported["model"](x))


# ---- diagnostics --------------------------------------------------------------------------------

STEP = "docs/diagnostics.md", "In a training step"
L, T = 3, 70


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
    connections: list
    weights: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sublayers:
    connection: mhc.MHCParams


@names(*STEP, 0)
def _(block, monkeypatch):
    found = block.run(
        attention=lambda u, w: jnp.tanh(u @ w),
        mlp=lambda u, w: jnp.sin(u @ w),
        cross_entropy=lambda u: jnp.mean(u**2),
        update=lambda params, grads: jax.tree.map(lambda p, g: p - 0.1 * g, params, grads),
    )
    initial = Params([params(L), params(L)], jnp.ones((L, C, C)))
    _, metrics = found["step"](initial, jax.random.normal(KEY, (T, C)), 0)
    close(metrics["gain"], jnp.ones((), jnp.float32))


@names(*STEP, 1)
def _(block, monkeypatch):
    found = block.run(
        layer=lambda u, one: jnp.tanh(u),
        params=Sublayers(params(L)),
        x=mhc.expand(jnp.ones((T, C)), streams=4),
    )
    assert found["h_res"].shape == (L, 64, 4, 4)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        connect = functools.partial(jax_mhc.flax.nnx.MHC, hidden=C, rngs=rngs)
        self.attention = connect(nnx.Linear(C, C, rngs=rngs))
        self.mlp = connect(nnx.Linear(C, C, rngs=rngs))


@names(*STEP, 2)
def _(block, monkeypatch):
    blocks = nnx.vmap(lambda key: NNXBlock(nnx.Rngs(key)))(jax.random.split(KEY, L))
    x = mhc.expand(jnp.ones((T, C)), streams=4)
    found = block.run(blocks=blocks, x=x)
    assert found["h_res"].shape == (2 * L, 64, 4, 4)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax_mhc.flax.linen.MHC(nn.Dense(C), C)(x)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, u):
        return mhc.reduce(LinenBlock(name="block")(mhc.expand(u, streams=4)))


@names(*STEP, 3)
def _(block, monkeypatch):
    model, u = LinenModel(), jnp.ones((T, C))
    found = block.run(model=model, variables=model.init(KEY, u), u=u)
    assert found["h_res"].shape == (T, 4, 4)


NUMBERS = {"mhc/composite_gain_forward": jnp.ones(()), "mhc/logit_range": jnp.full((), 3.3)}


class Log:
    """Stand-in for both libraries, which need not be here, and for what they write to."""

    def __init__(self):
        self.told = {}

    @classmethod
    def init(cls, *_, **__):
        return cls()

    SummaryWriter = init

    def add_scalar(self, name, value, at):
        self.told[name] = value

    def log(self, numbers, at):
        self.told |= numbers


@names("docs/diagnostics.md", "Logs of a training", 0, 1)
def _(block, monkeypatch):
    for library in "tensorboardX", "wandb":
        monkeypatch.setitem(sys.modules, library, Log)
    found = block.run(folder=".", numbers=NUMBERS, at=3)
    told = found["writer" if block.number == 0 else "run"].told
    assert told == {name: float(value) for name, value in NUMBERS.items()}


@names("docs/diagnostics.md", "Pictures")
def _(block, monkeypatch):
    h_res = jax.nn.softmax(jax.random.normal(KEY, (L, T, 4, 4)))
    gain = diagnostics.amax_gain(diagnostics.composite(h_res))
    given = {"gain_hc": gain, "gain_mhc": gain, "gains": {"mHC": gain}, "steps": range(L)}
    block.run(h_res=h_res, **given)
    assert Path("gain.png").read_bytes().startswith(b"\x89PNG")
