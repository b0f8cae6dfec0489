from tests.unit.stack.packages import site  # noqa: F401
