"""Captions of emoji_scenes, read back."""

import pytest

from jaxgen.data.emoji_scenes import artwork
from jaxgen.data.emoji_scenes.captions import PHRASES
from jaxgen.data.emoji_scenes.said import Said, read
from jaxgen.data.emoji_scenes.scenes import EmojiScenes


@pytest.mark.parametrize("split", ["train", "test_even", "held"])
def test_what_captions_say_is_what_scenes_show(split):
    scenes = EmojiScenes(f"emoji_scenes:{split}")
    silent = 0
    for i in range(1000):
        scene = scenes.scene(i)
        said = read(scene.caption)
        assert set(said.subjects) == set(scene.subjects)
        assert said.style in ("", scene.style)
        assert said.colour in ("", scene.colour)
        told = any(f" {p} " in scene.caption for phrases in PHRASES.values() for p in phrases)
        assert bool(said.relations) == told
        if told:
            first, *others = scene.subjects
            expected = [(first, scene.relations[0], others[0])]
            if others[1:]:
                third = others[1], scene.relations[1]
                expected += [(*third, n) for n in scene.subjects[:2]]
            assert list(said.relations) == expected
        silent += not (said.style and said.colour)
    assert 200 < silent < 350  # each is named in 85 of 100


def test_prompts_in_other_words_say_what_can_be_told():
    apple, owl = (artwork.load().number(name) for name in ("red apple", "owl"))
    assert read("a photo of Paris in the rain") == Said()
    assert read("an orange fish, Flat style").style == "flat"
    assert read("a red apple to the left of an owl") == Said(
        (apple, owl), ((apple, "left of", owl),)
    )
    assert read("two red apples, an owlet").subjects == ()
    assert read("The (Red Apple:1.3) above the (owl:0.8)").relations == ((apple, "above", owl),)
    assert read("an owl left of an owl") == Said((owl,))
    assert read("<5> and <200>") == Said()
