"""`mam experiment`: a matrix of runs, to its end."""
