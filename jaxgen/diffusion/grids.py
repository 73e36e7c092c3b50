"""The grids of points at which the samplers stand.

Everything here is computed once per run, on the host, in float64. What a sampler does at a row of
its grid (its order, its transfer, a forced last step) is a matter of coefficients, so that the code
on the device has no branches and no special first or last step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.diffusion.schedule import Schedule, alphas_cumprod
from jaxgen.types import Point, UserError

MAX_STEPS = 1000  # grids are padded to hold these; PNDM has one row more, and the end is a row


class Grid(NamedTuple):
    """The points of one run."""

    points: Point  # every field is float32 or int32 numpy with a leading axis [length]
    initial: float  # a run from pure noise starts at initial * standard normal noise
    length: int  # network calls of a run from row 0: steps, and one more for PNDM


class _Rows(NamedTuple):
    """What the samplers' grids differ in. Each field is float64 [length]."""

    time: np.ndarray
    here: tuple[np.ndarray, np.ndarray]  # signal and noise
    next: tuple[np.ndarray, np.ndarray]  # after the step
    fresh: np.ndarray
    weights: tuple[np.ndarray, ...] = ()  # of the sampler's own


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
    _check(schedule, steps, eta, share)
    variance_exploding = schedule.sampler in ("euler", "euler_a")
    lcm = schedule.sampler == "lcm"
    rows_of = partial(_lcm_rows, share=share) if lcm else _ROWS[schedule.sampler]
    rows = rows_of(schedule, steps, start, eta)
    length = len(rows.time)
    if not 0 <= start < length:
        raise UserError(f"start = {start} is not a row of a grid of {length}")

    signal, noise = rows.here
    if schedule.prediction_type == "epsilon" and not signal[start:].all():
        raise UserError(
            "prediction_type = 'epsilon' divides by the signal, and the first point of a schedule "
            "with rescale_betas_zero_snr has none; use a model with v_prediction"
        )
    scale = (signal**2 + noise**2) ** -0.5 if variance_exploding else np.ones(length)
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

    initial = float(noise.max()) if variance_exploding else 1.0
    if variance_exploding and schedule.timestep_spacing == "leading":
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


def _check(schedule: Schedule, steps: int, eta: float, share: float) -> None:
    limit = min(schedule.num_train_timesteps, MAX_STEPS)
    if not 1 <= steps <= limit:
        raise UserError(f"steps = {steps} is not 1 to {limit}, the timesteps of this schedule")
    if schedule.sampler == "lcm" and steps > schedule.original_inference_steps:
        raise UserError(
            f"steps = {steps} is more than the {schedule.original_inference_steps} that this "
            "latent consistency model was distilled for (original_inference_steps)"
        )
    distilled = _distilled(schedule, share)
    if schedule.sampler == "lcm" and steps > distilled:
        raise UserError(
            f"strength {share} leaves {distilled} of the {schedule.original_inference_steps} "
            f"timesteps of this latent consistency model, fewer than {steps} steps; take fewer "
            "steps, or more strength"
        )
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


