"""Region features -> class logits and box offsets."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class TwoLayerHead(nn.Module):
    """Two fully connected layers with ReLU, then one layer for classes and one for boxes (paper, section 4.2).

    Class K, the last, is background; it has no box.
    """

    def __init__(self, inputs: int, classes: int, hidden: int = 1024):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.classes, self.offsets = nn.Linear(hidden, classes + 1), nn.Linear(hidden, classes * 4)
        for layer, std in ((self.classes, 0.01), (self.offsets, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Float[Tensor, "BR d s s"]) -> tuple[Float[Tensor, "BR K1"], Float[Tensor, "BR K 4"]]:
        x = F.relu(self.fc1(regions.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.classes(x).float(), self.offsets(x).float().unflatten(1, (-1, 4))
