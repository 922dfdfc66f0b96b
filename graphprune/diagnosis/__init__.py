"""What can be pruned, what cannot, why, and what that costs."""

from .doctor import Blocker, Doctor, Prunable, doctor

__all__ = ["Blocker", "Doctor", "Prunable", "doctor"]
