"""An order adapter behind Norce Checkout."""
