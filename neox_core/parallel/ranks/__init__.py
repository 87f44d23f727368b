"""The ranks of a job: where each stands in the layout, and how they agree and share."""
