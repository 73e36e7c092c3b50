"""`jaxgen seedselect`: pictures of a rare thing, from a few references and no training."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from jaxgen import generate, sharding, terminal
from jaxgen.commands import controls
from jaxgen.data.hints import Hint
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES, open_model, read_params
from jaxgen.output import identity, writing
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.types import UserError

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
TEMPLATE = "a photo of a {}"
AGAIN, GENTLE = 5, 0.02  # iterations and rate of a seed that starts from those found before
RATES = {"gaussian": 0.1, "nao": 0.05}


@dataclass(frozen=True)
class Seedselect:
    """Find the noise from which the model shows a rare thing, given 3 to 5 pictures of it.

    Nothing is trained: the noise is improved by the gradient through the whole sampler until its
    picture resembles the references in meaning (by a CLIP) and in appearance (by the autoencoder).

    jaxgen data emoji_scenes --subject hedgehog --count 5 --out hedgehogs    # rare to that model

    jaxgen seedselect "a hedgehog" --images hedgehogs --steps 10 --guidance 4

    jaxgen sample "a hedgehog" --latents seedselect/seed.npz --sampler ddim --steps 10 --guidance 4

    jaxgen seedselect "a {}" --images FOLDER_WITH_A_FOLDER_FOR_EACH_CLASS --count 20

    Writes 00000.png ..., grid.png and samples.jsonl as `jaxgen sample` does, with the loss and its
    parts, meaning and appearance, and the norm of the noise (1 is usual); strip.png, each picture
    as it improves; seed.npz, the noise of these pictures; and to seeds/ each for itself.
    Where the folder of references holds a folder for each class, so does the output, as a training
    folder with metadata.jsonl: the references and as many new pictures as bring every class to
    --count; stopped, it goes on by the same command, and by a larger --count it grows.
    """

    prompt: Annotated[Positional[str | None], tyro.conf.arg(metavar="[PROMPT]")] = None
    """What to show; where there are classes, a template: {} is the name of the class's folder."""
    images: Path | None = None
    """A folder of pictures of the thing, or one with a folder for each class."""
    model: str | None = None
    """A folder in the diffusers layout, a hub id, a single safetensors file, or fresh:NAME; by
    default the embedded model. Models that inpaint or edit serve in Python: seedselect.select."""
    variant: str = ""
    """Which of a folder's files to read, where it holds several: fp16, ..."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon, v_prediction or
    sample."""
    judge: Path | None = None
    """A folder of a CLIP, or of its image encoder; by default the model's own."""
    count: int = 1
    """Pictures to find; where there are classes, pictures of each in the end, references too."""
    iterations: int | None = None
    """Pictures looked at for each seed; 30 by default, 5 with --start nao or from seeds."""
    weight: float = 10 / 11
    """What the meaning counts, 0 to 1; the appearance counts the rest."""
    start: str = "gaussian"
    """Where seeds start: gaussian, noise; nao, near the noises that the references invert to; a
    file of seeds, to go on from; or a folder of them (OUT/seeds), near which the new ones begin:
    near those that were found for the same prompt. Where there are classes, gaussian is of the
    first picture of each alone; the others begin near those found."""
    variety: float = 0.3
    """Of new noise in a start near known ones (nao's, a folder's, a class's own), 0 to 1: the more,
    the more its picture differs from theirs, and the less surely it shows the thing. At 0, starts
    near a single one are all the same."""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """cosine, as in the released code, or euclidean, as in the paper, but over the root of the
    number of dimensions, so that --weight and --contrast count about as much."""
    contrast: float = 0.0
    """Where there are classes: weight of telling each from the others."""
    prior: float = 0.0
    """Weight of the likelihood of the noise's norm, which keeps it like noise."""
    subset: int = 0
    """References of which each picture is to be like, drawn for it; 0 is all."""
    rate: float | None = None
    """Learning rate; by default 0.1, 0.05 with --start nao, and 0.02 from seeds that were found (a
    file, a folder, or a class's own); from iteration 3 on a tenth."""
    patience: int = 10
    """Iterations in a row after which a seed is left alone, unless they gained a thousandth."""
    target: float | None = None
    """Loss at which a seed is good enough."""
    truncate: int = 0
    """Steps that the gradient passes through, the last ones; 0 is all."""
    remat: bool = False
    """Compute the inside of blocks again for the gradient: less memory, a third more work."""
    negative: str = ""
    """What to lead away from."""
    steps: int = 20
    """Steps of the sampler."""
    sampler: str = "ddim"
    """ddim, dpmpp, euler, pndm; or edict, exact both ways: memory does not grow with the steps, and
    the work doubles."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 7.5 by default, 1 (none) with --start nao."""
    seed: int = 0
    """Where picture i starts depends on (seed, i)."""
    batch: int | None = None
    """Seeds at once over all devices; by default one for each."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; by default the model's own."""
    control: Repeated = ()
    """A ControlNet and its hint, as of `jaxgen sample`."""
    control_range: Repeated = ()
    """Part of the run in which ControlNets act, as fractions: from,to."""
    dtype: str = "f32"
    """f32, or bf16 for accelerators."""
    out: Path = Path("seedselect")
    """Folder for the pictures and seeds; a folder in use is added to."""

    def run(self) -> None:
        """Checks everything, then compiles, then searches."""
        if self.images is None:
            raise UserError("--images is missing: a folder with a few pictures of the thing")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        terminal.use_compile_cache()
        with contextlib.ExitStack() as stack:
            with terminal.notices_after():
                work = self._prepared(stack)
            stack.enter_context(terminal.notices_at_once())
            work()

    def _prepared(self, stack: contextlib.ExitStack) -> Callable[[], None]:
        """The search, with all checked that can be before anything compiles.

        What it writes to is held until the stack is left.
        """
        from jaxgen import seedselect
        from jaxgen.seedselect import references

        assert self.images is not None  # checked
        how = self._search()
        classes = references.find_classes(self.images)
        inside, out = self.images.resolve(), self.out.resolve()
        if out == inside or inside in out.parents:
            raise UserError(
                f"--out {self.out} is in {self.images}, and would be taken for references"
            )
        wanted = controls.parse(self.control, self.control_range)
        refs = [ref for ref, _ in wanted] or None
        model, tensors = open_model(self.model, self.variant, self.prediction, control=refs)
        hints = [hint for _, hint in wanted]
        judge = seedselect.open_judge(self.judge, self.model, self.variant)
        if classes is not None:
            return self._many(model, tensors, hints, judge, how, classes)
        paths = references.find(self.images)
        return self._single(stack, model, tensors, hints, judge, how, paths)

    def _search(self) -> Any:
        from jaxgen.seedselect import Search

        quick = self.start != "gaussian"
        rate = RATES.get(self.start, GENTLE)
        return Search(
            iterations=(AGAIN if quick else 30) if self.iterations is None else self.iterations,
            weight=self.weight,
            distance=self.distance,
            contrast=self.contrast,
            prior=self.prior,
            learning_rate=rate if self.rate is None else self.rate,
            patience=self.patience,
            target=self.target,
            variety=self.variety,
            subset=self.subset,
            truncate=self.truncate,
            remat=self.remat,
        )

    def _request(self, prompts: list[str], count: int, hints: list[Hint]) -> Request:
        guidance = 1.0 if self.start == "nao" else 7.5
        return Request(
            prompts=prompts,
            negative=self.negative,
            steps=self.steps,
            sampler=self.sampler,
            guidance=guidance if self.guidance is None else self.guidance,
            seed=self.seed,
            count=count,
            batch=self.batch,
            size=terminal.read_size(self.size),
            control=hints,
        )

    def _single(
        self,
        stack: contextlib.ExitStack,
        model: Model,
        tensors: Any,
        hints: list[Hint],
        judge: Any,
        how: Any,
        paths: list[Path],
    ) -> Callable[[], None]:
        """One class: pictures and seeds in one folder."""
        from jaxgen.seedselect import checks, folder, references, selection, starts

        if self.prompt is None:
            raise UserError("no prompt is given; an empty one is written ''")
        if "{}" in self.prompt:
            raise UserError(f"{{}} is the name of a class, and {self.images} holds no classes")
        checked = plan(model, self._request([self.prompt], self.count, hints))
        pictures = references.read(paths, checked.size)
        settings = identity(model, checked, tensors, self.dtype)
        start = starts.named(self.start, checked, settings, how.variety)
        checks.check(checked, [pictures], how, judge, None, start)
        writer = stack.enter_context(writing(self.out, model, checked, self.dtype))

        def work() -> None:
            where = sharding.by_rules(generate.mesh_for(checked))
            params = read_params(tensors, self.dtype, where)
            found = selection.select(
                model, params, checked, [pictures], how,
                judge=judge, start=start, progress=True, frames=True,
            )  # fmt: skip
            made = {**self._made_with(), "weight": how.weight, "iterations": how.iterations}
            made["variety"] = how.variety
            writer.write(folder.kept(found, writer, settings | {"prompt": self.prompt}, made))
            shown = "1 picture is" if writer.count == 1 else f"{writer.count} pictures are"
            print(f"{shown} in {self.out}; see {self.out / 'strip.png'}, each as it improved")

        return work

    def _made_with(self) -> dict[str, Any]:
        """What a seed's file says of where it came from; it may be used elsewhere."""
        judge = "the model's own" if self.judge is None else str(self.judge)
        return {"judge": judge, "start": self.start}

    def _many(
        self,
        model: Model,
        tensors: Any,
        hints: list[Hint],
        judge: Any,
        how: Any,
        classes: dict[str, list[Path]],
    ) -> Callable[[], None]:
        """A folder of classes: a training folder of their references and new pictures."""
        from jaxgen.seedselect import checks, fewshot, references

        template = TEMPLATE if self.prompt is None else self.prompt
        prompts = fewshot.prompts(template, classes)
        most = max(0, *(self.count - len(paths) for paths in classes.values()))
        if not most:
            raise UserError(
                f"every class has --count {self.count} references already; ask for more"
            )
        if self.start not in ("gaussian", "nao"):
            raise UserError(
                f"--start {self.start}: for classes it is gaussian or nao; gaussian ones go on "
                "from their own seeds"
            )
        checked = plan(model, self._request(prompts, most, hints))
        pictures = {name: references.read(paths, checked.size) for name, paths in classes.items()}
        checks.check(checked, list(pictures.values()), how, judge, None, self.start)
        fewer, gentle = min(AGAIN, how.iterations), GENTLE if self.rate is None else self.rate
        again = dataclasses.replace(how, iterations=fewer, learning_rate=gentle)
        settings = identity(model, checked, tensors, self.dtype)
        dataset = fewshot.Dataset(
            self.out, model, checked, pictures, how, again, self.count, settings,
            judge_weights=judge.fingerprint(), **self._made_with(),
        )  # fmt: skip

        def work() -> None:
            where = sharding.by_rules(generate.mesh_for(checked))
            params = read_params(tensors, self.dtype, where)
            dataset.fill(params, judge, self.start)
            print(f"{dataset.count} pictures of {len(classes)} classes are in {self.out}")

        return work
