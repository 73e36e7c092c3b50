"""Optimizers as typed values: AdamW, Adafactor, Lion and Muon over trees of named parameters."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Sharding
from jax.tree_util import DictKey

from jaxgen import trees
from jaxgen.training import muon, patterns
from jaxgen.types import Array, Params, UserError, at_least_float32

Schedule = Literal["constant", "cosine", "linear"]

_FROM_0: Any = lambda x: 0 <= x < math.inf, "from 0"
_FROM_1: Any = lambda x: 1 <= x < math.inf, "from 1"
_BELOW_1: Any = lambda x: 0 <= x < 1, "from 0 to below 1"
_RANGES = {
    **dict.fromkeys(("learning_rate", "warmup", "clip", "weight_decay"), _FROM_0),
    **dict.fromkeys(("epsilon", "decay", "size"), _FROM_0),
    **dict.fromkeys(("threshold", "smallest"), _FROM_1),
    **dict.fromkeys(("b1", "b2", "beta"), _BELOW_1),
    "final": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers have in common. Patterns are regular expressions, found anywhere."""

    learning_rate: float = 1e-4
    """Rate after the warmup."""
    warmup: int = 0
    """Steps over which the rate rises from 0, in a line."""
    schedule: Schedule = "constant"
    """How the rate goes on to the end of the run: constant, cosine or linear."""
    final: float = 0.0
    """Fraction of the rate that is left at the end, for cosine and linear."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 does not clip."""
    weight_decay: float = 1e-2
    """Share of a parameter taken off at each step, times the rate; decoupled from the gradient."""
    no_decay: tuple[str, ...] = ()
    """Patterns of paths without weight decay, as in "bias$"."""
    rates: tuple[tuple[str, float], ...] = ()
    """Pattern of paths and factor of their rate; the first that fits decides, 0 freezes."""

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            choices = ", ".join(get_args(Schedule))
            raise UserError(f"schedule = {self.schedule!r} is not one of {choices}")
        for name, (within, wanted) in _RANGES.items():
            number = getattr(self, name, None)  # None: another optimizer's
            if number is not None and not (isinstance(number, int | float) and within(number)):
                raise UserError(f"{name} = {number!r} is not a number {wanted}")
        patterns.check_written("no_decay", self.no_decay)
        patterns.check_factors("rates", self.rates)

    def direction(self) -> optax.GradientTransformation:
        """Gradients -> direction of the step, before weight decay and rate."""
        raise NotImplementedError

    def stride(self) -> optax.GradientTransformation:
        """What else scales a step, decay included."""
        return optax.identity()


@dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), with the numbers Stable Diffusion was trained with."""

    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.999
    """Decay of the mean of their squares."""
    epsilon: float = 1e-8
    """Added to the root of the mean of squares."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018): squares are kept by rows and columns, and no mean."""

    weight_decay: float = 0.0
    """Share of a parameter taken off at each step, times the rate; decoupled from the gradient."""
    decay: float = 0.8
    """Exponent of the decay of mean squares: at step t it is 1 - t^-decay."""
    epsilon: float = 1e-30
    """Added to squared gradients."""
    threshold: float = 1.0
    """Largest root mean square of a parameter's direction."""
    smallest: int = 128
    """Squares are factored where the two longest axes have at least this length."""
    relative: bool = False
    """Rate in units of a parameter's root mean square; what starts at zero then hardly moves."""

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay, min_dim_size_to_factor=self.smallest, epsilon=self.epsilon
            ),
            optax.clip_by_block_rms(self.threshold),
        )

    def stride(self) -> optax.GradientTransformation:
        return optax.scale_by_param_block_rms() if self.relative else optax.identity()


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of a mean. Rates 3 to 10 times lower than AdamW's."""

    learning_rate: float = 1e-5
    """Rate after the warmup."""
    weight_decay: float = 1e-1
    """Share of a parameter taken off at each step, times the rate; decoupled from the gradient."""
    b1: float = 0.9
    """Weight of the mean against the gradient in the step."""
    b2: float = 0.99
    """Decay of the mean of gradients."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon (Jordan et al. 2024): kernels move by their orthogonalised momentum, the rest by AdamW.

    A kernel's step has the root mean square of AdamW's (Liu et al. 2025), so that rates carry over.
    """

    beta: float = 0.95
    """Decay of the momentum of kernels."""
    b1: float = 0.9
    """Decay of the mean of gradients, of the rest."""
    b2: float = 0.999
    """Decay of the mean of their squares, of the rest."""
    epsilon: float = 1e-8
    """Added to the root of the mean of squares, of the rest."""
    size: float = 0.2
    """Root mean square of a kernel's step."""

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.masked(muon.steps(self.beta, self.size), _kernels),
            optax.masked(optax.scale_by_adam(self.b1, self.b2, self.epsilon), _others),
        )


def _kernels(params: Params) -> Params:
    return trees.map_with_path(muon.is_kernel, params)


