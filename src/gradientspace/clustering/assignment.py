"""What the clusterer says of a batch: the nearest centroid of each row, how near, and by what margin."""

import torch
from torch import Tensor

from gradientspace.clustering.centroids import Projection
from gradientspace.clustering.unit_rows import Rows


class Assignment:
    """What the clusterer says of a batch of b rows.

    `labels` (b,) int64, -1 for rows without a direction (zero, non-finite, or equal to the mean); `cosine`
    (b,) to the chosen centroid; `margin` (b,) cosine minus the runner-up's (2, the largest possible, when K =
    1); `coordinates` (b, q) = V u. Cosine, margin and coordinates of a -1 row are 0.
    """

    __slots__ = ("coordinates", "cosine", "labels", "margin")

    def __init__(self, labels: Rows, cosine: Rows, margin: Rows, coordinates: Rows):
        self.labels, self.cosine, self.margin, self.coordinates = labels, cosine, margin, coordinates


def nearest_centroid(batch: Projection) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, cosine and margin (b,) and coordinates (b, q) of a projected batch, as `Assignment` wants them."""
    cosine = batch.cosine
    best = cosine.max(dim=1).values
    # The lowest index wins a tie, on every device.
    index = torch.arange(cosine.shape[1], device=cosine.device)
    labels = torch.where(cosine == best[:, None], index, cosine.shape[1]).min(dim=1).values
    if cosine.shape[1] > 1:
        margin = best - cosine.scatter(1, labels[:, None], -2.0).max(dim=1).values
    else:
        margin = torch.full_like(best, 2.0)
    labels = torch.where(batch.valid, labels, -1)
    margin = torch.where(batch.valid, margin, torch.zeros_like(margin))
    return labels, best, margin, batch.coordinates
