"""The search itself: seeds improved by the gradient of an objective through the whole sampler."""

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen import denoiser
from jaxgen.conditioning import Guidance
from jaxgen.denoiser import Network
from jaxgen.diffusion import edict, samplers
from jaxgen.diffusion import guidance as guidances
from jaxgen.models.vae import VAE
from jaxgen.seedselect.objective import TAIL, Distance, Given, Look, Objective, Weights
from jaxgen.types import Array, Cache, Denoiser, Params, Point, UserError

# What runs first is what frees most: at the size of SD 1.5, less than half of the memory.
LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
LEAST_GAIN = 1e-3  # of the best loss: less is no improvement to go on for


@dataclass(frozen=True, kw_only=True)
class Search:
    """How seeds are looked for; the numbers are those of the released SeedSelect, where it has any.

    Attributes:
        iterations: images that are looked at for each seed, each but the last with an update.
        weight: lambda: what the meaning counts; the appearance counts the rest.
        distance: "cosine" as in the released code, or "euclidean" as in the paper, over the root of
            the number of dimensions, which keeps `weight` and `contrast` at a fit size.
        contrast: of meaning: weight of telling the class from the others of a search.
        prior: weight of the log density of a seed's norm, which keeps it on the Gaussian shell.
        tail: weights of the images decoded after the last steps; they are made to sum to 1.
        learning_rate: of AdamW, in standard deviations of the noise.
        settle: iteration from which the rate is a tenth.
        patience: iterations in a row after which a seed is left alone, unless its loss has fallen
            by a thousandth in them.
        target: loss at which a seed is good enough.
        variety: of new noise in a start near known seeds, the sine of the angle that it is turned
            by; at 1 it is all new.
        subset: references of which each seed's centroids are made, drawn for it; 0 is all.
        truncate: steps through which the gradient passes, the last ones; 0 is all.
        remat: whether each block of a network is computed again for the gradient: less memory, and
            a third more work.
    """

    iterations: int = 30
    weight: float = 10 / 11
    distance: Distance = "cosine"
    contrast: float = 0.0
    prior: float = 0.0
    tail: tuple[float, ...] = TAIL
    learning_rate: float = 0.1
    settle: int = 3
    patience: int = 10
    target: float | None = None
    variety: float = 0.3
    subset: int = 0
    truncate: int = 0
    remat: bool = False

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("patience", 1), ("settle", 0), ("subset", 0)):
            self._check(name, low, math.inf, whole=True)
        self._check("truncate", 0, math.inf, whole=True)
        for name in ("weight", "variety"):
            self._check(name, 0, 1)
        for name in ("contrast", "prior", "learning_rate"):
            self._check(name, 0, 1e4)
        if self.distance not in ("cosine", "euclidean"):
            raise UserError(f"distance = {self.distance!r} is not cosine or euclidean")
        if not self.tail or not all(0 <= w < math.inf for w in self.tail) or not sum(self.tail):
            raise UserError(f"tail = {self.tail!r} is not a few weights from 0")
        if self.target is not None and not math.isfinite(self.target):
            raise UserError(f"target = {self.target!r} is not a finite number")

    def tail_of(self, steps: int) -> tuple[float, ...]:
        """The tail of a run of some steps, whose weights sum to 1; within what gets a gradient."""
        cut = self.tail[-min(steps, self.truncate or steps) :]
        whole = sum(cut)
        return tuple(w / whole for w in cut) if whole else (*(0.0,) * (len(cut) - 1), 1.0)

    def _check(self, name: str, low: float, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        right = isinstance(value, int) if whole else isinstance(value, int | float)
        if not right or not low <= value <= high:
            wanted = "a whole number" if whole else "a number"
            upper = "" if math.isinf(high) else f" to {high:g}"
            raise UserError(f"{name} = {value!r} is not {wanted} from {low}{upper}")


@dataclass(frozen=True)
class Program:
    """What a search is compiled for; all its numbers are traced."""

    network: Network
    vae: VAE
    sampler: str
    objective: Objective
    truncate: int = 0  # steps that the gradient passes through, the last ones; 0 is all


# AdamW as PyTorch's is by default, but for the rate, which falls once.
OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01))


class Rule(NamedTuple):
    """How far seeds move, and until when; as in `Search`."""

    rate: Array | float
    settle: Array | int
    patience: Array | int
    target: Array | float

    @classmethod
    def of(cls, how: Search) -> "Rule":
        """The numbers of a search."""
        target = -math.inf if how.target is None else how.target
        return cls(how.learning_rate, how.settle, how.patience, target)


class Progress(NamedTuple):
    """Where the search for B seeds stands."""

    seeds: Array  # [B, h, w, C] to be looked at next
    memory: Any  # of the optimizer
    best: Array  # [B, h, w, C] the best seeds so far
    latents: Array  # [B, h, w, C] clean, of the best
    look: Look  # of the best
    seen: Look  # of those looked at last
    mark: Array  # [B] the loss at the last gain that counts
    stale: Array  # [B] iterations since then
    active: Array  # [B] bool
    iteration: Array  # [] done


