"""Parts of measuring that `jax_mhc.bench`, `jax_mhc.estimate` and the benchmarks share."""
