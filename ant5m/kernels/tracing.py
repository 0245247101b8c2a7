"""What torch.compile has to know about the dispatcher."""

from collections.abc import Callable
from typing import Any


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`: while torch.compile traces, `function` runs, and only its
    result goes into the graph.

    Torch's own decorator imports torch._dynamo, 1.3 s and 146 MB for whoever evaluates or generates (to train
    torch.optim imports it anyway).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
