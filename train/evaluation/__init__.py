"""The evaluation of a run on held-out questions: before it, in its midst, after it."""
