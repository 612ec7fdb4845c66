"""The questions of a run."""
