"""From references to seeds: what `jaxgen seedselect` does, for callers of the library."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgen import conditioning, generate, sharding
from jaxgen.denoiser import Model
from jaxgen.plan import Plan
from jaxgen.seedselect import checks, references, search, starts
from jaxgen.seedselect.judges import Judge, meaning_by
from jaxgen.seedselect.objective import ClipDistance, Given, Look, Objective, Score, Weights
from jaxgen.seedselect.references import References
from jaxgen.seedselect.search import Program, Rule, Run, Search
from jaxgen.seedselect.starts import Start
from jaxgen.types import Array, Params, UserError

log = logging.getLogger(__name__)
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
        checked: of `plan.plan`: prompts are classes, `count` is seeds of each.
        pictures: for each prompt its references, uint8 [H, W, 3] of any sizes (one is allowed), or
            what `encode` made of them; none where a score has all the weight.
        how: the numbers of the search.
        judge: tells what images mean; needed unless there is a score.
        score: takes the place of the distance in meaning, and of it alone: `how.weight` says what
            the appearance still counts.
        start: "gaussian", each seed's own noise; "nao", near what the references invert to;
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
    checks.check(checked, pictures, how, judge, score, start)
    if hasattr(start, "shape"):
        start = np.asarray(start)
    meaning = score or meaning_by(judge, how)
    mesh = mesh or generate.mesh_for(checked)
    wanted = list(range(checked.total)) if only is None else sorted(only)
    if wanted and not 0 <= wanted[0] <= wanted[-1] < checked.total:
        raise UserError(f"only = {wanted} are not indices of {checked.total} images")
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
        latents = [rows.latents for rows in known]
        start_of = starts.of(start, model, params, checked, latents, self.how.variety, mesh)
        targets_of = references.targets(checked, known, self.meaning, self.how)
        program = _program(model, checked, self.meaning, self.how)
        encoded = sharding.replicate(conditioning.encode_pictures(model, params, checked), mesh)
        points = sharding.replicate(checked.grid.points, mesh)

        batch = generate.batch_of(checked, mesh.size, each=1)  # of one size: one program
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
        best, pictures = np.asarray(state.best), frames[-1] if frames else show(state)
        for row, index in enumerate(indices):
            if not np.isfinite(look.loss[row]):
                prompt, number = divmod(index, self.checked.request.count)
                log.warning(
                    "image %d of %r is left out: its loss is not finite at the start",
                    number, self.checked.request.prompts[prompt],
                )  # fmt: skip
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
