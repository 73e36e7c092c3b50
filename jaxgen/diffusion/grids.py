"""The grids of points at which the samplers stand.

Everything here is computed once per run, on the host, in float64, and cast at the end.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.diffusion.rows import ROWS, Run
from jaxgen.diffusion.schedule import Schedule
from jaxgen.types import Point, UserError

MAX_STEPS = 1000  # grids are padded to hold these; PNDM has one row more, and the end is a row


class Grid(NamedTuple):
    """The points of one run."""

    points: Point  # every field is float32 or int32 numpy with a leading axis [length]
    initial: float  # a run from pure noise starts at initial * standard normal noise
    length: int  # network calls of a run from row 0: steps, and one more for PNDM


def grid(
    schedule: Schedule, steps: int, start: int = 0, eta: float = 0.0, share: float = 1.0
) -> Grid:
    """The points at which the schedule's sampler stands, noisiest first.

    Args:
        schedule: names the sampler.
        steps: of a full run, from pure noise.
        start: the first row to run; an image is noised to that row's signal and noise. The rows
            before it are never run. A multistep sampler begins its history there, and `index` and
            `steps` of the points count what is run.
        eta: DDIM's share of fresh noise, 0 to 1.
        share: of a latent consistency model's timesteps, the last ones, among which the steps are
            spread, above 0 and at most 1: its way to start from an image.

    `weights[0]` bounds the predicted clean latent (inf does not); the others are each sampler's.
    """
    _check(schedule, steps, eta)
    rows = ROWS[schedule.sampler](Run(schedule, steps, start, eta, share))
    length = len(rows.time)
    if not 0 <= start < length:
        raise UserError(f"start = {start} is not a row of a grid of {length}")

    signal, noise = rows.here
    if schedule.prediction_type == "epsilon" and not signal[start:].all():
        raise UserError(
            "prediction_type = 'epsilon' divides by the signal, and the first point of a schedule "
            "with rescale_betas_zero_snr has none; use a model with v_prediction"
        )
    scale = (signal**2 + noise**2) ** -0.5 if schedule.variance_exploding else np.ones(length)
    clean, eps = conversion(schedule.prediction_type, signal, noise, scale)
    bound = schedule.clip_sample_range if schedule.clip_sample else np.inf
    run = np.arange(length) - start
    fields: dict[str, Any] = {
        "time": rows.time.astype(np.float64),
        "scale": scale,
        "signal": signal,
        "noise": noise,
        "signal_next": rows.next[0],
        "noise_next": rows.next[1],
        "keep": np.sqrt(np.maximum(rows.next[1] ** 2 - rows.fresh**2, 0)),
        "fresh": rows.fresh,
        "clean": clean,
        "eps": eps,
        "weights": np.stack([np.full(length, bound), *rows.weights], axis=-1),
        "index": np.maximum(run, 0),
        "steps": np.full(length, length - start),
    }
    points = jax.tree.map(_cast, Point(**fields))

    initial = float(noise.max()) if schedule.variance_exploding else 1.0
    if schedule.variance_exploding and schedule.timestep_spacing == "leading":
        initial = (initial**2 + 1) ** 0.5
    return Grid(points, initial, length)


def pad(points: Point, rows: int = MAX_STEPS + 2) -> Point:
    """A grid of `rows` rows: one compilation serves every number of steps.

    The rows added are terminal (signal 1, noise 0) and are not meant to be run.
    """
    extra = rows - len(points.time)
    end = {"scale": 1, "signal": 1, "signal_next": 1, "steps": points.steps[-1]}

    def longer(name: str, field: Any) -> Any:
        tail = np.full((extra, *field.shape[1:]), end.get(name, 0), field.dtype)
        return np.concatenate([field, tail])

    return Point(**{name: longer(name, field) for name, field in points._asdict().items()})


def _check(schedule: Schedule, steps: int, eta: float) -> None:
    limit = min(schedule.num_train_timesteps, MAX_STEPS)
    if not 1 <= steps <= limit:
        raise UserError(f"steps = {steps} is not 1 to {limit}, the timesteps of this schedule")
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta} is not 0 to 1")
    if eta and schedule.sampler != "ddim":
        raise UserError(f"eta = {eta} has no meaning for {schedule.sampler}; use ddim, or eta 0")


def _cast(field: np.ndarray) -> np.ndarray:
    return field.astype(np.int32 if field.dtype.kind == "i" else np.float32)


def conversion(
    prediction_type: str, signal: np.ndarray, noise: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of `Point.split`, two of [length, 2]: clean and eps from x and prediction.

    The network sees z = scale * x = a * clean + b * eps with a^2 + b^2 = 1, and in those
    coordinates predicts eps, clean or v = a * eps - b * clean (Salimans & Ho 2022).
    """
    a, b = scale * signal, scale * noise
    zero, one = np.zeros_like(a), np.ones_like(a)
    if prediction_type == "epsilon":
        clean, eps = (_over(one, signal), -_over(noise, signal)), (zero, one)
    elif prediction_type == "sample":
        clean, eps = (zero, one), (_over(one, noise), -_over(signal, noise))
    else:
        clean, eps = (a * scale, -b), (b * scale, a)
    return np.stack(clean, -1), np.stack(eps, -1)


def _over(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y; 0 where y is 0, in rows that no run may reach."""
    return np.divide(x, y, out=np.zeros_like(x), where=y != 0)
