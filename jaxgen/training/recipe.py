"""A recipe: everything that a training run is made of, in one typed value.

A file of `configs/` states one, and options of the command change it:

    jaxgen train configs/mini.py --steps 500 --optimizer.learning-rate 3e-4
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgen import sharding
from jaxgen.data.pipeline import Images
from jaxgen.tasks.autoencoder import Autoencoder
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.controlnet import ControlNet
from jaxgen.tasks.denoising import Editing, Inpainting, TextToImage
from jaxgen.training import patterns
from jaxgen.training.ema import EMA
from jaxgen.training.optim import Adafactor, AdamW, Lion, Muon
from jaxgen.types import UserError


@dataclass(frozen=True)
class Mesh:
    """How many devices do what; one number may be -1, the rest."""

    data: int = -1
    """Copies of the model; each takes a share of the batch."""
    fsdp: int = 1
    """Shares into which parameters, moments and averages are split; each takes a share, too."""
    tensor: int = 1
    """Shares into which each product is split."""
    rules: tuple[tuple[str, str], ...] = ()
    """Pattern of paths, and what splits each dimension there ("kernel$" ". . fsdp tensor"; a dot,
    nothing; the first that fits decides), where shares are not to be as they are by default."""

    def __post_init__(self) -> None:
        pairs = isinstance(self.rules, tuple) and all(
            isinstance(rule, tuple) and [*map(type, rule)] == [str, str] for rule in self.rules
        )
        if not pairs:
            raise UserError(
                f"rules = {self.rules!r} is not of pairs, as in (('kernel$', '. . fsdp tensor'),)"
            )
        patterns.check_written("rules", tuple(pattern for pattern, _ in self.rules))
        _ = self.specs

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the axes, in the order of `sharding.AXES`."""
        return self.data, self.fsdp, self.tensor

    @property
    def specs(self) -> sharding.Rules:
        """The rules, read."""
        return tuple((pattern, sharding.spec(axes)) for pattern, axes in self.rules)


@dataclass(frozen=True)
class Samples:
    """Pictures on the way, from the same prompts and seeds each time."""

    prompts: tuple[str, ...] = ()
    """None, none."""
    every: int = 1000
    """Steps from one grid to the next; one more is made in the end."""
    steps: int = 30
    """Steps of the sampler."""
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
    seed: int = 0
    """Of the first picture; it is the same for every grid."""
    hints: tuple[str, ...] = ()
    """What a ControlNet follows, one for each prompt, or one for all: picture files, with an
    annotator before those that are yet to be drawn, as in canny:photo.png or labels:map.png."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every = {self.every} is not a whole number from 1")


@dataclass(frozen=True)
class Train:
    """Train a model; a run that was stopped goes on where its last checkpoint was made."""

    task: TextToImage | Inpainting | Editing | ControlNet | Autoencoder | Contrastive
    """What is learned, and from what model."""
    data: Images
    """Pictures and captions."""
    optimizer: AdamW | Adafactor | Lion | Muon = field(default_factory=AdamW)
    """How it learns."""
    steps: int = 1000
    """Updates in all."""
    batch_size: int = 8
    """Examples of an update, over all devices."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, to save memory."""
    seed: int = 0
    """Of fresh parameters, the order of the data, noise and times."""
    ema: EMA | None = None
    """The average of parameters over steps, which is sampled and saved in their stead."""
    dtype: str = "f32"
    """f32 or bf16, in which the networks compute; parameters that learn stay float32."""
    remat: bool = False
    """Compute blocks again in the backward pass instead of keeping what they made."""
    mesh: Mesh = Mesh()
    """How devices share the work."""
    out: Path = Path("runs/train")
    """Folder for checkpoints, metrics, samples, and the model in the end."""
    save_every: int = 1000
    """Steps from one checkpoint to the next; one more is made in the end."""
    keep: int = 2
    """Checkpoints that are kept, the last ones."""
    log_every: int = 10
    """Steps that a line of metrics stands for."""
    samples: Samples = Samples()
    """Pictures on the way."""
    profile: tuple[int, int] = (0, 0)
    """First and last step of a trace for jax's profiler, e.g. 10 13; none by default."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is not a whole number from 1")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}"
            )
        if self.dtype not in ("f32", "bf16"):
            raise UserError(f"dtype = {self.dtype!r} is not one of f32, bf16")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} is not within 0 to 4294967295")
        first, last = self.profile
        if not (0 < first <= last or first == last == 0):
            raise UserError(f"profile = {first} {last} is not a first and a last step, from 1")


# What may differ from the run that is gone on with: it changes nothing that was learned. Of `steps`
# a schedule may depend that has an end; it then goes on as if it had always been as long. Data may
# be moved: what they are, their fingerprint tells.
FREE = (
    "steps accumulate remat mesh out save_every keep log_every samples profile "
    "data.source data.workers data.threads data.bad_share"
).split()


def fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe as one flat object for JSON: `optimizer.learning_rate` and so on."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        name, inner = prefix + item.name, getattr(value, item.name)
        if dataclasses.is_dataclass(inner):
            flat[name] = type(inner).__name__
            flat |= fields(inner, f"{name}.")
        else:
            flat[name] = _listed(inner)
    return flat


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_listed(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two runs differ in, beyond what may differ: "seed: 0, now 1"."""
    # The parts of a batch are all that the examples of a contrastive loss are compared with.
    skipped = [name for name in FREE if name != "accumulate" or new["task"] != "Contrastive"]
    found = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) == new.get(name) or _within(name, skipped):
            continue
        found.append(f"{name}: {old.get(name)}, now {new.get(name)}")
        skipped.append(name)  # of a part that is another, the fields say no more
    return found


def _within(name: str, names: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)
