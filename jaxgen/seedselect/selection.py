"""From references to seeds: what `jaxgen seedselect` does, for callers of the library."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgen import conditioning, generate, sharding
from jaxgen.data import images
from jaxgen.denoiser import Model
from jaxgen.diffusion import inversion, samplers
from jaxgen.request import Plan
from jaxgen.seedselect import references, search, starts
from jaxgen.seedselect.judges import Judge, meaning_by
from jaxgen.seedselect.objective import (
    ClipDistance,
    Given,
    Look,
    Objective,
    Score,
    Targets,
    Weights,
)
from jaxgen.seedselect.references import References
from jaxgen.seedselect.search import Program, Rule, Run, Search
from jaxgen.types import Array, Params, UserError

Start = str | np.ndarray | Callable[[int], np.ndarray]
FRAMES = 8  # at most, of the image as it improves


class Found(NamedTuple):
    """A seed that was found."""

    index: int  # type: ignore[assignment]  # of the plan, prompt-major
    seed: np.ndarray  # float32 [h, w, C] standard normal noise
    image: np.ndarray  # uint8 [H, W, 3] that it leads to
    loss: float
    meaning: float  # of the loss, the distance that `weight` weighs, or the score
    appearance: float  # and the one that the rest weighs
    norm: float  # of the seed, over sqrt(d), which is about what noise has
    history: dict[str, list[float]]  # the four at each iteration, until the seed was left alone
    frames: list[np.ndarray]  # uint8 [H, W, 3] the best image at iterations ever further apart

    def figures(self) -> dict[str, float]:
        """The four, as lists of pictures say them."""
        return {name: round(getattr(self, name), 6) for name in Look._fields}


class NothingFound(UserError):
    """No seed has a finite loss where it starts."""


def select(
    model: Model,
    params: Params,
    checked: Plan,
    pictures: Sequence[Sequence[np.ndarray] | References],
    how: Search = Search(),  # noqa: B008  a frozen value
    *,
    judge: Judge | None = None,
    score: Score | None = None,
    start: Start = "gaussian",
    only: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    frames: bool = False,
) -> Iterator[Found]:
    """Looks for seeds whose images resemble references in meaning and appearance.

    SeedSelect (Samuel et al. 2024): the model stays as it is, the noise it starts from learns, by
    the gradient through all of the sampler. Seeds of one batch are improved side by side. A seed
    leads to its image again wherever it is sampled under the same settings; that another search
    finds the same one is not said, since rounding differs from batch to batch and grows.

    Args:
        model, params: from `jaxgen.load`.
        checked: of `request.plan`: prompts are classes, `count` is seeds of each.
        pictures: for each prompt its references, uint8 [H, W, 3] of any sizes (one is allowed), or
            what `encode` made of them; none where a score has all the weight.
        how: the numbers of the search.
        judge: tells what images mean; needed unless there is a score.
        score: takes the place of the distance in meaning, and of it alone: `how.weight` says what
            the appearance still counts.
        start: "gaussian", each seed's own noise; "nao", between what the references invert to;
            standard normal noise [N, h, w, C], N = 1 or prompts x count; or a function of an
            image's index that returns noise [h, w, C].
        only: indices of the images to find, prompt-major; all by default.
        mesh: devices over which a batch is spread; all of them by default.
        progress: shows a bar with the loss.
        frames: keeps the image of each seed as it improves.

    Returns:
        Each seed, as its batch ends. One whose loss is not finite at the start is left out, and
        that is said.

    Raises:
        UserError: before anything compiles, for what does not fit.
        NothingFound: at the end, where all were left out.
    """
    check(checked, pictures, how, judge, score, start)
    meaning = score or meaning_by(judge, how)
    mesh = mesh or generate.mesh_for(checked)
    wanted = list(range(checked.total)) if only is None else sorted(only)
    searching = _Searching(model, params, checked, how, meaning, mesh, progress, frames)
    return searching.run(pictures, start, wanted)


@dataclass(frozen=True)
class _Searching:
    """What all batches of a search share."""

    model: Model
    params: Params
    checked: Plan
    how: Search
    meaning: Score
    mesh: Mesh
    progress: bool
    frames: bool

    def run(
        self, pictures: Sequence[Sequence[np.ndarray] | References], start: Start, wanted: list[int]
    ) -> Iterator[Found]:
        """The wanted seeds, batch by batch."""
        model, checked, mesh = self.model, self.checked, self.mesh
        params, scoring = (sharding.replicate(t, mesh) for t in (self.params, self.meaning.params))
        known = [
            rows
            if isinstance(rows, References)
            else references.encode(model, self.params, rows, checked.size, self.meaning)
            for rows in pictures
        ]
        start_of = _starts(model, params, checked, known, start, mesh)
        targets_of = _targets(checked, known, self.meaning, self.how)
        program = _program(model, checked, self.meaning, self.how)
        encoded = sharding.replicate(conditioning.encode_pictures(model, params, checked), mesh)
        points = sharding.replicate(checked.grid.points, mesh)

        batch = checked.request.batch or mesh.size
        batch = -(-min(batch, checked.total) // mesh.size) * mesh.size  # of one size: one program
        groups = list(generate.batches(checked, batch, wanted))
        total, count = len(groups) * self.how.iterations, 0
        with tqdm(total=total, unit="iteration", disable=not self.progress) as bar:
            for indices in groups:
                full = generate.filled(indices, batch)
                seeds, _ = generate.starting_noise(checked, full, mesh)
                if start_of is not None:
                    seeds = sharding.split_batch(np.stack([start_of(i) for i in full]), mesh)
                targets = sharding.split_batch(targets_of(full), mesh)
                guidance, inputs = conditioning.condition(
                    model, params, checked, encoded, full, mesh
                )
                cache = generate.prepare(params, inputs, network=program.network)
                weights, rule = Weights(self.how.weight, self.how.prior), Rule.of(self.how)
                given = Given(scoring, *targets)
                run = Run(cache, points, checked.grid.initial, guidance, weights, given, rule)
                for found in self._batch(params, run, seeds, program, indices, bar):
                    count += 1
                    yield found
        if wanted and not count:
            half = any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(params["unet"]))
            more = "; try dtype f32" * half
            raise NothingFound(f"no loss is finite at the start of a seed{more}")

    def _batch(
        self,
        params: Params,
        run: Run,
        seeds: Array,
        program: Program,
        indices: list[int],
        bar: tqdm,
    ) -> Iterator[Found]:
        """One batch; the bar shows the means of the best losses, and of what they are made of."""

        def show(state: search.Progress) -> np.ndarray:
            kept = jnp.isfinite(state.look.loss)[:, None, None, None]
            latents = jnp.where(kept, state.latents, 0)  # what is left out need not be an image
            return generate.finish(self.model, params, latents, "uint8")

        state, iterations = search.begin(seeds), self.how.iterations
        looks: list[np.ndarray] = []  # [4, B] each
        alive: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        shown = _shown(iterations) if self.frames else set()
        for i in range(iterations):
            alive.append(np.asarray(state.active))
            after = search.improve(params, run, state, i + 1, program=program)
            state = sharding.place_like(after, state)
            looks.append(np.stack(state.seen))
            look = jax.tree.map(np.asarray, state.look)
            done = not np.asarray(state.active).any()
            if i in shown or (shown and done):  # the strip ends with the image that is found
                frames.append(show(state))
            bar.set_postfix(_means(look, len(indices)), refresh=False)
            bar.update(iterations - i if done else 1)
            if done:
                break
        best, pictures = np.asarray(state.best), show(state)
        for row, index in enumerate(indices):
            if not np.isfinite(look.loss[row]):
                images.warn_once(f"image {index} is left out: its loss is not finite at the start")
                continue
            seen = np.stack([at[:, row] for at, on in zip(looks, alive, strict=True) if on[row]])
            history = dict(zip(Look._fields, seen.T.tolist(), strict=True))
            loss, meaning, appearance, norm = (float(part[row]) for part in look)
            strip = [frame[row] for frame in frames]
            found = best[row], pictures[row], loss, meaning, appearance, norm
            yield Found(index, *found, history, strip)


def _means(look: Look, count: int) -> dict[str, str]:
    """Of the first so many seeds, those whose loss is finite; for a progress bar."""
    rows = np.flatnonzero(np.isfinite(look.loss[:count]))
    parts = {"loss": look.loss, "meaning": look.meaning, "appearance": look.appearance}
    return {name: f"{part[rows].mean():.4f}" for name, part in parts.items() if rows.size}


def _shown(iterations: int) -> set[int]:
    """The iterations after which the best image is kept: the first, the last, few between."""
    return {round(i) - 1 for i in np.geomspace(1, iterations, min(FRAMES, iterations))}


def _program(model: Model, checked: Plan, meaning: Score, how: Search) -> Program:
    """What is compiled; with `remat`, networks that keep nothing inside their blocks."""
    network, vae, apply = model.network, model.vae, meaning.apply
    if how.remat:
        controls = tuple(replace(net, remat=True) for net in network.controls)
        network = replace(network, unet=replace(network.unet, remat=True), controls=controls)
        vae = replace(vae, remat=True)
        if isinstance(apply, ClipDistance):
            apply = replace(apply, vision=replace(apply.vision, remat=True))
    objective = Objective(apply, how.distance, how.tail_of(checked.grid.length))
    return Program(network, vae, checked.schedule.sampler, objective, how.truncate)


def _targets(
    checked: Plan, known: list[References], meaning: Score, how: Search
) -> Callable[[list[int]], tuple[Any, Array]]:
    """A function of indices: what those seeds are compared with, for the score and in latents.

    Each seed has centroids of its own, where they are made of a subset of the references.
    """
    count, seed, apply = checked.request.count, checked.request.seed, meaning.apply
    centroids: list[Array] = []
    if isinstance(apply, ClipDistance) and apply.contrast:
        centroids = [apply.centroid(rows.embeddings) for rows in known]

    def of(index: int) -> tuple[Any, Array]:
        mine, number = divmod(index, count)
        chosen = references.subset(len(known[mine].latents), how.subset, seed, number)
        appearance = jnp.zeros(checked.latent_shape)  # without references, and without weight
        if len(chosen):
            appearance = known[mine].latents[chosen].mean(0)
        if not isinstance(apply, ClipDistance):
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], meaning.rows), appearance
        own = apply.centroid(known[mine].embeddings[chosen])
        others = [row for i, row in enumerate(centroids) if i != mine]
        return Targets(own, jnp.stack(others) if others else own[None][:0]), appearance

    return lambda indices: jax.tree.map(lambda *rows: jnp.stack(rows), *map(of, indices))


def _starts(
    model: Model, params: Params, checked: Plan, known: list[References], start: Start, mesh: Mesh
) -> Callable[[int], np.ndarray] | None:
    """Where the image of each index starts [h, w, C]; None for its own noise."""
    if isinstance(start, np.ndarray):
        return lambda index: start[index % len(start)]
    if not isinstance(start, str):
        return start
    if start == "gaussian":
        return None

    @functools.cache
    def between_references(prompt: int) -> Callable[[int], np.ndarray]:
        latents = known[prompt].latents
        seeds = starts.inverted(model, params, checked, prompt, latents, mesh)
        return starts.norm_aware(seeds, checked.request.seed)

    count = checked.request.count
    return lambda index: between_references(index // count)(index % count)


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
            if len(leaf) != checked.total:
                raise UserError(
                    f"a leaf of the score's rows has {len(leaf)}, and there are {checked.total} "
                    "images (prompts x count)"
                )
    if how.truncate > steps:
        raise UserError(f"truncate = {how.truncate} is more than the {steps} steps; 0 is all")
    if how.truncate and sampler == "edict":
        raise UserError("edict needs no truncate: its memory does not grow with the steps")
    _check_start(checked, start)


def _check_start(checked: Plan, start: Start) -> None:
    if isinstance(start, str):
        if start not in ("gaussian", "nao"):
            raise UserError(f"start {start!r} is not gaussian, nao, or noise")
        if start == "nao":  # which networks and grids cannot be inverted
            inversion.backwards(checked.schedule, starts.STEPS)
    elif isinstance(start, np.ndarray) and (
        start.dtype != np.float32
        or start.shape[1:] != checked.latent_shape
        or len(start) not in (1, checked.total)
    ):
        raise UserError(
            f"start is {start.dtype} {list(start.shape)}, and must be float32 "
            f"{[checked.total, *checked.latent_shape]}, or one for all"
        )
