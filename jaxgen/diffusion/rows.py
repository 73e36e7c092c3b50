"""Where each sampler stands: what the samplers' grids differ in, in float64.

What a sampler does at a row (its order, its transfer, a forced last step) is a matter of the row's
coefficients, so that the code on the device has no branches and no special first or last step.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxgen.diffusion.schedule import Schedule, alphas_cumprod
from jaxgen.types import UserError


class Run(NamedTuple):
    """What a run is to be; see `grids.grid`."""

    schedule: Schedule
    steps: int
    start: int
    eta: float
    share: float


class Rows(NamedTuple):
    """What the samplers' grids differ in. Each field is float64 [length]."""

    time: np.ndarray
    here: tuple[np.ndarray, np.ndarray]  # signal and noise
    next: tuple[np.ndarray, np.ndarray]  # after the step
    fresh: np.ndarray
    weights: tuple[np.ndarray, ...] = ()  # of the sampler's own


def _times(run: Run) -> np.ndarray:
    """Timesteps [steps], descending: the spacings of Lin et al. 2023, table 2.

    DPM-Solver++ divides the range by one step more and leaves the last to its end at sigma 0.
    """
    schedule, steps = run.schedule, run.steps
    total, spacing = schedule.num_train_timesteps, schedule.timestep_spacing
    count = steps + 1 if schedule.sampler == "dpmpp" else steps
    if spacing == "trailing":
        # For some numbers of steps arange adds a value; diffusers makes a step at time -1 of it.
        return np.arange(total, 0, -total / steps).round()[:steps] - 1
    if spacing == "linspace":
        times = np.linspace(0, total - 1, count)[::-1][:steps]
        return times if schedule.variance_exploding else times.round()

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


