"""One run: its folder, its loop, and what is left of it."""
