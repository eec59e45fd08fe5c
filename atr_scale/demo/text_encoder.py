"""The demo's text encoder: a WordPiece tokenizer trained on the demo's captions and a small untrained BERT.

Both go into one folder that transformers' AutoModel and AutoTokenizer load without a network.
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
    vocab_size: int = 2000,
    layers: int = 2,
    dim: int = 192,
    heads: int = 4,
    max_tokens: int = 128,
) -> None:
    """Write tokenizer and randomly initialised BertModel (`dim` wide, dropout 0.1) to `out`; seeded."""
    tokenizer = _train_tokenizer(captions, vocab_size)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, **SPECIAL_TOKENS)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        max_position_embeddings=max_tokens,
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
    logging.disable_progress_bar()  # it would show one for writing a single file
    model.save_pretrained(out)
    if bars:
        logging.enable_progress_bar()


def _train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's uncased WordPiece: every character, then the words of `captions`, the most frequent first.

    Not tokenizers' own trainer: it breaks ties in hash order, so that two runs give two vocabularies.
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
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys(pieces[:vocab_size]))}
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer
