"""What goes: from a request to a plan. `plan` and `prune` are in `calls`.

Every granularity is a file that is imported here, so that its names are known.
"""

from . import by_layer, by_width, experts

__all__ = ["by_layer", "by_width", "experts"]
