"""Tensor-parallel ranks exchange hidden states alongside their own matrix products."""
