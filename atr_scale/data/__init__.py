"""Corpora to batches; docs/data.md describes the formats and rules.

    corpora -> shard_builder (plan, manifest) -> shard_writer (one tar) -> shard_reader (samples) -> stream (batches)

Beside them: exclusions (lists of clips to leave out); manifest and shard_index (positions of samples in shards);
sample and tar (formats); shard_check; sample_order (which samples form a batch); decode (audio) and tokenizer
(captions); collate, shared_buffers and assembly (batches in pieces); loader_memory (how large they are); storage (disks
and S3); paraphrases; splits; options.
"""
