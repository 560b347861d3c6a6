"""The bundled handlers, registered as entry points like any plugin.

They import only `adapter.plugin` and their own package.
"""
