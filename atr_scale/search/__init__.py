"""Search with a trained model: embeddings of a collection of sounds, an index of them, queries, a page."""
