"""What can be pruned, what cannot, why, and what that costs; and which method to take."""

from .advice import Advice, advise
from .candidates import Option
from .doctor import Blocker, Doctor, Prunable, doctor
from .interfaces import Interface

__all__ = ["Advice", "Blocker", "Doctor", "Interface", "Option", "Prunable", "advise", "doctor"]
