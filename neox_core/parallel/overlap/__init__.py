"""Tensor-parallel ranks exchange hidden states beside their own matrix products."""
