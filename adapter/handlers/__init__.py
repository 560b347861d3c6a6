"""The bundled handlers, registered as entry points like any plugin.

They import only `adapter.plugin` and their own package. `adapter.deliveries.attempt` and `adapter.verdicts.verdicts`
call handlers and set their deadlines.
"""
