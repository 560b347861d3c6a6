"""Why an order is, or is not, at its destination: `facts` → `cases` → `words`."""
