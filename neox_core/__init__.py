"""The science and the numbers of llemma-pretrain. Imports neither prefect nor submitit."""

__version__ = "0.2.0"
