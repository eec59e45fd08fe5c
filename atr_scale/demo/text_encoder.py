"""The demo's text encoder: a WordPiece tokenizer for the demo's captions, and a small untrained BERT.

Both are saved to one folder, which transformers' AutoModel and AutoTokenizer load without network access.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from transformers.utils import logging

VOCAB_SIZE = 2000
MAX_TOKENS = 128
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def build_demo_text_encoder(
    captions: Iterable[str],
    out: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    dim: int = 192,
    heads: int = 4,
) -> None:
    """Write a tokenizer for `captions` and a randomly initialised BertModel to `out`.

    layers, dim and heads: of the BertModel; its dropout is 0.1. The same captions and seed give the same files.
    """
    tokenizer = _train_tokenizer(captions)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **SPECIAL_TOKENS)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    out.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(out)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers shows one even for a single small file
    model.save_pretrained(out)
    if bars:
        logging.enable_progress_bar()


def _train_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """BERT's uncased WordPiece; its vocabulary is every character and the most frequent words of `captions`.

    The trainer of tokenizers is not used: it breaks ties in hash order, so two runs give two vocabularies.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption))
        counts.update(word for word, _ in words)
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation}.union(*counts))
    words_by_count = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*SPECIAL_TOKENS.values(), *characters, *(f"##{c}" for c in characters), *words_by_count]
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys(pieces[:VOCAB_SIZE]))}
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer
