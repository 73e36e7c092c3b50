"""The sentences of emoji_scenes: true of their scenes, and silent on some of what they show."""

from collections.abc import Sequence

import numpy as np

from jaxgen.data.emoji_scenes.artwork import Subject

NAMED = 0.85  # how often a caption says the style, and how often the background
RELATED = 0.85  # and where one subject lies from the other
SIZED = 0.5  # and that a small or large subject is
PLAIN, PATTERNED = 0.25, 0.75  # and that a background is plain, or how it is not
PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
THEM = {"left of": "to their left", "right of": "to their right"}


def noun(subject: Subject, size: str = "") -> str:
    """ "an owl", "a large owl", "small grapes"."""
    if not size:
        return subject.article + subject.name
    return f"{subject.article and 'a '}{size} {subject.name}"


def things(subjects: Sequence[Subject]) -> str:
    """ "an owl", "an owl, a car and grapes"."""
    return _listed([noun(subject) for subject in subjects])


def background(colour: str, pattern: str = "") -> str:
    """ "an orange background", "a blue striped background"."""
    article = "an" if colour[0] in "aeio" and pattern != "plain" else "a"
    words = ["plain", colour] if pattern == "plain" else [colour, pattern]
    return " ".join([article, *(word for word in words if word), "background"])


def caption(
    subjects: Sequence[Subject],
    sizes: Sequence[str],
    relations: Sequence[str],
    style: str,
    colour: str,
    pattern: str,
    rng: np.random.Generator,
) -> str:
    """Says what a scene shows, such as "an owl above a car, flat style, on a blue background".

    Args:
        subjects: one to three.
        sizes: of each: small, medium or large; medium is never said.
        relations: where the first one lies from the second, and the third one from both.
    """
    chance = rng.random(6 + len(subjects))
    said = [size if size != "medium" and c < SIZED else "" for size, c in zip(sizes, chance[6:])]
    nouns = [noun(subject, size) for subject, size in zip(subjects, said)]
    shown = _arranged(nouns, relations, chance[0] < RELATED, rng)
    where = ""
    if chance[1] < NAMED:
        kind = pattern if chance[2] < (PLAIN if pattern == "plain" else PATTERNED) else ""
        where = f"on {background(colour, kind)}"
    if chance[3] >= NAMED:
        return f"{shown} {where}".strip()
    if chance[4] < 0.6:
        return ", ".join(part for part in (shown, f"{style} style", where) if part)
    if chance[5] < 0.5:
        return f"a {style} picture of {shown} {where}".strip()
    return f"{shown} {where}".strip() + f", {style} style"


def _listed(nouns: Sequence[str]) -> str:
    *others, last = nouns
    return f"{', '.join(others)} and {last}" if others else last


def _arranged(
    nouns: list[str], relations: Sequence[str], related: bool, rng: np.random.Generator
) -> str:
    """The subjects, and where they lie from each other if that is to be said."""
    if len(nouns) == 1:
        return nouns[0]
    if not related:
        return _listed(nouns)
    pair = f"{nouns[0]} {rng.choice(PHRASES[relations[0]])} {nouns[1]}"
    if len(nouns) == 2:
        return pair
    return f"{pair}, and {nouns[2]} {THEM.get(relations[1]) or relations[1] + ' them'}"
