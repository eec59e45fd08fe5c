"""Paraphrases of training captions: asked of a language model once, stored beside the shards, drawn in training.

    endpoint (ask) -> choose (which to keep) -> stored (the file beside the shards) -> the training stream

Source: caption augmentation of the co-attention retrieval paper (arXiv 2412.20914): five rewritings a caption, those
kept whose text embeddings are closest to the original's. Evaluation never reads them.
"""
