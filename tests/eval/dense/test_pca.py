"""Principal components as colours: on tokens whose components are known, and the whole evaluation."""

import pytest
import torch

from fastdino.eval.dense.pictures.pca import colors, components, foreground


@pytest.mark.parametrize("seed", range(4))
def test_colors_are_the_principal_components(seed):
    """Of tokens that vary along three known directions, the most along the first."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 4, 5, 3, generator=rng).double() * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(7, 3, generator=rng, dtype=torch.float64))[0].T
    found = colors(values @ basis + 5)
    assert found.shape == (2, 4, 5, 3)
    assert found.min() == 0
    assert found.max() == 1
    for component in range(3):
        pair = torch.stack([found[..., component].flatten(), values[..., component].flatten()])
        largest = basis[component][basis[component].abs().argmax()]
        assert torch.corrcoef(pair)[0, 1] * largest.sign() > 0.85
    torch.testing.assert_close(colors(3 * (values @ basis) - 8), found)


def test_colors_of_equal_tokens():
    assert colors(torch.ones(1, 2, 2, 5)).isfinite().all()


@pytest.mark.parametrize("step", [7, 1000])
def test_components_of_parts_are_those_of_the_whole(step: int) -> None:
    """Against torch's own decomposition, of tokens whose mean is far from 0; as many as it takes are held."""
    tokens = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1.0, 9) + 1e4
    found = components(tokens.split(step))
    _, deviation, directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    torch.testing.assert_close(found.mean, tokens.mean(0))
    torch.testing.assert_close(found.directions.abs(), directions[:3].T.abs(), rtol=0, atol=1e-8)
    assert found.explained == pytest.approx((deviation[:3].square().sum() / deviation.square().sum()).item())
    assert (found.directions.amax(0) >= found.directions.abs().amax(0)).all(), "the largest weight is positive"
    torch.testing.assert_close(found(tokens), (tokens - tokens.mean(0)) @ found.directions)


def test_there_are_no_components_of_nothing() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        components([torch.zeros(0, 4)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_what_the_borders_are_not(sign: float) -> None:
    """An object in the middle of each image, whichever way its feature points."""
    tokens = torch.zeros(2, 4, 5, 6)
    tokens[:, 1:3, 1:4, 2] = sign
    tokens[..., 3:] = 0.01 * torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    turned = foreground(components([tokens.flatten(0, 2)]), lambda: [tokens[:1], tokens[1:]])
    assert torch.equal(turned(tokens)[..., 0] > 0, tokens[..., 2] != 0)
