"""Replace modules whose code blocks pruning by graphs of their own recorded calls, with the sizes rewritten."""

from .module import RewrittenModule, replace
from .recipes import Rewrite
from .session import OUTPUTS, Rewriter, check_output, dependency_graph

__all__ = ["OUTPUTS", "Rewrite", "Rewriter", "RewrittenModule", "check_output", "dependency_graph", "replace"]
