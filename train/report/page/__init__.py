"""The page that a run leaves: a static folder that opens from disk."""
