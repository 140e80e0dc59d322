"""Many runs: started, searched, compared, watched and timed."""
