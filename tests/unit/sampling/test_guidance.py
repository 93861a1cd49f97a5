"""Classifier-free guidance as arithmetic."""

from __future__ import annotations

import torch

from gesso.sampling.guidance import guide, guide_keeping_length


def test_guided_vectors_keep_their_length_and_point_where_guidance_points() -> None:
    positive_BLD, negative_BLD = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    guided_BLD = guide_keeping_length(positive_BLD, negative_BLD, 4.0)
    assert torch.allclose(guided_BLD.norm(dim=-1), positive_BLD.norm(dim=-1))
    away_BLD = guide(positive_BLD, negative_BLD, 4.0)
    assert torch.allclose(torch.cosine_similarity(guided_BLD, away_BLD, dim=-1), torch.ones(2, 5))
    assert torch.allclose(guide_keeping_length(positive_BLD, negative_BLD, 1.0), positive_BLD, atol=1e-5)
