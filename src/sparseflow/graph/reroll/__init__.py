"""Batching over time: a graph in which a loop over T was written out, with each layer called once for all steps.

Tracing a forward that loops over time gives T copies of its body. Here the copies of one operation become a *group*:
operations that treat samples alone run once on ``[T * N, ...]``, neurons run as
:func:`sparseflow.graph.timeops.neuron_sequence`, and what is the same at every step runs once. Whatever depends on its
own past through more than a neuron's state stays as it was. See docs/batching-over-time.md.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from sparseflow.graph.reroll.effects import Effects
from sparseflow.graph.reroll.example import run_example
from sparseflow.graph.reroll.grouping import find_groups
from sparseflow.graph.reroll.inplace import remove_writes
from sparseflow.graph.reroll.verify import equivalent
from sparseflow.graph.reroll.writer import CircularError, write

__all__ = ["reroll"]


def reroll(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.GraphModule | None:
    """Compute layers without feedback once over all time steps of a traced loop.

    The new graph shares the modules of ``graph`` and leaves their state as ``graph`` does. T is that of the example;
    N stays free. A graph is only returned after both have been called twice on the example with equal results.

    The nodes of the new graph, besides those that were there:

    - layers and functions on flat ``[T * N, ...]``, with ``flatten(0, 1)`` and ``unflatten(0, (T, -1))`` where a
      sequence ``[T, N, ...]`` ends or begins; elementwise ones on either;
    - ``neuron_sequence(get_attr module, x_seq, *initial_states)``, and ``getitem`` of what it returns;
    - ``x.unsqueeze(0).expand(T, ...)`` before a neuron whose input is the same at every step;
    - ``seq[t]`` and ``torch.stack`` between what is batched and what is not;
    - ``seq.movedim(0, dim)`` for a ``torch.stack`` along another dimension, ``seq.sum(0)`` for a sum over the steps.

    Args:
        graph: made by :func:`sparseflow.graph.trace`; it is not changed.
        args, kwargs: the example that it was traced with.

    Returns:
        The batched graph, or ``None`` when no layer and no neuron of ``graph`` can be batched.

    Example:
        >>> import torch
        >>> from sparseflow.graph.tracer import trace
        >>> class Loop(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         return sum(self.fc(x[t]) for t in range(len(x)))
        >>> example = (torch.rand(3, 1, 4),)
        >>> rolled = reroll(trace(Loop(), example), example)
        >>> [node.target for node in rolled.graph.nodes if node.op.startswith("call")]
        ['flatten', 'fc', 'unflatten', 'sum']
    """
    kwargs = kwargs or {}
    unrolled = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    run = run_example(unrolled, args, kwargs)
    if run is None:
        return None
    groups = find_groups(run, Effects(run, remove_writes(run)))
    if not groups.has_layers:
        return None
    try:
        rolled = fx.GraphModule(graph, write(groups), type(graph).__name__)
    except CircularError:
        return None
    rolled.graph.lint()
    return rolled if equivalent(graph, rolled, args, kwargs) else None
