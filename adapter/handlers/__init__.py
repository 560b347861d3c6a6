"""The bundled handlers. They enter through the entry points, as everybody's do, and import `adapter.plugin` alone."""
