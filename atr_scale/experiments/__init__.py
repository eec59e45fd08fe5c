"""Many runs: sweeps over a grid of values, and comparisons of what came out."""
