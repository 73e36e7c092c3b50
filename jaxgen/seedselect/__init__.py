"""SeedSelect: the noise that shows a rare thing, by the gradient through the whole sampler.

`select` is the whole of it; the other rooms are its parts: what is minimised (`objective`), how
(`search`), from where (`starts`), with what (`references`), and the files (`seeds`).
"""

from jaxgen.seedselect.objective import ClipDistance, Score
from jaxgen.seedselect.search import Search
from jaxgen.seedselect.selection import Found, Judge, open_judge, select

__all__ = ["ClipDistance", "Found", "Judge", "Score", "Search", "open_judge", "select"]
