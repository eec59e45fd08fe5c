"""A rehearsal of what goes wrong on a cluster: a training is hit by faults at random, and compared with an undisturbed
one. `--write` makes the report the page docs/rehearsal.md."""
