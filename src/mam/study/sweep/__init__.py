"""`mam sweep`: a search for good settings of one policy on one task."""
