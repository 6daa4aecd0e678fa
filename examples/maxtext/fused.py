"""MaxText's hyper-connections, computed by jax_mhc; docs/maxtext.md has what it takes and gives.

Parameters stay those of MaxText's modules, and so do their names in checkpoints: every step
converts them, and gradients go back through the conversion.
"""

import dataclasses

from flax import nnx

from jax_mhc import convert, head, post, pre, presets

ADDED = "load_balance_loss", "moe_bias_updates"


def connection(self, norm_fn, branch_fn, x, mhc_type, **kwargs):
    """In place of `ManifoldConstrainedHyperConnections.__call__`."""
    cfg, is_attention = self.config, mhc_type.value == "attention"
    preset = presets.MAXTEXT_LITE if cfg.enable_mhc_lite else presets.MAXTEXT
    eps, iterations = cfg.normalization_layer_epsilon, cfg.sinkhorn_iterations
    config = dataclasses.replace(preset, norm_eps=eps, sinkhorn_iters=iterations)
    params = convert.from_maxtext(nnx.to_pure_dict(nnx.state(self, nnx.Param)))
    u, ctx = pre(x, params, config=config)
    names = ("inputs_q", "inputs_kv") if is_attention else ("inputs",)
    result = branch_fn(**dict.fromkeys(names, norm_fn(u)), **kwargs)
    y, *rest = result if isinstance(result, tuple) else (result,)
    added = {} if is_attention else dict(zip(ADDED, rest, strict=False))  # attention's is its cache
    return post(y, ctx), added


def leave(self, x):
    """In place of `DeepSeek4HyperHead.__call__`."""
    params = convert.head_from_maxtext(self.hc_fn[...], self.hc_base[...], self.hc_scale[...])
    config = dataclasses.replace(presets.MAXTEXT, norm_eps=self.eps, pre_eps=self.eps)
    return head(x, params, config=config).astype(self.dtype)


def install():
    """Puts both in MaxText's place, for the models of this process."""
    from maxtext.layers import mhc

    mhc.ManifoldConstrainedHyperConnections.__call__ = connection
    mhc.DeepSeek4HyperHead.__call__ = leave
