"""Supervised fine-tuning: packed conversations and the tasks of the needle world."""
