"""`mam dashboard`: the live view of a folder of runs."""
