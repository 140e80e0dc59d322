"""Choosing actions: one agent after another, or all at once until nothing changes; in XLA, CUDA or native code."""
