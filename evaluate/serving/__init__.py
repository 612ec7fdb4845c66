"""An OpenAI-compatible server on our engine: JSON in, rows of the engine, text out."""
