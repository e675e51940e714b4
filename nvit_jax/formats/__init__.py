"""Checkpoints of other places in, the small model out."""
