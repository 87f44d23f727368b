"""Runs of the flows: their names, whether they are at work, how they are followed, interrupted and put right."""
