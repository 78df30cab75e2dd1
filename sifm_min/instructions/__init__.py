"""Instructions of the kinds that people give to editors: banks of them, and the order in which a run draws them."""
