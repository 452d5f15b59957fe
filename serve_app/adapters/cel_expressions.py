import functools

from cel_expr_python import cel

from serve_app.core.errors import StepFailedError


class CelExpressions:
    def __init__(self):
        self._env = cel.NewEnv(
            variables=dict.fromkeys(
                ("input", "steps", "event", "execution", "item", "index"), cel.Type.DYN
            )
        )
        self._compile = functools.lru_cache(4096)(self._env.compile)

    def check(self, text):
        try:
            self._compile(text)
        except RuntimeError as e:
            return str(e)
        return None

    def evaluate(self, text, scope):
        v = self._compile(text).eval(data=dict(scope))
        if str(v.type()) == "ERROR":
            raise StepFailedError(f"{text}: {v.value()}", False)
        return _plain(v)


def _plain(v):
    v = v.value() if hasattr(v, "value") else v
    if isinstance(v, dict):
        return {(_plain(k)): _plain(x) for k, x in v.items()}
    if isinstance(v, list):
        return [_plain(x) for x in v]
    return v
