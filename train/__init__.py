"""Composition: the door (`main.py`), the loops, the train steps and the recipes."""
