"""A stage's micro batch as a CUDA graph."""