class Run(NamedTuple):
    """What a search reads, beside parameters; traced."""

    cache: Cache
    points: Point  # of the whole grid [S]
    initial: Array | float  # standard normal noise times this is where a run starts
    guidance: Guidance
    weights: Weights
    given: Given
    rule: Rule


@jax.jit
def begin(seeds: Array) -> Progress:
    """The state before the first iteration, from standard normal seeds [B, h, w, C]."""
    none = jnp.full(len(seeds), jnp.inf, seeds.dtype)
    count = jnp.zeros(len(seeds), jnp.int32)
    memory, look = OPTIMIZER.init(seeds), Look(none, none, none, none)
    return Progress(seeds, memory, seeds, seeds, look, look, none, count, count == 0, jnp.int32(0))


def improve(
    params: Params, run: Run, state: Progress, stop: Array | int, *, program: Program
) -> Progress:
    """Goes on to iteration `stop`, or until no seed is active."""
    return compiled()(params, run, state, stop, program=program)


@functools.cache
def compiled() -> Any:
    """`improve` as it is compiled: for little memory, which on a CPU is not XLA's first aim."""
    options = LITTLE_MEMORY if jax.default_backend() == "cpu" else None
    return jax.jit(_improve, static_argnames="program", compiler_options=options)


def _improve(
    params: Params, run: Run, state: Progress, stop: Array | int, *, program: Program
) -> Progress:
    rule = run.rule

    def goes_on(state: Progress) -> Array:
        return (state.iteration < stop) & state.active.any()

    def body(state: Progress) -> Progress:
        slopes, (seen, latents) = gradient(params, run, state.seeds, program=program)
        losses = seen.loss
        updates, memory = OPTIMIZER.update(slopes, state.memory, state.seeds)
        rate = jnp.where(state.iteration < rule.settle, rule.rate, rule.rate / 10)
        seeds = state.seeds - rate * updates

        better = state.active & (losses < state.look.loss)
        gained = state.active & (losses < state.mark - LEAST_GAIN * jnp.abs(losses))
        best, kept = (
            jnp.where(better[:, None, None, None], new, old)
            for new, old in ((state.seeds, state.best), (latents, state.latents))
        )
        stale = jnp.where(gained, 0, state.stale + 1)
        active = state.active & (stale < rule.patience) & (losses > rule.target)
        active &= jnp.isfinite(losses)  # its best seed stays
        return Progress(
            seeds=jnp.where(state.active[:, None, None, None], seeds, state.seeds),
            memory=memory,
            best=best,
            latents=kept,
            look=jax.tree.map(partial(jnp.where, better), seen, state.look),
            seen=jax.tree.map(partial(jnp.where, state.active), seen, state.seen),
            mark=jnp.where(gained, losses, state.mark),
            stale=stale,
            active=active,
            iteration=state.iteration + 1,
        )

    return jax.lax.while_loop(goes_on, body, state)


def gradient(
    params: Params, run: Run, seeds: Array, *, program: Program
) -> tuple[Array, tuple[Look, Array]]:
    """Slopes of the losses of seeds [B, h, w, C], what they are made of, and the clean latents.

    Seeds do not meet in anything but the sum of their losses: each slope is its own loss's.
    """

    def total(seeds: Array) -> tuple[Array, tuple[Look, Array]]:
        latents = last_latents(params, run, seeds, program=program)
        decode, decoder = program.vae.decode, params["vae"]
        look = program.objective(seeds, latents, decode, decoder, run.weights, run.given)
        return look.loss.sum(), (look, latents[-1])

    (_, found), slopes = jax.value_and_grad(total, has_aux=True)(seeds)
    return slopes, found


def last_latents(params: Params, run: Run, seeds: Array, *, program: Program) -> Array:
    """Seeds [B, h, w, C] -> the latents after each of the last k steps, [k, B, h, w, C]."""
    denoise = denoiser.bind(program.network, params, run.cache)
    if run.guidance.scales.size:
        denoise = guidances.guide(denoise, *run.guidance[:2], interval=run.guidance[2:])
    sampler, last = samplers.SAMPLERS[program.sampler], len(program.objective.tail)
    rows = run.points.time.shape[0]
    x = seeds * run.initial
    state = samplers.State(x, sampler.memory(x))

    points = run.points
    if program.truncate:
        cut = rows - program.truncate
        head, points = (jax.tree.map(lambda f, p=p: f[p], points) for p in _parts(cut))
        state = _straight(sampler.step, denoise, state, head)
    if program.sampler == "edict":
        return edict.unroll(denoise, state, points, last)[1]
    return samplers.trail(sampler.step, denoise, state, points, None)[1][-last:]


def _parts(cut: int) -> tuple[slice, slice]:
    return slice(0, cut), slice(cut, None)


def _straight(
    step: samplers.Step, denoise: Denoiser, state: samplers.State, points: Point
) -> samplers.State:
    """Steps that the gradient passes unchanged: their result's is taken for that of `state`."""
    after = samplers.unroll(step, denoise, jax.lax.stop_gradient(state), points, None)
    return jax.tree.map(
        lambda new, old: jax.lax.stop_gradient(new) + (old - jax.lax.stop_gradient(old)),
        after,
        state,
    )