def _ddim_rows(run: Run) -> Rows:
    # The step is always T // N timesteps, whichever the spacing; so it is in diffusers.
    schedule, times = run.schedule, _times(run).astype(int)
    alphas = alphas_cumprod(schedule)
    here = _power(schedule, alphas, times)
    after = _power(schedule, alphas, times - schedule.num_train_timesteps // run.steps)
    fresh = run.eta * _posterior_std(here, after)
    return Rows(times, _amplitudes(here), _amplitudes(after), fresh)


def _edict_rows(run: Run) -> Rows:
    """DDIM's points, and its step as x' = here * x + there * eps."""
    rows = _ddim_rows(run)  # whose eta is 0
    if not rows.here[0].all():
        raise UserError("EDICT divides by the signal, and this schedule begins with none; use ddim")
    here = rows.next[0] / rows.here[0]
    return rows._replace(weights=(here, rows.next[1] - here * rows.here[1]))


def _ddpm_rows(run: Run) -> Rows:
    times = _times(run).astype(int)
    here = alphas_cumprod(run.schedule)[times]
    after = np.append(here[1:], 1.0)
    clean = np.sqrt(after) * (1 - here / after) / (1 - here)  # Ho et al. 2020, eq. 7
    x = np.sqrt(here / after) * (1 - after) / (1 - here)
    fresh = _posterior_std(here, after)
    return Rows(times, _amplitudes(here), _amplitudes(after), fresh, (clean, x))


def _lcm_rows(run: Run) -> Rows:
    """Evenly skipped from the timesteps of the distillation, or from a share of them.

    `timestep_spacing` has no say.
    """
    schedule, steps, whole = run.schedule, run.steps, run.schedule.original_inference_steps
    count = int(whole * run.share)  # as diffusers counts
    if steps > count:
        cause, way = f"it was distilled for {whole} timesteps", "take fewer"
        if run.share < 1:
            cause = (
                f"strength {run.share} leaves {count} of the {whole} timesteps of its distillation"
            )
            way += ", or more strength"
        raise UserError(
            f"{steps} steps are too many for this latent consistency model: {cause} "
            f"(original_inference_steps); {way}"
        )

    stride = schedule.num_train_timesteps // whole
    distilled = np.arange(count, 0, -1) * stride - 1
    times = distilled[np.linspace(0, count, steps, endpoint=False).astype(int)]

    here = alphas_cumprod(schedule)[times]
    after = _amplitudes(np.append(here[1:], 1.0))
    s = times * schedule.timestep_scaling  # boundary scalings: Luo et al. 2023, section 4
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / np.sqrt(s**2 + 0.25)  # sigma_data = 0.5
    return Rows(times, _amplitudes(here), after, after[1], (c_out, c_skip))


def _sigma_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Times [steps] and sigmas = noise / signal [steps + 1], by table or Karras et al. 2022."""
    schedule = run.schedule
    times, alphas = _times(run), alphas_cumprod(schedule)
    if schedule.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # as in diffusers: no signal would make sigma infinite
    table, index = np.sqrt((1 - alphas) / alphas), np.arange(len(alphas))
    sigmas = np.interp(times, index, table)

    if schedule.use_karras_sigmas:
        # DPM-Solver++ spans the whole table, Euler only the rows its spacing selects.
        ends = (table[-1], table[0]) if schedule.sampler == "dpmpp" else (sigmas[0], sigmas[-1])
        first, last = np.power(ends, 1 / 7)
        sigmas = (first + np.linspace(0, 1, run.steps) * (last - first)) ** 7
        times = np.interp(np.log(sigmas), np.log(table), index)
        if schedule.sampler == "dpmpp":  # its network is told whole timesteps
            cosine = schedule.beta_schedule == "squaredcos_cap_v2"
            # diffusers cuts these off, and in its float32 the first is a hair below T - 1
            times = np.floor(np.maximum(times - 1e-4, 0)) if cosine else times.round()
    end = table[0] if schedule.final_sigmas_type == "sigma_min" else 0.0
    return times, np.append(sigmas, end)


def _euler_rows(run: Run) -> Rows:
    times, sigmas = _sigma_rows(run)
    here, after, one = sigmas[:-1], sigmas[1:], np.ones(run.steps)
    fresh = np.zeros(run.steps)
    if run.schedule.sampler == "euler_a":  # ancestral: DDPM's posterior, with a signal of 1
        fresh = after * np.sqrt(1 - (after / here) ** 2)
    return Rows(times, (one, here), (one, after), fresh)


def _dpmpp_rows(run: Run) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): e^-h is a ratio of sigmas, 0 at the end."""
    schedule, steps = run.schedule, run.steps
    times, sigmas = _sigma_rows(run)
    signal, noise = _amplitudes(1 / (sigmas**2 + 1))
    here, after = sigmas[:-1], sigmas[1:]
    data = signal[1:] * (1 - after / here)  # alpha_t (1 - e^-h)

    with np.errstate(divide="ignore"):
        h = np.log(here / after)  # inf where sigma ends at 0: that step is of first order
    before = np.append(0.0, h[:-1])
    row = np.arange(steps)
    first = (row <= run.start) | (schedule.solver_order == 1) | (before == 0) | np.isinf(h)
    if schedule.euler_at_final or (schedule.lower_order_final and steps < 15):
        first |= row == steps - 1
    slope = np.divide(h, before, out=np.zeros(steps), where=~first)  # 1 / r; h is then finite

    weights = (noise[1:] / noise[:-1], data, 0.5 * data * slope)
    zero = np.zeros(steps)
    return Rows(times, (signal[:-1], noise[:-1]), (signal[1:], noise[1:]), zero, weights)


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


def _pndm_rows(run: Run) -> Rows:
    """Pseudo linear multistep (Liu et al. 2022) with its first step done twice: steps + 1 rows.

    The second call of a run goes back to the saved x and takes the first step again, to end at its
    own row's time. In a run from row 1 that is the time at which the run began: diffusers takes
    again a step that it never took, and so does this.
    """
    schedule, times = run.schedule, _times(run).astype(int)
    times = np.concatenate([times[:2], times[1:]])
    alphas, stride = alphas_cumprod(schedule), schedule.num_train_timesteps // run.steps
    call = np.arange(len(times)) - run.start
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
    return Rows(times, _amplitudes(here), _amplitudes(after), zero, weights)


ROWS: dict[str, Callable[[Run], Rows]] = {
    "ddim": _ddim_rows,
    "ddpm": _ddpm_rows,
    "euler": _euler_rows,
    "euler_a": _euler_rows,
    "dpmpp": _dpmpp_rows,
    "pndm": _pndm_rows,
    "lcm": _lcm_rows,
    "edict": _edict_rows,
}
