"""How far two sets of pictures are apart, by their features (of `inception`, or of any network).

FID comes out too large for few pictures, and compares at equal numbers of them only. KID does not:
fewer pictures make it less sure, and no larger.
"""

import numpy as np

from jaxgen.types import UserError

RESAMPLES = 1000  # of a bootstrap
AT_ONCE = 512  # rows whose kernel is held in memory


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance, squared, of the Gaussians that fit the rows of [N, D] and of [M, D].

    |mean a - mean b|^2 + Tr(A + B - 2 (A B)^(1/2)) of the covariances A and B (Heusel et al. 2017,
    eq. 6), which divide by N - 1 and M - 1 as in the reference code.

    Raises:
        UserError: for features that are not two finite tables of one width and two rows or more.
    """
    a, b = _checked(a, b)
    means = a.mean(0) - b.mean(0)
    # A = X^T X of X = (a - mean) / (N - 1)^(1/2), and B = Y^T Y. A B has the eigenvalues of the
    # symmetric (X Y^T)(X Y^T)^T, and their roots are the singular values of X Y^T: none is the root
    # of a rounding error, as there would be many where pictures are fewer than features.
    x, y = (np.linalg.qr((f - f.mean(0)) / np.sqrt(len(f) - 1)).R for f in (a, b))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = means @ means + np.square(x).sum() + np.square(y).sum() - 2 * root
    return max(float(distance), 0.0)


def kid(
    a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance of the rows of [N, D] and of [M, D] (Binkowski et al. 2018).

    The squared maximum mean discrepancy by the kernel (x.y / D + 1)^3, of all pairs: the unbiased
    estimate (Gretton et al. 2012, eq. 3), which can come out below zero. The authors' mean over
    random subsets estimates the same, less surely.

    The standard error is of the bootstrap: how much the distance varies over sets that are drawn
    anew, with replacement, from the rows of both (Efron 1979). Where the sets are alike, so that
    the distance is near zero, it is too large by up to a factor of the root of 3.

    Args:
        resamples: sets that are drawn; 1000 tell the standard error to 2 %.
        seed: which.

    Returns:
        The distance and its standard error.

    Raises:
        UserError: as `fid`, and for fewer than two resamples.
    """
    a, b = _checked(a, b)
    x, y = _draws((len(a), len(b)), resamples, seed)
    return _with_error(_within(a, x) + _within(b, y) - 2 * _across(a, b, x, y))


def kid_difference(
    a: np.ndarray, b: np.ndarray, real: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """How much farther from `real` [M, D] the rows of `a` [N, D] are than those of `b` [N, D].

    Row i of both belongs together, as pictures of one prompt and noise do, and one set is drawn for
    both: what is common to them is no error of the difference.

    Returns:
        kid(a, real) - kid(b, real), and its standard error.

    Raises:
        UserError: as `kid`, and for sets whose rows are not as many.
    """
    a, b = _checked(a, b)
    real = _checked(a, real)[1]
    if len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} pictures are no pairs; each needs its other")
    x, y = _draws((len(a), len(real)), resamples, seed)
    both = [_within(some, x) - 2 * _across(some, real, x, y) for some in (a, b)]
    return _with_error(both[0] - both[1])


def _draws(rows: tuple[int, ...], resamples: int, seed: int) -> list[np.ndarray]:
    """For each set, how often each of its rows is drawn, float64 [1 + resamples, rows].

    The first time once each; then as many as there are, at random with replacement.
    """
    if resamples < 2:
        raise UserError(f"{resamples} resamples have no spread; 2 have, and 1000 a steady one")
    rng = np.random.default_rng(seed)
    anew = [rng.multinomial(n, np.full(n, 1 / n), resamples) for n in rows]
    return [np.concatenate([np.ones((1, n)), some]) for n, some in zip(rows, anew)]


def _with_error(found: np.ndarray) -> tuple[float, float]:
    """The first number, and how the others vary; a set of one row drawn again has no pairs."""
    others = found[1:][np.isfinite(found[1:])]
    return float(found[0]), float(np.std(others, ddof=1))


def _within(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean of the kernel over pairs of rows that are drawn; no row is compared with itself."""
    own = (np.square(a).sum(1) / a.shape[1] + 1) ** 3
    total = _sums(a, a, x, x) - np.square(x) @ own
    pairs = x.sum(1) ** 2 - np.square(x).sum(1)
    return np.divide(total, pairs, out=np.full(len(x), np.nan), where=pairs > 0)


def _across(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _sums(a, b, x, y) / (len(a) * len(b))


def _sums(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sums of the kernel over rows [N, D] and [M, D], drawn x [R, N] and y [R, M] times -> [R]."""
    total = np.zeros(len(x))
    for start in range(0, len(a), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        kernel = (a[some] @ b.T / a.shape[1] + 1) ** 3
        total += ((x[:, some] @ kernel) * y).sum(1)
    return total


def _checked(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Both as float64."""
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
            raise UserError(f"features are {list(features.shape)} and should be [2 or more, width]")
        if not np.isfinite(features).all():
            raise UserError("features are not finite; are the pictures or the weights damaged?")
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"features are {a.shape[1]} and {b.shape[1]} wide; are both of one network?"
        )
    return [np.asarray(a, np.float64), np.asarray(b, np.float64)]
