"""Choosing actions, one agent after another or by a fixed point; in XLA, CUDA or native code."""