def _times(schedule: Schedule, steps: int) -> np.ndarray:
    """Timesteps [steps], descending: the spacings of Lin et al. 2023, table 2.

    DPM-Solver++ divides the range by one step more and leaves the last to its end at sigma 0.
    """
    total, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    count = steps + 1 if schedule.sampler == "dpmpp" else steps
    if spacing == "trailing":
        # For some numbers of steps arange adds a value; diffusers makes a step at time -1 of it.
        return np.arange(total, 0, -total / steps).round()[:steps] - 1
    if spacing == "linspace":
        times = np.linspace(0, total - 1, count)[::-1][:steps]
        return times if schedule.sampler in ("euler", "euler_a") else times.round()

    times = np.arange(count - 1.0, count - 1 - steps, -1) * (total // count)
    times += schedule.steps_offset
    if times[0] >= total or count > total:
        raise UserError(
            f"steps = {steps} at leading spacing with steps_offset = {schedule.steps_offset} need "
            f"more than {total} timesteps; take fewer steps, or another timestep_spacing"
        )
    return times


def _amplitudes(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal power alpha-bar -> signal and noise of a variance-preserving process."""
    return np.sqrt(power), np.sqrt(1 - power)


def _power(schedule: Schedule, alphas: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Alpha-bar at whole timesteps; those below 0 are the end of the run."""
    end = 1.0 if schedule.set_alpha_to_one else alphas[0]
    return np.where(times >= 0, alphas[np.maximum(times, 0)], end)


def _posterior_std(power: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Of q(x_next | x, clean): Ho et al. 2020, eq. 7; also DDIM's sigma (its eq. 16) at eta = 1."""
    return np.sqrt((1 - after) / (1 - power) * (1 - power / after))


def _ddim_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    # The step is always T // N timesteps, whichever the spacing; so it is in diffusers.
    times = _times(schedule, steps).astype(int)
    alphas = alphas_cumprod(schedule)
    here = _power(schedule, alphas, times)
    after = _power(schedule, alphas, times - schedule.num_train_timesteps // steps)
    fresh = eta * _posterior_std(here, after)
    return _Rows(times, _amplitudes(here), _amplitudes(after), fresh)


def _edict_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    """DDIM's points, and its step as x' = here * x + there * eps."""
    rows = _ddim_rows(schedule, steps, start, 0.0)
    if not rows.here[0].all():
        raise UserError("EDICT divides by the signal, and this schedule begins with none; use ddim")
    here = rows.next[0] / rows.here[0]
    return rows._replace(weights=(here, rows.next[1] - here * rows.here[1]))


def _ddpm_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    times = _times(schedule, steps).astype(int)
    here = alphas_cumprod(schedule)[times]
    after = np.append(here[1:], 1.0)
    clean = np.sqrt(after) * (1 - here / after) / (1 - here)  # Ho et al. 2020, eq. 7
    x = np.sqrt(here / after) * (1 - after) / (1 - here)
    fresh = _posterior_std(here, after)
    return _Rows(times, _amplitudes(here), _amplitudes(after), fresh, (clean, x))


def _distilled(schedule: Schedule, share: float) -> int:
    """How many of a latent consistency model's timesteps make up a share, as diffusers counts."""
    return int(schedule.original_inference_steps * share)


def _lcm_rows(schedule: Schedule, steps: int, start: int, eta: float, share: float = 1.0) -> _Rows:
    # Evenly skipped from the timesteps of the distillation; timestep_spacing has no say.
    count = _distilled(schedule, share)
    stride = schedule.num_train_timesteps // schedule.original_inference_steps
    distilled = np.arange(count, 0, -1) * stride - 1
    times = distilled[np.linspace(0, count, steps, endpoint=False).astype(int)]

    here = alphas_cumprod(schedule)[times]
    after = _amplitudes(np.append(here[1:], 1.0))
    s = times * schedule.timestep_scaling  # boundary scalings: Luo et al. 2023, section 4
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / np.sqrt(s**2 + 0.25)  # sigma_data = 0.5
    return _Rows(times, _amplitudes(here), after, after[1], (c_out, c_skip))


def _sigma_rows(schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Times [steps] and sigmas = noise / signal [steps + 1], by table or Karras et al. 2022."""
    times, alphas = _times(schedule, steps), alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # as in diffusers: no signal would make sigma infinite
    table, index = np.sqrt((1 - alphas) / alphas), np.arange(len(alphas))
    sigmas = np.interp(times, index, table)

    if schedule.use_karras_sigmas:
        # DPM-Solver++ spans the whole table, Euler only the rows its spacing selects.
        ends = (table[-1], table[0]) if schedule.sampler == "dpmpp" else (sigmas[0], sigmas[-1])
        first, last = np.power(ends, 1 / 7)
        sigmas = (first + np.linspace(0, 1, steps) * (last - first)) ** 7
        times = np.interp(np.log(sigmas), np.log(table), index)
        if schedule.sampler == "dpmpp":  # its network is told whole timesteps
            cosine = schedule.beta_schedule == "squaredcos_cap_v2"
            # diffusers cuts these off, and in its float32 the first is a hair below T - 1
            times = np.floor(np.maximum(times - 1e-4, 0)) if cosine else times.round()
    end = table[0] if schedule.final_sigmas_type == "sigma_min" else 0.0
    return times, np.append(sigmas, end)


def _euler_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    times, sigmas = _sigma_rows(schedule, steps)
    here, after, one = sigmas[:-1], sigmas[1:], np.ones(steps)
    fresh = np.zeros(steps)
    if schedule.sampler == "euler_a":  # ancestral: DDPM's posterior, with a signal of 1
        fresh = after * np.sqrt(1 - (after / here) ** 2)
    return _Rows(times, (one, here), (one, after), fresh)


def _dpmpp_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): e^-h is a ratio of sigmas, 0 at the end."""
    times, sigmas = _sigma_rows(schedule, steps)
    signal, noise = _amplitudes(1 / (sigmas**2 + 1))
    here, after = sigmas[:-1], sigmas[1:]
    data = signal[1:] * (1 - after / here)  # alpha_t (1 - e^-h)

    with np.errstate(divide="ignore"):
        h = np.log(here / after)  # inf where sigma ends at 0: that step is of first order
    before = np.append(0.0, h[:-1])
    row = np.arange(steps)
    first = (row <= start) | (schedule.solver_order == 1) | (before == 0) | np.isinf(h)
    if schedule.euler_at_final or (schedule.lower_order_final and steps < 15):
        first |= row == steps - 1
    slope = np.where(first, 0, _over(h, np.where(first, 0, before)))  # 1 / r; h is then finite

    weights = (noise[1:] / noise[:-1], data, 0.5 * data * slope)
    zero = np.zeros(steps)
    return _Rows(times, (signal[:-1], noise[:-1]), (signal[1:], noise[1:]), zero, weights)


# Shares of the newest prediction and of the last three, by calls done (Liu et al. 2022, eq. 12).
_ADAMS_BASHFORTH = np.array(
    [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],  # the first step over again, with the mean of both its ends
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)


def _pndm_rows(schedule: Schedule, steps: int, start: int, eta: float) -> _Rows:
    """Pseudo linear multistep (Liu et al. 2022) with its first step done twice: steps + 1 rows.

    The second call of a run goes back to the saved x and takes the first step again, to end at its
    own row's time. In a run from row 1 that is the time at which the run began: diffusers takes
    again a step that it never took, and so does this.
    """
    times = _times(schedule, steps).astype(int)
    times = np.concatenate([times[:2], times[1:]])
    alphas, stride = alphas_cumprod(schedule), schedule.num_train_timesteps // steps
    call = np.arange(len(times)) - start
    again = call == 1
    here = _power(schedule, alphas, times)
    source = _power(schedule, alphas, np.where(again, times + stride, times))
    after = _power(schedule, alphas, np.where(again, times, times - stride))

    # x_next = x_share * x + eps_share * eps: the transfer of Liu et al. 2022, eq. 9
    signal, noise = _amplitudes(source)
    x_share = np.sqrt(after / source)
    eps_share = -(after - source) / (source * np.sqrt(1 - after) + noise * np.sqrt(source * after))
    if schedule.prediction_type == "v_prediction":  # the predictions are mixed, then converted
        x_share, eps_share = x_share + eps_share * noise, eps_share * signal

    shares = _ADAMS_BASHFORTH[np.clip(call, 0, 4)]
    weights = (x_share, eps_share, again.astype(float), *shares.T)
    zero = np.zeros(len(times))
    return _Rows(times, _amplitudes(here), _amplitudes(after), zero, weights)


_ROWS = {
    "ddim": _ddim_rows,
    "ddpm": _ddpm_rows,
    "euler": _euler_rows,
    "euler_a": _euler_rows,
    "dpmpp": _dpmpp_rows,
    "pndm": _pndm_rows,
    "lcm": _lcm_rows,
    "edict": _edict_rows,
}
