"""`jaxgen data`: what jaxgen can draw itself, as a folder of pictures."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxgen.save import check_new
from jaxgen.types import UserError


@dataclass(frozen=True)
class Data:
    """Write data that jaxgen makes itself as an image folder: look at it, or train on it.

    jaxgen data emoji_scenes --out scenes --count 1000

    jaxgen train configs/mini.py --data.source scenes

    jaxgen data emoji_scenes --subject owl --count 5 --out owls     # for jaxgen seedselect

    Beside the pictures and metadata.jsonl, with captions, boxes and their phrases, it holds PNG
    files of masks, segmentations, edges and line art. The embedded model's ControlNet `edges`
    follows the line art, in `lines`; edges show what lies in the background, too. `--data.source
    emoji_scenes` or `emoji_scenes:test` trains on the same scenes without writing any.
    """

    name: Positional[str]
    """emoji_scenes: one to three real emoji on coloured backgrounds, 64x64 pixels."""
    out: Path
    """A new or empty folder for the pictures."""
    split: str | None = None
    """train (the default), validation or test; with _even behind the last two, rare subjects are as
    frequent; or held."""
    count: int = 1000
    """Scenes to write: the first of the split."""
    seed: int = 0
    """Another one gives other scenes."""
    subject: str | None = None
    """Views of this subject alone, in any style, size and turn, instead of scenes of a split."""

    def run(self) -> None:
        """All of it or nothing."""
        from jaxgen.data.emoji_scenes import scenes as emoji_scenes
        from jaxgen.data.emoji_scenes.views import SubjectViews
        from jaxgen.data.examples import Source
        from jaxgen.data.export import export

        if self.name != emoji_scenes.NAME:
            raise UserError(f"no data {self.name[:80]!r}; there is {emoji_scenes.NAME}")
        if self.subject is not None and self.split is not None:
            raise UserError(
                f"--split {self.split[:40]} is of scenes; --subject has none, leave one"
            )
        check_new(self.out)
        ref = f"{self.name}:{self.split or 'train'}"
        if self.subject is not None:
            source: Source = SubjectViews(self.subject, self.seed)
        else:
            source = emoji_scenes.EmojiScenes(ref, columns=emoji_scenes.PICTURES, seed=self.seed)
        export(source, self.out, self.count)
        what = "scene" if self.subject is None else "view"
        made = f"1 {what} is" if self.count == 1 else f"{self.count} {what}s are"
        print(f"{made} in {self.out}; to train on them: --data.source {self.out}")
