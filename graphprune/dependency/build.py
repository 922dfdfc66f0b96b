"""What each axis of a parameter does: produce channels, read them, or scale them."""

from __future__ import annotations

import math

from torch import fx

from ..tracing.operators import Kind, Product, kind_of, shape_of
from .analysis import Analysis
from .dims import Root
from .groups import Role


def axis_roles(analysis: Analysis) -> dict[Root, Role]:
    """What each parameter axis does: produce channels, consume them, or scale them."""
    roles: dict[Root, Role] = {}
    for parameter, node in analysis.trace.parameters.items():
        shape = node.meta["val"].shape
        role: Role = "vector" if len([n for n in shape if n > 1]) == 1 else "other"
        for axis in range(len(shape)):
            roles[parameter, axis] = role
    computed: list[Product] = []
    for products in analysis.trace.products.values():
        for product in products:
            name = product.weight.meta.get("parameter") if product.weight.op == "get_attr" else None
            if name is not None:
                for axis, role in _sides(product):
                    roles[name, axis] = role
            elif product.fixed:
                computed.append(product)
    for product in computed:
        _roles_behind(roles, analysis, product)
    return roles


def _sides(product: Product) -> list[tuple[int, Role]]:
    return [*((axis, "in") for axis in product.reads), *((axis, "out") for axis in product.produces)]


def _roles_behind(roles: dict[Root, Role], analysis: Analysis, product: Product) -> None:
    """Weights that were sliced, transposed, scaled or standardised before the call that multiplies with them."""
    size = math.prod(shape_of(product.weight))
    for axis, role in _sides(product):
        for root in _axes_behind(analysis, product.weight, axis):
            parameter = analysis.trace.parameters.get(root[0])
            whole = parameter is not None and math.prod(shape_of(parameter)) == size > 1
            if roles.get(root) == "other" or (roles.get(root) == "vector" and whole):
                roles[root] = role


def _axes_behind(analysis: Analysis, weight: fx.Node, axis: int) -> set[Root]:
    """The axes of parameters whose indices lie along an axis of a tensor that is computed from them."""
    dims = set(analysis.state(weight).axis(axis))
    todo, seen = [weight], {weight}
    while todo:
        node = todo.pop()
        state = analysis.state(node)
        if kind_of(node) in _ALIGNED:  # the coordinates of one operand stand for those of all
            for a, axis_map in state.axes.items():
                if not dims.isdisjoint(axis_map):
                    for operand in map(analysis.state, node.all_input_nodes):
                        at = a - len(state.shape) + len(operand.shape)
                        if at >= 0 and operand.shape[at] == state.shape[a]:
                            dims.update(operand.axis(at))
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return {analysis.dims.root_of[dim] for dim in dims}


_ALIGNED = (Kind.POINTWISE, Kind.WEIGHT_NORM)
