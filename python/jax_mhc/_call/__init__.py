"""Calls on one device: their table, the library that runs them, and their rules for JAX.

- `table.py`: what calls there are, from the library's description of itself.
- `library.py`: the shared library with the kernels.
- `dispatch.py`: which implementation an op runs; `faster.py`: which of them is faster.
- `primitive.py`: a call as a primitive of JAX, lowered to a custom call, or to `plain.py`.
- `derivatives.py`: the errors for derivatives that the kernels do not have.

`_mesh` spreads calls over devices, and `_ops` makes ops of them.
"""

from jax_mhc._call.derivatives import first_order, reverse_mode_only
from jax_mhc._call.dispatch import Implementation, use_fused
from jax_mhc._call.faster import configuration_of, configuration_of_op
from jax_mhc._call.primitive import bind
from jax_mhc._call.table import Call, Settings, Value, Values

__all__ = [
    "Call",
    "Implementation",
    "Settings",
    "Value",
    "Values",
    "bind",
    "configuration_of",
    "configuration_of_op",
    "first_order",
    "reverse_mode_only",
    "use_fused",
]
