"""What a run says while it works, and what it leaves to read."""
