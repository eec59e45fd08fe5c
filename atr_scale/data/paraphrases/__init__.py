"""Paraphrases of training captions: written once by a language model, stored beside the shards, drawn in training.

    ask (a chat model at an endpoint) -> choose (which to keep) -> stored (the file beside the shards) -> training

Source: caption augmentation of the co-attention retrieval paper (arXiv 2412.20914): five paraphrases of each caption,
of which those with the text embeddings closest to the original's are kept. Evaluation never reads them.
"""
