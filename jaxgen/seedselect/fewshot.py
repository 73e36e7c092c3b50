"""Few pictures of each class -> a training folder in which all classes have as many."""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import config, locks
from jaxgen.data import images
from jaxgen.denoiser import Model
from jaxgen.output import identity
from jaxgen.request import Plan
from jaxgen.seedselect import references, seeds, selection, starts
from jaxgen.seedselect.references import References
from jaxgen.seedselect.search import Search
from jaxgen.types import Params, UserError

LIST = "metadata.jsonl"
SETTINGS = "settings.json"
SEEDS = "seeds"
FREE = ("remat",)  # fields of a search that change no picture


def prompts(template: str, classes: Iterable[str]) -> list[str]:
    """The prompt of each class: its name, `_` and `-` as spaces, in a template."""
    if "{}" not in template:
        raise UserError(
            f"the prompt {template!r} has no {{}} for the class's name, as in 'a photo of a {{}}'"
        )
    return [template.replace("{}", re.sub(r"[\s_-]+", " ", name).strip()) for name in classes]


class Dataset:
    """A folder for each class with its references and what was found, and one list of them all.

    A line of the list comes after its picture and seed, so that a run that is stopped goes on where
    the list ends. Where a seed starts depends on its class, its number and the first seed of its
    class.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        checked: Plan,
        pictures: Mapping[str, Sequence[np.ndarray]],
        how: Search,
        count: int,
        dtype: str = "f32",
        **made_with: Any,
    ):
        """Makes the folder, or goes on in it.

        Args:
            checked: a prompt for each class; its count is at least that of seeds of any class.
            pictures: the references of each class by name, uint8 [H, W, 3].
            how: the search for the first seed of each class.
            count: pictures of each class in the end, references included.
            made_with: what else must be the same where a run goes on.

        Raises:
            UserError: where nothing can be written, or what is there was made by other settings.
        """
        if bad := {LIST, SETTINGS, SEEDS} & set(pictures):
            raise UserError(f"a class cannot be called {min(bad)}, as a part of {folder} is")
        self.folder, self.model, self.checked = folder, model, checked
        self.names, self.pictures, self.how = list(pictures), list(pictures.values()), how
        self.total, self.identity = count, identity(model, checked, dtype)
        request = checked.request
        wanted = {
            **self.identity,
            "seed": request.seed,
            "size": list(checked.size),
            "prompts": list(request.prompts),
            "count": count,
            "references": [_digest(rows) for rows in self.pictures],
            **{k: str(v) for k, v in vars(how).items() if k not in FREE},
            **made_with,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = locks.hold(folder, "--out")
            try:
                self._begin(wanted)
                self.done = self._listed()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None

    def close(self) -> None:
        """Lets other runs write to the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @property
    def count(self) -> int:
        """Pictures in the list."""
        return len(self.done)

    def _begin(self, wanted: dict[str, Any]) -> None:
        """Writes the settings, or compares them with those of the pictures that are there."""
        where, begun = self.folder / SETTINGS, (self.folder / LIST).exists()
        if begun and where.exists():
            held = config.read_json(where)
            for name, value in wanted.items():
                if held.get(name) != value:
                    raise UserError(
                        f"{self.folder} was begun with {name} = {held.get(name)} (now {value}); "
                        "use the same, or another --out"
                    )
        elif any(p for p in self.folder.iterdir() if p != where):
            raise UserError(f"{self.folder} holds other files; name a new folder (--out)")
        config.write_json(where, wanted)

    def _listed(self) -> set[str]:
        """The pictures of the list; a line that was cut off is cut away."""
        where, found = self.folder / LIST, set[str]()
        if not where.exists():
            return found
        whole, _, rest = where.read_text("utf-8").rpartition("\n")
        if rest:
            where.write_text(whole + "\n" * bool(whole), "utf-8")
        for line in whole.splitlines():
            try:
                found.add(json.loads(line)["file_name"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{where} has a line that is none of ours: {line[:60]}") from None
        return found

    def fill(
        self, params: Params, again: Search, judge: selection.Judge, start: selection.Start
    ) -> None:
        """Copies the references; finds the first seed of each class, then others near it.

        Args:
            again: the shorter search for seeds that start from the first.
            start: of first seeds, "gaussian" or "nao".
        """
        try:
            self._copy()
            left = self._left()
            if not left:
                return
            meaning = selection.meaning_by(judge, self.how)
            known = [
                references.encode(self.model, params, rows, self.checked.size, meaning)
                for rows in self.pictures
            ]
            count = self.checked.request.count
            first, rest = ([i for i in left if bool(i % count) == late] for late in (False, True))
            self._find(params, known, self.how, judge, start, first)
            self._find(params, known, again, judge, self._near(), rest)
        finally:
            self.close()

    def _copy(self) -> None:
        for mine, rows in enumerate(self.pictures):
            (self.folder / self.names[mine]).mkdir(exist_ok=True)
            (self.folder / SEEDS / self.names[mine]).mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(rows[: self.total]):
                fitted = references.fit(picture, *self.checked.size)
                more = {"origin": "reference"}
                self._add(mine, f"reference_{number:05}.png", fitted, "a reference", more)

    def _left(self) -> list[int]:
        """Indices of the plan that are yet to be found."""
        count = self.checked.request.count
        return [
            mine * count + number
            for mine, rows in enumerate(self.pictures)
            for number in range(max(0, self.total - len(rows)))
            if f"{self.names[mine]}/{number:05}.png" not in self.done
        ]

    def _near(self) -> Callable[[int], np.ndarray]:
        """Starts near the first seed of a class."""
        request, shape = self.checked.request, self.checked.latent_shape

        def start(index: int) -> np.ndarray:
            mine, number = divmod(index, request.count)
            file = self.folder / SEEDS / self.names[mine] / "00000.npz"
            held = seeds.read(file, shape, self.identity)
            return starts.spread(held, request.seed, number)

        return start

    def _find(
        self,
        params: Params,
        known: list[References],
        how: Search,
        judge: selection.Judge,
        start: selection.Start,
        wanted: list[int],
    ) -> None:
        if not wanted:
            return
        request = self.checked.request
        for found in selection.select(
            self.model, params, self.checked, known, how,
            judge=judge, start=start, only=wanted, progress=True,
        ):  # fmt: skip
            mine, number = divmod(found.index, request.count)
            prompt = request.prompts[mine]
            name = f"{SEEDS}/{self.names[mine]}/{number:05}.npz"
            about = {"prompt": prompt, "loss": found.loss}
            seeds.write(self.folder / name, found.seed[None], self.identity | about)
            more: dict[str, Any] = {"latents": name, "loss": round(found.loss, 6)}
            text = images.parameters_text(
                prompt, request.negative, request.steps, self.identity["sampler"],
                request.guidance, request.seed, self.checked.size, self.identity["model"],
                index=number, **more,
            )  # fmt: skip
            more = {"origin": "seedselect", "index": number, **more}
            self._add(mine, f"{number:05}.png", found.image, text, more)

    def _add(
        self, mine: int, file: str, picture: np.ndarray, text: str, more: dict[str, Any]
    ) -> None:
        name, prompt = f"{self.names[mine]}/{file}", self.checked.request.prompts[mine]
        if name in self.done:
            return
        images.save_png(self.folder / name, picture, text)
        line = {"file_name": name, "text": prompt, "class": self.names[mine], **more}
        with (self.folder / LIST).open("a", encoding="utf-8") as list_file:
            list_file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done.add(name)


def _digest(pictures: Sequence[np.ndarray]) -> str:
    """What tells references from others."""
    return f"{len(pictures)}: {zlib.crc32(b''.join(p.tobytes() for p in pictures)):08x}"
