"""Teachers of an ensemble: teacher tables, the soft labels made from them, and the command that writes them."""
