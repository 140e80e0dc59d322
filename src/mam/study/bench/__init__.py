"""`mam bench`: forward, acting and update times against the number of agents."""
