"""The noise schedule of a single file, which does not hold it."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Config = dict[str, Any]


def scheduler_config(prediction_type: str) -> Config:
    """As in the folders of 1.5 and 2.1; PNDM ignores `clip_sample`, which the others default to."""
    return {
        "_class_name": "DDIMScheduler" if prediction_type == "v_prediction" else "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def predicted(path: Path | None, predicts_v: bool, where: str) -> str:
    """What the YAML beside the file says; without one, what most models of its kind predict."""
    text = yaml_beside(path) if path else None
    if text is not None:
        says_v = re.search(r"""(?m)^\s*parameterization\s*:\s*["']?v["']?\s*(#|$)""", text)
        return "v_prediction" if says_v else "epsilon"
    if predicts_v:
        log.warning(
            "%s does not tell whether it predicts v (Stable Diffusion 2 at 768 pixels) or epsilon "
            "(2-base, at 512); v is assumed; `--prediction epsilon` samples or converts the other",
            where,
        )
        return "v_prediction"
    return "epsilon"


def yaml_beside(path: Path) -> str | None:
    """The YAML that lies beside a file, under its name, as its authors' programs look for it."""
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return None
    with beside.open("rb") as file:
        return file.read(1 << 20).decode("utf-8", "replace")
