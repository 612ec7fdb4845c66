"""The needle world: long dull videos with short events that only a close look finds."""
