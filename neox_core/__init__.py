"""The science and the numbers of llemma-pretrain. Imports neither prefect nor submitit."""

__version__ = "0.1.0"
