"""What trainings with a discriminator share: two networks with opposite aims, in one training step.

A generative adversarial network (Goodfellow et al. 2014) has a discriminator, which learns to tell real
examples from made ones, and a generator, which learns to make examples that the discriminator takes for real.
The usual loop has an optimizer for each and updates them in turns. The losses of this package add both
networks' losses instead, and each network gets the gradient of its own: the discriminator's loss is computed
on made examples that are detached, and the generator's while the discriminator is `frozen`. One `train` with
one optimizer then updates both at the same time, and saves and resumes both together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the context, results of `module` have no gradient for its parameters, only for its input.

    Args:
        module: its parameters get back their `requires_grad` afterwards.

    Example:
        >>> network, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> with frozen(network):
        ...     y = network(x)
        >>> y.sum().backward()
        >>> x.grad is None, network.weight.grad is None
        (False, True)
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
