"""Noise schedules: how a model was trained, and how its sampler is configured."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgen import config as configs
from jaxgen.types import UserError


class _Kind(NamedTuple):
    """What diffusers' scheduler class for one sampler reads from a config file."""

    name: str  # the class, as in `_class_name`
    fields: dict[str, Any]  # those fields of Schedule that the class has, with its defaults
    fixed: dict[str, Any]  # what else it has, with the one value supported


_OFF = configs.AnyOf((False, None))
_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "final_sigmas_type": "zero", "timestep_spacing": "linspace"}
_OTHER_SIGMAS = {"use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF}
_THRESHOLD = {"thresholding": _OFF, "dynamic_thresholding_ratio": ..., "sample_max_value": ...}

KINDS = {
    "ddim": _Kind(
        "DDIMScheduler",
        {**_NOISE, **_ZERO_SNR, **_CLIP, "set_alpha_to_one": True},
        _THRESHOLD,
    ),
    "ddpm": _Kind(
        "DDPMScheduler",
        {**_NOISE, **_ZERO_SNR, **_CLIP},
        {**_THRESHOLD, "variance_type": "fixed_small"},
    ),
    "euler": _Kind(
        "EulerDiscreteScheduler",
        {**_NOISE, **_ZERO_SNR, **_SIGMAS},
        {
            **_OTHER_SIGMAS,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "sigma_min": None,
            "sigma_max": None,
        },
    ),
    "euler_a": _Kind(
        "EulerAncestralDiscreteScheduler",
        {**_NOISE, **_ZERO_SNR, "timestep_spacing": "linspace"},
        {},
    ),
    "dpmpp": _Kind(
        "DPMSolverMultistepScheduler",
        {
            **_NOISE,
            **_ZERO_SNR,
            **_SIGMAS,
            "solver_order": 2,
            "lower_order_final": True,
            "euler_at_final": False,
        },
        {
            **_THRESHOLD,
            **_OTHER_SIGMAS,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "lambda_min_clipped": -np.inf,
            "use_lu_lambdas": _OFF,
            "use_dynamic_shifting": _OFF,
            "time_shift_type": ...,
            "use_flow_sigmas": _OFF,
            "flow_shift": ...,
            # it looks for learned variances only; a file of DDPM's keeps its own value here
            "variance_type": configs.AnyOf((None, "fixed_small", "fixed_large")),
        },
    ),
    "pndm": _Kind(
        "PNDMScheduler",
        {**_NOISE, "set_alpha_to_one": False},
        {"skip_prk_steps": True},
    ),
    "lcm": _Kind(
        "LCMScheduler",
        {
            **_NOISE,
            **_ZERO_SNR,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "set_alpha_to_one": True,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
        _THRESHOLD,
    ),
}
KINDS["edict"] = KINDS["ddim"]  # the same points; no class of diffusers has its step
# Of files of UniPC, which is no sampler of ours, but whose files any sampler may be asked to read.
_OTHERS = {"disable_corrector", "predict_x0", "shift_terminal", "solver_p"}
_KNOWN = {key for kind in KINDS.values() for key in (*kind.fields, *kind.fixed)} | _OTHERS
_AS_DPM = {  # how DPMSolverMultistepScheduler reads what is theirs, and DEIS'
    ("algorithm_type", "deis"): "dpmsolver++",
    **{("solver_type", name): "midpoint" for name in ("logrho", "bh1", "bh2")},
}
_CHOICES = {
    "sampler": tuple(KINDS),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How noise was added in training, and how a sampler walks back: a `scheduler_config.json`.

    Fields are named as in the file, and the defaults here are those of Stable Diffusion 1. A file
    read by `Schedule.read` gets the defaults of its diffusers class for the keys it lacks.
    """

    sampler: str = "ddim"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} = {value!r} is not one of {', '.join(map(str, choices))}")
        total = self.num_train_timesteps
        if not isinstance(total, int) or total < 2:
            raise UserError(f"num_train_timesteps = {total!r} is not a whole number above 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"betas {self.beta_start} to {self.beta_end} do not rise within 0 to 1")
        if self.trained_betas is not None and len(self.trained_betas) != total:
            raise UserError(f"trained_betas holds {len(self.trained_betas)} values, not {total}")
        if self.trained_betas is not None and not all(0 < beta <= 1 for beta in self.trained_betas):
            raise UserError("trained_betas holds values that are not above 0 and at most 1")
        if not isinstance(self.steps_offset, int) or self.steps_offset < 0:
            raise UserError(f"steps_offset = {self.steps_offset!r} is not a whole number from 0")
        if self.sampler == "lcm" and not 1 <= self.original_inference_steps <= total:
            raise UserError(
                f"original_inference_steps = {self.original_inference_steps} is not 1 to {total}"
            )
        if self.sampler == "pndm" and self.prediction_type == "sample":
            raise UserError("PNDM has no form for prediction_type = 'sample'; choose ddim")
        if self.sampler == "pndm" and self.rescale_betas_zero_snr:
            raise UserError("PNDM has no form for rescale_betas_zero_snr = True; choose ddim")

    @property
    def variance_exploding(self) -> bool:
        """Whether its sampler sees noise added to a signal of 1."""
        return self.sampler in ("euler", "euler_a")

    @classmethod
    def read(cls, config: Mapping[str, Any], sampler: str | None, where: str) -> "Schedule":
        """The schedule in a scheduler's config file.

        Args:
            config: the file's object, as any of diffusers' seven classes in `KINDS` writes it.
            sampler: a name of ours; None takes the one of the file's `_class_name`. Under another
                sampler the keys present are kept, where its class has them at all, and the defaults
                of its class serve for the absent ones, as in diffusers' `from_config`.
            where: what to call the file in an error.
        """
        if sampler is None:
            name = config.get("_class_name")
            sampler = next((key for key, kind in KINDS.items() if kind.name == name), None)
            if sampler is None:
                raise UserError(
                    f"{where}: no sampler for _class_name {name!r}; name one of {', '.join(KINDS)}"
                )
        elif sampler not in KINDS:
            raise UserError(f"sampler {sampler!r} is not one of {', '.join(KINDS)}")
        if "sampler" in config:
            raise UserError(f"{where}: unknown field 'sampler'; it follows from _class_name")
        if sampler == "pndm" and not config.get("skip_prk_steps", False):
            raise UserError(
                f"{where}: PNDM with Runge-Kutta steps (skip_prk_steps = False, also if absent) is "
                "not supported; set skip_prk_steps to true, or choose another sampler"
            )
        kind = KINDS[sampler]
        # How the network was trained is no sampler's to drop: PNDM has to refuse a zero SNR.
        ours = {*kind.fields, *kind.fixed, *_ZERO_SNR}
        data = {k: v for k, v in config.items() if k in ours or k not in _KNOWN}
        if sampler == "dpmpp":
            data = {k: _AS_DPM.get((k, str(v)), v) for k, v in data.items()}
        data = kind.fields | data | {"sampler": sampler}
        return configs.parse(cls, data, kind.fixed, f"{where} as {kind.name}")


def alphas_cumprod(schedule: Schedule) -> np.ndarray:
    """The signal power alpha-bar of each training timestep, float64 [T].

    Betas are float32, rounded as in the tables that models were trained with; their product is not.
    """
    betas = _betas(schedule)
    if schedule.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    return np.cumprod((1 - betas).astype(np.float64))


def _betas(schedule: Schedule) -> np.ndarray:
    """Float32 [T]: the noise variance that each timestep adds."""
    total = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.asarray(schedule.trained_betas, np.float32)
    if schedule.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        t = np.arange(total + 1) / total
        power = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - power[1:] / power[:-1], 0.999).astype(np.float32)
    if schedule.beta_schedule == "linear":
        return _linspace(schedule.beta_start, schedule.beta_end, total)
    return _linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total) ** 2


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """Float32 [count], rounded as torch.linspace does: a float32 step, walked from both ends."""
    low, high = np.float32(first), np.float32(last)
    step = np.float64((high - low) / np.float32(count - 1))
    i = np.arange(count)
    rising, falling = low + step * i, high - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last signal power is 0 (Lin et al. 2023, algorithm 1), float32 throughout."""
    root = np.sqrt(np.cumprod((1 - betas).astype(np.float64)).astype(np.float32))
    power = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - np.concatenate([power[:1], power[1:] / power[:-1]])
