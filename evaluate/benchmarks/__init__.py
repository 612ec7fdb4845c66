"""Benchmarks as data: published rows, protocols by name, scores and reports. No engine in here."""
