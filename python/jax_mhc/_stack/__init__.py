"""The stack of sublayers: the public function, its own scan, and what is computed again."""
