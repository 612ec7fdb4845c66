"""The core: words (records, interfaces, protocol) and numerics shared by every other room.

This package imports none of the other rooms (`models`, `pipelines`, `rollout`,
`train`, `evaluate`); a test holds that law.
"""
