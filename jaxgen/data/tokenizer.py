"""CLIP's tokenizer on the `tokenizers` library, from the files of a model folder and back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxgen.types import UserError

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
MAX_BYTES = 16 << 20  # per file; the largest that CLIP comes with has 4 MB
LENGTH = 77  # CLIP's context, where a folder does not say or says 10**30
LENGTHS = range(3, 1025)  # from start, one token and end to more than any CLIP reads

# Letters of any script run together, digits stand alone, and so do English contractions.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# What \s matches among the control characters (Unicode category Cc), and the other ones.
_BREAKS = re.compile("[\t-\r\x85]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # have no UTF-8


class Tokenizer:
    """Text to token ids, byte for byte as the text encoder was trained.

    Nothing about the special tokens is assumed: Stable Diffusion 1 pads with the end token, 2 with
    "!". They are specials in text as well: "<|endoftext|>" in a prompt is the end token, and "!"
    with Stable Diffusion 2 is the padding, which is what transformers does.

    Attributes:
        bos: id of the token that starts a text.
        eos: id of the token that ends it; the pooled embedding is read there.
        pad: id of the token that fills up to `length`.
        length: tokens that the text encoder reads, specials included; 77 for CLIP.
        size: 1 + the largest id, hence the rows that the token embedding must have at least.
    """

    def __init__(
        self, backend: Backend, specials: Mapping[str, str], length: int, files: Mapping[str, bytes]
    ):
        """Use `read`. `specials` are `bos_token`, `eos_token` and `pad_token`, by role."""
        self._backend = backend
        self._files = dict(files)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.bos = vocabulary[specials["bos_token"]]
        self.eos = vocabulary[specials["eos_token"]]
        self.pad = vocabulary[specials["pad_token"]]
        self.length = length
        self.size = 1 + max(vocabulary.values())

    @classmethod
    def read(cls, folder: Path, pad: str | None = None) -> "Tokenizer":
        """The tokenizer of a model's `tokenizer/` folder, perhaps with another padding token.

        `tokenizer.json` serves where there is one, else `vocab.json` and `merges.txt`. The special
        tokens and the length come from the small files beside them.

        Raises:
            UserError: for files that are missing, damaged, too large, or contradict each other.
        """
        files = {name: _read_bytes(folder / name) for name in FILES if (folder / name).is_file()}
        if pad is not None:
            specials = _object(folder, files, "special_tokens_map.json") | {"pad_token": pad}
            files["special_tokens_map.json"] = json.dumps(specials, indent=2).encode()
        config = _object(folder, files, "tokenizer_config.json")
        whole = _object(folder, files, "tokenizer.json")
        specials = _specials(whole, config, _object(folder, files, "special_tokens_map.json"))
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if role not in specials:
                raise UserError(f"{folder} names no {role} in any of its files")

        if "tokenizer.json" in files:
            backend = _from_whole(folder / "tokenizer.json", files["tokenizer.json"])
        else:
            backend = _from_parts(folder, files, specials["unk_token"].content)
        added = _added(folder, config, _object(folder, files, "added_tokens.json"))
        _add(backend, folder, added, specials)
        length = config.get("model_max_length")
        if type(length) is not int or length not in LENGTHS:
            length = LENGTH
        return cls(backend, {k: t.content for k, t in specials.items()}, length, files)

    def save(self, folder: Path) -> None:
        """Writes the files that were read, byte for byte; makes the folder where there is none."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self._files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start, end and padding.

        Control characters (Unicode category Cc) are removed, but for line breaks and tabs, which
        are spaces; so are lone surrogates, the rest of a badly decoded argument. Format characters
        (Cf) stay: emoji and several scripts are spelled with joiners.
        """
        text = _SURROGATES.sub("", _CONTROLS.sub("", _BREAKS.sub(" ", text)))
        return self._backend.encode(text, add_special_tokens=False).ids


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB; is it CLIP's tokenizer?")
    return content


def _object(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in one of the JSON files; empty for a file that is not there."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{folder / name} does not hold a JSON object")
    return value


def _damaged(path: Path, error: Exception) -> UserError:
    """`tokenizers` raises bare exceptions, some of several lines."""
    return UserError(f"{path} is damaged or not CLIP's: {' '.join(str(error).split())}")


def _from_whole(path: Path, content: bytes) -> Backend:
    """A `tokenizer.json`, without the truncation and padding that may be stored with it."""
    try:
        backend = Backend.from_str(content.decode("utf-8"))
    except Exception as error:
        raise _damaged(path, error) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_parts(folder: Path, files: Mapping[str, bytes], unknown: str) -> Backend:
    """CLIP's pipeline, which `vocab.json` and `merges.txt` take for granted."""
    for name in ("vocab.json", "merges.txt"):
        if name not in files:
            raise UserError(f"{folder} has neither tokenizer.json nor {name}")
    vocabulary = _object(folder, files, "vocab.json")
    merges = _merges(folder / "merges.txt", files["merges.txt"])
    if any(type(i) is not int or not 0 <= i < 1 << 31 for i in vocabulary.values()):
        raise UserError(f"{folder / 'vocab.json'} has ids that are not whole numbers from 0")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{folder / 'vocab.json'} gives one id to several tokens")
    if unmade := _unmade(vocabulary, merges):
        raise UserError(
            f"{folder / 'merges.txt'} is damaged or another vocabulary's: none of its merges makes "
            f"{len(unmade)} tokens of vocab.json, {unmade[0]!r} among them"
        )
    try:
        bpe = models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>")
    except Exception as error:  # a merge whose parts or whole the vocabulary lacks
        raise _damaged(folder / "merges.txt", error) from None
    backend = Backend(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _unmade(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> list[str]:
    """Tokens of several symbols that no merge makes, but for specials, which stand in <angles>."""
    made = {a + b for a, b in merges}
    longer = (t for t in vocabulary if len(t.removesuffix("</w>")) > 1)
    return [t for t in longer if t not in made and not (t[0] == "<" and t[-1] == ">")]


def _merges(path: Path, content: bytes) -> list[tuple[str, str]]:
    """The pairs of a `merges.txt`, most frequent first."""
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"{path}: line {number} is not two tokens: {line[:60]!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _specials(
    whole: Mapping[str, Any], config: Mapping[str, Any], legacy: Mapping[str, Any]
) -> dict[str, AddedToken]:
    """The special tokens that a folder names, by role.

    Args:
        whole: `tokenizer.json`; it knows the roles by what it once did with them.
        config: `tokenizer_config.json`.
        legacy: `special_tokens_map.json`. It wins over a config that lists no added tokens:
            Stable Diffusion 2 pads with the token named here, and its config names another.
    """
    steps = whole.get("post_processor"), whole.get("padding")
    after, padding = (step if isinstance(step, dict) else {} for step in steps)
    start, end = (after.get(key) for key in ("cls", "sep"))  # [token, id], as BERT calls them
    # The padding comes last: where it is one of the others, its flags are the ones that count.
    found: dict[str, Any] = {
        "bos_token": start[0] if isinstance(start, list) and start else None,
        "eos_token": end[0] if isinstance(end, list) and end else None,
        "unk_token": None,
        "pad_token": padding.get("pad_token"),
    }
    for source in [config] if "added_tokens_decoder" in config else [config, legacy]:
        found |= {role: source[role] for role in found if source.get(role) is not None}
    if found["unk_token"] is None:
        found["unk_token"] = found["eos_token"]
    tokens = {role: _token(value) for role, value in found.items()}
    return {role: token for role, token in tokens.items() if token is not None}


def _token(value: Any, special: bool = True) -> AddedToken | None:
    """A token in either of its two forms, a string or a dict with flags; `None` for neither."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text or _SURROGATES.search(text):
        return None
    names = ("lstrip", "rstrip", "normalized", "single_word") if isinstance(value, dict) else ()
    flags = {name: bool(value[name]) for name in names if name in value}
    return AddedToken(text, special=special, **flags)


def _added(
    folder: Path, config: Mapping[str, Any], legacy: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """The tokens listed apart from the vocabulary, by id, e.g. those of Textual Inversion.

    Args:
        folder: named in an error.
        config: `tokenizer_config.json`, which may list them as {id: token with flags}.
        legacy: `added_tokens.json`, which lists them as {token: id}.
    """
    listed = [(i, token, False) for token, i in legacy.items()]
    decoder = config.get("added_tokens_decoder", {})
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        number = int(i) if i.isascii() and i.isdigit() and len(i) < 10 else None
        special = isinstance(token, dict) and token.get("special") is True
        listed.append((number, token, special))

    added = {}
    for i, value, special in listed:
        token = _token(value, special)
        if type(i) is not int or token is None:
            raise UserError(f"{folder} lists the added token {value!r} without a text or an id")
        added[i] = token
    return added


def _add(
    backend: Backend,
    folder: Path,
    added: Mapping[int, AddedToken],
    specials: Mapping[str, AddedToken],
) -> None:
    """Makes `backend` find the added and the special tokens in text, before it splits words."""
    for i, token in sorted(added.items()):
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != i:
            raise UserError(f"{folder} gives {token.content!r} the id {i}, but its turn is {found}")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for role, token in specials.items():
        if backend.token_to_id(token.content) is None:
            raise UserError(f"{folder}: the {role} {token.content!r} is not in the vocabulary")
        if token.content not in known:
            backend.add_special_tokens([token])
