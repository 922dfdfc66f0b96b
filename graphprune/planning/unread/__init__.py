"""Sizes that modules keep in attributes and the recorded call does not read: another method may, an exporter, or
whoever puts a new head on.

Such a number follows where the code of its class builds a layer with it whose width changes; one that only happens to
be equal stays; what the code does not tell is listed.
"""

from .following import Unread, unread_sizes
from .used import Used

__all__ = ["Unread", "Used", "unread_sizes"]
