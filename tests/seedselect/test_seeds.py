"""Seeds on disk: which of a folder a search goes on from."""

import logging

import numpy as np
import pytest

from jaxgen.data import latents
from jaxgen.seedselect import seeds
from jaxgen.types import UserError

SETTINGS = {**dict.fromkeys(latents.TEXTS, "some"), "steps": 20, "guidance": 7.5}
SHAPE = (4, 3, 2)


@pytest.fixture
def folder(tmp_path):
    """Four seeds, all of one number, for two prompts and under two samplers."""
    for i, about in enumerate(
        ({"prompt": "an owl"}, {"prompt": "a fox"}, {}, {"prompt": "an owl", "sampler": "other"})
    ):
        noise = np.full((1, *SHAPE), i, np.float32)
        seeds.write(tmp_path / f"{i:05}.npz", noise, SETTINGS | about)
    return tmp_path


def test_seeds_of_a_folder_are_those_of_the_prompt(folder, caplog):
    with caplog.at_level(logging.WARNING, "jaxgen"):
        found = seeds.read(folder, SHAPE, SETTINGS, "an owl")
    np.testing.assert_array_equal(found[:, 0, 0, 0], [0])
    assert len(caplog.messages) == 1
    assert f"3 of 4 seeds in {folder} are left out" in caplog.text
    assert "00001.npz was found for 'a fox' (here 'an owl')" in caplog.text
    np.testing.assert_array_equal(seeds.read(folder, SHAPE, SETTINGS)[:, 0, 0, 0], [0, 1, 2])


def test_a_file_of_seeds_may_be_of_another_prompt(folder):
    assert seeds.read(folder / "00001.npz", SHAPE, SETTINGS, "an owl").max() == 1


def test_a_folder_without_seeds_of_the_prompt_is_refused(folder):
    with pytest.raises(UserError) as found:
        seeds.read(folder, SHAPE, SETTINGS, "a cat")
    said = str(found.value)
    assert f"none of the seeds in {folder} fits" in said
    assert "was found for 'an owl' (here 'a cat')" in said
    assert "\n" not in said
