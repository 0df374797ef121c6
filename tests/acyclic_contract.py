"""The import contract `acyclic`: no module imports itself through others, imports for type checking included."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


def find_cycle(graph: ImportGraph) -> list[str]:
    """The modules of one circle of imports, each imported by the next one, the first again at the end; or none."""
    internal = {module for module in graph.modules if not graph.is_module_squashed(module)}
    imports = {module: graph.find_modules_directly_imported_by(module) & internal for module in internal}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


class AcyclicContract(Contract):
    """Broken by any circle between modules, also within a package."""

    type_name = "acyclic"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Kept if the graph has no circle."""
        cycle = find_cycle(graph)
        return ContractCheck(kept=not cycle, metadata={"cycle": cycle})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print the circle that was found."""
        output.print_error(" is imported by\n".join(check.metadata["cycle"]))
