"""The examples of examples/modules, and what it takes to convert a model."""

import collections
import difflib
import re
import runpy

import equinox as eqx
import jax
import pytest
from cases import PLATFORM
from flax import nnx
from hlo import custom_calls
from test_examples import EXAMPLES

import jax_mhc as mhc

MODULES = EXAMPLES / "modules"
DEPTH = 2
pytestmark = pytest.mark.usefixtures("default_dtypes")


@pytest.mark.parametrize("name", ["flax_nnx", "flax_linen", "equinox_module", "maxtext_decoder"])
def test_one_step_lowers_the_loss(name, capsys):
    names = runpy.run_path(str(MODULES / f"{name}.py"), run_name="__main__")
    first, second, *balance = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out))
    if name == "maxtext_decoder":
        # Every other number is what the experts add to the loss.
        first_balance, second, second_balance = second, *balance
        assert 0.01 <= first_balance < first and 0.01 <= second_balance < second
    else:
        params = names.get("params", names["model"])
        labels = collections.Counter(jax.tree.leaves(mhc.param_labels(params)))
        # Two sublayers with norms, and a head; the layers have biases too.
        assert labels.pop("other") >= 12
        assert labels == {"projection": 3, "gate": 3, "bias": 3, "norm": 2}
    assert second < first - 0.1


def nnx_step(names, tokens):
    model = nnx.jit(lambda: names["GPT"](16, 8, 2, DEPTH, nnx.Rngs(0)))()
    return nnx.jit(nnx.value_and_grad(names["loss"])), (model, tokens)


def linen_step(names, tokens):
    model = names["GPT"](16, 8, 2, DEPTH)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)

    def loss(variables, tokens):
        return names["loss"](variables, model, tokens)

    return jax.jit(jax.value_and_grad(loss)), (variables, tokens)


def equinox_step(names, tokens):
    model = eqx.filter_jit(names["GPT"])(16, 8, 2, DEPTH, jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, tokens):
        return names["loss"](eqx.combine(arrays, static), tokens)

    return jax.jit(jax.value_and_grad(loss)), (arrays, tokens)


@pytest.mark.parametrize(
    "library, make", [("", nnx_step), ("linen_", linen_step), ("equinox_", equinox_step)]
)
def test_converting_a_model(library, make):
    """At most six lines of it change, and it starts with the same loss; all of it is seams."""
    plain, with_mhc = (MODULES / f"gpt_{library}{name}.py" for name in ("plain", "mhc"))
    before, after = (path.read_text().splitlines() for path in (plain, with_mhc))
    diff = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ") and line[2:]]
    assert sum(line.startswith("+") for line in diff) <= 6
    if not library:
        shown = re.search(r"```diff\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)[1]
        assert [s.replace(" ", "") for s in diff] == shown.replace(" ", "").splitlines()

    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 16)
    losses = {}
    for path in (plain, with_mhc):
        # By default a GPU rounds the factors of a product in float32 to 10 bits.
        with jax.default_matmul_precision("highest"):
            run, operands = make(runpy.run_path(str(path)), tokens)
            step = run.lower(*operands).compile()
        losses[path] = float(step(*operands)[0])
        # Each sublayer but the first runs the post before it, and reduce that of the last one.
        calls = {"pre": 1, "post_pre": 2 * DEPTH - 1, "post": 1} if path == with_mhc else {}
        each_way = {f"{op}_{way}": num for op, num in calls.items() for way in ("fwd", "bwd")}
        if library == "equinox_" and PLATFORM == "cpu":
            # Gradients of the parameters for each of a few examples, under vmap, are in plain JAX.
            each_way = {call: num for call, num in each_way.items() if "pre_bwd" not in call}
        assert custom_calls(step.as_text()) == each_way
    assert losses[with_mhc] == pytest.approx(losses[plain], rel=2e-6)
