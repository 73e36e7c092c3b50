"""From a recipe to its task and its data; what does not fit is said before weights are read."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen import sharding, trees, zoo
from jaxgen.data.hints import read as read_hint
from jaxgen.data.pipeline import Images
from jaxgen.denoiser import Model
from jaxgen.load import open_model
from jaxgen.parts import PARTS
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.tasks.base import Task, check_caches
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.controlnet import ControlNet
from jaxgen.training import optim, patterns
from jaxgen.training.recipe import Train
from jaxgen.types import UserError
from jaxgen.weights.files import Tensors


def rows(recipe: Train, mesh: Mesh) -> list[int]:
    """The rows of a batch that this process reads. UserError if the mesh does not divide it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.batch_size % (ways * recipe.accumulate):
        parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
        raise UserError(
            f"batch_size {recipe.batch_size}{parts} is not divisible by the {ways} devices that "
            f"share it (mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
        )
    return sharding.batch_rows(mesh, recipe.batch_size)


def open_task(recipe: Train) -> tuple[Task, dict[str, Tensors]]:
    """The task, and the tensors that it starts from, of which no values are read yet.

    Raises:
        UserError: for a model that cannot be opened, and for parts, patterns, sizes and samples
            that do not fit it.
    """
    wanted = recipe.task
    prediction = getattr(wanted, "prediction", None)
    control = [ref for ref in (getattr(wanted, "control", ""),) if ref]  # no folder's own
    model, tensors = open_model(wanted.model, "", prediction, recipe.seed, control)
    for part in wanted.fresh:
        if part not in PARTS:
            raise UserError(f"task.fresh: {part!r} is not one of {', '.join(PARTS)}")
        tensors[part] = zoo.fresh(getattr(model, part), part, recipe.seed)
    networks = {part: replace(getattr(model, part), remat=recipe.remat) for part in PARTS}
    task = wanted.build(replace(model, **networks))
    if isinstance(wanted, ControlNet):
        check_base(wanted)
    check_learns(recipe, task, tensors)
    check_size(recipe, task.model)
    check_samples(recipe, task.model)
    check_caches(task, tensors, recipe.data)
    return task, tensors


def check_base(task: ControlNet) -> None:
    """UserError for a ControlNet's base that has learned nothing, and never will."""
    if "unet" in task.fresh or task.model.startswith(zoo.PREFIX):
        raise UserError(
            "task.model: a ControlNet learns beside a base that stays as it is, and this one is "
            "random; name one that is trained (--task.model FOLDER)"
        )


def check_learns(recipe: Train, task: Task, tensors: Mapping[str, Tensors]) -> None:
    """UserError for patterns that decide nothing, and where they leave nothing to learn."""
    given = {
        part: trees.unflatten({p: jax.ShapeDtypeStruct(t.shape, "float32") for p, t in of.items()})
        for part, of in tensors.items()
    }
    paths = [*trees.flatten(jax.eval_shape(task.init, jax.random.key(0), given))]
    for pattern in recipe.task.learn:
        if not any(re.match(pattern, path) for path in paths):
            tops = list(dict.fromkeys(path.split("/")[0] + "/" for path in paths))
            close = difflib.get_close_matches(pattern, tops, 1)
            hint = f"perhaps {close[0]}?" if close else f"paths begin with {', '.join(tops)}"
            raise UserError(f"task.learn: {pattern!r} fits no parameter; {hint}")
    left = paths
    for pattern, _ in recipe.mesh.rules:
        patterns.check_reach("mesh.rules", pattern, left)
        left = [path for path in left if not patterns.fits(pattern, path)]
    learns = [path for path in paths if task.learns(path)]
    optim.check(recipe.optimizer, learns)
    if all(optim.frozen(recipe.optimizer, path) for path in learns):
        raise UserError("nothing learns: task.learn and optimizer.rates leave no parameter")


def check_size(recipe: Train, model: Model) -> None:
    """UserError for pictures that the networks cannot take."""
    data, task = recipe.data, recipe.task
    if isinstance(task, Contrastive):
        if data.buckets or data.size != task.image_size:
            raise UserError(
                f"data.size {data.size}{' in buckets' * data.buckets} is not the one size that the "
                f"image encoder reads, task.image_size {task.image_size}"
            )
        return
    name = "bucket_step" if data.buckets else "size"
    side, f = getattr(data, name), model.factor
    if side % f:
        near = max(f, side // f * f)
        raise UserError(f"data.{name} {side} is not divisible by the VAE's {f}; {near} is")


def check_samples(recipe: Train, model: Model) -> None:
    """UserError for samples that could not be made once it is time."""
    if recipe.samples.hints and not model.controls:
        raise UserError("samples.hints have no effect: the task has no ControlNet")
    if not recipe.samples.prompts:
        return
    if model.unet.config.in_channels != model.vae.config.latent_channels:
        raise UserError(
            "samples.prompts: this model draws from a picture, too; leave them out, and sample "
            "the model folder in the end (jaxgen sample --image)"
        )
    prompts, hints = recipe.samples.prompts, recipe.samples.hints
    if model.controls and len(hints) not in (1, len(prompts)):
        raise UserError(
            f"samples.hints: {len(hints)} for {len(prompts)} prompts of a ControlNet; "
            "name one picture file for each, or one for all"
        )
    try:
        plan(model, Request(prompts=prompts, **sampling(recipe)))
    except UserError as error:
        raise UserError(f"samples: {error}") from None


def sampling(recipe: Train) -> dict[str, Any]:
    """How samples are drawn: the fields of a request, without its prompts."""
    wanted, size = recipe.samples, recipe.data.size
    hints = [_hint(text, size) for text in wanted.hints]
    hints *= len(wanted.prompts) if len(hints) == 1 else 1
    return {
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "seed": wanted.seed,
        "size": (size, size),
        "control": [np.stack(hints)] if hints else [],
    }


def _hint(text: str, size: int) -> np.ndarray:
    """uint8 [size, size, 3], of a hint that a recipe names."""
    try:
        hint = read_hint(str(text))
        hint.check(1)
        if hint.scale != 1:
            raise UserError(f"{text}: samples follow hints at a scale of 1")
        return hint.at(size, size).picture
    except UserError as error:
        raise UserError(f"samples.hints: {error}") from None


def data_of(recipe: Train, task: Task) -> Images:
    """The recipe's data, with what the task asks of them."""
    data, columns = recipe.data, dict.fromkeys((*recipe.data.columns, *task.columns))
    dropout = task.dropout if data.caption_dropout is None else data.caption_dropout
    return replace(data, columns=tuple(columns), caption_dropout=dropout)
