"""Many runs, told apart honestly: sweeps, and comparisons with intervals. Needs no torch."""
