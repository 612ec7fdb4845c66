"""Host-side data: videos to frames, frames and words to prompts, rows to batches. NumPy only."""
