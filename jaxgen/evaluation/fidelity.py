"""How close a copy of a picture is to it: PSNR and SSIM."""

import numpy as np
from scipy.ndimage import gaussian_filter

SIGMA, RADIUS = 1.5, 5  # of the window, in pixels: 11 x 11, as in the paper
SMALL = (0.01, 0.03)  # what steadies the two quotients


def psnr(copies: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 [N, H, W, 3], float64 [N]; infinite for equals."""
    wrong = copies.astype(np.float64) - pictures
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.square(wrong).mean((1, 2, 3)))


def ssim(copies: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 [N, H, W, 3], float64 [N]; 1 for equals.

    Wang et al. 2004, equation 13, over all channels and the pixels whose window is inside.
    """

    def smooth(x: np.ndarray) -> np.ndarray:
        y = gaussian_filter(x, SIGMA, radius=RADIUS, axes=(1, 2))
        return y[:, RADIUS:-RADIUS, RADIUS:-RADIUS]

    x, y = copies.astype(np.float64), pictures.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    a, b = ((k * 255) ** 2 for k in SMALL)
    top = (2 * mean_x * mean_y + a) * (2 * both + b)
    return (top / ((mean_x**2 + mean_y**2 + a) * (var_x + var_y + b))).mean((1, 2, 3))
