"""PSNR and SSIM against closed forms and scikit-image."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from jaxgen.evaluation.fidelity import psnr, ssim

RNG = np.random.default_rng(0)
PICTURES = np.kron(RNG.integers(0, 256, (3, 8, 6, 3), np.uint8), np.ones((1, 5, 5, 1), np.uint8))
NOISY = np.clip(PICTURES + 20.0 * RNG.standard_normal(PICTURES.shape), 0, 255).astype(np.uint8)


def test_psnr_of_one_wrong_level():
    assert psnr(PICTURES // 2 + 1, PICTURES // 2) == pytest.approx([20 * np.log10(255)] * 3)
    assert np.isinf(psnr(PICTURES, PICTURES)).all()


def test_ssim_is_that_of_scikit_image():
    wanted = [
        structural_similarity(
            a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(NOISY, PICTURES)
    ]
    np.testing.assert_allclose(ssim(NOISY, PICTURES), wanted, rtol=1e-10)
    np.testing.assert_allclose(ssim(PICTURES, PICTURES), 1)