def _others(params: Params) -> Params:
    return trees.map_with_path(lambda path, leaf: not muon.is_kernel(path, leaf), params)


def rate(optimizer: Optimizer, steps: int) -> Callable[[Any], Any]:
    """Learning rate as a function of the updates made before, for a run of `steps` updates.

    As in diffusers: the warmup starts at 0, the schedule runs over what remains. Of a number it is
    computed on the host, in float64; of an array where that is, in float32.
    """

    def at(count: Any) -> Any:
        xp: Any = jnp if isinstance(count, jax.Array) else np
        count = xp.asarray(count, "float32" if xp is jnp else "float64")
        done = (count - optimizer.warmup) / max(1, steps - optimizer.warmup)
        done = xp.clip(done, 0, 1)
        left = {
            "constant": xp.ones_like(done),
            "cosine": (1 + xp.cos(np.pi * done)) / 2,
            "linear": 1 - done,
        }[optimizer.schedule]
        level = optimizer.final + (1 - optimizer.final) * left
        rising = count / max(1, optimizer.warmup)
        return optimizer.learning_rate * xp.where(count < optimizer.warmup, rising, level)

    return at


def factor(optimizer: Optimizer, path: str) -> float:
    """By what the learning rate of the parameter at `path` is multiplied."""
    return next((f for pattern, f in optimizer.rates if patterns.fits(pattern, path)), 1.0)


def frozen(optimizer: Optimizer, path: str) -> bool:
    """Whether a factor of 0 freezes the parameter: it needs no gradient and gets no state."""
    return factor(optimizer, path) == 0


def check(optimizer: Optimizer, paths: Iterable[str]) -> None:
    """Refuses patterns that decide nothing: misspelt, or behind one that takes all they fit.

    Args:
        paths: of every parameter that the task lets learn, before any is frozen.

    Raises:
        UserError: naming the field and the pattern.
    """
    paths = [*paths]
    for pattern in optimizer.no_decay:
        patterns.check_reach("no_decay", pattern, paths)
    for pattern, _ in optimizer.rates:
        patterns.check_reach("rates", pattern, paths)
        paths = [path for path in paths if not patterns.fits(pattern, path)]


def build(optimizer: Optimizer, learned: Params, steps: int) -> optax.GradientTransformation:
    """The optimizer of a tree of parameters (or their shapes), for a run of `steps` updates.

    Everything is computed and kept in float32 at least, whatever the parameters are kept in. Its
    state is named tuples of counts and of trees like `learned`. Patterns are for `check`, which
    sees what they freeze; it has no place in `learned`.
    """
    return _in_float32(
        optax.chain(
            _clip(optimizer.clip) if optimizer.clip else optax.identity(),
            optimizer.direction(),
            _decay_and_factor(optimizer, [*trees.flatten(learned)]),
            optimizer.stride(),
            optax.scale_by_learning_rate(rate(optimizer, steps)),
        )
    )


def shardings(
    state: Any,
    learned: Params,
    where: Callable[[str, tuple[int, ...]], Sharding],
    replicated: Sharding,
) -> Any:
    """Where an optimizer's state lives: with its parameters.

    Args:
        state: what `init` returns, or its shapes.
        learned: parameters or their shapes.
        where: (path, shape) of a parameter -> its sharding.
        replicated: for counts, and for Adafactor's rows and columns.

    Returns:
        A tree like `state`.
    """
    shapes = {path: leaf.shape for path, leaf in trees.flatten(learned).items()}

    def place(keys: tuple[Any, ...], leaf: Any) -> Sharding:
        path = "/".join(key.key for key in keys if isinstance(key, DictKey))
        return where(path, leaf.shape) if shapes.get(path) == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(place, state)


def _clip(most: float) -> optax.GradientTransformation:
    """Gradients times a factor; divided, as optax does it, XLA would keep all of them once more."""

    def update(grads: Params, params: Params | None) -> Params:
        factor = jnp.minimum(1, most / optax.tree.norm(grads))
        return jax.tree.map(lambda grad: factor * grad, grads)

    return optax.stateless(update)


def _decay_and_factor(optimizer: Optimizer, paths: list[str]) -> optax.GradientTransformation:
    """factor * (direction + decay * parameter), with the factor and decay of each path."""
    plain = {p for p in paths if any(patterns.fits(pattern, p) for pattern in optimizer.no_decay)}
    decays = {path: 0.0 if path in plain else optimizer.weight_decay for path in paths}
    factors = {path: factor(optimizer, path) for path in paths}

    def update(directions: Params, params: Params) -> Params:
        values = trees.flatten(params)

        def one(path: str, direction: Array) -> Array:
            if decays[path]:
                direction += decays[path] * values[path]
            return factors[path] * direction

        return trees.map_with_path(one, directions)

    return optax.stateless(update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def up(tree: Any) -> Any:
        return jax.tree.map(at_least_float32, tree)

    def init(params: Any) -> Any:
        return inner.init(up(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(up(grads), state, up(params))

    return optax.GradientTransformation(init, update)
