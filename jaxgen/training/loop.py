"""The one loop: every task, from its first step or from where it was stopped."""

import dataclasses
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from jaxgen import flops, generate, sharding, trees
from jaxgen.data.images import grid
from jaxgen.data.pipeline import Loader
from jaxgen.denoiser import Model
from jaxgen.load import PARTS, read_params
from jaxgen.training import metrics, optim, result, setup, signals
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.recipe import Train, fields
from jaxgen.training.setup import begin, compiled_once
from jaxgen.types import Params, UserError

logger = logging.getLogger(__name__)


def train(recipe: Train, progress: bool = True) -> Path | None:
    """Trains, or goes on with, what a recipe describes.

    Every process of a cluster calls this with the same recipe. Where one of them fails alone, it
    says so, and the runtime ends them all once it misses it, after minutes.

    Returns:
        The model folder; None if a signal (SIGTERM, Ctrl-C) stopped the run, which is saved.

    Raises:
        UserError: for what does not fit, before anything is compiled or written; for data that
            fail on the way, once the run is saved; for a full disk or device; and if the run
            diverges. The last checkpoint that was saved whole stays.
    """
    if finished(recipe):
        return recipe.out / "model"
    try:
        run = Run(recipe)
        with run.loader(), run.checkpoints, run.log(progress) as log, signals.caught() as stopped:
            return run.finish() if run.learn(log, stopped) else None
    except metrics.Diverged as error:
        what = f"{error.name} is {error.value} at step {error.step}"
        advice = "a lower learning_rate or a longer warmup may help, in another folder (out)"
    except OSError as error:  # a full disk, most often
        what, advice = f"{recipe.out}: {error}", "once that is mended, the same command goes on"
    except jax.errors.JaxRuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        what = "the devices have too little memory"
        advice = "a lower batch_size, or a higher accumulate or mesh.fsdp needs less"
    last = _checkpoints(recipe).latest
    kept = "no checkpoint yet"
    if last is not None:
        kept = f"the checkpoint of step {last} is whole (steps = {last} makes a model of it)"
    raise UserError(f"{what}; {kept}; {advice}")


def _checkpoints(recipe: Train) -> Checkpoints:
    return Checkpoints(recipe.out / "checkpoints", recipe.keep)


def finished(recipe: Train) -> bool:
    """Whether nothing is left to do: the last step's model is there, whole."""
    checkpoints = _checkpoints(recipe)
    past = setup.past(recipe, checkpoints)
    at_the_end = past is not None and checkpoints.latest == recipe.steps
    return at_the_end and result.step_of(recipe.out / "model") == recipe.steps


