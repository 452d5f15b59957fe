"""The sync and the async half of the SDK are one text: taking out `async` and `await` shows it."""

import ast
import inspect
from types import ModuleType

import pytest

from inferpipe import _http as http
from inferpipe import async_resources, client, resources, streams

PAIRS = [
    (client, "InferPipe", client, "AsyncInferPipe"),
    (streams, "ExecutionStream", streams, "AsyncExecutionStream"),
    (http, "Runner", http, "AsyncRunner"),
    (http, "StreamRunner", http, "AsyncStreamRunner"),
    *(
        (resources, name, async_resources, f"Async{name}")
        for name, _ in inspect.getmembers(resources, inspect.isclass)
        if vars(resources)[name].__module__ == resources.__name__
    ),
]
SYNC_NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "anext": "next",
    "aread": "read",
    "async_client": "client",
    "async_resources": "resources",
    "async_sleep": "sleep",
}


class WithoutAsync(ast.NodeTransformer):
    """Turns the async half into what the sync half must be; drops docstrings."""

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.visit_FunctionDef(ast.FunctionDef(**vars(node)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.renamed(node.name)
        node.body = [one for one in node.body if not is_docstring(one)]
        return self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        return self.visit_For(ast.For(**vars(node)))

    def visit_For(self, node: ast.For) -> ast.AST:
        # An async generator has no `yield from`.
        match node:
            case ast.For(ast.Name(target), body=[ast.Expr(ast.Yield(ast.Name(given)))]) if (
                target == given
            ):
                return ast.Expr(ast.YieldFrom(self.visit(node.iter)))
        return self.generic_visit(node)

    def visit_Await(self, node: ast.Await) -> ast.AST:
        return self.visit(node.value)

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.is_async = 0
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        # `Awaitable[object]` is what an async function's `object` becomes.
        node.id = self.renamed(node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self.renamed(node.attr)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            node.value = self.renamed(node.value)
        return node

    @staticmethod
    def renamed(name: str) -> str:
        return SYNC_NAMES.get(name, name.removeprefix("Async"))


def is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def methods_of(module: ModuleType, name: str) -> dict[str, str]:
    (found,) = (
        node
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    body = [WithoutAsync().visit(node) for node in found.body if not is_docstring(node)]
    return {getattr(node, "name", str(at)): ast.unparse(node) for at, node in enumerate(body)}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1])
def test_the_halves_differ_in_async_and_await_alone(
    pair: tuple[ModuleType, str, ModuleType, str],
) -> None:
    sync_module, sync_name, async_module, async_name = pair
    assert methods_of(async_module, async_name) == methods_of(sync_module, sync_name)


def test_every_class_of_the_async_half_has_a_twin() -> None:
    names = {
        name
        for name, one in inspect.getmembers(async_resources, inspect.isclass)
        if one.__module__ == async_resources.__name__
    }
    assert names == {async_name for _, _, module, async_name in PAIRS if module is async_resources}
