"""The engine: requests in, streams out."""
