"""The one loop: every task, from its first step or from where it was stopped."""

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import flops, generate, sharding, trees, zoo
from jaxgen.data.images import grid
from jaxgen.data.pipeline import Loader
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES, PARTS, open_model, read_params
from jaxgen.save import save
from jaxgen.tasks.base import Task
from jaxgen.training import metrics, optim
from jaxgen.training import step as steps
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.recipe import Train, differences, fields
from jaxgen.training.step import State
from jaxgen.types import Params, UserError


def train(recipe: Train, progress: bool = True) -> Path | None:
    """Trains, or goes on with, what a recipe describes.

    In order: the model and the task; the mesh and where everything lives on it; the last
    checkpoint, whose record must agree with the recipe; the data from that step on; then step by
    step. Every process of a cluster calls this with the same recipe.

    Returns:
        The model folder; None if a signal (SIGTERM, Ctrl-C) stopped the run, which is saved.

    Raises:
        UserError: for what does not fit, before anything compiles; and if the run diverges.
    """
    run = Run(recipe)
    if run.first >= recipe.steps and (recipe.out / "model").exists():
        return recipe.out / "model"
    with run.loader(), run.log(progress) as log, _signals() as stopped:
        finished = run.learn(log, stopped)
        return run.finish(log) if finished else None


class Run:
    """What a run is made of; `first` is the step it begins, or goes on, at."""

    def __init__(self, recipe: Train) -> None:
        self.recipe = recipe
        self.mesh = sharding.training_mesh(**dataclasses.asdict(recipe.mesh))
        self.share = _share(recipe, self.mesh)
        self.task, params = open_task(recipe, sharding.layout(self.mesh))
        self.state, self.frozen, self.transform = begin(recipe, self.task, params, self.mesh)
        self.checkpoints = Checkpoints(recipe.out / "checkpoints", recipe.keep)
        self.record = fields(recipe)
        self.resumed: dict[str, Any] = {}  # sums of metrics since the last line
        self.read_from: dict[str, Any] | None = None  # the data of the checkpoint
        self.first = 0
        if (latest := self.checkpoints.latest) is not None:
            self._resume(latest)

    def _resume(self, latest: int) -> None:
        recorded = self.checkpoints.record(latest)
        different = differences(recorded["recipe"], self.record)
        if different:
            raise UserError(
                f"{self.checkpoints.folder} is of another run ({'; '.join(different)}); "
                "name another folder (out), or undo the change"
            )
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        self.state = self.checkpoints.restore(latest, like)
        self.first, self.resumed, self.read_from = latest, recorded["log"], recorded["data"]

    @contextmanager
    def loader(self) -> Iterator[None]:
        """The data, from the step on that comes next."""
        data = self.recipe.data
        columns = tuple(dict.fromkeys((*data.columns, *self.task.columns)))
        self.data = Loader(
            dataclasses.replace(data, columns=columns),
            self.task.example,
            self.recipe.batch_size,
            self.recipe.seed,
            self.first,
            *self.share,
        )
        try:
            found, then = self.data.fingerprint(), self.read_from
            if then is not None and then != found:
                names = [name for name in found if then.get(name) != found[name]]
                raise UserError(f"{self.checkpoints.folder} saw other data ({', '.join(names)})")
            yield
        finally:
            self.data.close()

    def log(self, progress: bool) -> metrics.Log:
        recipe = self.recipe
        self.batch = self._next_batch()
        self.step = compiled_once(recipe, self.task, self.transform, self.state)
        return metrics.Log(
            recipe.out,
            recipe.steps,
            self.first,
            recipe.batch_size,
            flops.count(self.step, self.state, self.frozen, self.batch),
            jax.devices(),
            progress=progress,
            writes=jax.process_index() == 0,
            every=recipe.log_every,
            resumed=self.resumed,
        )

    def _next_batch(self) -> dict[str, jax.Array]:
        self.rows = next(self.data)
        return sharding.place_batch(self.rows, self.mesh)

    def learn(self, log: metrics.Log, stopped: threading.Event) -> bool:
        """Step by step to the end, which is saved like every stop; False if a signal stopped it."""
        recipe, first = self.recipe, self.recipe.profile[0]
        rate = optim.rate(recipe.optimizer, recipe.steps)
        profiler = metrics.Profiler(recipe.out, first, recipe.profile[1] - first + bool(first))
        saved = self.first
        for done in range(self.first + 1, recipe.steps + 1):
            profiler.before(done, self.state.step)
            self.state, values = self.step(self.state, self.frozen, self.batch)
            if done < recipe.steps:
                self.batch = self._next_batch()  # while the device works
            log.add(done, values | {"learning_rate": rate(done - 1)})
            stops = stopped.is_set() or self.checkpoints.stops(done)
            if stops or done % recipe.save_every == 0 or done == recipe.steps:
                self.save(log, done)
                saved = done
            if done % recipe.samples.every == 0 or done == recipe.steps:
                self.sample(log, done)
            if stops and done < recipe.steps:
                break
        profiler.stop(self.state.step)
        self.checkpoints.close()
        return saved == recipe.steps

    def save(self, log: metrics.Log, step: int) -> None:
        """A checkpoint; never of a state that has diverged."""
        with log.paused():
            record = {"recipe": self.record, "data": self.data.fingerprint(), "log": log.state()}
            self.checkpoints.save(step, self.state, record)

    def parameters(self, where: sharding.Layout | None = None) -> Params:
        """What is sampled and saved: averages where there are some, on the host."""
        learned = self.state.averaged or self.state.learned
        return sharding.to_host(trees.combine(learned, self.frozen))

    def sample(self, log: metrics.Log, step: int) -> None:
        """A grid of the recipe's prompts; one process makes it."""
        wanted = self.recipe.samples
        if not wanted.prompts:
            return
        with log.paused():
            params = self.parameters()
            if jax.process_index() == 0:
                log.images(step, "samples", grid(_pictures(self.task.model, params, self.recipe)))

    def finish(self, log: metrics.Log) -> Path:
        """The model folder, all or nothing."""
        folder = self.recipe.out / "model"
        params = self.parameters()
        if jax.process_index() == 0:
            parts = {name: params[name] for name in PARTS}
            save(self.task.finished(self.task.model, params, self.rows), parts, folder)
        return folder


