"""For docs/api.md: the functions that `polyseme.options.takes` decorates, as they are called."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from polyseme import options


class CalledWithFields(griffe.Extension):
    """Replaces the parameter of each of these functions, an options object, by its fields."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Change a function that has just been read from the source."""
        decorators = [str(decorator.value) for decorator in func.decorators]
        for name in [text[len("takes(") : -1] for text in decorators if text.startswith("takes(")]:

            def function(_: Any) -> None: ...

            assert func.docstring is not None
            function.__doc__ = func.docstring.value
            called = options.takes(getattr(options, name))(function)
            func.docstring.value = inspect.getdoc(called) or ""
            func.parameters = griffe.Parameters(
                *(
                    griffe.Parameter(
                        parameter.name,
                        annotation=parameter.annotation,
                        kind=griffe.ParameterKind(parameter.kind.description),
                        default=None
                        if parameter.default is parameter.empty
                        else repr(parameter.default),
                    )
                    for parameter in inspect.signature(called).parameters.values()
                )
            )
