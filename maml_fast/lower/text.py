"""A plan as text: what the model computes, as which kernels see it, and the program over it."""

from __future__ import annotations

from textwrap import indent

from .plan import Plan


def text(plan: Plan) -> str:
    """The graph, the graph that fused kernels take, and the program; without a graph only the program."""
    graph, kernels, names = plan.trace[0], plan.kernel_graph, plan.model.names
    sections = []
    if graph is not None and kernels is not None:
        sections.append("graph, shapes per sample:\n" + indent(graph.text(names), "  "))
        if (lowered := kernels.text(names)) != graph.text(names):
            sections.append("graph for kernels, images channels last:\n" + indent(lowered, "  "))
    return "\n".join([*sections, plan.traced_rule[1] or str(plan.program)])
