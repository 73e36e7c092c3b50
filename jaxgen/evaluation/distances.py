"""How far two sets of pictures are apart, by their features (of `inception`, or of any network).

FID comes out too large for few pictures, and compares at equal numbers of them only. KID does not:
fewer pictures make it less sure, and no larger.
"""

import numpy as np

from jaxgen.types import UserError


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
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance of the rows of [N, D] and of [M, D] (Binkowski et al. 2018).

    The squared maximum mean discrepancy by the kernel (x.y / D + 1)^3, over random subsets. It is
    the unbiased estimate (Gretton et al. 2012, eq. 3), which can come out below zero.

    Args:
        size: rows of each subset; by default 1000, or half of the smaller set where that is less,
            since subsets that are the whole set would be all alike.
        seed: which subsets.

    Returns:
        Mean and standard deviation over subsets.

    Raises:
        UserError: as `fid`, and for a number of subsets or rows that cannot be.
    """
    a, b = _checked(a, b)
    fewest = min(len(a), len(b))
    size = max(2, min(1000, fewest // 2)) if size is None else size
    if not 2 <= size <= fewest:
        raise UserError(f"subsets of {size} features of {fewest}: 2 to {fewest} can be taken")
    if subsets < 1:
        raise UserError(f"{subsets} subsets are none to average")
    rng = np.random.default_rng(seed)
    found = [
        _mmd(*(f[rng.choice(len(f), size, replace=False)] for f in (a, b))) for _ in range(subsets)
    ]
    return float(np.mean(found)), float(np.std(found))


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Of as many rows in x as in y; no row is compared with itself."""
    n, width = x.shape
    xx, yy, xy = ((p @ q.T / width + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    own = xx.sum() - xx.trace() + yy.sum() - yy.trace()
    return own / (n * (n - 1)) - 2 * xy.mean()


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
