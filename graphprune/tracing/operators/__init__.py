"""What is known of operators: the table, and the products that their calls compute."""

from .kinds import Kind, Merge, Move, Operator
from .products import Cells, Form, Layer, Matrices, Product, Sliding, argument, given, shape_of
from .table import (
    OPERATORS,
    add_operator,
    declare,
    function_name,
    is_layer,
    kind_of,
    named,
    operator_of,
    operator_of_target,
    products_of,
    remove_operator,
    undeclare,
)

__all__ = [
    "OPERATORS",
    "Cells",
    "Form",
    "Kind",
    "Layer",
    "Matrices",
    "Merge",
    "Move",
    "Operator",
    "Product",
    "Sliding",
    "add_operator",
    "argument",
    "declare",
    "function_name",
    "given",
    "is_layer",
    "kind_of",
    "named",
    "operator_of",
    "operator_of_target",
    "products_of",
    "remove_operator",
    "shape_of",
    "undeclare",
]
