"""What does not fit a search, said before anything compiles."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import inversion, samplers
from jaxgen.plan import Plan
from jaxgen.seedselect import starts
from jaxgen.seedselect.judges import Judge
from jaxgen.seedselect.objective import Score
from jaxgen.seedselect.references import References
from jaxgen.seedselect.search import Search
from jaxgen.seedselect.starts import Start
from jaxgen.types import UserError


def check(
    checked: Plan,
    pictures: Sequence[Sequence[Any] | References],
    how: Search,
    judge: Judge | None,
    score: Score | None,
    start: Start,
) -> None:
    """UserError for what does not fit; as `select` is called."""
    request, steps, sampler = checked.request, checked.grid.length, checked.schedule.sampler
    if not checked.from_noise or (checked.mask.size and not checked.inpaints):
        raise UserError("seeds are what a run starts from: this one starts from an image")
    if samplers.SAMPLERS[sampler].stochastic or request.eta:
        raise UserError(
            f"{sampler} adds noise of its own at each step, and a seed is only the first; choose "
            "ddim, dpmpp, euler, pndm or edict, and eta 0"
        )
    if len(pictures) != len(request.prompts):
        raise UserError(
            f"{len(request.prompts)} prompts have {len(pictures)} lists of references; each needs "
            "its own"
        )
    inverts = isinstance(start, str) and start == "nao"
    unread = score is not None and how.weight == 1 and not inverts
    for rows in pictures:
        _check_references(checked, rows)
    known = all(len(r.latents if isinstance(r, References) else r) for r in pictures)
    if not (known or unread):
        raise UserError(
            "a prompt has no references; one is needed, 3 to 5 are better, and none alone where a "
            "score has all the weight (1)"
        )
    if (judge is None) == (score is None):
        raise UserError("images are judged by a judge or by a score: give one of them")
    if how.contrast and (score is not None or len(pictures) < 2):
        raise UserError("contrast needs a judge and other classes to tell from")
    if score is not None:
        for leaf in jax.tree.leaves(score.rows):
            if np.shape(leaf)[:1] != (checked.total,):
                raise UserError(
                    f"a leaf of the score's rows is {list(np.shape(leaf))}, and there are "
                    f"{checked.total} images (prompts x count)"
                )
        _check_score(checked, score)
    if how.truncate > steps:
        raise UserError(f"truncate = {how.truncate} is more than the {steps} steps; 0 is all")
    if how.truncate and sampler == "edict":
        raise UserError("edict needs no truncate: its memory does not grow with the steps")
    _check_start(checked, start)


def _check_references(checked: Plan, rows: Sequence[Any] | References) -> None:
    if isinstance(rows, References):
        shape = rows.latents.shape[1:]
        if len(rows.latents) and shape != checked.latent_shape:
            raise UserError(
                f"references are encoded as {list(shape)}, and the images' latents are "
                f"{list(checked.latent_shape)}"
            )
        return
    for picture in rows:
        right = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        if not right or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError("a reference is no picture, numpy uint8 [H, W, 3]")


def _check_score(checked: Plan, score: Score) -> None:
    """Traced for two images, since a sum over them or a whole number would go on without a word."""
    shape = lambda *sides, like=np.float32: jax.ShapeDtypeStruct(sides, like)  # noqa: E731
    rows = jax.tree.map(lambda x: shape(2, *np.shape(x)[1:], like=x.dtype), score.rows)
    width, height = checked.size
    given = jax.eval_shape(score.apply, score.params, rows, shape(2, height, width, 3))
    leaves = jax.tree.leaves(given)
    right = leaves == [given] and given.shape == (2,)
    if not right or not jnp.issubdtype(given.dtype, jnp.floating):
        found = ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in leaves) or "nothing"
        raise UserError(
            f"a score gives {found} for 2 images, and must give a float for each, [2]; the mean of "
            "each, for example, is images.mean((1, 2, 3))"
        )


def _check_start(checked: Plan, start: Start) -> None:
    if isinstance(start, str):
        if start not in ("gaussian", "nao"):
            raise UserError(f"start {start!r} is not gaussian, nao, or noise")
        if start == "nao":  # which networks and grids cannot be inverted
            inversion.backwards(checked.schedule, starts.STEPS)
    elif hasattr(start, "shape"):
        noise = np.asarray(start)
        wanted = [[n, *checked.latent_shape] for n in (1, checked.total)]
        if noise.dtype != np.float32 or list(noise.shape) not in wanted:
            raise UserError(
                f"start is {noise.dtype} {list(noise.shape)}, and must be float32 {wanted[1]}, or "
                "one for all"
            )
    elif not callable(start):
        raise UserError(f"start is a {type(start).__name__}, not a name, noise or a function")
