"""Studies: every method on every domain, from one command to the report."""

__all__: list[str] = []
