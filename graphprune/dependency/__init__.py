"""Which slices of which tensors are one channel."""

from .effects import Reason
from .graph import DependencyGraph, Frozen, trace
from .groups import Group, GroupKind, Member

__all__ = ["DependencyGraph", "Frozen", "Group", "GroupKind", "Member", "Reason", "trace"]
