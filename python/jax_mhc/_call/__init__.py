"""The calls: their table, the library that runs them, and their rules for JAX."""
