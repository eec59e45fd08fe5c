"""Synthetic corpora: dsp -> events -> scenes -> captions -> plan -> corpora and truth; text_encoder beside them."""
