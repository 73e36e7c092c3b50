"""From a recipe to what its run begins with; what does not fit is said before weights are read."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import request, sharding, trees, zoo
from jaxgen.data.hints import fit
from jaxgen.data.images import read_image
from jaxgen.data.pipeline import Images
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES, open_model
from jaxgen.parts import PARTS
from jaxgen.request import Request
from jaxgen.tasks.base import Task, check_caches
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training import optim, patterns, together
from jaxgen.training import step as steps
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.recipe import Train, differences, fields
from jaxgen.training.step import State
from jaxgen.types import Params, UserError
from jaxgen.weights.files import Tensors


def past(recipe: Train, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The record of the checkpoint to go on from; None for a new run.

    Raises:
        UserError: for a checkpoint of another run, or of a later step than the last one wanted.
    """
    latest = checkpoints.latest
    if latest is None:
        return None
    record = checkpoints.record(latest)
    if not isinstance(record, dict) or not {"recipe", "data", "log"} <= record.keys():
        raise UserError(f"{checkpoints.folder} is of another program; name another folder (out)")
    if different := differences(record["recipe"], fields(recipe)):
        raise UserError(
            f"{checkpoints.folder} is of another run ({'; '.join(different)}): "
            "undo the change, or name another folder (out)"
        )
    if latest > recipe.steps:
        raise UserError(
            f"{checkpoints.folder} is at step {latest} already, beyond steps = {recipe.steps}: "
            f"ask for {latest} or more, or name another folder (out)"
        )
    return record


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
    check_learns(recipe, task, tensors)
    check_size(recipe, task.model)
    check_samples(recipe, task.model)
    check_caches(task, tensors, recipe.data)
    return task, tensors


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
        request.plan(model, Request(prompts=prompts, **sampling(recipe)))
    except UserError as error:
        raise UserError(f"samples: {error}") from None


def sampling(recipe: Train) -> dict[str, Any]:
    """How samples are drawn: the fields of a request, without its prompts."""
    wanted, size = recipe.samples, recipe.data.size
    hints = [fit(read_image(path), size, size, name=str(path)) for path in wanted.hints]
    hints *= len(wanted.prompts) if len(hints) == 1 else 1
    return {
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "seed": wanted.seed,
        "size": (size, size),
        "control": [np.stack(hints)] if hints else [],
    }


def data_of(recipe: Train, task: Task) -> Images:
    """The recipe's data, with what the task asks of them."""
    data, columns = recipe.data, dict.fromkeys((*recipe.data.columns, *task.columns))
    dropout = task.dropout if data.caption_dropout is None else data.caption_dropout
    return replace(data, columns=tuple(columns), caption_dropout=dropout)


def check_one_order(found: dict[str, Any]) -> None:
    """UserError, on every process, unless all of them read the same data in the same order.

    All of them must call it.
    """
    if other := together.other(found):
        raise UserError(
            f"processes 0 and {other} find different data: name a folder that all of them share, "
            "and look for files that one of them cannot read"
        )


def check_one_view(recipe: Train, checkpoints: Checkpoints, done: bool) -> None:
    """UserError, on every process, unless all of them do the same, and go on from the same step.

    All of them must call it. A folder may have another name for each of them.
    """
    same = {k: v for k, v in fields(recipe).items() if k != "out" and not k.startswith("data.")}
    if other := together.other(same):
        raise UserError(f"processes 0 and {other} are given different configs or options")
    if other := together.other([checkpoints.latest, done]):
        raise UserError(
            f"processes 0 and {other} find different checkpoints or models, here that of step "
            f"{checkpoints.latest} in {checkpoints.folder}: name a folder that all share (out)"
        )


def check_same_data(found: dict[str, Any], record: dict[str, Any], folder: Any) -> None:
    """UserError unless the data are those that a checkpoint's run saw."""
    different = _changes(record["data"], json.loads(json.dumps(found)))
    if different:
        raise UserError(
            f"the data are not those of {folder} ({'; '.join(different)}): "
            "bring them back, or name another folder (out)"
        )


