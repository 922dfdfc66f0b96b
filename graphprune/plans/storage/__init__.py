"""A pruned model as one safetensors file: weights, and what makes their shapes right. docs/model-format.md."""

from .models import load, save

__all__ = ["load", "save"]
