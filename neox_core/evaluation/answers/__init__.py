"""Final answers: found in a sample, read, and compared, as in the Minerva protocol (arXiv 2206.14858, appendix D)."""
