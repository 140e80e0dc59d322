"""Recurrences and their implementations: XLA, CUDA (Pallas), native CPU code. Leaves: arrays in, arrays out."""
