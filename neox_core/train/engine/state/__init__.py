"""The engine's state in files: read in any layout, and verified."""
