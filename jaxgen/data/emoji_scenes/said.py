"""What a caption of emoji_scenes says, read back from its words."""

import re
from dataclasses import dataclass
from functools import lru_cache

from jaxgen.data.emoji_scenes import artwork, backgrounds
from jaxgen.data.emoji_scenes.captions import PHRASES

_WORDS = {phrase: word for word, phrases in PHRASES.items() for phrase in phrases}
_RELATION = re.compile(rf"<(\d+)> ({'|'.join(_WORDS)}) (?:an? |the )?(?:small |large )?(?=<(\d+)>)")
_THIRD = re.compile(r"<(\d+)> (?:to their (left|right)|(above|below) them)")
_COLOUR = re.compile(rf"on an? (?:plain )?({'|'.join(backgrounds.COLOURS)})(?: \w+)? background")
_WEIGHED = re.compile(r"\(([^():]*):[\d.]+\)")  # as prompts weigh words
_STYLE = re.compile(rf"\b({'|'.join(artwork.STYLES)}) (?:style|picture)\b".lower())


@dataclass(frozen=True)
class Said:
    """What a caption says; what it leaves open is empty.

    Attributes:
        subjects: their numbers, in the order of the words.
        relations: (number, "left of" and so on, number).
        style: of `artwork.STYLES`.
        colour: of the background, of `backgrounds.COLOURS`.
    """

    subjects: tuple[int, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    style: str = ""
    colour: str = ""


def read(caption: str) -> Said:
    """Reads a caption, or a prompt in its words; others say little or nothing."""
    caption = _WEIGHED.sub(r"\1", caption).replace("<", " ").replace("(", " ").lower()
    style, colour = _STYLE.search(caption), _COLOUR.search(caption)
    for found in (style, colour):
        caption = caption.replace(found[0], "") if found else caption
    text = _names().sub(lambda name: f"<{artwork.load().number(name[0])}>", caption)
    subjects = tuple(dict.fromkeys(int(number) for number in re.findall(r"<(\d+)>", text)))
    relations = [(int(a), _WORDS[how], int(b)) for a, how, b in _RELATION.findall(text) if a != b]
    for number, beside, over in _THIRD.findall(text):
        how = f"{beside} of" if beside else over
        relations += [(int(number), how, other) for other in subjects if other != int(number)]
    styles = {name.lower(): name for name in artwork.STYLES}
    return Said(
        subjects,
        tuple(relations),
        styles[style[1].lower()] if style else "",
        colour[1] if colour else "",
    )


@lru_cache(maxsize=1)
def _names() -> re.Pattern[str]:
    names = sorted((subject.name for subject in artwork.load().subjects), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
