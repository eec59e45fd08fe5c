"""TensorBoard's pictures and players: queries with the clips retrieved for them and the right clip, each described."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.audio import metadata
from tensorboard.util.tensor_util import make_tensor_proto

from atr_scale.evaluation.evaluate import Evaluation
from atr_scale.evaluation.example_tables import table_cell
from atr_scale.evaluation.examples import Example
from atr_scale.evaluation.sounds import Sounds
from atr_scale.redaction import redact

TITLE_PART = 80  # characters of a caption in the title of a player
PLAYED_CLIPS = 3  # of each query, besides the right one


def picture(tag: str, figure: Figure) -> Summary:
    """A figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    width, height = figure.canvas.get_width_height()
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])


@dataclass(frozen=True)
class Player:
    """A clip that was retrieved at `rank`, or the right one. sound: makes an MP3 file."""

    clip_id: str
    rank: int
    score: float
    hit: bool
    sound: Callable[[], bytes]

    @property
    def place(self) -> str:
        return f"rank {self.rank}, {'right' if self.hit else 'wrong'}"


@dataclass(frozen=True)
class RetrievedClips:
    """A caption and the clips retrieved for it, best first; the right clip comes last if it is not among them.

    rank: retrieval rank of the right clip.
    """

    query: str
    rank: int
    clips: Sequence[Player]

    def table(self) -> str:
        """Markdown."""
        rows = [
            f"| {clip.rank} | {'✓' if clip.hit else ''} | {table_cell(clip.clip_id)} | {clip.score:.3f} |"
            for clip in self.clips
        ]
        head = f"**{table_cell(self.query)}** (right clip at rank {self.rank})\n\n"
        return head + "| rank | hit | clip | score |\n|-|-|-|-|\n" + "\n".join(rows)

    def players(self, tag: str) -> Summary:
        """One player for each clip, with the tags TAG/1, TAG/2, ...; the right clip that was missed has TAG/right.

        TensorBoard keeps the first description of a tag: a tag must not be used twice.
        """
        return Summary(value=self._players(tag))

    def _players(self, tag: str) -> Iterator[Summary.Value]:
        for number, clip in enumerate(self.clips, start=1):
            sound = clip.sound()
            if not sound:
                continue
            missed = clip.rank > number
            told = redact(
                f"**Query:** {_whole(self.query)}\n\n**Clip:** {_whole(clip.clip_id)}\n\n"
                f"**Rank {clip.rank}** ({'the right clip' + (', missed' if missed else '') if clip.hit else 'wrong'}), "
                f"score {clip.score:.3f}"
            )
            # TensorBoard has no name for MP3; the browser finds out what the bytes are.
            about = metadata.create_summary_metadata(
                display_name=redact(f"{clip.place} | query: {_short(self.query)} | clip: {_short(clip.clip_id)}"),
                description=told,
                encoding=metadata.Encoding.Value("UNKNOWN"),
            )
            place = "right" if missed else number
            yield Summary.Value(tag=f"{tag}/{place}", metadata=about, tensor=make_tensor_proto([sound]))


def _whole(text: str) -> str:
    return table_cell(text, len(text))


def _short(text: str) -> str:
    return textwrap.shorten(text, TITLE_PART, placeholder="…")


def retrieved_clips(evaluation: Evaluation, sounds: Sounds) -> list[RetrievedClips]:
    """The text queries of the first result's examples, with the audio of the clips retrieved for them."""
    return [_of_example(each, sounds) for each in evaluation.results[0].examples if each.direction == "t2a"]


def _of_example(example: Example, sounds: Sounds) -> RetrievedClips:
    shown = list(enumerate(example.retrieved[:PLAYED_CLIPS], start=1))
    if example.match and example.rank > PLAYED_CLIPS:
        shown.append((example.rank, example.match))
    players = [Player(item.name, rank, item.score, item.hit, partial(sounds.mp3, item.index)) for rank, item in shown]
    return RetrievedClips(example.query, example.rank, players)
