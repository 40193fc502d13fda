"""Two kinds of import contract that import-linter does not ship, for rules that say "everything, except ...".

Both take module expressions (`*` one level, `**` any depth) that may match nothing, so a contract may stand
before the first module that it governs; and a new module is governed from its first line on, since only
exceptions are named.

- `clean`: every module of `modules`, less `except_modules`, reaches no module of `forbidden_modules`,
  directly or through others of this project. A chain through a third-party package is not followed.
- `reserved`: each of `packages` (third-party or ours) is imported directly by `allowed_importers` and by its
  own submodules alone.
"""

from __future__ import annotations

from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class CleanContract(Contract):
    """Breaks with the shortest chain from each offending module to each forbidden one."""

    type_name = "clean"

    modules = fields.ListField(subfield=fields.ModuleExpressionField())
    except_modules = fields.ListField(subfield=fields.ModuleExpressionField(), required=False, default=[])
    forbidden_modules = fields.ListField(subfield=fields.ModuleExpressionField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002, FBT001  # its signature
        """Search every governed module for a chain to every forbidden one."""
        governed = _matches(graph, self.modules) - _matches(graph, self.except_modules)
        forbidden = _matches(graph, self.forbidden_modules)
        chains = [
            chain
            for importer in sorted(governed)
            for imported in sorted(forbidden)
            if (chain := graph.find_shortest_chain(importer=importer, imported=imported))
        ]
        return ContractCheck(kept=not chains, metadata={"chains": chains})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one chain a line."""
        for chain in check.metadata["chains"]:
            output.print_error(" -> ".join(chain), bold=False)
        output.new_line()


class ReservedContract(Contract):
    """Breaks with each direct import by a module that is not allowed it."""

    type_name = "reserved"

    packages = fields.ListField(subfield=fields.ModuleExpressionField())
    allowed_importers = fields.ListField(subfield=fields.ModuleExpressionField(), required=False, default=[])

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002, FBT001  # its signature
        """Look at who imports each reserved package and its submodules."""
        allowed = _matches(graph, self.allowed_importers)
        reserved = _matches(graph, self.packages)
        reserved |= {
            below
            for module in reserved
            if not graph.is_module_squashed(module)
            for below in graph.find_descendants(module)
        }
        breaches = [
            (importer, module)
            for module in sorted(reserved)
            for importer in sorted(graph.find_modules_that_directly_import(module) - allowed - reserved)
        ]
        return ContractCheck(kept=not breaches, metadata={"breaches": breaches})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one import a line."""
        for importer, imported in check.metadata["breaches"]:
            output.print_error(f"{importer} -> {imported}", bold=False)
        output.new_line()


def _matches(graph: ImportGraph, expressions: Any) -> set[str]:
    """All modules that a ListField of module expressions names. Its type is the field, not what it parses."""
    return {module for expression in expressions for module in graph.find_matching_modules(str(expression))}
