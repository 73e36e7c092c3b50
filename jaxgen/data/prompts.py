"""Prompts as people type them, weights in parentheses included, to chunks of token ids."""

import re

import numpy as np

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.types import UserError

MAX_CHUNKS = 16
MAX_WEIGHT = 100.0  # whoever gets here wrote a clock or a ratio: "(at 12:300)"

# An escaped parenthesis, a weight that closes one, a bare parenthesis, or text. No two branches
# begin alike, and none backtracks over what another reads: a hostile prompt takes linear time.
_PARTS = re.compile(
    r"\\(?P<escaped>[()])"
    r"|:\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)"
    r"|(?P<open>\()"
    r"|(?P<close>\))"
    r"|[^\\:()]+|[\\:]"
)


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""A prompt as texts and their weights, in order; neighbours differ in weight.

    "a (red:1.3) fox" is [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]. Weights of nested parentheses
    multiply. `\(` and `\)` are parentheses of the text, and so are all that no weight closes.
    An empty prompt is an empty list.

    Raises:
        UserError: for a weight, or a product of nested ones, beyond `MAX_WEIGHT` in magnitude.
    """
    parts = list(_PARTS.finditer(prompt))
    opened: dict[int, float] = {}  # index of a parenthesis that has a weight -> that weight
    closing = set()  # indices of the parts that close those
    waiting = []
    for i, part in enumerate(parts):
        if part["open"]:
            waiting.append(i)
        elif waiting and (part["close"] or part["weight"]):
            start = waiting.pop()
            if part["weight"]:
                opened[start] = float(part["weight"])
                closing.add(i)

    texts: list[tuple[list[str], float]] = []
    weights = [1.0]
    for i, part in enumerate(parts):
        if i in opened:
            weights.append(weights[-1] * opened[i])
            if not abs(weights[-1]) <= MAX_WEIGHT:  # nor infinity times nothing
                where = prompt[part.start() : part.start() + 40]
                raise UserError(
                    f"the weight {weights[-1]:g} in the prompt at {where!r} is beyond "
                    f"{MAX_WEIGHT:g}; a parenthesis that is meant as text is written \\( and \\)"
                )
        elif i in closing:
            weights.pop()
        else:
            if not texts or texts[-1][1] != weights[-1]:
                texts.append(([], weights[-1]))
            texts[-1][0].append(part["escaped"] or part[0])
    return [("".join(pieces), weight) for pieces, weight in texts]


def chunks(tokenizer: Tokenizer, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """A prompt of any length as whole inputs of the text encoder.

    Each chunk is the start token, up to L - 2 tokens of the prompt, the end token and padding,
    with L = `tokenizer.length`, 77 for CLIP. There is always one: the empty prompt is a prompt.

    Returns:
        ids: int32 [n, L].
        weights: float32 [n, L]; 1 for start, end and padding.

    Raises:
        UserError: for more than `MAX_CHUNKS` chunks, and for absurd weights.
    """
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in parse(prompt):
        tokens = tokenizer.encode(text)
        ids += tokens
        weights += [weight] * len(tokens)

    body = tokenizer.length - 2
    if len(ids) > MAX_CHUNKS * body:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the limit is {MAX_CHUNKS * body} "
            f"({MAX_CHUNKS} chunks of {body}); it begins {prompt[:40]!r}"
        )
    n = max(1, -(-len(ids) // body))
    all_ids, all_weights = _empty(tokenizer, n)
    for i in range(n):
        part = slice(i * body, (i + 1) * body)
        stop = 1 + len(ids[part])
        all_ids[i, 1:stop] = ids[part]
        all_ids[i, stop] = tokenizer.eos
        all_weights[i, 1:stop] = weights[part]
    return all_ids, all_weights


def pad_chunks(
    tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """[m, L] ids and weights of `chunks` -> [max(m, n), L], by chunks of the empty prompt.

    So a prompt and its negative have one shape, and the longer one decides.
    """
    more_ids, more_weights = _empty(tokenizer, max(0, n - len(ids)))
    return np.concatenate([ids, more_ids]), np.concatenate([weights, more_weights])


def _empty(tokenizer: Tokenizer, n: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and float32 weights, both [n, L], of n empty prompts."""
    ids = np.full((n, tokenizer.length), tokenizer.pad, np.int32)
    ids[:, 0] = tokenizer.bos
    ids[:, 1] = tokenizer.eos
    return ids, np.ones(ids.shape, np.float32)
