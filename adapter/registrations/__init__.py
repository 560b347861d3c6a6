"""Registration of our callbacks at Norce."""