def open_task(recipe: Train, layout: sharding.Layout) -> tuple[Task, Params]:
    """The task, and every parameter of it where a layout says."""
    model, tensors = open_model(recipe.task.model)
    for part in recipe.task.fresh:
        if part not in PARTS:
            raise UserError(f"fresh: {part!r} is not one of {', '.join(PARTS)}")
        tensors[part] = zoo.fresh(getattr(model, part), part)
    task = recipe.task.build(model)
    if not any(task.learns(f"{part}/{path}") for part in tensors for path in tensors[part]):
        raise UserError(f"learn = {recipe.task.learn}: no parameter has such a path")
    given = read_params(tensors, "f32", layout)
    return task, task.init(jax.random.key(recipe.seed), given)


def begin(
    recipe: Train, task: Task, params: Params, mesh: jax.sharding.Mesh
) -> tuple[State, Params, Any]:
    """The first state, what is frozen, and the optimizer; every array where it belongs."""
    layout = sharding.layout(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    learns = lambda path: task.learns(path) and not optim.frozen(recipe.optimizer, path)  # noqa: E731
    optim.check(recipe.optimizer, [p for p in trees.flatten(params) if task.learns(p)])
    learned, frozen = trees.split(params, learns)
    place = lambda path, x: jax.device_put(x, layout(path, x.shape))  # noqa: E731
    learned = trees.map_with_path(place, learned)
    dtype = DTYPES[recipe.dtype]
    frozen = trees.map_with_path(lambda path, x: place(path, x.astype(dtype)), frozen)

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
    return jax.jit(start, out_shardings=where)(learned), frozen, transform


def compiled_once(recipe: Train, task: Task, transform: Any, state: State) -> Any:
    """The step as one program, which takes its state's memory for the new one."""
    step = steps.make(
        task, transform, recipe.ema, recipe.seed, DTYPES[recipe.dtype], recipe.accumulate
    )
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def _share(recipe: Train, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which part of a batch this process reads. UserError if the mesh does not divide the batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.batch_size % (ways * recipe.accumulate):
        raise UserError(
            f"batch_size {recipe.batch_size} in {recipe.accumulate} parts is not divisible by the "
            f"mesh's data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
        )
    return sharding.batch_share(mesh)


def _pictures(model: Model, params: Params, recipe: Train) -> np.ndarray:
    """uint8 [N, H, W, 3], a picture for each prompt, on this process' first device."""
    wanted = recipe.samples
    size = recipe.data.size
    return generate.sample(
        model,
        jax.device_put(params, jax.local_devices()[0]),
        list(wanted.prompts),
        steps=wanted.steps,
        guidance=wanted.guidance,
        seed=wanted.seed,
        size=(size, size),
        mesh=sharding.local_mesh(),
    )


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second Ctrl-C stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # On several processes SIGTERM is the runtime's, which lets all of them stop at one step.
    numbers = [signal.SIGINT, signal.SIGTERM][: 2 if jax.process_count() == 1 else 1]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
