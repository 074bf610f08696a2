"""For the documentation: the help text of each dataclass field is its docstring, and its default is the value shown."""

import ast

from griffe import Attribute, Docstring, Extension, ObjectNode


class FieldHelp(Extension):
    """Reads `name: type = field(default=…, metadata={"help": …})`."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **kwargs) -> None:
        call = node.value if isinstance(node, ast.AnnAssign) else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field"):
            return
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        metadata = given.get("metadata")
        if isinstance(metadata, ast.Dict):
            texts = {key.value: value for key, value in zip(metadata.keys, metadata.values, strict=True)
                     if isinstance(key, ast.Constant)}  # fmt: skip
            text = texts.get("help")
            if isinstance(text, ast.Constant):
                attr.docstring = Docstring(str(text.value), parent=attr)
        attr.value = ast.unparse(given["default"]) if "default" in given else None
