from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atr_scale.batch import TokenSequence
from atr_scale.demo.clips import Sizes, plan_clips
from atr_scale.demo.corpora import training_captions, write_demo_corpora
from atr_scale.demo.text_encoder import build_demo_text_encoder
from atr_scale.errors import UserError
from tools.bench.measure import peak_mib
from tools.study import report
from tools.study.__main__ import main
from tools.study.corpora import SAMPLE_RATE, Split, read_demo
from tools.study.encoders import ResizedCNN, draw_captions, epochs
from tools.study.head import Head
from tools.study.jobs import ENSEMBLE, GROUPS, Job, phases
from tools.study.negatives import KINDS, hard_negatives
from tools.study.recipes import BASELINE, EXPERIMENTS, SWEEP, Recipe
from tools.study.store import ESC50, Settings, chosen_rates, name_of
from tools.study.teachers import spearman
from tools.study.tokens import Tokens

SIZES = Sizes().scaled(0.03)


@pytest.fixture(scope="module")
def split() -> Split:
    clips = plan_clips(0, replace(SIZES, audiocaps_test=60))
    return Split(Path(), tuple(clip for clip in clips if clip.name == "audiocaps/test"))


def settings(out: Path) -> Settings:
    return Settings(out, out / "demo", (0, 1), steps=2, encoder_steps=1)


def sequences(lengths: list[int], dim: int = 4) -> TokenSequence:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(*mask.shape, dim, generator=generator)
    return TokenSequence(tokens, mask, torch.randn(len(lengths), dim, generator=generator))


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[\w-]+", text.lower()))


def test_hard_negatives_change_one_fact_in_few_words(split: Split) -> None:
    negatives = hard_negatives(split)
    by_kind = Counter(negatives.kinds)
    assert all(by_kind[kind] > 10 for kind in KINDS)
    for text, kind, source in zip(negatives.texts, negatives.kinds, negatives.sources, strict=True):
        caption = split.captions[source]
        gone, new = words(caption.text) - words(text), words(text) - words(caption.text)
        assert text.lower() != caption.text.lower()
        if kind == "order":
            assert not gone and not new
            assert [k for *_, k in caption.states.relations] == ["before"]
            continue
        assert 1 <= sum(gone.values()) <= 3 and 1 <= sum(new.values()) <= 3
        stated = [getattr(sound, kind) for sound in caption.states.sounds]
        assert any(isinstance(value, int) if kind == "count" else value is not None for value in stated)


def test_further_captions_come_after_the_own_ones_and_are_true(split: Split) -> None:
    more = split.with_more_captions(2)
    assert len(more.captions) == len(split.captions) + 2 * len(split.clips)
    assert all(a.captions == b.captions[: len(a.captions)] for a, b in zip(split.clips, more.clips, strict=True))
    assert np.allclose(more.grades[np.arange(len(more.captions)), more.owner], 1)
    counts = torch.bincount(split.owner) + 1
    clips = torch.arange(len(split.clips)).repeat(50)
    drawn = draw_captions(more.owner, clips, np.random.default_rng(0), counts[clips])
    assert torch.equal(more.owner[drawn], clips)
    place = drawn - torch.searchsorted(more.owner, clips)
    assert place.max() == 5 and place.min() == 0  # five of its own and one more


def test_tokens_keep_what_is_real_and_crop_within_a_sequence() -> None:
    batches = [sequences([3, 1]), sequences([5])]
    tokens = Tokens.of(batches)
    found = tokens.take(torch.tensor([2, 0]))
    assert found.mask.sum(1).tolist() == [5, 3]
    assert torch.allclose(found.tokens[1, :3], batches[0].tokens[0], atol=1e-2)
    assert torch.equal(found.tokens[1, 3:], torch.zeros(2, 4))
    starts = set()
    for _ in range(50):
        crop = tokens.take(torch.tensor([2]), crop=2).tokens[0]
        starts |= {k for k in range(4) if torch.equal(crop, tokens.values[4 + k : 6 + k].float())}
    assert starts == {0, 1, 2, 3}


def test_epochs_visit_every_clip_once_before_any_twice() -> None:
    seen = torch.cat(list(epochs(10, 5, 4, np.random.default_rng(0))))
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_a_resized_clip_has_the_tokens_of_ten_seconds() -> None:
    encoder = ResizedCNN().eval()
    waveform = 0.1 * torch.randn(2, 20 * SAMPLE_RATE)
    both = encoder(waveform, torch.tensor([20 * SAMPLE_RATE, 5 * SAMPLE_RATE]))
    assert both.tokens.shape == (2, 32, encoder.dim) and both.mask.all()
    alone = encoder(waveform[1:, : 5 * SAMPLE_RATE])
    torch.testing.assert_close(both.tokens[1:], alone.tokens, atol=1e-5, rtol=1e-4)