class Run:
    """What a run is made of; `first` is the step it begins, or goes on, after.

    In order: the last checkpoint, whose record must agree with the recipe; the mesh; the model and
    the task, of which no weights are read yet; the data and a first batch of them; and only then
    weights, and where everything lives on the mesh. Nothing is compiled but the optimizer's first
    state, and nothing is written.
    """

    def __init__(self, recipe: Train) -> None:
        self.recipe, self.record = recipe, fields(recipe)
        self.model_folder = recipe.out / "model"
        self.checkpoints = _checkpoints(recipe)
        self.past = setup.past(recipe, self.checkpoints)
        self.first = self.checkpoints.latest or 0
        self.mesh = sharding.training_mesh(**dataclasses.asdict(recipe.mesh))
        share = setup.share(recipe, self.mesh)
        result.check_place(self.model_folder, goes_on=self.past is not None)
        self.task, tensors = setup.open_task(recipe)
        self.data = self._open_data(share)
        try:
            self.batch = self._next_batch()
            given = read_params(tensors, "f32", sharding.layout(self.mesh))
            params = self.task.init(jax.random.key(recipe.seed), given)
            self.state, self.frozen, self.transform = begin(recipe, self.task, params, self.mesh)
            if self.past:
                like = jax.tree.map(_shape, self.state)
                self.state = self.checkpoints.restore(self.first, like)
            self.step = compiled_once(recipe, self.task, self.transform, self.state, self.mesh)
        except BaseException:
            self.data.close()
            raise

    def _open_data(self, share: tuple[int, int]) -> Loader:
        """The data, from the step on that comes next; a finished run sees its last batch again."""
        recipe = self.recipe
        columns = tuple(dict.fromkeys((*recipe.data.columns, *self.task.columns)))
        data = Loader(
            dataclasses.replace(recipe.data, columns=columns),
            self.task.example,
            recipe.batch_size,
            recipe.seed,
            min(self.first, recipe.steps - 1),
            *share,
        )
        if self.past:
            setup.check_same_data(data.fingerprint(), self.past, self.checkpoints.folder)
        return data

    @contextmanager
    def loader(self) -> Iterator[None]:
        """Ends the threads that read data."""
        try:
            yield
        finally:
            self.data.close()

    def log(self, progress: bool) -> metrics.Log:
        """Opens the metrics, and removes what a killed run left half-written."""
        recipe = self.recipe
        if jax.process_index() == 0:
            result.discard(self.model_folder)
        with jax.set_mesh(self.mesh):
            work = flops.count(self.step, self.state, self.frozen, self.batch)  # traces it for good
            self.step.lower(self.state, self.frozen, self.batch).compile()
        generate.trim()  # what the compiler has freed, before the first step needs it
        return metrics.Log(
            recipe.out,
            recipe.steps,
            self.first,
            recipe.batch_size,
            work,
            jax.devices(),
            progress=progress,
            writes=jax.process_index() == 0,
            every=recipe.log_every,
            resumed=self.past and self.past["log"],
        )

    def _next_batch(self) -> dict[str, jax.Array]:
        self.rows = next(self.data)
        return sharding.place_batch(self.rows, self.mesh)

    def learn(self, log: metrics.Log, stopped: threading.Event) -> bool:
        """Step by step to the end, which is saved like every stop; False if a signal stopped it."""
        recipe, first = self.recipe, self.recipe.profile[0]
        rate = optim.rate(recipe.optimizer, recipe.steps)
        profiler = metrics.Profiler(recipe.out, first, recipe.profile[1] - first + bool(first))
        for done in range(self.first + 1, recipe.steps + 1):
            profiler.before(done, self.state.step)
            with jax.set_mesh(self.mesh):
                self.state, values = self.step(self.state, self.frozen, self.batch)
            failed = self._prepare_next(done)  # while the device works
            log.add(done, values | {"learning_rate": rate(done - 1)})

            ends = done == recipe.steps
            stops = failed or stopped.is_set() or self.checkpoints.stops(done)
            if stops or ends or done % recipe.save_every == 0:
                self.save(log, done)
            self.checkpoints.look()
            if ends or done % recipe.samples.every == 0:
                self.sample(log, done)
            if failed:
                raise failed
            if stops and not ends:
                break
        else:
            done = recipe.steps
        profiler.stop(self.state.step)
        self.checkpoints.wait()
        return done == recipe.steps

    def _prepare_next(self, done: int) -> UserError | None:
        """Reads the batch of the next step. What is wrong with the data is returned.

        So that a run is saved first. Of several processes only one may know: that one raises.
        """
        try:
            if done < self.recipe.steps:
                self.batch = self._next_batch()
        except UserError as error:
            if jax.process_count() > 1:
                raise
            return error
        return None

    def save(self, log: metrics.Log, step: int) -> None:
        """A checkpoint, once all losses up to this step are seen to be finite."""
        with log.paused():
            record = {"recipe": self.record, "data": self.data.fingerprint(), "log": log.state()}
            self.checkpoints.save(step, self.state, record)

    def parameters(self) -> Params:
        """What is sampled and saved: averages where there are some, on the host."""
        learned = self.state.averaged or self.state.learned
        return sharding.to_host(trees.combine(learned, self.frozen))

    def sample(self, log: metrics.Log, step: int) -> None:
        """A grid of the recipe's prompts; one process makes it."""
        if not self.recipe.samples.prompts:
            return
        with log.paused():
            params = self.parameters()
            if jax.process_index() == 0:
                try:
                    pictures = _pictures(self.task.model, params, self.recipe)
                except UserError as error:  # no reason to stop
                    logger.warning("no samples of step %d: %s", step, error)
                else:
                    log.images(step, "samples", grid(pictures))

    def finish(self) -> Path:
        """The model folder."""
        params = self.parameters()
        if jax.process_index() == 0:
            model = self.task.finished(self.task.model, params, self.rows)
            parts = {name: params[name] for name in (*PARTS, "clip") if name in params}
            try:
                result.write(model, parts, self.model_folder, self.recipe.steps)
            except UserError as error:
                raise UserError(f"{error}; {self.checkpoints.kept()}") from None
        return self.model_folder


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _pictures(model: Model, params: Params, recipe: Train) -> np.ndarray:
    """uint8 [N, H, W, 3], a picture for each prompt, on this process' first device."""
    return generate.sample(
        model,
        jax.device_put(params, jax.local_devices()[0]),
        list(recipe.samples.prompts),
        mesh=sharding.local_mesh(),
        **setup.sampling(recipe),
    )
