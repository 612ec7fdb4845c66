"""Composition: what a policy can do, measured on questions it never trained on."""
