"""Few pictures of each class -> a training folder in which all classes have as many."""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import config, locks
from jaxgen.data import images
from jaxgen.data.folder import METADATA, add_line
from jaxgen.denoiser import Model
from jaxgen.plan import Plan
from jaxgen.seedselect import references, seeds, selection, starts
from jaxgen.seedselect.judges import Judge, meaning_by
from jaxgen.seedselect.references import References
from jaxgen.seedselect.search import Search
from jaxgen.types import Params, UserError

SETTINGS = "settings.json"
SEEDS = "seeds"
FREE = ("remat",)  # fields of a search that change no picture


def prompts(template: str, classes: Iterable[str]) -> list[str]:
    """The prompt of each class: its name, `_` and `-` as spaces, in a template."""
    if "{}" not in template:
        raise UserError(
            f"the prompt {template!r} has no {{}} for the class's name, as in 'a photo of a {{}}'"
        )
    made: dict[str, str] = {}
    for name in classes:
        prompt = template.replace("{}", re.sub(r"[\s_-]+", " ", name).strip())
        if prompt in made:
            raise UserError(f"the classes {made[prompt]} and {name} have one prompt, {prompt!r}")
        made[prompt] = name
    return list(made)


class Dataset:
    """A folder for each class with its references and what was found, and one list of them all.

    A line of the list comes after its picture and seed, so that a run that is stopped goes on where
    the list ends, and a folder grows by a larger count. From noise, seeds are found in rounds:
    number 0, then 1, 2 and 3, 4 to 7 and so on. Where one starts depends on its number and on what
    the rounds before its own found for its class. Norm-aware starts depend on no seed found, and
    are searched from in one round, class by class: references are inverted once.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        checked: Plan,
        pictures: Mapping[str, Sequence[np.ndarray]],
        how: Search,
        again: Search,
        count: int,
        identity: Mapping[str, Any],
        **made_with: Any,
    ):
        """Makes the folder, or goes on in it.

        Args:
            checked: a prompt for each class; its count is at least that of seeds of any class.
            pictures: the references of each class by name, uint8 [H, W, 3].
            how: the search for seeds that start near no other: the first of each class, or all.
            again: the shorter and gentler one for seeds that start near others.
            count: pictures of each class in the end, references included; a class that has more
                references keeps them all. May be larger than it was, where a run goes on.
            identity: of `output.identity`, what decides the pictures.
            made_with: what else must be the same where a run goes on; seeds carry it.

        Raises:
            UserError: where nothing can be written, or what is there was made by other settings.
        """
        if bad := {METADATA, SETTINGS, SEEDS} & set(pictures):
            raise UserError(f"a class cannot be called {min(bad)}, as a part of {folder} is")
        self.folder, self.model, self.checked = folder, model, checked
        self.names, self.pictures, self.how = list(pictures), list(pictures.values()), how
        self.again, self.made_with = again, made_with
        self._held: dict[tuple[int, int], np.ndarray] = {}  # to start near, of one class and round
        self.total, self.identity = count, dict(identity)
        over = [name for name, rows in pictures.items() if len(rows) > count]
        if over:
            images.warn_once(
                f"{', '.join(over)}: more references than {count} pictures; all of them are kept"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = locks.hold(folder, "--out")
            try:
                self._begin(self._settings())
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

    def _settings(self) -> dict[str, Any]:
        """What must be the same where a run goes on."""
        request = self.checked.request
        return {
            **self.identity,
            "seed": request.seed,
            "size": list(self.checked.size),
            "prompts": list(request.prompts),
            "classes": self.names,
            "count": self.total,
            "references": [_digest(rows) for rows in self.pictures],
            **{k: str(v) for k, v in vars(self.how).items() if k not in FREE},
            "rate_again": self.again.learning_rate,
            **{k: v for k, v in self.made_with.items() if k != "judge"},  # known by its weights
        }

    def _begin(self, wanted: dict[str, Any]) -> None:
        """Writes the settings, or compares them with those of the pictures that are there."""
        where, list_file = self.folder / SETTINGS, self.folder / METADATA
        others = {p for p in self.folder.iterdir() if p not in (where, list_file)}
        nothing_yet = not others and not (list_file.exists() and list_file.stat().st_size)
        if nothing_yet:
            pass  # whatever was asked for before
        elif list_file.exists() and where.exists():
            held = config.read_json(where)
            if "judge_weights" not in held and "judge" in held:  # it knew judges by their paths
                wanted = {**wanted, "judge": self.made_with.get("judge")}
            if held.get("weights") == wanted["weights"]:
                held["model"] = wanted["model"]  # the same one, whatever its folder is called now
            older = "an older version's" if held.get("start") == "nao" else "0.3"
            for name, value in wanted.items():
                was = held.get(name, older if name == "variety" else value)  # it recorded less
                grows = name == "count" and isinstance(was, int) and was < value
                if was != value and not grows:
                    raise UserError(
                        f"{self.folder} was begun with {name} = {was} (now {value}); use the same"
                        f"{', or more' * (name == 'count')}, or another --out"
                    )
        else:
            raise UserError(f"{self.folder} holds other files; name a new folder (--out)")
        config.write_json(where, wanted)
        list_file.touch()  # from here on the folder is ours

    def _listed(self) -> set[str]:
        """The pictures of the list; a line that was cut off is cut away."""
        where, found = self.folder / METADATA, set[str]()
        lines, end, rest = where.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(where, len(lines + end))
        for line in filter(None, lines.split(b"\n")):
            try:
                name = json.loads(line)["file_name"]
                there = (self.folder / name).is_file()
            except (ValueError, KeyError, TypeError):
                shown = line[:60].decode("utf-8", "replace")
                raise UserError(f"{where} has a line that is none of ours: {shown}") from None
            if not there:
                raise UserError(
                    f"{where} lists {name}, which is gone: put it back, or take its line out and "
                    "it is made again"
                )
            found.add(name)
        return found

    def fill(self, params: Params, judge: Judge, start: starts.Start) -> None:
        """Copies the references, and finds the seeds that are missing.

        Args:
            start: "gaussian", of first seeds, and of a class's next where those failed; or "nao",
                of all seeds.

        Raises:
            UserError: where pictures are missing and no seed is found.
        """
        try:
            self._copy()
            left = self._left()
            if not left:
                return
            meaning = meaning_by(judge, self.how)
            known = [
                references.encode(self.model, params, rows, self.checked.size, meaning)
                for rows in self.pictures
            ]
            before = self.count
            for wanted in [left] if start == "nao" else self._rounds(left):
                far: list[int] = []
                near: list[int] = []
                for i in wanted:
                    (near if start != "nao" and self._earlier(i) else far).append(i)
                with contextlib.suppress(selection.NothingFound):  # each is named already
                    self._find(params, known, self.how, judge, start, far)
                with contextlib.suppress(selection.NothingFound):
                    self._find(params, known, self.again, judge, self._near, near)
            if self.count == before:
                raise selection.NothingFound("no seed is found: no loss is finite at the start")
        finally:
            self.close()

    def _copy(self) -> None:
        for mine, rows in enumerate(self.pictures):
            (self.folder / self.names[mine]).mkdir(exist_ok=True)
            (self.folder / SEEDS / self.names[mine]).mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(rows):
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

    def _rounds(self, left: list[int]) -> list[list[int]]:
        most = self.checked.request.count
        rounds = range(most.bit_length() + 1)
        return [[i for i in left if (i % most).bit_length() == late] for late in rounds]

    def _earlier(self, index: int) -> list[Path]:
        """Files of the seeds of its class that the rounds before its own found."""
        mine, number = divmod(index, self.checked.request.count)
        folder, first = self.folder / SEEDS / self.names[mine], (1 << number.bit_length()) >> 1
        paths = (folder / f"{n:05}.npz" for n in range(first))
        return [path for path in paths if path.is_file()]

    def _near(self, index: int) -> np.ndarray:
        """A start [h, w, C] near them."""
        checked = self.checked
        mine, number = divmod(index, checked.request.count)
        at = mine, number.bit_length()
        if at not in self._held:  # once a round, whose earlier ones stay as they are
            paths, shape = self._earlier(index), checked.latent_shape
            self._held = {at: np.concatenate([seeds.read(p, shape, self.identity) for p in paths])}
        return starts.spread(self._held[at], checked.request.seed, number, self.how.variety)

    def _find(
        self,
        params: Params,
        known: list[References],
        how: Search,
        judge: Judge,
        start: starts.Start,
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
            figures = found.figures()
            about = {"prompt": prompt, "weight": how.weight, "iterations": how.iterations}
            about |= {"variety": how.variety} | self.made_with | figures
            if how is self.again:
                about["start"] = "near others"
            seeds.write(self.folder / name, found.seed[None], self.identity | about)
            more: dict[str, Any] = {"latents": name, **figures}
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
        add_line(self.folder / METADATA, line)
        self.done.add(name)


def _digest(pictures: Sequence[np.ndarray]) -> str:
    """What tells references from others."""
    return f"{len(pictures)}: {zlib.crc32(b''.join(p.tobytes() for p in pictures)):08x}"
