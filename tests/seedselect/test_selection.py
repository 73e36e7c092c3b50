"""A batch of a search: what is left out, and the strip of what is found."""

from types import SimpleNamespace

import numpy as np
import pytest
from tqdm import tqdm

from jaxgen import generate
from jaxgen.seedselect import selection
from jaxgen.seedselect.search import Search
from tests.seedselect import toys


@pytest.fixture
def batch(monkeypatch):
    """batch(seeds, how) -> what is found; latents are their own image."""
    monkeypatch.setattr(generate, "finish", lambda model, params, x, output: np.asarray(x))

    def run(seeds, **how):
        asked = SimpleNamespace(request=SimpleNamespace(count=4, prompts=["a fox", "an owl"]))
        searching = selection._Searching(
            None, toys.PARAMS, asked, Search(**how), None, None, progress=False, frames=True
        )
        inputs = toys.run(seeds, **how)
        rest = toys.program(), [3, 5, 6], tqdm(disable=True)
        return [*searching._batch(toys.PARAMS, inputs, selection.search.begin(seeds).seeds, *rest)]

    return run


def test_a_seed_without_a_finite_loss_is_left_out_and_named(batch, caplog):
    seeds = toys.seeds(3)
    everyone = batch(seeds, iterations=3)
    assert [one.index for one in everyone] == [3, 5, 6]
    bad = seeds.copy()
    bad[1] = np.nan
    found = batch(bad, iterations=3)
    assert [one.index for one in found] == [3, 6]
    assert caplog.messages == [
        "image 1 of 'an owl' is left out: its loss is not finite at the start"
    ]
    for one, other in zip(found, everyone[::2], strict=True):
        np.testing.assert_allclose(one.seed, other.seed, rtol=1e-6)
        assert set(one.history) == {"loss", "meaning", "appearance", "norm"}
        assert one.loss == pytest.approx(min(one.history["loss"]), rel=1e-6)


def test_the_strip_ends_with_the_image_that_is_found(batch):
    """A search that ends between two images of its strip keeps its last one."""
    found = batch(toys.seeds(3), iterations=20, learning_rate=0.0, patience=2)
    for one in found:
        assert (len(one.history["norm"]), len(one.frames)) == (3, 3)
        np.testing.assert_array_equal(one.frames[-1], one.image)
