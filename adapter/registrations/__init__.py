"""Our callbacks at Norce: on one order, on every new order, and through the public endpoint."""
