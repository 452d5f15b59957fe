import jsonschema_rs

from serve_app.core.errors import Problem


class JsonSchemas:
    def check(self, schema):
        return None

    def problems(self, schema, value):
        v = jsonschema_rs.Draft202012Validator(schema)
        return tuple(Problem(tuple(e.instance_path), e.message) for e in v.iter_errors(value))
