"""Paraphrases of training captions: asked of a language model once, stored beside the shards, drawn in training.

    ask (a chat model at an endpoint) -> choose (which to keep) -> stored (the file beside the shards) -> training

Source: caption augmentation of the co-attention retrieval paper (arXiv 2412.20914): five rewritings a caption, those
kept whose text embeddings are closest to the original's. Evaluation never reads them.
"""
