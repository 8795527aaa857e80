"""What one step does to the weights."""

import torch
from torch import nn

from fpn.training.learner import sgd


def test_sgd_decays_weights_but_neither_biases_nor_what_is_frozen():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)])
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = sgd(model, lr=0.1, momentum=0.5, weight_decay=0.01)
    for _ in range(2):
        for parameter in model[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    weight, bias, *frozen = model.parameters()
    first = before[0] - 0.1 * (1 + 0.01 * before[0])
    second = first - 0.1 * (0.5 * (1 + 0.01 * before[0]) + 1 + 0.01 * first)
    torch.testing.assert_close(weight, second)
    torch.testing.assert_close(bias, before[1] - 0.1 - 0.1 * 1.5)
    assert all(torch.equal(own, other) for own, other in zip(frozen, before[2:], strict=True))
