"""Which modules are rewritten: those whose code blocks something, where a graph can stand for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from ...dependency import DependencyGraph
from ...dependency.analysis import Analysis, analyse
from ...dependency.configured import tied_by_configuration
from ...dependency.effects import Rewritten
from ...dependency.reparametrised import held_positions
from ...dependency.sizes import Conflict, SizeSolver
from ...dependency.state import Mask
from ...dependency.temperature import rescales
from ...errors import GraphPruneError
from ...support.suggestions import check_choice
from ...tracing.origin import Attribute
from ...tracing.recorder import Guard
from ...tracing.trace import record_run
from .arguments import rewritable
from .fitting import Survivors, Unfit
from .parts import Part
from .recipes import Rewrite, merge, recipe
from .recorder import PartRecorder, is_container

OUTPUTS = ("module", "hybrid", "graph")
_TAKEN = frozenset(n for n in dir(fx.GraphModule) if not n.startswith("__")) - frozenset(dir(nn.Module))


class Rewriter:
    """Chooses, with each round of planning, which modules are rewritten, and writes their recipes.

    `only`: exactly these modules, for the analysis of a plan that is made already.
    """

    def __init__(self, model: nn.Module, example: Any, output: str, only: Iterable[str] | None = None) -> None:
        self.model, self.example = model, example
        self.inline = output == "graph"
        self.modules = dict(model.named_modules())
        self.asked: set[str] = set()
        self.whole: dict[str, str] = {}
        if self.inline:
            self.whole = self._kept_whole()
        recorder = PartRecorder(self.modules, self.inline, whole=self.whole)
        self.trace = record_run(model, example, training_paths=True, observe=recorder.observing)
        self._take(recorder)
        self.refused.update(self.whole)
        self.owners: dict[Guard, set[str]] = recorder.guard_owners
        self.by_node = {n: p for p, parts in self.parts.items() for x in parts for c in x.calls for n in c.nodes}
        self.chosen: set[str] = set(only or ())
        if self.inline:
            self._choose_all()
        self.latest: DependencyGraph | None = None

    def _take(self, recorder: PartRecorder) -> None:
        self.parts = recorder.parts
        self.refused = {p: next((x.refusal for x in parts if x.refusal), "") for p, parts in self.parts.items()}

    def _kept_whole(self) -> dict[str, str]:
        """Modules inside the model whose own code no graph can stand for, with the reason: they stay modules."""
        recorder = PartRecorder(self.modules, inline=False)
        record_run(self.model, self.example, observe=recorder.observing)
        self._take(recorder)
        inner = [path for path in self.parts if path]
        self._ask(inner)
        self.asked.clear()
        return {path: self.refused[path] for path in inner if self.refused[path]}

    def _choose_all(self) -> None:
        self.chosen = {""}
        why = self._cannot("") if "" in self.parts else "is not Python code of its own"
        if why:
            raise GraphPruneError(
                f"output='graph': the model cannot become one graph: its forward {why}. Use output='hybrid', which "
                f"replaces only the modules whose code blocks something, or output='module'"
            )

    # -- the dependency graph

    def graph(self) -> DependencyGraph:
        """The analysis with the sizes of the chosen modules free. Starts with the modules that literals block in."""
        if self.latest is None and not self.chosen:
            first, known = self._analysed(), dict(self.refused)
            if not self._choose(self._blocking(first)) and self.refused == known:
                return first
        return self._analysed()

    def _analysed(self) -> DependencyGraph:
        trace = dataclasses.replace(self.trace, guards=self._guards(self.chosen))
        analysis = analyse(trace, self._rewritten(self.chosen))
        graph = DependencyGraph(tied_by_configuration(self.model, analysis))
        self.latest = graph.freezing(held_positions(graph.analysis, self.model))
        return self.latest

    def _rewritten(self, chosen: set[str]) -> Rewritten:
        """The calls of these modules, whose sizes are free, and why others are not chosen."""
        calls = (c for path in chosen & self.parts.keys() for part in self.parts[path] for c in part.calls)
        return Rewritten(frozenset(n for c in calls if rewritable(c) for n in c.nodes), dict(self.refused))

    def _guards(self, chosen: set[str]) -> tuple[Guard, ...]:
        """What the code outside these modules asks of its sizes."""
        return tuple(g for g in self.trace.guards if not self.owners.get(g, {"<none>"}) <= chosen)

    def _blocking(self, graph: DependencyGraph) -> set[str]:
        """Modules in whose own code a literal size blocks."""
        nodes = [r.node for _, r in graph.analysis.freezes if r.kind == "literal" and r.node is not None]
        return {self.by_node[n] for n in nodes if n in self.by_node}

    # -- choosing

    def _choose(self, paths: Iterable[str]) -> bool:
        wanted = sorted(p for p in paths if p not in self.chosen)
        self._ask(wanted)
        new = {p for p in wanted if not self._cannot(p)}
        self.chosen |= new
        return bool(new)

    def extend(self, conflicts: Iterable[Conflict]) -> bool:
        """Rewrite the modules that these conflicts arise in as well, where possible. True: analyse again."""
        return self._choose(self._origins(conflicts))

    def _origins(self, conflicts: Iterable[Conflict]) -> set[str]:
        """The modules whose own code conflicts arise in."""
        conflicts = list(conflicts)
        nodes: set[fx.Node] = {c.node for c in conflicts if c.node is not None}
        paths = {self.by_node[n] for n in nodes if n in self.by_node}
        sources = {str(c.source) for c in conflicts if c.source}
        for guard, owners in self.owners.items():
            if guard.source and str(guard.source) in sources:
                paths |= owners & self.parts.keys()
        return paths

    def release(self, analysis: Analysis, gone: Mask) -> Analysis:
        """Leave alone the modules whose own code gets every size right when `gone` goes: the analysis without them, or
        the same where all are needed."""
        needed: set[str] = self.chosen if self.inline else set()
        while needed != self.chosen:
            found = analysis.rewriting(self._rewritten(needed), self._guards(needed))
            solver = SizeSolver(found, gone)
            conflicts = solver.resolve().conflicts + rescales(found, solver)[1]
            if not conflicts:
                self.chosen = needed
                return found
            # where a conflict cannot be laid at the door of one module, all stay chosen
            needed = needed | ((self._origins(conflicts) & self.chosen) - needed or self.chosen)
        return analysis

    def _cannot(self, path: str) -> str:
        """Why the module cannot be rewritten, or "". Its behaviour in training mode is recorded when first asked."""
        module = self.modules[path]
        used = {*module._parameters, *module._buffers, *module._modules}
        if not isinstance(module, fx.GraphModule):
            used |= set(vars(module)) | set(dir(type(module)))
        taken = used & _TAKEN
        if taken:
            self.refused[path] = f"uses self.{min(taken)}, a name that torch.fx.GraphModule has for itself"
        self._ask([path])
        return self.refused[path]

    def _ask(self, paths: list[str]) -> None:
        """Record these modules in training mode, all in one run where the model allows; refuse those that no graph can
        follow."""
        open_ = [p for p in paths if not self.refused[p] and p not in self.asked]
        if not open_:
            return
        switched = open_
        if self.inline and open_ == [""]:
            below = tuple(f"{p}." for p in self.whole)
            switched = [p for p, m in self.modules.items() if is_container(m) and not f"{p}.".startswith(below)]
        recorder = PartRecorder(self.modules, self.inline and open_ == [""], switched, self.whole)
        try:
            record_run(self.model, self.example, observe=recorder.observing)
        except GraphPruneError as error:
            if len(open_) > 1:
                for path in open_:
                    self._ask([path])
                return
            why = f"fails in training mode on the example input ({str(error).splitlines()[0]})"
            self.asked.update(open_)
            self.refused[open_[0]] = why
            return
        self.asked.update(open_)
        for path in open_:
            self.refused[path] = _follow(self.parts[path], recorder.parts.get(path, []))

    # -- the result

    def rewrites(
        self, graph: DependencyGraph, gone: Mask, attributes: Mapping[Attribute, int]
    ) -> tuple[Rewrite, ...] | None:
        """The recipes of all chosen modules in which a size has changed; None: one of them cannot be written, it is
        given up, and planning has to start again."""
        survivors = Survivors(graph.analysis, gone, attributes)
        touched = {a.module for a in attributes}
        found = []
        for path in sorted(self.chosen):
            try:
                steps, changed = self._recipe(self.parts[path], survivors)
            except Unfit as error:
                self.refused[path] = str(error)
                if self.inline:
                    self._choose_all()
                self.chosen.discard(path)
                return None
            if changed or self.inline or path in touched:
                found.append(Rewrite(path, self.parts[path][0].home, steps))
        return tuple(found)

    def _recipe(self, parts: list[Part], survivors: Survivors) -> tuple[tuple[Any, ...], bool]:
        written = [recipe(part, survivors) for part in parts]
        if any(steps != written[0][0] for steps, _ in written):
            raise Unfit("does not do the same in each of its calls")
        return written[0][0], any(changed for _, changed in written)


def _follow(evaluation: list[Part], training: list[Part]) -> str:
    """Make the parts follow the training flag; "" or why they cannot."""
    if len(evaluation) != len(training):
        return "is called another number of times in training mode"
    return next((why for a, b in zip(evaluation, training, strict=True) if (why := merge(a, b))), "")


def dependency_graph(model: nn.Module, example: Any, output: str, paths: Iterable[str]) -> DependencyGraph:
    """The analysis behind a plan that rewrites the modules at `paths`."""
    return Rewriter(model, example, output, paths).graph()


def check_output(output: str) -> None:
    """Raise GraphPruneError for an unknown output mode."""
    check_choice("output", output, OUTPUTS)


__all__ = ["OUTPUTS", "Rewriter", "check_output", "dependency_graph"]
