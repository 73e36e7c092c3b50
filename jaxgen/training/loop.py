"""The one loop: every task, from its first step or from where it was stopped."""

import dataclasses
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxgen import flops, generate, sharding, trees
from jaxgen.data.pipeline import Loader
from jaxgen.denoiser import control_names
from jaxgen.load import read_params
from jaxgen.parts import PARTS
from jaxgen.training import agreement, metrics, optim, result, samples, setup, signals, together
from jaxgen.training.checkpoint import Checkpoints, memory_is_full
from jaxgen.training.placement import as_read, begin, compiled_once, resume
from jaxgen.training.recipe import Train, fields
from jaxgen.types import Params, UserError


def train(recipe: Train, progress: bool = True) -> Path | None:
    """Trains, or goes on with, what a recipe describes.

    Every process of a cluster calls this with the same recipe. Where one of them fails alone, all
    of them say so and end.

    Returns:
        The model folder; None if a signal (SIGTERM, Ctrl-C) stopped the run, which is saved.

    Raises:
        UserError: for what does not fit, before anything is compiled or written; for data that
            fail on the way, once the run is saved; for a full disk or device; and if the run
            diverges. The last checkpoint that was saved whole stays.
    """
    try:
        with signals.caught() as stopped:
            if finished(recipe):
                return recipe.out / "model"
            run = Run(recipe)
            with run.loader(), run.checkpoints, run.log(progress) as log, together.leaving():
                return run.finish() if run.learn(log, stopped) else None
    except metrics.Diverged as error:
        what = f"{error.name} is {error.value} at step {error.step}"
        advice = "a lower learning_rate or a longer warmup may help, in another folder (out)"
    except OSError as error:  # a full disk, most often
        what, advice = f"{recipe.out}: {error}", "once that is mended, the same command goes on"
    except jax.errors.JaxRuntimeError as error:
        if not memory_is_full(error):
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


@together.leaving()
def finished(recipe: Train) -> bool:
    """Whether nothing is left to do: the last step's model is there, whole."""
    checkpoints = _checkpoints(recipe)
    at_the_end = checkpoints.latest == recipe.steps
    done = at_the_end and result.step_of(recipe.out / "model") == recipe.steps
    agreement.check_one_view(recipe, checkpoints, done)
    past = agreement.past(recipe, checkpoints)
    together.ready()
    return past is not None and done