def _changes(then: Any, now: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: "sources.0.length: 16, now 15"."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            change
            for key in dict.fromkeys([*then, *now])
            for change in _changes(
                then.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if then == now else [f"{name}: {then}, now {now}"]


def begin(recipe: Train, task: Task, params: Params, mesh: Mesh) -> tuple[State, Params, Any]:
    """The first state, what is frozen, and the optimizer; every array where it belongs."""
    learned, frozen = _placed(recipe, task, params, mesh)
    like, start, transform = _plan(recipe, learned, mesh)
    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(start, out_shardings=where)(learned), frozen, transform


def resume(
    recipe: Train,
    task: Task,
    initial: Callable[[], Params],
    mesh: Mesh,
    restore: Callable[[State], State],
) -> tuple[State, Params, Any]:
    """As `begin`, but the state is what `restore` makes of its shapes.

    What learned is let go of first: nothing is held twice.
    """
    learned, frozen = _placed(recipe, task, initial(), mesh)
    like, _, transform = _plan(recipe, learned, mesh)
    del learned
    return restore(like), frozen, transform


def _placed(recipe: Train, task: Task, params: Params, mesh: Mesh) -> tuple[Params, Params]:
    """What learns, and what is frozen, in the dtype of products."""
    layout = sharding.layout(mesh, recipe.mesh.specs)
    learns = lambda path: task.learns(path) and not optim.frozen(recipe.optimizer, path)  # noqa: E731
    learned, frozen = trees.split(params, learns)
    place = lambda path, x: jax.device_put(x, layout(path, x.shape))  # noqa: E731
    learned = trees.map_with_path(place, learned)
    dtype = DTYPES[recipe.dtype]
    return learned, trees.map_with_path(lambda path, x: place(path, x.astype(dtype)), frozen)


def _plan(recipe: Train, learned: Params, mesh: Mesh) -> tuple[State, Callable, Any]:
    """The state as shapes with shardings, what makes the first one, and the optimizer."""
    layout = sharding.layout(mesh, recipe.mesh.specs)
    whole = NamedSharding(mesh, PartitionSpec())
    transform = optim.build(recipe.optimizer, learned, recipe.steps)
    start = partial(steps.start, optimizer=transform, average=recipe.ema)
    shapes = jax.eval_shape(start, learned)
    kept = jax.tree.map(lambda x: x.sharding, learned)
    where = State(
        whole,  # type: ignore[arg-type]
        kept,
        optim.shardings(shapes.optimizer, learned, layout, whole),
        kept if recipe.ema else {},
    )
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(placed, shapes, where), start, transform


def as_read(
    recipe: Train,
    task: Task,
    tensors: Mapping[str, Tensors],
    learned: Mapping[str, Any],
    params: Params,
) -> Params:
    """The parameters, on the host, with what did not learn as the run read it, in float32.

    The networks had it in the recipe's dtype, which may hold less. `learned` is by path.
    """
    if recipe.dtype == "f32":
        return params
    given = {
        f"{part}/{path}": np.broadcast_to(np.float32(0), tensor.shape)  # which takes no memory
        if f"{part}/{path}" in learned
        else tensor.numpy().astype(np.float32)
        for part, of in tensors.items()
        for path, tensor in of.items()
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the others may be full
        first = task.init(jax.random.key(recipe.seed), trees.unflatten(given))
    kept, _ = trees.split(params, learned.__contains__)
    _, untouched = trees.split(first, learned.__contains__)
    return trees.combine(kept, untouched)


def compiled_once(recipe: Train, task: Task, transform: Any, state: State, mesh: Mesh) -> Any:
    """The step as one program, which takes its state's memory for the new one.

    To be called within `jax.set_mesh(mesh)`.
    """
    dtype, rules = DTYPES[recipe.dtype], recipe.mesh.specs
    step = steps.make(
        task, transform, recipe.ema, recipe.seed, dtype, recipe.accumulate, mesh, rules
    )
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))
