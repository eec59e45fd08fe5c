"""Synthetic corpora: dsp -> events -> scenes -> captions -> clips -> corpora and relevance; and a text_encoder."""
