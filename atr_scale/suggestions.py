"""Which key was meant by an unknown one: names that people bring from other systems, other sections, misspellings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Names of other training systems whose words do not tell the key.
SYNONYMS = {
    name: key
    for key, names in {
        "monitor": "report_to log_with loggers trackers tracker wandb",
        "run.dir": "output_dir out_dir save_dir log_dir exp_dir experiment_dir logdir workdir",
        "run.seed": "random_seed manual_seed",
        "data.train": "train_data train_set train_shards dataset",
        "data.validation": "val valid val_data val_set dev eval_data",
        "data.crop_seconds": "duration max_duration clip_seconds clip_length audio_length segment_seconds",
        "data.captions.max_tokens": "max_length max_len max_seq_length max_words context_length text_length",
        "model.audio.name": "audio_encoder audio_model audio_backbone",
        "model.audio.spec_augment": "spec_aug specaug specaugment",
        "model.text.name": "text_encoder text_model text_backbone language_model",
        "model.projection.dim": "embed_dim embedding_dim embedding_size joint_dim joint_embed projection_dim proj_dim",
        "objective.temperature.initial": "temperature tau temp logit_scale init_temperature",
        "train.lr": "learningrate base_lr peak_lr",
        "train.lr_floor": "min_lr lr_min eta_min end_lr final_lr",
        "train.steps": "iterations iters max_iters updates num_updates",
        "train.global_batch_size": "batch_size train_batch_size batchsize batch bs",
        "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu per_gpu_batch_size",
        "train.accum_steps": "gradient_accumulation_steps gradient_accumulation accumulation_steps grad_accum "
        "accumulate_grad_batches accum",
        "train.warmup_steps": "warmup warmup_ratio warmup_proportion warmup_iters warmup_updates",
        "train.weight_decay": "wd l2",
        "train.gradient_clipping": "grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val clip_norm clip",
        "train.betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
        "train.eps": "epsilon adam_epsilon",
        "train.precision": "fp16 bf16 amp mixed_precision dtype autocast",
        "train.zero_stage": "zero stage deepspeed_stage zero_optimization deepspeed",
        "train.initial_checkpoint": "resume resume_from resume_from_checkpoint init_from load_from pretrained",
        "train.checkpoint_every": "save_every save_steps save_interval checkpoint_interval",
        "train.evaluate_every": "eval_every eval_steps eval_interval val_check_interval validate_every",
        "train.keep_checkpoints": "save_total_limit keep_last save_top_k",
        "train.log_every": "logging_steps log_steps log_interval log_every_n_steps print_freq",
    }.items()
    for name in names.split()
}
SHORT = {"learning_rate": "lr", "tau": "temperature"}
FILLERS = {"num", "n", "number", "of", "max", "total"}


def closest(key: str, own: Sequence[str], everywhere: Sequence[str]) -> str | None:
    """The known key that an unknown one stands for, None if there is no likely one.

    key: without its section. own, everywhere: dotted keys, of its section and of the whole configuration.
    """
    same_words = _with_words_of(key, own)
    if same_words:
        return same_words[0]
    synonym = SYNONYMS.get(key.lower().replace("-", "_"))
    if synonym in everywhere:
        return synonym
    longer = [known for known in own if _words(key) < _words(_last(known))]
    if len(longer) == 1:
        return longer[0]
    elsewhere = [known for known in everywhere if _last(known) == key] or _with_words_of(key, everywhere)
    if len(elsewhere) == 1:
        return elsewhere[0]
    return _similar(key, own, 0.6) or (None if elsewhere else _similar(key, everywhere, 0.75))


def _with_words_of(key: str, keys: Iterable[str]) -> list[str]:
    words = _words(key)
    return [known for known in keys if _words(_last(known)) == words]


def _words(key: str) -> frozenset[str]:
    text = key.lower().replace("-", "_")
    for long, short in SHORT.items():
        text = text.replace(long, short)
    words = {word.removesuffix("s") for word in text.split("_")}
    return frozenset(words - FILLERS or words)


def _similar(key: str, keys: Sequence[str], cutoff: float) -> str | None:
    by_name = {_last(known): known for known in reversed(keys)}
    close = difflib.get_close_matches(key, by_name, n=1, cutoff=cutoff)
    return by_name[close[0]] if close else None


def _last(key: str) -> str:
    return key.rpartition(".")[2]
