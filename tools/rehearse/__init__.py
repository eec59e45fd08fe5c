"""A rehearsal of what goes wrong on a cluster: a training is hit by faults at random, and compared with an undisturbed
one. docs/rehearsal.md is the report of a run."""