def test_a_student_moves_only_by_the_terms_it_is_given() -> None:
    text, audio, ids = sequences([4] * 6), sequences([5] * 6), torch.arange(6)[:, None]
    nothing = {"nt_xent": {"weight": 0.0}}
    torch.manual_seed(0)
    head = Head(4, 4, Recipe(objective=nothing, teacher="self", distillation=1.0))
    own = head.score(text, audio)
    head(text, audio, ids, 0, (own,)).backward()
    assert max(p.grad.abs().max() for p in head.parameters() if p.grad is not None) < 1e-6
    head(text, audio, ids, 0, (own.T,)).backward()
    assert max(p.grad.abs().max() for p in head.parameters() if p.grad is not None) > 1e-3


def test_peak_memory_is_of_tensors_alive_at_once() -> None:
    x = torch.ones(1024, 1024, requires_grad=True)
    assert peak_mib(lambda: (x * 2).sum().backward()) == pytest.approx(4, abs=0.1)

    def two_at_once() -> None:
        kept = [x * 2, x * 3]
        del kept

    assert peak_mib(two_at_once) == pytest.approx(8, abs=0.1)


def test_rank_correlation_with_ties() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 4000])) == pytest.approx(1)
    # ranks 1.5 1.5 3 4 and 1 2 3 4
    assert spearman(np.array([0.0, 0, 1, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_the_best_learning_rate_of_a_family_counts_once_all_are_there() -> None:
    lines = [
        {"kind": "sweep", "name": name_of("sweep", recipe, 0), "metrics": {"validation/t2a/mAP@10": value}}
        for recipe, value in zip(SWEEP[:5], (0.1, 0.3, 0.2, 0.5, 0.6), strict=True)
    ]
    assert chosen_rates(lines) == {"cosine": SWEEP[1].lr}


def test_recipes_have_different_names_and_dependents_come_last(tmp_path: Path) -> None:
    recipes = [r for e in EXPERIMENTS.values() for r in e.rows.values()]
    assert len({r.key for r in recipes}) == len({json.dumps(vars(r), sort_keys=True) for r in recipes})
    assert sorted(ENSEMBLE + "".join(group for group in GROUPS if group != ESC50)) == sorted(EXPERIMENTS)
    order = [job for phase in phases(settings(tmp_path), ["d", "g"]) for job in phase]
    kinds = [job.recipe is not None and job.recipe.depends for job in order]
    assert order[0] == Job("tokens", None, 0, "all")
    assert kinds.index(True) > max(k for k, job in enumerate(order) if job.recipe == BASELINE)


def test_a_report_replaces_its_own_lines_alone(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\nbefore\n")
    given = settings(tmp_path / "out")
    with pytest.raises(UserError, match="no finished runs"):
        report.write_results(given, results)
    given.out.mkdir()
    line = {"name": name_of("demo", BASELINE, 0), "kind": "demo", "seed": 0, "metrics": {"audiocaps/t2a/R@1": 0.25}}
    given.runs.write_text(json.dumps(line) + "\n" + '{"name": "cut sho')
    report.write_results(given, results)
    results.write_text(results.read_text() + "\nby hand\n")
    report.write_results(given, results)
    text = results.read_text()
    assert text.startswith("# Results\n\nbefore\n\n## Study\n") and text.count("### a) Pooling") == 1
    assert "| meanmax | 25.0 |" in text and "- a) meanmax: 1 of 2 seeds" in text
    assert text.endswith("\n### Reasons\n\nby hand\n")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "z"]) == 2
    assert capsys.readouterr().err.startswith("no experiment 'z'")
    with pytest.raises(UserError, match="no demo corpora"):
        read_demo(tmp_path)


@pytest.mark.slow
def test_a_tiny_study_from_demo_to_report_and_again(tmp_path: Path) -> None:
    demo, out, results = tmp_path / "demo", tmp_path / "out", tmp_path / "RESULTS.md"
    write_demo_corpora(demo, sizes=SIZES, workers=1)
    build_demo_text_encoder(training_captions(demo), demo / "text_encoder", layers=1, dim=32, heads=2)
    call = ["--demo", str(demo), "--out", str(out), "--only", "h", "--seeds", "1", "--steps", "2"]
    call += ["--encoder-steps", "1", "--workers", "1", "--results", str(results)]
    assert main(call) == 0
    done = (out / "runs.jsonl").read_text()
    assert "| meanmax, 5 further captions a clip |" in results.read_text()
    assert main(call) == 0
    assert (out / "runs.jsonl").read_text() == done
    assert main([*call, "--steps", "3"]) == 2  # runs of other settings do not mix
