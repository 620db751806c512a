"""Whether a computation is recorded to be run again, which forbids to look at the data or at the length at hand."""

import torch


def is_traced() -> bool:
    """Whether the computation is recorded, by a compiler or for a file, to be run on other inputs than those at hand."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# Before 2.7 torch does not tell an export from a compilation: both then get a graph for any length.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exported() -> bool:
    """Whether the record is a graph that stands alone, for texts of any length. Nothing in it may depend on the length
    at hand. A compiler looks at the length each time, and compiles again for one that its code does not hold for."""
    return is_exporting() or torch.jit.is_tracing()
