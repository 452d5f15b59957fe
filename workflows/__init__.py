"""The workflow definitions that ship with inferpipe: YAML files and no code.

A package, because `importlib.resources` cannot read a namespace package of an editable install
(Python 3.11 with setuptools' import hook: "MultiplexedPath only supports directories").
"""
