"""What one rank computes. Knows nothing of ranks: parallelism is applied from outside."""

from neox_core.model.dimensions import ModelDimensions
from neox_core.model.llama import FinalNorm, Llama, OutputHead, TokenEmbedding, TransformerBlock

__all__ = ["FinalNorm", "Llama", "ModelDimensions", "OutputHead", "TokenEmbedding", "TransformerBlock"]
