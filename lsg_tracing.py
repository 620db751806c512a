"""Whether a computation is recorded, to be run again on other inputs.

Code that is recorded must not look at the data. In an exported graph, it must not depend on the length either.
"""

import torch


def is_traced() -> bool:
    """Whether a compiler, an exporter or a tracer is recording the computation."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# Before 2.7, torch does not distinguish an export from a compilation: both get a graph for any length.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exported() -> bool:
    """Whether the recording becomes a graph that stands alone, for texts of any length.

    Nothing in such a graph may depend on the length of the present input. A compiler differs: it looks at each
    call's length, and compiles again for a length that its code does not cover.
    """
    return is_exporting() or torch.jit.is_tracing()
