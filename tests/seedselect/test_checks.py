"""What a search refuses in one line, before anything compiles."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen import seedselect
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.types import UserError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
PICTURE = np.zeros((32, 32, 3), np.uint8)


def bright(params, rows, images):
    return -images.mean((1, 2, 3))


def refused(score=bright, rows=(), pictures=((), ()), how=None, **request):
    model, params = jaxgen.load(TINY)
    asked = Request(prompts=["a fox", "an owl"], **{"sampler": "ddim", "steps": 3} | request)
    how = how or seedselect.Search(weight=1.0)
    score = seedselect.Score(score, rows=rows)
    with pytest.raises(UserError) as error:
        next(seedselect.select(model, params, plan(model, asked), pictures, how, score=score))
    message = str(error.value)
    assert "\n" not in message
    return message


SCORES = {
    "float32 []": lambda params, rows, images: images.mean(),
    "float32 [1]": lambda params, rows, images: images.mean()[None],
    "float32 [2, 1]": lambda params, rows, images: images.mean((1, 2, 3))[:, None],
    "int32 [2]": lambda params, rows, images: (images > 0).sum((1, 2, 3)),
    "float32 [2], float32 [2]": lambda *given: (bright(*given), bright(*given)),
    "nothing": lambda params, rows, images: None,
}


@pytest.mark.parametrize("found", SCORES)
def test_a_score_gives_a_float_for_each_image(found):
    assert f"a score gives {found} for 2 images" in refused(SCORES[found])


def test_what_does_not_fit_is_named():
    assert "euler_a adds noise of its own" in refused(sampler="euler_a")
    assert "ddim adds noise of its own" in refused(eta=0.5)
    assert "starts from an image" in refused(image=PICTURE)
    rows = jnp.zeros((3, 4))
    assert "rows is [3, 4], and there are 2 images" in refused(rows=rows)
    assert "2 prompts have 1 lists" in refused(pictures=((),))
    assert "has no references" in refused(how=seedselect.Search(weight=0.5))
    assert "contrast needs a judge" in refused(how=seedselect.Search(weight=1.0, contrast=0.1))
    cut = seedselect.Search(weight=1.0, truncate=4)
    assert "truncate = 4 is more than the 3 steps" in refused(how=cut)
    assert "edict needs no truncate" in refused(how=cut, sampler="edict", steps=4)
