"""Recurrences and their implementations: XLA, CUDA (Pallas), native CPU code; arrays in and out."""
