"""What the code of a model's classes makes of numbers: which layer, under which name, has which size from where.

Nothing is run: the source of constructors is read, beside an object that such a constructor made.
"""

from .alike import Alikeness
from .equations import Equation, Width, equations_of
from .interpreter import Reading, read
from .summary import Summary, below, summary_of

__all__ = [
    "Alikeness",
    "Equation",
    "Reading",
    "Summary",
    "Width",
    "below",
    "equations_of",
    "read",
    "summary_of",
]