class Run:
    """What a run is made of; `first` is the step it begins, or goes on, after.

    In order: the last checkpoint, whose record must agree with the recipe; the mesh; the model and
    the task, of which no weights are read yet; the data and a first batch of them; and only then
    weights, and where everything lives on the mesh. Nothing is compiled but the optimizer's first
    state, and nothing is written.
    """

    @together.leaving()
    def __init__(self, recipe: Train) -> None:
        self.recipe, self.record = recipe, fields(recipe)
        self.model_folder = recipe.out / "model"
        self.checkpoints = _checkpoints(recipe)
        self.past = agreement.past(recipe, self.checkpoints)
        self.first = self.checkpoints.latest or 0
        self.mesh = sharding.training_mesh(*recipe.mesh.sizes)
        rows = setup.rows(recipe, self.mesh)
        result.check_place(self.model_folder, goes_on=self.past is not None)
        self.task, self.tensors = setup.open_task(recipe)
        self.data = self._open_data(rows)
        try:
            self.batch = self._next_batch()
            self._begin()
            self.step = compiled_once(recipe, self.task, self.transform, self.state, self.mesh)
        except BaseException:
            self.data.close()
            raise

    def _begin(self) -> None:
        """The state, restored or the first one, and what is frozen."""

        def initial() -> Params:
            layout = sharding.layout(self.mesh, self.recipe.mesh.specs)
            given = read_params(self.tensors, "f32", layout)
            params = self.task.init(jax.random.key(self.recipe.seed), given)
            together.ready()
            return params

        if self.past is None:
            found = begin(self.recipe, self.task, initial(), self.mesh)
        else:
            restore = partial(self.checkpoints.restore, self.first)
            found = resume(self.recipe, self.task, initial, self.mesh, restore)
        self.state, self.frozen, self.transform = found

    def _open_data(self, rows: list[int]) -> Loader:
        """The data, from the step on that comes next; a finished run sees its last batch again."""
        recipe = self.recipe
        data = Loader(
            setup.data_of(recipe, self.task),
            self.task.example,
            recipe.batch_size,
            recipe.seed,
            min(self.first, recipe.steps - 1),
            rows,
            self.past.get("skipped") if self.past else None,
        )
        agreement.check_one_order(data.fingerprint())
        if self.past:
            agreement.check_same_data(data.fingerprint(), self.past, self.checkpoints.folder)
        return data

    @contextmanager
    def loader(self) -> Iterator[None]:
        """Ends the threads that read data."""
        try:
            yield
        finally:
            self.data.close()

    @together.leaving()
    def log(self, progress: bool) -> metrics.Log:
        """Opens the metrics, and removes what a killed run left half-written."""
        recipe = self.recipe
        if jax.process_index() == 0:
            result.discard(self.model_folder)
        with jax.set_mesh(self.mesh):
            work = flops.count(self.step, self.state, self.frozen, self.batch)  # traces it for good
            needed = self._without_remat() if recipe.remat else work
            self.step.lower(self.state, self.frozen, self.batch).compile()
        generate.trim()  # what the compiler has freed, before the first step needs it
        return metrics.Log(
            recipe.out,
            recipe.steps,
            self.first,
            recipe.batch_size,
            work,
            needed,
            jax.devices(),
            progress=progress,
            writes=jax.process_index() == 0,
            every=recipe.log_every,
            resumed=self.past and self.past["log"],
        )

    def _without_remat(self) -> int:
        """Operations that the model needs: what blocks compute again is not among them."""
        recipe = dataclasses.replace(self.recipe, remat=False)
        task, _ = setup.open_task(recipe)
        step = compiled_once(recipe, task, self.transform, self.state, self.mesh)
        return flops.count(step, self.state, self.frozen, self.batch)

    def _next_batch(self) -> dict[str, jax.Array]:
        self.rows = next(self.data)
        return sharding.place_batch(self.rows, self.mesh)

    def learn(self, log: metrics.Log, stopped: threading.Event) -> bool:
        """Step by step to the end, which is saved like every stop; False if a signal stopped it."""
        together.ready()
        if stopped.is_set():  # while all was made ready: nothing is new
            return False
        recipe, first = self.recipe, self.recipe.profile[0]
        rate = optim.rate(recipe.optimizer, recipe.steps)
        profiler = metrics.Profiler(recipe.out, first, recipe.profile[1] - first + bool(first))
        for done in range(self.first + 1, recipe.steps + 1):
            profiler.before(done, self.state.step)
            with jax.set_mesh(self.mesh):
                self.state, values = self.step(self.state, self.frozen, self.batch)
            self.skipped = self.data.bad  # up to this step: the next batch is not of it
            values |= {"learning_rate": rate(done - 1)}
            values |= {"skipped": self.skipped} if self.skipped else {}
            failed = self._prepare_next(done)  # while the device works
            log.add(done, values)
            failed = together.meet(failed)

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
        together.ready()
        return done == recipe.steps

    def _prepare_next(self, done: int) -> UserError | None:
        """Reads the batch of the next step; what is wrong is returned, as a run is saved first."""
        try:
            if done < self.recipe.steps:
                self.batch = self._next_batch()
        except UserError as error:
            return error
        return None

    def save(self, log: metrics.Log, step: int) -> None:
        """A checkpoint, once all losses up to this step are seen to be finite."""
        with log.paused():
            record = {"recipe": self.record, "data": self.data.fingerprint(), "log": log.state()}
            self.checkpoints.save(step, self.state, {**record, "skipped": self.skipped})
            together.ready()

    def parameters(self) -> Params:
        """What is sampled and saved: averages where there are some, on the first host alone."""
        learned = self.state.averaged or self.state.learned

        def one(path: str, x: jax.Array) -> np.ndarray | None:
            whole = sharding.to_host(x)  # which all must call
            return whole if jax.process_index() == 0 else None

        return trees.map_with_path(one, trees.combine(learned, self.frozen))

    def sample(self, log: metrics.Log, step: int) -> None:
        """A grid of the recipe's prompts; one process makes it."""
        if not self.recipe.samples.prompts:
            return
        with log.paused():
            params = self.parameters()
            if jax.process_index() == 0:
                samples.show(log, step, self.task.model, params, self.recipe)

    def finish(self) -> Path:
        """The model folder."""
        params = self.parameters()
        if jax.process_index() == 0:
            learned = trees.flatten(self.state.learned)
            try:
                params = as_read(self.recipe, self.task, self.tensors, learned, params)
                batches = itertools.chain([self.rows], self.data)
                model = self.task.finished(self.task.model, params, batches, learned)
                names = (*PARTS, *control_names(len(model.controls)), "clip")
                parts = {name: params[name] for name in names if name in params}
                result.write(model, parts, self.model_folder, self.recipe.steps)
            except UserError as error:
                raise UserError(f"{error}; {self.checkpoints.kept()}") from None
        together.ready()
        return self.model_folder
