"""A notebook's cells as plain Python: what IPython alone understands is taken out of them.

plain_python("%%time\\ndef f(): ...")     # "# %%time\\ndef f(): ...\\n"
definitions("import torch\\nf(3)\\ndef f(n): ...")      # the import and the function, not the call

IPython itself turns its magics into calls of `get_ipython()`. `NoShell` answers those calls
without a shell: it runs Python that a magic was given, and nothing else.
"""

import ast
from collections.abc import Iterator
from typing import Any

RUN_PYTHON = ("time", "capture", "prun")  # magics whose code defines names in the notebook


def plain_python(source: str) -> str:
    """A cell's code, each line in its place; magics are calls of `get_ipython()`.

    A cell magic that runs Python, such as %%time, becomes a comment, and any other takes its whole
    cell along, which is in another language.
    """
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        pass
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ModuleNotFoundError:  # then no notebook runs here either
        return source
    try:
        text = TransformerManager().transform_cell(source)
        call = cell_magic(ast.parse(text))
    except SyntaxError:  # it is wrong in IPython, too; who runs it will say so
        return source
    if call is None:
        return text
    name, line, body = call
    return f"# %%{name} {line}".rstrip() + f"\n{plain_python(body)}" if name in RUN_PYTHON else ""


def cell_magic(tree: ast.Module) -> tuple[str, str, str] | None:
    """The name, the line and the body of a cell magic, if that is all that a cell holds."""
    match tree.body:
        case [ast.Expr(ast.Call(ast.Attribute(_, "run_cell_magic"), arguments))]:
            name, line, body = map(ast.literal_eval, arguments)
            return name, line, body
    return None


def definitions(source: str) -> Iterator[ast.stmt]:
    """The statements of a cell that do nothing but define: imports, functions, classes, constants.

    A cell with an error in its syntax has none, since it defines nothing in its notebook either.
    """
    try:
        body = ast.parse(plain_python(source)).body
    except SyntaxError:
        return
    for statement in body:
        kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(statement, kinds) or is_constant(statement):
            yield statement


def is_constant(statement: ast.stmt) -> bool:
    """Whether a statement gives names a number, a text, or a list, tuple, dict or set of them."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


class NoShell:
    """What `get_ipython()` returns where there is no IPython: see above."""

    def __init__(self, names: dict[str, Any]):
        self.names = names

    def run_line_magic(self, name: str, line: str) -> Any:
        if name not in RUN_PYTHON:
            return None
        try:
            code = compile(line, "<magic>", "eval")
        except SyntaxError:  # a statement
            code = compile(line, "<magic>", "exec")
        return eval(code, self.names)

    def __getattr__(self, name: str) -> Any:
        """Shell commands, `name?` and all else: nothing is done."""
        return lambda *_: None
