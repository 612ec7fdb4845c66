"""Whose rewards: a module for each, found by the name of its file.

A module says where its rewards come from and ends with `SCHEME = Scheme(score, ranges, reads=...)`.
"""
