"""SeedSelect: the noise that shows a rare thing, by the gradient through the whole sampler.

`select` is the whole of it; the other rooms are its parts: what is minimised (`objective` and
`slopes`), how (`search`), from where (`starts`), with what (`references`), by whom (`judges`), what
does not fit (`checks`), and what is written (`seeds`, `folder`, and `fewshot` for a folder of
classes).
"""

from jaxgen.seedselect.judges import Judge, open_judge
from jaxgen.seedselect.objective import ClipDistance, Score
from jaxgen.seedselect.search import Search
from jaxgen.seedselect.selection import Found, select

__all__ = ["ClipDistance", "Found", "Judge", "Score", "Search", "open_judge", "select"]
