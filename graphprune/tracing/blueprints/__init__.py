"""What the code of a model's classes makes of numbers: which layer, under which name, has which size from where.

Nothing is run: the source of constructors is read, beside an object that such a constructor made.
"""

from .equations import Equation, Width, equations_of
from .interpreter import Reading, read

__all__ = ["Equation", "Reading", "Width", "equations_of", "read"]
