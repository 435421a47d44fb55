"""One module a family of models; each ends with its ``FAMILIES``. Modules put here are found by themselves."""
