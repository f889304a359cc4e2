"""The tests. A package, so that tests may share modules: ``from tests import ...``."""
